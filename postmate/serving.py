"""The two server processes of production: `python -m postmate.serving web` and `python -m postmate.serving live`.

SIGTERM stops one without losing a request. For DRAIN_SECONDS it works on while /healthz and /readyz say 503, so that
the proxy, which asks twice a second, sends new requests elsewhere and lets idle connections be. Then it closes its
port and ends what is under way: requests; texts that stream, for up to STREAM_SECONDS; balance streams at once, since
a browser simply opens another.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STREAM_SECONDS = 60
DRAIN_SECONDS = float(os.environ.get("DRAIN_SECONDS") or 3)
# What a process leaves here for /healthz and /readyz to see. granian answers requests in children of its own.
MARKER_VARIABLE = "POSTMATE_DRAINING_MARKER"


def is_draining() -> bool:
    """This process will stop within seconds and should get no more requests."""
    marker = os.environ.get(MARKER_VARIABLE)
    return bool(marker) and Path(str(marker)).exists()


class _Drain:
    """On the first signal the marker is made, and `stop` called DRAIN_SECONDS later; a second signal stops at once."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="postmate-")
        self._marker = Path(self._directory.name) / "draining"
        os.environ[MARKER_VARIABLE] = str(self._marker)

    def begin(self, stop: Callable[[], Any]) -> None:
        if self._marker.exists():
            stop()
            return
        self._marker.touch()
        timer = threading.Timer(DRAIN_SECONDS, stop)
        timer.daemon = True
        timer.start()


def serve_web(host: str, port: int, *, workers: int, threads: int) -> None:
    """Pages, API and webhooks (WSGI), until SIGTERM."""
    from granian.constants import Interfaces
    from granian.log import LogLevels
    from granian.server import Server

    drain = _Drain()

    class WebServer(Server):  # type: ignore[misc, valid-type]
        def signal_handler_interrupt(self, *args: Any, **kwargs: Any) -> None:
            drain.begin(super().signal_handler_interrupt)

    WebServer(
        "postmate.wsgi:application",
        address=host,
        port=port,
        interface=Interfaces.WSGI,
        workers=workers,
        blocking_threads=threads,
        respawn_failed_workers=True,
        websockets=False,
        log_level=LogLevels.error,
    ).serve()


def serve_live(host: str, port: int) -> None:
    """Everything under /live/ (ASGI), until SIGTERM."""
    import uvicorn

    from ai_ops import counting, providers
    from billing.announcements import listener

    providers.load_configured()  # before the port is open
    counting.load()
    drain = _Drain()

    class LiveServer(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            drain.begin(lambda: super(LiveServer, self).handle_exit(sig, frame))

        async def shutdown(self, sockets: Any = None) -> None:
            listener.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        "postmate.asgi:application",
        host=host,
        port=port,
        lifespan="off",
        log_level="warning",
        access_log=False,
        # The proxy closes idle connections first, or a request could meet the end of one.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STREAM_SECONDS,
    )
    # uvicorn raises the signal again when it has shut down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    LiveServer(config).run()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m postmate.serving", description=str(__doc__).partition("\n")[0])
    parser.add_argument("process", choices=["web", "live"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes that answer (web)")
    parser.add_argument("--threads", type=int, default=8, help="requests each of them answers at once (web)")
    return parser


def main() -> None:
    options = parser().parse_args()
    insist_on_settings()
    if options.process == "web":
        serve_web(options.host, options.port, workers=options.workers, threads=options.threads)
    else:
        serve_live(options.host, options.port)


def insist_on_settings() -> None:
    """Leave with what is missing, before processes are started that would say it again and again."""
    from django.conf import settings
    from django.core.exceptions import ImproperlyConfigured

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "postmate.settings")
    try:
        settings.DEBUG  # noqa: B018  (reads them all)
    except ImproperlyConfigured as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
