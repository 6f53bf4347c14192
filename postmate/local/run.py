"""`make run`: the whole product from one command on a laptop.

Starts the embedded servers where no URL names others, migrates, seeds, and runs web, worker, beat and, for services
without keys, the stand-ins. Ctrl-C stops all of it.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import environ
import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from postmate.local import embedded, running
from postmate.local.embedded import PROJECT

READY_WITHIN_SECONDS = 60
STOP_SECONDS = 6  # open streams have three

# Any text will do: the stand-ins take them, nobody else does.
STANDIN_WEBHOOK_SECRET = "whsec_local_stand_in"  # noqa: S105 – opens nothing but a demonstration


def main() -> None:
    os.chdir(PROJECT)
    environ.Env.read_env(PROJECT / ".env")
    if not environ.Env().bool("DEBUG", True):
        sys.exit("`make run` is for development. docs/TOKEN_BILLING_SETUP.md says how to run in production.")
    os.environ.setdefault("LOG_LEVEL", "WARNING")  # the terminal is for what is wrong; INFO adds every request
    port = chosen_port(default=8000)
    running.hold("make run", address=f"http://localhost:{port}", port=port)
    require_free_ports(port, port + 1, port + 2, command="make run")
    with step("PostgreSQL and Redis"):
        embedded.configure_environment()
        insist_on_servers()
    embedded.guard()
    commands = take_addresses(port)
    stripe_data = ["--stripe-data", str(stripe_data_file())] if "stripe" in commands else []
    for name, *arguments in (
        ("Database tables", "migrate", "--verbosity=0"),
        ("Packages and prices", "seed_billing"),
        ("People and data to look at", "seed_demo", "--past", *stripe_data),
    ):
        with step(name):
            if subprocess.run([sys.executable, "manage.py", *arguments]).returncode:
                sys.exit(
                    f"manage.py {arguments[0]} failed; its words are above. When the data in {embedded.data_dir()}\n"
                    "came from other code, `make clean` removes it, and `make run` begins anew."
                )
    print("Web, worker and beat …", flush=True)
    threading.Thread(target=_announce_when_ready, args=(port,), daemon=True).start()
    sys.exit(run_together(commands | _servers(port)))


def run_together(commands: dict[str, list[str]]) -> int:
    """Until Ctrl-C, `make stop` or a closed terminal, or until one of them ends; then all end. Returns the exit code.

    What they print comes with their names before it.
    """
    asked: list[int] = []
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: asked.append(number))
    children = {
        name: subprocess.Popen(
            command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )
        for name, command in commands.items()
    }  # fmt: skip
    running.tell(processes={name: child.pid for name, child in children.items()})
    for name, child in children.items():
        threading.Thread(target=_pass_on, args=(name, child), daemon=True).start()
    while not asked and all(child.poll() is None for child in children.values()):
        time.sleep(0.1)
    ended = [f"{name} (code {child.returncode})" for name, child in children.items() if child.poll() is not None]
    with suppress(OSError):  # the terminal may be closed
        print("Stopping …" if asked else f"{', '.join(ended)} ended by itself; its words are above.", flush=True)
    for child in children.values():
        child.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while any(child.poll() is None for child in children.values()) and time.monotonic() < deadline and len(asked) < 2:
        time.sleep(0.05)
    for child in children.values():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    running.forget()
    return 0 if asked else 1


def _pass_on(name: str, child: subprocess.Popen[str]) -> None:
    for line in child.stdout or ():
        with suppress(OSError):
            print(f"{name:<6} | {line}", end="", flush=True)


def take_addresses(port: int | None = None) -> dict[str, list[str]]:
    """Give this process the addresses and keys of `make run` for what has none; returns the stand-ins' commands.

    Without `port` those of the one that runs on our data, else of PORT.
    """
    if port is None:
        if not os.environ.get("PORT"):
            os.environ["PORT"] = str(running.read().get("port", 8000))
        port = chosen_port(default=8000)
    webhook_url = f"http://127.0.0.1:{port}/stripe/webhook/"
    return standin_commands(stripe_port=port + 1, ai_port=port + 2, webhook_url=webhook_url)


def standin_commands(*, stripe_port: int, ai_port: int, webhook_url: str) -> dict[str, list[str]]:
    """The stand-ins for the services that have no keys, whose place in the environment they take."""
    commands = {}
    if not is_set("STRIPE_SECRET_KEY"):
        os.environ |= {
            "STRIPE_SECRET_KEY": "sk_test_local_stand_in",
            "STRIPE_PUBLISHABLE_KEY": "pk_test_local_stand_in",
            "STRIPE_WEBHOOK_SECRET": STANDIN_WEBHOOK_SECRET,
            "STRIPE_API_BASE": f"http://localhost:{stripe_port}",
        }
        commands["stripe"] = [
            *(sys.executable, "-m", "standins.stripe", "--port", str(stripe_port)),
            *("--data", str(stripe_data_file())),
            *("--webhook-url", webhook_url),
            *("--webhook-secret", STANDIN_WEBHOOK_SECRET),
        ]
    bases = {"OPENAI": "openai/v1", "ANTHROPIC": "anthropic", "GOOGLE": "google"}
    without_key = [name for name in bases if not is_set(f"{name}_API_KEY")]
    for name in without_key:
        base_name = "GOOGLE_GEMINI_BASE_URL" if name == "GOOGLE" else f"{name}_BASE_URL"
        os.environ[f"{name}_API_KEY"] = "local-stand-in"
        os.environ[base_name] = f"http://127.0.0.1:{ai_port}/{bases[name]}"
    if without_key:
        commands["ai"] = [sys.executable, "-m", "standins.ai", "--port", str(ai_port)]
    return commands


def stripe_data_file() -> Path:
    """Where the Stripe stand-in keeps what it knows."""
    return embedded.data_dir() / "stripe-stand-in.sqlite3"


def is_set(name: str) -> bool:
    """By its value or by a file that holds it."""
    return bool(os.environ.get(name) or os.environ.get(f"{name}_FILE"))


def _servers(port: int) -> dict[str, list[str]]:
    # Root in a container is nothing to warn of where nobody else sends tasks.
    root = ["-W", "ignore:You're running the worker with superuser privileges"]
    celery = [sys.executable, *root, "-m", "celery", "--quiet", "-A", "postmate"]
    return {
        # One process serves pages and streams here; production splits them (docs/ARCHITECTURE.md).
        "web": [
            *(sys.executable, "-m", "uvicorn", "postmate.asgi:application", "--host", "127.0.0.1"),
            *("--port", str(port), "--lifespan", "off", "--log-level", "warning"),
            # Open streams must not keep a stopped server alive.
            *("--timeout-graceful-shutdown", "3"),
        ],
        "worker": [*celery, "worker", "--pool", "threads", "--concurrency", "4", "--loglevel", "WARNING"],
        "beat": [
            *(*celery, "beat", "--loglevel", "WARNING"),
            *("--schedule", str(embedded.data_dir() / "beat-schedule"), "--pidfile", ""),
        ],
    }


@contextmanager
def step(name: str) -> Iterator[None]:
    """Says what is being done and how long it took."""
    print(f"{name} …", flush=True)
    began = time.monotonic()
    yield
    print(f"  {time.monotonic() - began:.1f} s", flush=True)


def chosen_port(*, default: int) -> int:
    """PORT, or the default, which then stands in the environment; the ports after it are used as well."""
    text = os.environ.setdefault("PORT", str(default))
    if not (text.isascii() and text.isdigit() and 1024 <= int(text) <= 65_000):
        sys.exit(f"PORT is {text!r}. Choose a number from 1024 to 65000.")
    return int(text)


def insist_on_servers() -> None:
    """Leave with advice when a server that a URL names does not answer."""
    if (database := os.environ.get("DATABASE_URL", "")).startswith(("postgres://", "postgresql://")):
        try:
            psycopg.connect(database, connect_timeout=5).close()
        except psycopg.OperationalError as error:
            sys.exit(f"The PostgreSQL server that DATABASE_URL names does not let us in:\n  {error}")
    if url := os.environ.get("REDIS_URL"):
        try:
            redis.Redis.from_url(url, socket_connect_timeout=5, retry=Retry(NoBackoff(), 0)).ping()
        except redis.RedisError as error:
            sys.exit(f"The Redis server that REDIS_URL names does not answer:\n  {error}")


def require_free_ports(*ports: int, command: str) -> None:
    """Leave with advice when something listens on one of them."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                sys.exit(f"Port {port} is in use. Stop what uses it, or choose others: PORT={port + 100} {command}")


def _announce_when_ready(port: int) -> None:
    from billing.demo import DEMO_PASSWORD, DEMO_PEOPLE

    deadline = time.monotonic() + READY_WITHIN_SECONDS
    while not _is_ready(port):
        if time.monotonic() > deadline:
            print("The web server is not ready yet; its messages above may say why.", flush=True)
            return
        time.sleep(0.2)
    people = "\n".join(f"    {email:<28} {role}" for email, role in DEMO_PEOPLE.items())
    mails = "" if os.environ.get("EMAIL_URL") else f"  Emails it sends: http://localhost:{port}/dev/mails/\n"
    print(
        f"\n  Postmate runs at  http://localhost:{port}\n\n"
        f"  Sign up there, or sign in with the password {DEMO_PASSWORD!r} as\n{people}\n\n"
        f"  Pay with the card 4242 4242 4242 4242. Refunds, disputes, faults: http://localhost:{port + 1}/control\n"
        f"{mails}  Commands beside it: {running.with_place('make manage')} ARGS=createsuperuser\n"
        "\n  Ctrl-C stops everything.\n",
        flush=True,
    )


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped before it ran.")
