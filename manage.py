#!/usr/bin/env python
"""Django's command line. PostgreSQL and Redis are started out of their wheels when no URL names a server.

In development what has no key is spoken to through the stand-ins of `make run`, never for real.
"""

import os
import sys
from pathlib import Path

import environ

from postmate.local import embedded, run


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "postmate.settings")
    environ.Env.read_env(Path(__file__).parent / ".env")  # before servers are started that it names
    if environ.Env().bool("DEBUG", True):
        run.take_addresses()
    embedded.configure_environment()
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
