"""`make audit-dependencies`: looks for known vulnerabilities in what production installs.

Exit code 0 when all packages were looked up and none has any, 1 when one has, 2 when some or all could not be looked
up: it says which. Continuous integration leaves it out, since it asks a database (OSV) that may be
away, or know more today.
"""

# ruff: noqa: T201  (its output is what it is for)

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Accepted:
    """A vulnerability that does not concern us, why, and until when that is believed."""

    reason: str
    until: date


# By the id that the audit prints.
ACCEPTED: dict[str, Accepted] = {}


def main(arguments: list[str]) -> int:
    """`arguments` go to pip-audit."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", "requirements/production.txt"]
        command += ["--require-hashes", "--disable-pip", "--vulnerability-service", "osv", "--timeout", "10"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(report), *arguments]
        try:
            answer = subprocess.run(
                command, cwd=PROJECT, timeout=TIMEOUT_SECONDS, capture_output=True, text=True, check=False
            )
            why = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        except subprocess.TimeoutExpired:
            why = f"no answer within {TIMEOUT_SECONDS} seconds"
        dependencies = json.loads(report.read_text())["dependencies"] if report.exists() else []
    audited = [each for each in dependencies if "vulns" in each]
    if not audited:
        print(f"NOTHING WAS AUDITED: the database of vulnerabilities could not be asked about any package. {why[:200]}")
        return 2
    found = [line for each in audited for line in _describe(each)]
    unasked = [f"{each['name']} was not audited: {each['skip_reason']}" for each in dependencies if "vulns" not in each]
    print("\n".join([*found, *unasked, f"{len(audited)} dependencies audited, {len(found)} problems."]))
    return 1 if found else 2 if unasked else 0


def _describe(dependency: dict[str, Any]) -> list[str]:
    lines = []
    for vulnerability in dependency["vulns"]:
        accepted = ACCEPTED.get(vulnerability["id"])
        if accepted and accepted.until >= datetime.now(UTC).date():
            print(f"{vulnerability['id']} is accepted until {accepted.until}: {accepted.reason}")
            continue
        fixed_in = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        lines.append(f"{dependency['name']} {dependency['version']}: {vulnerability['id']}, fixed in {fixed_in}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
