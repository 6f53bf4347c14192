"""When the first page paints, with the rules of Tabler that our pages use and with all of them:

    python -m tests.benchmarks.first_paint

The page to sign in on, in Chromium on a slow line (1.6 Mbit/s, 150 ms) and a processor four times slower, as
Lighthouse measures phones; files are sent compressed, as by the proxy.
Prints the median of seven.
"""

import gzip
import os
import statistics
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import django
from django.test import Client, override_settings
from playwright.sync_api import Browser, sync_playwright

from postmate.local import stylesheet

RUNS = 7
LINE = {"offline": False, "latency": 150, "downloadThroughput": 1_600_000 / 8, "uploadThroughput": 750_000 / 8}


def served(page: str, tabler: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            if path.endswith("css/tabler.css"):
                body, media = tabler.encode(), "text/css"
            elif path.startswith("static/"):
                body = (stylesheet.PROJECT / path).read_bytes()
                media = "text/css" if path.endswith("css") else "text/javascript"
            else:
                body, media = page.encode(), "text/html"
            body = gzip.compress(body)
            self.send_response(200)
            for name, value in {
                "Type": f"{media}; charset=utf-8",
                "Encoding": "gzip",
                "Length": str(len(body)),
            }.items():
                self.send_header(f"Content-{name}", value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def painted_after_ms(browser: Browser, address: str) -> float:
    page = browser.new_page()
    tools = page.context.new_cdp_session(page)
    tools.send("Network.enable")
    tools.send("Network.emulateNetworkConditions", LINE)
    tools.send("Emulation.setCPUThrottlingRate", {"rate": 4})
    page.goto(address, wait_until="load")
    paint = page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]?.startTime").json_value()
    page.close()
    return float(paint)


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "postmate.settings")
    django.setup()
    with override_settings(ALLOWED_HOSTS=["*"]):
        page = Client().get("/accounts/login/").content.decode()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--headless", "--no-sandbox"])
        for name, css in (("used", stylesheet.USED.read_text()), ("whole", stylesheet.WHOLE.read_text())):
            server = served(page, css)
            times = [painted_after_ms(browser, f"http://127.0.0.1:{server.server_port}/") for _ in range(RUNS)]
            sizes = f"{len(css):>8,} bytes, {len(gzip.compress(css.encode())):>7,} compressed"
            sys.stdout.write(f"{name:>6}: {sizes}; first paint {statistics.median(times):.0f} ms\n")
            server.shutdown()
        browser.close()


if __name__ == "__main__":
    main()
