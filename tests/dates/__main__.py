"""`make test-dates`: the tests that know dates, on days that are unlike today.

Every process of a run, PostgreSQL and Redis included, is started with a library that moves the clock of the day
(clock.c). A test knows dates when its file speaks of them; `make test-dates DATES=2030-01-01 TESTS=tests` runs all of
them on another day. The browser keeps today's date, so its journeys stay out.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

# A model retires, a month of 28 days ends, the clocks of Europe go forward and back, a year ends, a leap day.
DATES = ["2026-12-02", "2027-02-28", "2027-03-28", "2027-10-31", "2027-12-31", "2028-02-29"]
# Half an hour before the clocks change: yesterday in New York, and in Berlin a day that is not 24 hours long.
TIME = "00:30"
SPEAKS_OF_DATES = re.compile(r"datetime|timedelta|time_machine|timezone\.now|\bdate\(|20\d\d-\d\d|retired")
WITHOUT = ("journeys", "production")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def tests_of_dates() -> list[str]:
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if path.parts[1] not in WITHOUT]
    return [str(path) for path in files if SPEAKS_OF_DATES.search(path.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dates", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dates", nargs="*", default=DATES, help="YYYY-MM-DD, as many as wanted")
    parser.add_argument("tests", nargs="*", default=tests_of_dates(), help="what pytest runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="postmate-dates-") as directory:
        library = Path(directory) / "clock.so"
        compiler = shutil.which("cc") or sys.exit("A C compiler is needed: apt install gcc")
        source = Path(__file__).with_name("clock.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
        failed = [day for day in options.dates if not passes_on(day, options.tests, library, Path(directory) / day)]
    if failed:
        sys.exit(f"Failed on {', '.join(failed)}.")


def passes_on(day: str, tests: list[str], library: Path, data: Path) -> bool:
    began = time.monotonic()
    then = datetime.fromisoformat(f"{day}T{TIME}").replace(tzinfo=UTC)
    say(f"{then:%A, %-d %B %Y, %H:%M} UTC")
    shift_seconds = int((then - datetime.now(UTC)).total_seconds())
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "CLOCK_SHIFT_SECONDS": str(shift_seconds),
        "POSTMATE_DATA_DIR": str(data),  # a database whose clock never ran backwards
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *tests]
    passed = subprocess.run(command, env=environment).returncode == 0
    say(f"  {time.monotonic() - began:.0f} s")
    return passed


if __name__ == "__main__":
    main()
