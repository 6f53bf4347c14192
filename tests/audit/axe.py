"""axe-core in a page: at each width, with everything unfolded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, ViewportSize

SCRIPT = Path(__file__).parent / "vendor" / "axe-core-4.14.1" / "axe.min.js"
WIDTHS = (390, 768, 1440)

# All rules that are on by themselves, best practices included, and the size of targets (WCAG 2.2), which is off.
RUN = """
async (within) => {
  const found = await axe.run(within, {resultTypes: ["violations"], rules: {"target-size": {enabled: true}}});
  return found.violations.map((rule) => ({
    rule: rule.id,
    help: rule.help,
    places: rule.nodes.map((node) => `${node.target.join(" ")}: ${node.failureSummary}`),
  }));
}
"""
# A menu lies over the page and is looked at by itself.
UNFOLD = "document.querySelectorAll('details:not(.menu)').forEach((each) => (each.open = true))"


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    help: str
    places: tuple[str, ...]
    width: int


def find_violations(page: Page, *, widths: tuple[int, ...] = WIDTHS, within: str = "html") -> list[Violation]:
    """What axe finds on the page as it is now. The context must have been opened with `bypass_csp=True`."""
    page.evaluate(UNFOLD)
    if not page.evaluate("() => 'axe' in window"):
        page.add_script_tag(path=SCRIPT)
    found = []
    for width in widths:
        page.set_viewport_size(ViewportSize(width=width, height=900))
        found += [_violation(each, width) for each in page.evaluate(RUN, within)]
    return found


def _violation(found: dict[str, Any], width: int) -> Violation:
    return Violation(found["rule"], found["help"], tuple(found["places"]), width)
