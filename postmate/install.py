"""Makes .venv and installs a set of locked packages into it: `python3 postmate/install.py local`. `make` calls it.

It runs on whatever Python there is, to say what is wrong with it: the standard library alone, and no syntax that
Python 3.6 would not read.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PYTHON = PROJECT / ".venv" / "bin" / "python"
OLDEST = (3, 11)
NEEDED_MB = {"production": 600, "local": 900, "dev": 1600}
KEPT_LINES = 15  # of pip, shown when it fails
# No questions, and few tries: who has no network shall know within a minute.
PIP_OPTIONS = "--disable-pip-version-check --no-input --progress-bar off --retries 2 --timeout 15 --require-hashes"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in NEEDED_MB:
        sys.exit("python3 postmate/install.py " + "|".join(NEEDED_MB))
    name, began = sys.argv[1], time.time()
    insist_on_a_good_place(name)
    if not has_environment():
        say(f"Making .venv with Python {platform.python_version()} …")
        make_environment()
    install(PROJECT / "requirements" / f"{name}.txt")
    say(f"Installed in {time.time() - began:.0f} s.")


def say(text: str) -> None:
    print(text, flush=True)


def insist_on_a_good_place(name: str) -> None:
    """Leave with advice where the installation could not end well."""
    if sys.platform not in ("linux", "darwin"):
        sys.exit("Postmate runs on Linux and macOS. On Windows, use it inside WSL 2 (wsl --install).")
    if sys.version_info < OLDEST:
        sys.exit(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is {platform.python_version()}.\n"
            "Install one (Debian 12, Ubuntu 24.04, Fedora and Homebrew have it) and name it:\n"
            "  make run PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = "{}.{}".format(*sys.version_info[:2])
        sys.exit(
            f"This Python comes without its venv module. On Debian and Ubuntu:\n  sudo apt install python{version}-venv"
        )
    if not os.access(PROJECT, os.W_OK):
        sys.exit(f"Nothing can be written into {PROJECT}. Clone the project into a directory of your own.")
    free_mb = shutil.disk_usage(PROJECT).free // 2**20
    if free_mb < NEEDED_MB[name]:
        sys.exit(
            f"The packages need about {NEEDED_MB[name]} MB, and {free_mb} MB are free where {PROJECT} lies.\n"
            "Make room, then try again."
        )


def has_environment() -> bool:
    """A whole one: making it may have been interrupted."""
    if not PYTHON.exists():
        return False
    asked = subprocess.run([str(PYTHON), "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    return asked.returncode == 0


def make_environment() -> None:
    shutil.rmtree(str(PROJECT / ".venv"), ignore_errors=True)
    command = [sys.executable, "-m", "venv", str(PROJECT / ".venv")]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        sys.exit("Python could not make .venv:\n" + made.stdout.decode(errors="replace"))


def install(requirements: Path) -> None:
    """Run pip, and say how far it is. Leaves with its last words and advice when it fails."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    count = sum("==" in line and not line.startswith((" ", "#")) for line in lines)
    say(f"Installing up to {count} locked packages …")
    command = [str(PYTHON), "-m", "pip", "install", *PIP_OPTIONS.split(), "-r", str(requirements)]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last_words, found = [""], 0
    for raw in pip.stdout or ():
        line = raw.decode(errors="replace").strip()
        last_words = [*last_words[1 - KEPT_LINES :], line]
        if line.startswith(("Collecting ", "Requirement already satisfied: ")):
            found += 1
            package = line.replace("Requirement already satisfied: ", "Collecting ").split()[1].partition("==")[0]
            show_progress(f"  {found:>3} {package}", is_mark=found % 20 == 0)
        elif line.startswith("Installing collected packages"):
            show_progress(f"  {found} are here; unpacking them …", is_mark=True)
    show_progress("")
    if pip.wait():
        sys.exit("\n".join([*last_words, "", advice("\n".join(last_words)), "Then try again; what is here, stays."]))


def show_progress(text: str, is_mark: bool = False) -> None:
    """On a terminal a line that changes; elsewhere the marks alone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif is_mark:
        say(text)


def advice(words: str) -> str:
    """What to do about pip's last words."""
    if "No space left" in words:
        return "The disk is full. Make room, also where temporary files go."
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in words:
        return "A package is not the one that was locked: do not use it. Look at the mirror that pip is set to."
    if any(
        sign in words for sign in ("NewConnectionError", "timed out", "Temporary failure", "ProxyError", "SSLError")
    ):
        return "pip cannot reach its package index. Check the network, and `pip config list` for a proxy or a mirror."
    if "No matching distribution" in words:
        return (
            f"A package has no build for this machine ({platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}).\n"
            "There are builds for Linux on x86-64 and ARM and for macOS, with glibc and Python 3.11 to 3.13."
        )
    return "What pip says above has to be put right."


if __name__ == "__main__":
    main()
