"""`make audit-dependencies`, with pip-audit itself, against a server that speaks OSV's protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from tests.environment import free_port
from tests.servers import PROJECT


@contextmanager
def osv(*, vulnerable: str = "") -> Iterator[str]:
    """The address of a server that knows a vulnerability of one package, or of none."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = question["package"]["name"]
            affected = {
                "package": {"name": name, "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
            }
            vulnerability = {"id": "PYSEC-0", "modified": "2026-01-01T00:00:00Z", "details": "", "affected": [affected]}
            body = json.dumps({"vulns": [vulnerability]} if name == vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()


def audit(url: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.audit.dependencies", "--osv-url", url]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=150, check=False)
    return answer.returncode, answer.stdout


def test_nothing_known() -> None:
    with osv() as url:
        code, said = audit(url)
    assert code == 0
    assert "dependencies audited, 0 problems." in said
    assert int(said.split()[0]) > 50


def test_a_vulnerability_fails_it() -> None:
    with osv(vulnerable="django") as url:
        code, said = audit(url)
    assert code == 1
    assert "django 5.2" in said
    assert "PYSEC-0, fixed in 99.1" in said


def test_without_an_answer_it_says_so_and_decides_nothing_in_ci() -> None:
    code, said = audit(f"http://127.0.0.1:{free_port()}/v1/query")
    assert code == 2
    assert said.startswith("NOTHING WAS AUDITED: ")
    assert said.count("\n") == 1
    assert "audit-dependencies" not in (PROJECT / ".ci" / "run").read_text()
