"""Row 78: the locks hold together on every machine that is served, whatever is released later; install.py uses them.

The index of `tomorrow` has each locked package with the real package's requirements and nothing else in it, and a newer
release of every one.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import product
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from postmate.local import install
from tests.production.conftest import SHELL
from tests.servers import PROJECT

UV = Path(sys.executable).with_name("uv")
BASE_PYTHON: str = sys._base_executable  # type: ignore[attr-defined]  # not the .venv's
BESIDE = ("pip", "setuptools")  # Python may bring them along
GROUPS = {"uv": [], "production": [], "local": ["local"], "dev": ["local", "dev"]}
PYTHONS = ["3.11.0", "3.11.14", "3.12.0", "3.13.0", "3.14.0"]
HERE = {name: str(value) for name, value in default_environment().items()}
MACHINES = {
    "x86_64-manylinux_2_28": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "aarch64-manylinux_2_28": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "aarch64-apple-darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def lock(name: str) -> Path:
    return PROJECT / "requirements" / f"{name}.txt"


def pinned(name: str) -> list[Requirement]:
    """The lines of a lock: a package with extras has two, one without them."""
    lines = lock(name).read_text().splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if not line.startswith((" ", "#"))]


def pins(name: str) -> dict[str, Requirement]:
    """Each package's line, of two the one with the extras."""
    return {pin.name: pin for pin in sorted(pinned(name), key=lambda pin: len(pin.extras))}


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def applies(requirement: Requirement, environment: dict[str, str], extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment | {"extra": extra})


def installed(pin: Requirement) -> Distribution | None:
    """What is installed of it, which is all that is pinned for this machine."""
    try:
        found = distribution(pin.name)
    except PackageNotFoundError:
        assert not applies(pin, HERE), f"{pin} is not installed: `make test` installs it"
        return None
    assert found.version == version(pin) or not applies(pin, HERE), f"{pin} is not what is installed"
    return found if found.version == version(pin) else None


def asked_for(name: str) -> list[Requirement]:
    """What pyproject.toml asks of the set."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    lines = [] if name == "uv" else project["project"]["dependencies"]
    for group in GROUPS[name] or ["uv"] * (name == "uv"):
        lines = lines + [line for line in project["dependency-groups"][group] if isinstance(line, str)]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", GROUPS)
def test_every_requirement_is_met_by_a_pin(name: str) -> None:
    """Extras and markers included, on every Python and machine that is served."""
    locked = pins(name)
    asked = {
        pin.name: [Requirement(line) for line in getattr(installed(pin), "requires", None) or ()]
        for pin in locked.values()
    }
    unmet = set()
    for python, machine in product(PYTHONS, MACHINES.values()):
        environment = HERE | machine
        environment |= {"python_version": python.rpartition(".")[0], "python_full_version": python}
        here = {pin.name: pin for pin in locked.values() if applies(pin, environment)}
        wanted = [("pyproject.toml", each) for each in asked_for(name) if applies(each, environment)]
        for pin in here.values():
            for each in asked[pin.name]:
                if any(applies(each, environment, extra) for extra in ("", *pin.extras)):
                    wanted.append((pin.name, each))
        for who, each in wanted:
            met = here.get(canonicalize_name(each.name))
            if met is None or not each.specifier.contains(version(met), True) or not each.extras <= met.extras:
                unmet.add(f"{who} asks for {each}; pinned is {met} (Python {python}, {machine['platform_machine']})")
    assert unmet == set()


def test_the_sets_agree() -> None:
    """The larger contains the smaller. What has extras is pinned without them as well: old pips tell the two apart."""
    dev = pins("dev")
    for name in ("uv", "production", "local"):
        for pin in pins(name).values():
            assert (version(pin), pin.extras <= dev[pin.name].extras) == (version(dev[pin.name]), True)
    for name in GROUPS:
        lines = [str(pin) for pin in pinned(name)]
        assert [each for each in lines if re.sub(r"\[.*?\]", "", each, count=1) not in lines] == []


# --- Installing -------------------------------------------------------------------------------------------------------


class Index:
    """Packages in a directory that pip and uv read as an index, and locks that name their hashes. pip, being locked for
    development, is left out: an empty one would take the place of the one that runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hashes: dict[str, str] = {}
        for pin in pins("dev").values():
            known = installed(pin)
            lines = [f"Requires-Dist: {line}" for line in (known and known.requires) or () if line[:3] != "pip"]
            lines += [
                f"Provides-Extra: {extra}" for extra in (known and known.metadata.get_all("Provides-Extra")) or ()
            ]
            files = {}
            if pin.name == "uv":
                files[f"uv-{version(pin)}.data/scripts/uv"] = UV.read_bytes()
            self.hashes[pin.name] = self.add(pin.name, version(pin), lines, files)
            self.add(pin.name, "9999", lines, {})

    def add(self, name: str, version: str, lines: list[str], files: dict[str, bytes]) -> str:
        """Returns the hash of the wheel."""
        stem = f"{name.replace('-', '_')}-{version}"
        path = self.directory / name / f"{stem}-py3-none-any.whl"
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])
        with zipfile.ZipFile(path, "w") as wheel:
            for file, content in files.items():
                entry = zipfile.ZipInfo(file)
                entry.external_attr = 0o100755 << 16
                wheel.writestr(entry, content)
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "".join(f"{file},,\n" for file in wheel.namelist()))
        with (path.parent / "index.html").open("a") as page:
            page.write(f'<a href="{path.name}">{path.name}</a>\n')
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def write_locks(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        for name in GROUPS:
            lines = (f"{pin} --hash=sha256:{self.hashes[pin.name]}\n" for pin in pinned(name) if pin.name != "pip")
            (directory / f"{name}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def tomorrow(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("machine", MACHINES)
def test_uv_resolves_tomorrow(tomorrow: Index, tmp_path: Path, machine: str) -> None:
    tomorrow.write_locks(tmp_path / "requirements")
    command = [str(UV), "pip", "install", "--dry-run", "--reinstall", "--no-config", "--no-cache", "--require-hashes"]
    command += [
        "--python",
        sys.executable,
        "--python-platform",
        machine,
        "--default-index",
        tomorrow.directory.as_uri(),
    ]
    for name, python in product(("production", "local", "dev"), ("3.11", "3.14")):
        which = ["--python-version", python, "-r", str(tmp_path / "requirements" / f"{name}.txt")]
        done = subprocess.run([*command, *which], env=SHELL, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


class Clone:
    """The project's installation, in a directory as people have them, set to an index as people set pip to a mirror."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory, self.index = directory / "my projects" / ("clone " * 20).strip(), index
        index.write_locks(self.directory / "requirements")
        (self.directory / "postmate" / "local").mkdir(parents=True)
        shutil.copy(install.__file__, self.directory / "postmate" / "local")
        shutil.copy(PROJECT / "Makefile", self.directory)
        self.set_pip_to(index.directory.as_uri())

    def set_pip_to(self, url: str) -> None:
        (self.directory / "pip.conf").write_text(f"[global]\nindex-url = {url}\n")

    def install(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """`python3 postmate/local/install.py NAME`, or another command, as a person's shell starts it."""
        own = {
            "PIP_CONFIG_FILE": str(self.directory / "pip.conf"),
            "UV_CACHE_DIR": "/dev/null/cache",
            "PIP_NO_CACHE_DIR": "1",
        }
        return subprocess.run(
            command or [BASE_PYTHON, "postmate/local/install.py", name],
            cwd=self.directory,
            env=SHELL | own,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def installed_by(self, installer: str) -> dict[str, str]:
        """The version of each package that the installer brought."""
        found = {}
        for path in self.directory.glob(".venv/lib/python*/site-packages/*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            by = (path / "INSTALLER").read_text().strip()
            if by == installer and name not in BESIDE:
                found[str(canonicalize_name(name))] = version
        return found


def locked_here(name: str, *, without: str = "") -> dict[str, str]:
    """What a set has for this machine: the version of each package."""
    return {
        pin.name: version(pin)
        for pin in pins(name).values()
        if applies(pin, HERE) and pin.name not in (without, *BESIDE)
    }


def test_installing_tomorrow(tomorrow: Index, tmp_path: Path) -> None:
    """What fails says what to do and blames nobody who reads it. All is installed by uv, or, where it does not run, by
    the pip that came with Python, as old as that is."""
    clone = Clone(tmp_path, tomorrow)
    programs = clone.directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to("/nowhere/python")  # its Python has gone, as after an upgrade of the system
    clone.set_pip_to("http://127.0.0.1:1/simple/")
    done = clone.install("production")
    assert "Making .venv anew" in done.stdout
    assert "The package index cannot be reached" in done.stderr

    clone.set_pip_to(tomorrow.directory.as_uri())
    production = clone.directory / "requirements" / "production.txt"
    whole = production.read_text()
    for part, instead, advice in (
        (r"^amqp==[^ ]+", "amqp==1", "has no build of this package"),
        (tomorrow.hashes["amqp"], "0" * 64, "do not use it"),
        (r"^amqp==.*\n", "", "a fault of this release"),
    ):
        production.write_text(re.sub(part, instead, whole, flags=re.MULTILINE))
        assert advice in clone.install("production").stderr
    production.write_text(whole)

    (programs / "uv").rename(programs / "aside")
    done = clone.install("production")
    assert done.returncode == 0, done.stdout + done.stderr
    by_pip = locked_here("production")
    assert clone.installed_by("pip") == by_pip | locked_here("uv")

    (programs / "aside").rename(programs / "uv")
    for _ in range(2):
        done = clone.install("dev", "make", "installed-dev", f"PYTHON={BASE_PYTHON}")
        assert done.returncode == 0, done.stdout + done.stderr
    by_uv = {name: version for name, version in locked_here("dev", without="uv").items() if name not in by_pip}
    assert clone.installed_by("uv") == by_uv
    assert done.stdout == ""  # the second time nothing was left to do
