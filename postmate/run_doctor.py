"""`make doctor`: `manage.py doctor` with the addresses and keys that `make run` gives its processes, running or not."""

import os
import subprocess
import sys

import environ

from postmate import embedded
from postmate.run import PROJECT, standin_commands


def main() -> None:
    os.chdir(PROJECT)
    environ.Env.read_env(PROJECT / ".env")
    if environ.Env().bool("DEBUG", True):
        port = int(os.environ.setdefault("PORT", "8000"))
        embedded.configure_environment()
        standin_commands(stripe_port=port + 1, ai_port=port + 2, webhook_url=f"http://127.0.0.1:{port}/stripe/webhook/")
    sys.exit(subprocess.run([sys.executable, "manage.py", "doctor", *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
