"""Makes .venv and installs a set of locked packages into it: `postmate/local/install.py local`. `make` calls it.

uv installs them, itself fetched by its hash; where it has no build or does not get through, pip does. Both use the
index, the proxy and the certificates that pip is set to here. What is in place already is left alone.

It runs on whatever Python there is, to say what is wrong with it: the standard library alone, and no syntax that
Python 3.6 would not read.
"""

import ast
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ENVIRONMENT = PROJECT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
UV = ENVIRONMENT / "bin" / "uv"
LOCKS = PROJECT / "requirements"
OLDEST, NEWEST = (3, 11), (3, 14)
SERVED = ("Linux x86_64", "Linux aarch64", "Darwin arm64")
OLDEST_GLIBC = (2, 28)
NEEDED_MB = {"production": 400, "local": 600, "dev": 1100}
KEPT_LINES = 15  # of an installer's words, shown when it fails
# What each setting of pip is called by uv.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "keyring-provider": "UV_KEYRING_PROVIDER",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}
SEPARATORS = {"extra-index-url": " ", "trusted-host": " ", "find-links": ","}  # of those that may be several, for uv
FINAL = ("DO NOT MATCH THE HASHES", "Hash mismatch", "No space left", "Disk quota")  # pip would not do better
NO_NETWORK = (
    "NewConnectionError",
    "Connection refused",
    "ConnectTimeout",
    "Read timed out",
    "timed out",
    "Temporary failure",
    "Name or service not known",
    "nodename nor servname",
    "ProxyError",
    "SSLError",
    "CERTIFICATE_VERIFY_FAILED",
)
FAULT_OF_THE_LOCK = (
    "all requirements must have their versions pinned",
    "Hashes are required",
    "ResolutionImpossible",
    "conflicting dependencies",
)
NO_COMPILER = ("Failed building wheel", "Failed to build", "subprocess-exited-with-error")


def main() -> None:
    if sys.argv[1:] == ["--is-fit"]:
        sys.exit(what_is_unfit() or 0)
    if len(sys.argv) != 2 or sys.argv[1] not in NEEDED_MB:
        sys.exit("python3 postmate/local/install.py " + "|".join(NEEDED_MB))
    name, began = sys.argv[1], time.time()
    insist_on_a_fit_python()
    lock, stamp = LOCKS / (name + ".txt"), ENVIRONMENT / ("installed-" + name + ".txt")
    is_whole = environment_is_whole()
    if is_whole and stamp.exists() and stamp.read_bytes() == lock.read_bytes():
        return
    insist_on_a_served_machine(name)
    insist_on_a_good_place(name)
    if not is_whole:
        make_environment()
    install(lock)
    stamp.write_bytes(lock.read_bytes())
    say(f"Installed in {time.time() - began:.0f} s.")


def say(text: str) -> None:
    print(text, flush=True)


# --- The machine: whoever cannot be served shall know before anything is installed ------------------------------------


def this_python() -> str:
    return f"Python {platform.python_version()}"


def what_is_unfit() -> str:
    """What keeps this Python from running Postmate; nothing when it can."""
    versions = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return f"Python {versions} is needed; {sys.executable} is {platform.python_version()}."
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED") or sys.maxsize < 2**32:
        return f"The usual 64-bit CPython is needed, {versions}; {sys.executable} is another build."
    return ""


def insist_on_a_fit_python() -> None:
    """Go on with another Python of this machine when this one cannot be used, or leave with advice."""
    reason = what_is_unfit()
    if not reason:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.call([found, __file__, "--is-fit"], stderr=subprocess.DEVNULL) == 0:
            say(f"{reason} {found} is used instead.")
            os.execv(found, [found, *sys.argv])  # noqa: S606  (found on the PATH, with our own arguments)
    sys.exit(
        f"{reason}\nInstall one (Debian 12, Ubuntu 24.04, Fedora and Homebrew have it) and name it:\n"
        "  make run PYTHON=python3.13"
    )


def insist_on_a_served_machine(name: str) -> None:
    """Leave with what to do where a package of the set has no build for this machine."""
    if sys.platform not in ("linux", "darwin"):
        sys.exit("Postmate runs on Linux and macOS. On Windows, use it inside WSL 2 (wsl --install).")
    machine = platform.system() + " " + platform.machine()
    if machine == "Darwin x86_64":
        if not (shutil.which("cargo") and shutil.which("cc")):
            sys.exit(
                "Two packages (cryptography, argon2-cffi-bindings) have no build for Intel Macs and their Pythons.\n"
                "On a Mac with Apple silicon use a Python of its own: brew install python@3.13\n"
                "On an Intel Mac install what builds them, then try again (this is not tested there):\n"
                "  xcode-select --install; brew install rust openssl@3"
            )
    elif machine not in SERVED:
        sys.exit(
            f"The packages have no builds for {machine}. There are some for Linux on x86-64 and 64-bit ARM\n"
            "and for macOS on Apple silicon."
        )
    if name == "production":
        return
    if sys.platform == "linux" and glibc_version() < OLDEST_GLIBC:
        sys.exit(
            "The PostgreSQL that comes along needs glibc {}.{} or newer".format(*OLDEST_GLIBC)
            + ": Debian 10, Ubuntu 20.04, Fedora 29 or later; not Alpine.\n"
            "Run it on one of these, or in containers: docker compose up -d (docs/OPERATIONS.md)."
        )


def glibc_version() -> tuple:
    """(0,) where there is another C library, as on Alpine."""
    try:
        _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError):
        return (0,)
    return tuple(int(part) for part in version.split(".")[:2])


def insist_on_a_good_place(name: str) -> None:
    """Leave with advice where the installation could not end well."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = "{}.{}".format(*sys.version_info[:2])
        sys.exit(
            f"This Python comes without its venv module. On Debian and Ubuntu:\n  sudo apt install python{version}-venv"
        )
    if os.pathsep in str(PROJECT):
        sys.exit(f"Python makes no environment in a directory with a {os.pathsep} in its name: move {PROJECT}.")
    if not os.access(str(PROJECT), os.W_OK):
        sys.exit(f"Nothing can be written into {PROJECT}. Clone the project into a directory of your own.")
    if ENVIRONMENT.exists() and not os.access(str(ENVIRONMENT), os.W_OK):
        sys.exit(f"{ENVIRONMENT} belongs to another user. Remove it, then try again:\n  sudo rm -rf '{ENVIRONMENT}'")
    free_mb = shutil.disk_usage(str(PROJECT)).free // 2**20
    if free_mb < NEEDED_MB[name]:
        sys.exit(
            f"The packages need about {NEEDED_MB[name]} MB, and {free_mb} MB are free where {PROJECT} lies.\n"
            "Make room, then try again."
        )


# --- The environment --------------------------------------------------------------------------------------------------


def environment_is_whole() -> bool:
    """Of this Python's version and with pip: making it may have been interrupted, its Python may be gone. Its programs
    name its place, which may have moved."""
    try:
        with (ENVIRONMENT / "bin" / "pip").open("rb") as program:
            if os.fsencode(str(ENVIRONMENT) + "/") not in program.read(4096):
                return False
        answer = subprocess.check_output(
            [str(PYTHON), "-I", "-c", "import pip, sys; print(*sys.version_info[:2])"], stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return False
    return answer.decode().split() == [str(part) for part in sys.version_info[:2]]


def make_environment() -> None:
    say(f"Making .venv {'anew ' if ENVIRONMENT.exists() else ''}with {this_python()} …")
    # The Python beneath: this one may be that of the .venv which goes now.
    python = getattr(sys, "_base_executable", None) or sys.executable
    shutil.rmtree(str(ENVIRONMENT), ignore_errors=True)
    made = subprocess.run([python, "-m", "venv", str(ENVIRONMENT)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        words = made.stdout.decode(errors="replace").strip()
        sys.exit(f"{words}\n\n{this_python()} could not make .venv. {advice(words)}")


# --- The packages -----------------------------------------------------------------------------------------------------


def install(lock: Path) -> None:
    """Run uv, or pip where uv cannot be had or fails. Leaves with the last words and advice when both fail."""
    settings = pip_settings()
    count = len(
        {line.partition("==")[0].partition("[")[0] for line in lock.read_text("utf-8").splitlines() if "==" in line}
    )
    say(f"Installing up to {count} locked packages …")
    words = run_pip(LOCKS / "uv.txt", settings, "--only-binary", ":all:")
    if any(sign in words for sign in (*FINAL, *NO_NETWORK)):
        leave(words)
    if not words:
        words = run_uv(lock, settings)
        if "Failed to initialize cache" in words:  # no home directory, or one that may not be written
            words = run_uv(lock, settings, "--no-cache")
        if not words:
            return
        if any(sign in words for sign in FINAL):
            leave(words)
        say(f"uv did not get through ({words.splitlines()[-1]}); pip tries …")
    words = run_pip(lock, settings)
    if words:
        leave(words)


def pip_settings() -> dict:
    """What pip is set to by its files and by the environment, `install`'s before the general: {"index-url": "…"}."""
    listed = subprocess.run(
        [str(PYTHON), "-I", "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    found = {}  # type: dict
    for line in listed.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        section, _, setting = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            try:
                found[section, setting] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                continue
    settings = {}
    for section in ("global", "install", ":env:"):
        settings.update({setting: value for (of, setting), value in found.items() if of == section})
    return settings


def run_pip(requirements: Path, settings: dict, *options: str) -> str:
    """Its last words when it fails, else nothing."""
    command = [str(PYTHON), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--require-hashes", "-r", str(requirements), *options]
    # Few tries unless somebody wants more of them: without a network that is known within a minute.
    if "retries" not in settings:
        command += ["--retries", "2"]
    if "timeout" not in settings and "default-timeout" not in settings:
        command += ["--timeout", "15"]
    return run(command, dict(os.environ, PIP_USER="0"))


def run_uv(requirements: Path, settings: dict, *options: str) -> str:
    """Its last words when it fails, else nothing."""
    command = [
        str(UV),
        "pip",
        "install",
        "--python",
        str(PYTHON),
        "--require-hashes",
        "-r",
        str(requirements),
        *options,
    ]
    # As pip does it: the best release of all indexes, where uv would stop at the first that knows the name.
    command += ["--index-strategy", "unsafe-best-match"]
    environment = {"UV_HTTP_RETRIES": "2"}
    for setting, value in settings.items():
        if setting in UV_NAMES:
            separator = SEPARATORS.get(setting)
            environment[UV_NAMES[setting]] = separator.join(value.split()) if separator else value
    return run(command, dict(environment, **os.environ))


def run(command: list, environment: dict) -> str:
    """Run an installer and say how far it is. Its last words when it fails, else nothing."""
    try:
        installer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return str(error)
    last_words, found = [""], 0
    for raw in installer.stdout or ():
        line = raw.decode(errors="replace").strip()
        last_words = [*last_words[1 - KEPT_LINES :], line]
        if line.startswith(("Collecting ", "Requirement already satisfied: ")):
            found += 1
            package = line.replace("Requirement already satisfied: ", "Collecting ").split()[1].partition("==")[0]
            show_progress(f"  {found:>3} {package}", is_mark=found % 20 == 0)
        elif line.startswith("Installing collected packages"):
            show_progress(f"  {found} are here; unpacking them …", is_mark=found > 1)
        elif line.startswith(("Downloading ", "Building ", "Prepared ")):
            show_progress(f"  {line}", is_mark=line.startswith("Prepared "))
    show_progress("")
    return "\n".join(last_words).strip() or "No word." if installer.wait() else ""


def show_progress(text: str, is_mark: bool = False) -> None:
    """On a terminal a line that changes; elsewhere the marks alone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    elif is_mark:
        say(text)


def leave(words: str) -> None:
    sys.exit(f"{words}\n\n{advice(words)}\nThen try again; what is here, stays.")


def advice(words: str) -> str:
    """What to do about an installer's last words."""
    if "No space left" in words or "Disk quota" in words:
        return "The disk is full. Make room, also where temporary files and the home directory lie."
    if "DO NOT MATCH THE HASHES" in words or "Hash mismatch" in words:
        return (
            "A package is not the one that was locked: do not use it. The index or mirror that pip is set to gives out "
            f"another one:\n  {PYTHON} -m pip config list"
        )
    if any(sign in words for sign in NO_NETWORK):
        return (
            "The package index cannot be reached. Check the network, and what pip is set to (a proxy, a mirror, a "
            f"certificate):\n  {PYTHON} -m pip config list"
        )
    if any(sign in words for sign in FAULT_OF_THE_LOCK):
        return (
            "This is a fault of this release of Postmate, not of this machine: its list of packages does not hold "
            "together.\nReport it with the lines above. Until it is mended, the release before installs."
        )
    if any(sign in words for sign in NO_COMPILER):
        return (
            f"A package has no build for {this_python()} on {platform.system()} {platform.machine()}, and could not be "
            "built here.\nInstall a compiler (sudo apt install build-essential; xcode-select --install), or use "
            "another Python:\n  make run PYTHON=python3.12"
        )
    if "No matching distribution" in words:
        return (
            f"The index that pip is set to has no build of this package for {this_python()} on {platform.system()} "
            f"{platform.machine()}.\nA mirror may lag behind: {PYTHON} -m pip config list"
        )
    if "Permission denied" in words:
        return f"Something may not be written. Make this directory yours:\n  sudo chown -R $(id -u) '{PROJECT}'"
    return "This is no failure that is known here. Report it with the lines above, and with what `uname -a` says."


if __name__ == "__main__":
    main()
