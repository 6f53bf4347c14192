"""`make run-production`: what docker-compose.yml runs, on this machine, without containers.

Two web processes, two live ones, a worker and beat stand behind Caddy with its own docker/Caddyfile, over HTTPS. The
embedded servers and the stand-ins take the place of what has no URL and no key; that makes it a rehearsal, and every
page says so. A process that ends is started again. SIGUSR1 (`make restart-production`) puts new ones in the place of
all, one at a time, each ready before the next goes, so that nobody notices.

Supervised by ourselves: general supervisors know nothing of "ready". Long, since the processes and their supervisor are
read together.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import environ

from postmate.local import embedded, running
from postmate.local.embedded import PROJECT
from postmate.local.run import chosen_port, insist_on_servers, is_set, require_free_ports, standin_commands, step
from postmate.serving import insist_on_settings

STARTED_WITH = dict(os.environ)
READY_SECONDS = 60
STOP_SECONDS = 75  # above what a text may take to its end (serving.STREAM_SECONDS), and the drain before it
CRASH_PAUSE_SECONDS = 2.0  # and twice as long after each further crash in a row
STEADY_SECONDS = 30  # what runs for so long has not crashed in a row
TICK_SECONDS = 0.1
PREPARE = [sys.executable, "-m", "postmate.local.run_production", "prepare"]


def main() -> None:
    os.chdir(PROJECT)
    match sys.argv[1:]:
        case []:
            serve()
        case ["restart"]:
            restart()
        case ["prepare"]:
            prepare()
        case ["manage", *arguments]:
            take_remembered_port()
            configure()
            sys.exit(subprocess.run([sys.executable, "manage.py", *arguments]).returncode)
        case _:
            sys.exit("python -m postmate.local.run_production [restart | manage ARGUMENTS]")


# --- The environment ------------------------------------------------------------------------------------------------


class Ports(NamedTuple):
    """All of them, in a row that begins with the one that people see."""

    https: int
    http: int
    stripe: int
    ai: int
    web: tuple[int, int]
    live: tuple[int, int]

    @classmethod
    def beginning_at(cls, port: int) -> "Ports":
        return cls(port, port + 1, port + 2, port + 3, (port + 4, port + 5), (port + 6, port + 7))

    def row(self) -> range:
        return range(self.https, self.https + 8)


def configure() -> None:
    """As `take_environment`, and start the embedded servers where no URL names others."""
    take_environment()
    embedded.configure_environment()


def take_environment() -> tuple[Ports, dict[str, list[str]]]:
    """Give this process and its children production's environment; the stand-ins that it takes are returned.

    What is set, in the shell or in .env, stays.
    """
    os.environ.clear()
    os.environ.update(STARTED_WITH)
    environ.Env.read_env(PROJECT / ".env")
    os.environ["DEBUG"] = "false"
    port = chosen_port(default=8443)
    _name_data_directory()
    ports, directory = Ports.beginning_at(port), embedded.data_dir()
    os.environ.setdefault("SITE_URL", f"https://localhost:{ports.https}")
    for name in ("SECRET_KEY", "BILLING_SECRET"):
        if not is_set(name):
            os.environ[name] = _kept_secret(directory / "secrets" / name)
    commands = standin_commands(
        stripe_port=ports.stripe, ai_port=ports.ai, webhook_url=f"{os.environ['SITE_URL']}/stripe/webhook/"
    )
    has_mail_server = is_set("EMAIL_URL")
    if not has_mail_server:
        os.environ["EMAIL_URL"] = f"filemail:///{quote(str(mail_directory()))}"
    if commands or not has_mail_server:
        os.environ["REHEARSAL"] = "true"
    return ports, commands


def _name_data_directory() -> None:
    """Not that of `make run`, where everybody knows the passwords."""
    os.environ.setdefault("POSTMATE_DATA_DIR", str(running.PRODUCTION))


def take_remembered_port() -> None:
    """That of the one which runs on this data, unless PORT is set."""
    environ.Env.read_env(PROJECT / ".env")
    _name_data_directory()
    if "PORT" not in os.environ and (port := running.read().get("port")):
        STARTED_WITH["PORT"] = str(port)


def _kept_secret(file: Path) -> str:
    """Made once, for this data directory, readable by its owner alone."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with suppress(FileExistsError), os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
        new.write(secrets.token_urlsafe(48))
    return file.read_text()


def mail_directory() -> Path:
    return embedded.data_dir() / "mails"


def root_certificate() -> Path:
    """That of Caddy's own authority, which signs for localhost."""
    return embedded.data_dir() / "caddy" / "pki" / "authorities" / "local" / "root.crt"


# --- The processes --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Process:
    """One of them, while it runs and after it has crashed."""

    name: str
    command: list[str]
    is_ready: Callable[["Process"], bool]
    environment: dict[str, str] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: int = 0  # in a row
    start_again_at: float = 0.0

    @property
    def log(self) -> Path:
        return _log_directory() / f"{self.name}.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.started_at = time.time()
            self.child = subprocess.Popen(
                self.command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which stops them in order
            )

    def has_ended(self) -> bool:
        return self.child is None or self.child.poll() is not None

    def stop(self) -> None:
        if not self.has_ended() and self.child is not None:
            self.child.terminate()

    def kill(self) -> None:
        """End what is left of it, its own children, too, which would keep its port."""
        if self.child is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


def _log_directory() -> Path:
    directory = embedded.data_dir() / "logs"
    directory.mkdir(exist_ok=True)
    return directory


def _standins(ports: Ports, commands: dict[str, list[str]]) -> Iterator[Process]:
    for name, command in commands.items():
        port = getattr(ports, name)
        # Stripe's stand-in brings its events to our address, whose certificate is signed by ourselves.
        trust = {"SSL_CERT_FILE": str(root_certificate())} if name == "stripe" else {}
        yield Process(name, command, lambda _, port=port: _accepts(port), trust)  # type: ignore[misc]


def _servers(ports: Ports) -> Iterator[Process]:
    for kind, numbers in (("web", ports.web), ("live", ports.live)):
        for index, port in enumerate(numbers, 1):
            command = [sys.executable, "-m", "postmate.serving", kind, "--port", str(port)]
            yield Process(f"{kind}{index}", command, lambda _, port=port: _is_ready(port))  # type: ignore[misc]
    celery = [sys.executable, "-m", "celery", "--quiet", "-A", "postmate"]
    alive = embedded.data_dir() / "worker-alive"
    yield Process(
        "worker",
        [*celery, "worker", "--pool", "threads", "--concurrency", "4", "--loglevel", "INFO"],
        lambda worker: alive.exists() and alive.stat().st_mtime > worker.started_at,
        {"WORKER_SIGN_OF_LIFE": str(alive)},
    )
    schedule = str(embedded.data_dir() / "beat-schedule")
    beat = [*celery, "beat", "--schedule", schedule, "--pidfile", "", "--loglevel", "INFO"]
    yield Process("beat", beat, lambda _: True)


def _proxy(ports: Ports) -> Process:
    def to(numbers: tuple[int, ...]) -> str:
        return " ".join(["to", *(f"127.0.0.1:{number}" for number in numbers)])

    beside_us = Path(sys.executable).with_name("caddy")
    program = str(beside_us) if beside_us.exists() else which("caddy")
    if program is None:
        sys.exit("The packages bring no Caddy for this machine. Install it (caddyserver.com), then try again.")
    return Process(
        "proxy",
        [program, "run", "--config", "docker/Caddyfile", "--adapter", "caddyfile"],
        lambda _: _accepts(ports.https),
        {
            "SITE_ADDRESS": os.environ["SITE_URL"],
            "HTTPS_PORT": str(ports.https),
            "HTTP_PORT": str(ports.http),
            **({"PROXY_BIND": "127.0.0.1"} if urlsplit(os.environ["SITE_URL"]).hostname == "localhost" else {}),
            "WEB_UPSTREAMS": to(ports.web),
            "LIVE_UPSTREAMS": to(ports.live),
            "MEDIA_ROOT": os.environ.get("MEDIA_ROOT") or str(embedded.data_dir() / "media"),
            "XDG_DATA_HOME": str(embedded.data_dir()),
            "XDG_CONFIG_HOME": str(embedded.data_dir()),
        },
    )


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_ready(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/readyz", headers={"Host": "localhost"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310  (its scheme is ours)
            return bool(response.status == 200)
    except OSError:  # an HTTPError is one, too
        return False


# --- The supervisor -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Somebody asked for the end."""


class _RestartFailed(Exception):
    """With the reason, for people."""


class Supervisor:
    """Keeps the processes running, and puts new ones in their place when it is asked to."""

    def __init__(self, *, standins: Iterable[Process], servers: Iterable[Process], proxy: Process) -> None:
        self.proxy, self.standins, self.servers = proxy, list(standins), list(servers)
        self._in_hand: Process | None = None
        self._stops = 0
        self._restart_is_wanted = False
        self._state: dict[str, Any] = {"doing": "starting", "restarts": 0, "error": ""}

    def run(self, announce: Callable[[], None]) -> None:
        """Until SIGTERM or Ctrl-C. Another Ctrl-C does not wait for what is under way."""
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the last comes when a terminal is closed
            signal.signal(sign, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_restart)
        try:
            for process in self._all():
                process.log.unlink(missing_ok=True)
                process.start()
                self._write_state()
            for process in self._all():
                if not self._becomes_ready(process):
                    self._say(f"{process.name} is not ready yet; {process.log} may say why.")
            announce()
            self._tell("")
            while True:
                self._tend()
                if self._restart_is_wanted:
                    self._restart_is_wanted = False
                    self._restart()
                time.sleep(TICK_SECONDS)
        except _Stop:
            self._say("Stopping …")
        finally:
            self._stop_all()

    def _all(self) -> list[Process]:
        return [*self.standins, *self.servers, self.proxy]

    def _on_stop(self, *_: Any) -> None:
        self._stops += 1

    def _on_restart(self, *_: Any) -> None:
        self._restart_is_wanted = True

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in time. The other processes are tended meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._tend()
            time.sleep(TICK_SECONDS)
        return True

    def _tend(self) -> None:
        """Start again what has ended by itself, later each time when that does not help."""
        if self._stops:
            raise _Stop
        for process in self._all():
            if process is self._in_hand or not process.has_ended():
                continue
            if process.child is not None:
                self._note_crash(process, process.child)
            elif time.time() > process.start_again_at:
                process.start()
                self._write_state()

    def _note_crash(self, process: Process, child: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.child = None
        process.crashes = 1 if time.time() - process.started_at > STEADY_SECONDS else process.crashes + 1
        pause_seconds = CRASH_PAUSE_SECONDS * 2 ** min(process.crashes - 1, 5)
        process.start_again_at = time.time() + pause_seconds
        self._say(
            f"{process.name} ended by itself (code {child.returncode}) and is started again in {pause_seconds:.0f} s. "
            f"Its log: {process.log}"
        )

    def _becomes_ready(self, process: Process) -> bool:
        return self._wait(lambda: not process.has_ended() and process.is_ready(process), READY_SECONDS)

    def _restart(self) -> None:
        error, environment = "", dict(os.environ)
        try:
            try:
                configure()
                self._prepare()
            except (SystemExit, _RestartFailed):
                # What crashes meanwhile is started again with what it had.
                os.environ.clear()
                os.environ.update(environment)
                raise
            for process in self.servers:
                self._replace(process)
        except (SystemExit, _RestartFailed) as failure:
            error = str(failure)
        self._say(error or "Everything has been restarted.")
        self._state["restarts"] += 1
        self._tell("", error=error)

    def _prepare(self) -> None:
        self._tell("Static files, settings, database")
        with (_log_directory() / "restart.log").open("wb") as log:
            child = subprocess.Popen(PREPARE, stdout=log, stderr=log)
            try:
                self._wait(lambda: child.poll() is not None, float("inf"))
            finally:
                child.wait()
        if child.returncode:
            raise _RestartFailed(f"Nothing was restarted; {log.name} says why.")

    def _replace(self, process: Process) -> None:
        """A new process in the place of the old one. Raises _RestartFailed when it does not get ready."""
        self._tell(process.name)
        self._in_hand = process
        try:
            process.stop()
            if not self._wait(process.has_ended, STOP_SECONDS):
                self._say(f"{process.name} did not stop within {STOP_SECONDS} s and was killed.")
            process.kill()
            process.crashes = 0
            process.start()
            self._write_state()
            self._wait(lambda: process.has_ended() or process.is_ready(process), READY_SECONDS)
            if process.has_ended() or not process.is_ready(process):
                raise _RestartFailed(
                    f"{process.name} does not get ready, and the others go on as before: {process.log}"
                )
        finally:
            self._in_hand = None

    def _stop_all(self) -> None:
        # The proxy and the stand-ins last: what is under way ends through them.
        for group, seconds in ((self.servers, STOP_SECONDS), ([*self.standins, self.proxy], 15)):
            for process in group:
                process.stop()
            time.sleep(TICK_SECONDS)
            for process in group:
                process.stop()  # once more: without waiting for a proxy to look elsewhere
            deadline = time.monotonic() + seconds
            while not all(process.has_ended() for process in group) and time.monotonic() < deadline and self._stops < 2:
                time.sleep(TICK_SECONDS)
            for process in group:
                process.kill()
        running.forget()

    def _say(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be closed
            print(text, flush=True)

    def _tell(self, doing: str, *, error: str = "") -> None:
        """Here and to those who asked for a restart."""
        if doing:
            self._say(f"  {doing} …")
        self._state |= {"doing": doing, "error": error}
        self._write_state()

    def _write_state(self) -> None:
        groups = {process.name: process.child and process.child.pid for process in self._all()}
        running.tell(processes=groups, **self._state)


# --- The commands ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Prepare everything, then run it until Ctrl-C."""
    began = time.monotonic()
    ports, commands = take_environment()
    running.hold("make run-production", address=os.environ["SITE_URL"], port=ports.https)
    require_free_ports(*ports.row(), command="make run-production")
    with step("PostgreSQL and Redis"):
        embedded.configure_environment()
        insist_on_servers()
    embedded.guard()
    insist_on_settings()
    if subprocess.run(PREPARE).returncode:
        sys.exit("What is said above has to be put right first.")
    print("Web, live, worker, beat and the proxy …", flush=True)
    supervisor = Supervisor(standins=_standins(ports, commands), servers=_servers(ports), proxy=_proxy(ports))
    supervisor.run(lambda: _announce(time.monotonic() - began))


def prepare() -> None:
    """Static files, checks, migrations and the seed, each before any process meets what it brings."""
    import django
    from django.core.management import CommandError, call_command

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "postmate.settings")
    django.setup()
    for name, command, options in (
        ("Static files, hashed and compressed", "collectstatic", {"interactive": False, "verbosity": 0}),
        ("Settings, looked over", "check", {"deploy": True}),
        ("Database tables", "migrate", {"interactive": False, "verbosity": 0}),
        ("Packages and prices", "seed_billing", {}),
    ):
        with step(name):
            try:
                call_command(command, **options)
            except CommandError as error:
                sys.exit(str(error))


def _announce(seconds: float) -> None:
    lines = [f"Postmate runs in production at  {os.environ['SITE_URL']}  (ready after {seconds:.0f} s)"]
    if root_certificate().exists():
        lines += [
            "Your browser does not know who signed its certificate, and asks. To be asked no more, let it trust",
            f"  {root_certificate()}",
        ]
    if os.environ.get("REHEARSAL"):
        lines.append("This is a rehearsal: without keys and a mail server, stand-ins and files take their place.")
    if os.environ["EMAIL_URL"].startswith("filemail:"):
        lines.append(f"E-mails it sends: {mail_directory()}")
    lines += [
        f'A superadmin:  {running.with_place("make manage-production")} ARGS="createsuperuser"',
        f"New code or settings, unnoticed by anybody:  {running.with_place('make restart-production')}",
        f"Logs: {_log_directory()}",
    ]
    print("\n  " + "\n  ".join(lines) + "\n\n  Ctrl-C stops everything.\n", flush=True)


def restart() -> None:
    """Ask the running one to restart everything, say what it does, and fail when it fails."""
    _name_data_directory()
    before = running.read()
    if "restarts" not in before:
        sys.exit(f"Nothing runs on the data in {embedded.data_dir()}. `make run-production` starts it.")
    os.kill(before["pid"], signal.SIGUSR1)
    doing = ""
    while state := running.read():
        if state["doing"] not in ("", doing):
            doing = state["doing"]
            print(f"  {doing} …", flush=True)
        if state["restarts"] > before["restarts"]:
            sys.exit(state["error"] or None)
        time.sleep(TICK_SECONDS)
    sys.exit("It has stopped meanwhile.")


if __name__ == "__main__":
    main()
