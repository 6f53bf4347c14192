"""Whether an installation is as it must be, in plain words, and what to do where it is not.

Each check is a function that yields what it found. What lies on this machine comes first, then what must be asked for
over the network; whatever needs something that does not answer is not looked at, and says so. Nothing is changed.
"""

from collections.abc import Callable, Iterator

from django.conf import settings

from postmate.ops.doctor import books, database, machine, outside, processes
from postmate.ops.doctor.findings import Check, Level, Line, Outcomes, short


def examine(*, is_quick: bool = False, test_address: str = "") -> Iterator[Line]:
    """Look at everything, and report each at once. `is_quick` leaves the books out. A test mail goes to an address."""
    away: set[str] = set()
    for check in (*CHECKS, Check("Test mail", lambda: outside.send_test_mail(test_address))):
        if (check.is_slow and is_quick) or (check.subject == "Test mail" and not test_address):
            continue
        if missing := check.needs & away:
            yield Line(check.subject, Level.SKIPPED, f"Not looked at, for lack of {' and '.join(sorted(missing))}.", "")
            continue
        found = []
        try:
            for outcome in check.run():
                found.append(outcome.level)
                yield Line(check.subject, outcome.level, outcome.message, outcome.advice)
        except Exception as error:  # one that fails must not hide what the others find
            found.append(Level.PROBLEM)
            yield Line(
                check.subject,
                Level.PROBLEM,
                f"This could not be looked at: {short(error)}",
                "Mend what is reported above first; if it stays, report it as a bug.",
            )
        if check.gives and Level.PROBLEM in found:
            away.add(check.gives)
            if check.gives == SITE and settings.DEBUG:
                away.add(RUNNING)


DATABASE, TABLES, REDIS, SITE, STRIPE, RUNNING = (
    "a database",
    "the migrations",
    "Redis",
    "an answer of the site",
    "Stripe",
    "`make run`",
)


def _on_tables(subject: str, run: Callable[[], Outcomes], *, is_slow: bool = False) -> Check:
    return Check(subject, run, frozenset({DATABASE, TABLES}), is_slow=is_slow)


CHECKS = (
    Check("Python", machine.python_and_packages),
    Check("Mode", machine.mode),
    Check("Settings", machine.settings_are_sound),
    Check("Disks", machine.disks),
    Check("Images", machine.images_can_be_written),
    Check("Backup", machine.last_backup),
    Check("Database", database.database_answers, gives=DATABASE),
    Check("Migrations", database.migrations_are_applied, frozenset({DATABASE}), gives=TABLES),
    _on_tables("Triggers", database.triggers_are_there),
    Check("Connections", database.database_connections, frozenset({DATABASE})),
    Check("Clock", database.database_clock, frozenset({DATABASE})),
    _on_tables("Sale", books.sale),
    _on_tables("Models", books.models_on_offer),
    _on_tables("Superadmins", books.superadmins),
    _on_tables("Welcome bonus", books.welcome_bonus),
    _on_tables("Holds", books.holds),
    _on_tables("Events", books.events),
    _on_tables("Money", books.money_to_look_at),
    _on_tables("Roll-ups", books.roll_ups),
    _on_tables("Outbox", books.outbox),
    _on_tables("Finance", books.finance_exports),
    _on_tables("Books", books.books, is_slow=True),
    Check("Redis", processes.redis_answers, gives=REDIS),
    Check("Queue", processes.queue, frozenset({REDIS})),
    Check("Site", processes.site_answers, gives=SITE),
    Check("Worker", processes.worker_lives, frozenset({REDIS, RUNNING})),
    Check("Beat", processes.beat_lives, frozenset({REDIS, RUNNING})),
    Check("Stripe", outside.stripe_lets_us_in, frozenset({RUNNING}), gives=STRIPE),
    Check("Webhook", outside.webhook_is_registered, frozenset({STRIPE, RUNNING})),
    Check("Webhook", outside.webhook_answers, frozenset({SITE})),
    Check("AI", outside.ai_providers, frozenset({DATABASE, TABLES, RUNNING})),
    Check("E-mail", outside.mail_server),
)
