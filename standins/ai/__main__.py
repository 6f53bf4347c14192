"""`python -m standins.ai`: see the package."""

import argparse
import socket

import uvicorn

from standins import ai
from standins.ai.server import Server

DEFAULT_TOKENS_PER_SECOND = 160.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m standins.ai", description=(ai.__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8011, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--tokens-per-second", type=float, default=DEFAULT_TOKENS_PER_SECOND)
    arguments = parser.parse_args()

    listener = socket.create_server(("127.0.0.1", arguments.port))
    # Printed once connections are queued, so a caller that has read the line can connect.
    print(f"AI stand-in on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        Server(arguments.tokens_per_second).app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,  # open streams would hold the process for minutes
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
