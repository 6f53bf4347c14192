import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from postmate.ops import doctor
from postmate.ops.doctor.findings import Level, Line


class Command(BaseCommand):
    help = (
        "Looks at everything that an installation needs: packages, settings, database, books, Redis, workers, Stripe, "
        "AI providers, e-mail. Says what is wrong and what to do; exits with 1 on a problem. Changes nothing."
    )
    requires_system_checks = []  # their findings are lines of the report

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--quick", action="store_true", help="leave out the books, which take long when they are big"
        )
        parser.add_argument("--json", action="store_true", dest="as_json", help="the report as JSON")
        parser.add_argument("--send-test-mail", metavar="ADDRESS", default="", help="send an e-mail there, too")

    def handle(self, *args: Any, quick: bool, as_json: bool, send_test_mail: str, **options: Any) -> None:
        lines = []
        for line in doctor.examine(is_quick=quick, test_address=send_test_mail):
            lines.append(line)
            if not as_json:
                self._print(line)
        levels = Counter(line.level for line in lines)
        if as_json:
            report = {"ok": not levels[Level.PROBLEM], "lines": [asdict(line) for line in lines]}
            self.stdout.write(json.dumps(report, indent=2))
        summary = f"Problems: {levels[Level.PROBLEM]}, warnings: {levels[Level.WARNING]}."
        if levels[Level.PROBLEM]:
            raise CommandError(summary)
        if not as_json:
            self.stdout.write(f"\n{summary}")

    def _print(self, line: Line) -> None:
        style = {Level.OK: self.style.SUCCESS, Level.WARNING: self.style.WARNING, Level.PROBLEM: self.style.ERROR}
        self.stdout.write(f"{style.get(line.level, str)(f'{line.level:8}')} {line.subject:12} {line.message}")
        if line.advice:
            self.stdout.write(f"{'':21} → {line.advice}")
        self.stdout.flush()
