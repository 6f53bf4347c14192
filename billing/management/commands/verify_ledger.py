from typing import Any

from django.core.management.base import BaseCommand, CommandError

from billing.upkeep.verification import note_outcome, verify


class Command(BaseCommand):
    help = (
        "Checks every law of the books over the whole database, in one read-only snapshot. "
        "Prints each check and the first rows that break it, and tells /metrics; exits with 1 when any does."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        checks = violations = 0
        for finding in verify():
            checks += 1
            violations += finding.violations
            outcome = f"{finding.violations:,} VIOLATIONS" if finding.violations else "ok"
            self.stdout.write(f"{finding.check.name} (law {finding.check.law}): {finding.rows:,} rows, {outcome}")
            for example in finding.examples:
                self.stdout.write("    " + ", ".join(f"{name} {value}" for name, value in example.items()))
            if finding.violations > len(finding.examples):
                self.stdout.write(f"    … and {finding.violations - len(finding.examples):,} more")
        note_outcome(violations)
        if violations:
            raise CommandError(f"The books are broken: {violations:,} violations in {checks} checks.")
        self.stdout.write(f"The books are in order: {checks} checks, no violation.")
