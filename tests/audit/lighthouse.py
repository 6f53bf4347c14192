"""Lighthouse, with its mobile preset (a slow phone on a slow network), over one page at a time."""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext

from tests.journeys.conftest import ARGUMENTS

HERE = Path(__file__).parent
PROGRAM = HERE / "node_modules" / ".bin" / "lighthouse"
REPORTS = HERE.parents[1] / "artifacts" / "audit"
CATEGORIES = ("performance", "accessibility", "best-practices", "seo")
BAR = 95
RUNS = 3
ATTEMPTS = 3
TIMEOUT_SECONDS = 120
CHROMIUM = "/usr/bin/chromium"


@dataclass(frozen=True, slots=True)
class Scores:
    """Of several runs over one page: from 0 to 100."""

    name: str
    runs: Mapping[str, list[int]]

    def median(self, category: str) -> int:
        return int(statistics.median(self.runs[category]))

    @property
    def passes(self) -> bool:
        return all(self.median(category) >= BAR for category in CATEGORIES)


def measure(name: str, url: str, visitor: BrowserContext, *, runs: int = RUNS) -> tuple[Scores, list[str]]:
    """Its scores as the visitor sees it, and what of the last run's audits cost points."""
    with tempfile.TemporaryDirectory(prefix="postmate-audit-") as profile:
        _sign_in(visitor, profile)
        reports = [_run(f"{name}-{number}", url, profile) for number in range(1, runs + 1)]
    scores = {name: [_score(report, name) for report in reports] for name in CATEGORIES}
    return Scores(name, scores), _lost_points(reports[-1])


def _sign_in(visitor: BrowserContext, profile: str) -> None:
    """Put the visitor's cookies into a profile. (Sent as a header they are lost as soon as the page sets one.)"""
    browser = visitor.browser
    assert browser is not None
    window = browser.browser_type.launch_persistent_context(profile, executable_path=CHROMIUM, args=ARGUMENTS)
    window.add_cookies(visitor.cookies())  # type: ignore[arg-type] # what is read is more than what is set
    window.close()


def _run(name: str, url: str, profile: str) -> dict[str, Any]:
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"lighthouse-{name}.json"
    command = [str(PROGRAM), url, "--quiet", "--output=json", f"--output-path={path}", "--form-factor=mobile"]
    command += [f"--only-categories={','.join(CATEGORIES)}", "--locale=en-US", "--no-enable-error-reporting"]
    command += [f"--chrome-flags={' '.join(ARGUMENTS)} --user-data-dir={profile}"]
    for attempt in range(ATTEMPTS):
        # Now and then Chromium loses the trace of a page load; Lighthouse then asks to be run again.
        is_last = attempt == ATTEMPTS - 1
        environment = {**os.environ, "CHROME_PATH": CHROMIUM}
        if subprocess.run(command, check=is_last, timeout=TIMEOUT_SECONDS, env=environment).returncode == 0:
            break
    report: dict[str, Any] = json.loads(path.read_text())
    if "runtimeError" in report or report["finalDisplayedUrl"].split("#")[0] != url:
        raise RuntimeError(f"Lighthouse saw {report['finalDisplayedUrl']}: {report.get('runtimeError')}")
    return report


def _score(report: dict[str, Any], category: str) -> int:
    score = report["categories"][category]["score"]
    if score is None:
        raise RuntimeError(f"Lighthouse could not measure {category}.")
    return round(score * 100)


def _lost_points(report: dict[str, Any]) -> list[str]:
    lines = []
    for category in CATEGORIES:
        for reference in report["categories"][category]["auditRefs"]:
            audit = report["audits"][reference["id"]]
            if reference["weight"] and audit["score"] is not None and audit["score"] < 0.9:
                lines.append(f"{category}: {audit['title']} ({audit.get('displayValue') or audit['score']})")
    return lines
