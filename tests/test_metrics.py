"""/metrics: the books' own numbers, true at any moment; and the files that read it, which name nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from django.core.management import CommandError, call_command
from django.db.models import Count, Sum
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.models import Notification, Purchase, RollUp, StripeEvent, TokenAccount, TokenTransaction, TokenUsage
from billing.tasks import check_books
from billing.upkeep.verification import BOOKS_KEY
from kit import counters, redis_client
from postmate.celery import app
from postmate.web import metrics
from tests.ai_ops.studio import Writer, until
from tests.billing.figures.test_rollups import invent_history, roll_up_until, tamper
from tests.environment import free_port
from tests.servers import PROJECT, Server, running_worker

pytestmark = pytest.mark.django_db

ALERTS = PROJECT / "docker/prometheus/alerts.yml"
PROMETHEUS = PROJECT / "docker/prometheus/prometheus.yml"
DASHBOARD = PROJECT / "docker/grafana/dashboard.json"
GUIDE = PROJECT / "docs/MONITORING.md"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read() -> Samples:
    """What Prometheus would keep of one scrape: each sample by its name and labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(name: str, samples: Samples | None = None, **labels: str) -> float:
    """The sum of a metric's samples that have these labels; fails when there is none."""
    found = [
        number
        for (sample, pairs), number in (samples or read()).items()
        if sample == name and labels.items() <= dict(pairs).items()
    ]
    assert found, name
    return sum(found)


@pytest.fixture
def history() -> None:
    """A month of operations, payments, refunds and grants in which every law holds."""
    invent_history(transactions=300, users=12, months=1)


@pytest.mark.parametrize("hours_ago", [0, 5, 24 * 9, None])
def test_numbers_are_those_of_the_books_wherever_the_roll_ups_end(history: None, hours_ago: int | None) -> None:
    """All rows raw, all but the newest hour rolled up, and between: to the token the same."""
    if hours_ago is None:
        RollUp.objects.all().delete()
    else:
        roll_up_until(timezone.now() - timedelta(hours=hours_ago))
    samples = read()
    for row in TokenUsage.objects.exclude(status="reserved").values("provider", "model", "operation_type").annotate(
        ended=Count("pk"),
        actual=Sum("actual_tokens"),
        billed=Sum("billable_tokens"),
        unbilled=Sum("unbilled_tokens"),
        cost=Sum("provider_cost_microusd"),
    ):  # fmt: skip
        of = {"provider": row["provider"], "model": row["model"], "operation": row["operation_type"]}
        assert value("postmate_operations_total", samples, **of) == row["ended"]
        assert value("postmate_actual_tokens_total", samples, **of) == row["actual"]
        assert value("postmate_billed_tokens_total", samples, **of) == row["billed"]
        assert value("postmate_unbilled_tokens_total", samples, **of) == row["unbilled"]
        assert value("postmate_provider_cost_microusd_total", samples, **of) == row["cost"]
    entries = TokenTransaction.objects.order_by()
    assert value("postmate_debits_total", samples) == entries.filter(type="usage").count() > 100
    for type in ("purchase", "auto_recharge", "bonus", "admin_grant"):
        credited = entries.filter(type=type).aggregate(tokens=Sum("amount", default=0))["tokens"]
        assert value("postmate_credited_tokens_total", samples, type=type) == credited
    sales = entries.filter(type="purchase").values_list("currency").annotate(Sum("paid_cents"))
    for currency, cents in sales:
        assert value("postmate_revenue_cents_total", samples, currency=currency, type="purchase") == cents > 0
    balances = TokenAccount.objects.aggregate(tokens=Sum("balance"))["tokens"]
    assert value("postmate_balance_tokens", samples) == value("postmate_ledger_tokens", samples) == balances
    paid = Purchase.objects.filter(state="paid").count()
    assert value("postmate_purchases", samples, state="paid") == paid > 0


def test_what_waits_is_told(alice: User) -> None:
    ledger.reserve_tokens(
        user_id=alice.pk,
        tokens=700,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", fixed_cost_tokens=700),
        idempotency_key="one",
        lifetime_seconds=600,
    )
    TokenUsage.objects.update(
        created_at=timezone.now() - timedelta(minutes=20), expires_at=timezone.now() - timedelta(minutes=10)
    )
    event = StripeEvent.objects.create(
        event_id="evt_1", type="refund.created", livemode=False, payload={}, state="failed"
    )
    StripeEvent.objects.filter(pk=event.pk).update(received_at=timezone.now() - timedelta(hours=2))
    notification = Notification.objects.create(user=alice, kind="low_balance", key="1", title="Low")
    Notification.objects.filter(pk=notification.pk).update(
        created_at=timezone.now() - timedelta(hours=1), email_next_at=timezone.now()
    )
    TokenAccount.objects.update(status="blocked")
    samples = read()
    assert value("postmate_reservations_open", samples) == 1
    assert value("postmate_reservations_open_tokens", samples) == value("postmate_reserved_tokens", samples) == 700
    assert value("postmate_reservations_overdue", samples) == 1
    assert 1_200 <= value("postmate_reservations_oldest_age_seconds", samples) < 1_300
    assert value("postmate_webhook_events", samples, state="failed") == 1
    assert 7_200 <= value("postmate_webhook_oldest_age_seconds", samples, state="failed") < 7_300
    assert value("postmate_outbox_mails", samples) == 1
    assert 3_600 <= value("postmate_outbox_oldest_age_seconds", samples) < 3_700
    assert value("postmate_accounts", samples, status="blocked") == 1


def test_broken_books_are_seen_at_once_and_by_the_nightly_check(alice: User) -> None:
    assert check_books() == 0
    samples = read()
    assert value("postmate_books_violations", samples) == 0
    assert value("postmate_books_checked_age_seconds", samples) < 60
    tamper("UPDATE billing_tokenaccount SET balance = balance + 1")
    samples = read()
    assert value("postmate_balance_tokens", samples) == value("postmate_ledger_tokens", samples) + 1
    assert check_books() > 0
    assert value("postmate_books_violations") > 0


@pytest.mark.django_db(transaction=True)
def test_a_worker_leaves_a_trace_of_each_task_that_ends_well() -> None:
    """What a queue holds is seen while it waits, and who has done it after."""
    redis_client.client().delete(metrics.TASKS_KEY, *app.amqp.queues)
    task = "billing.tasks.expire_reservations"
    subprocess.run([sys.executable, "-m", "celery", "-A", "postmate", "call", task], cwd=PROJECT, check=True)
    samples = read()
    assert value("postmate_queue_length", samples, queue="celery") == 1
    redis_client.client().set(metrics.SINCE_KEY, time.time() - 1_000)
    assert value("postmate_task_last_success_age_seconds", task=task) > 900
    with running_worker():
        until(lambda: value("postmate_task_last_success_age_seconds", task=task) < 900, seconds=30)
    samples = read()
    assert value("postmate_task_last_success_age_seconds", samples, task=task) < 60
    assert value("postmate_queue_length", samples, queue="celery") == 0


def forget() -> None:
    """Redis is as on the first day."""
    counters.flush()
    remembered = (metrics.TASKS_KEY, metrics.BEAT_KEY, metrics.SINCE_KEY, BOOKS_KEY, counters.KEY)
    redis_client.client().delete(*remembered, *app.amqp.queues)


@pytest.fixture
def new_installation(seeded: None) -> Samples:
    """The first scrape after `migrate` and `seed_billing`."""
    forget()
    return read()


def test_verify_ledger_by_hand_is_a_check_of_the_books(alice: User) -> None:
    forget()
    redis_client.client().set(metrics.SINCE_KEY, "0")
    assert value("postmate_books_checked_age_seconds") > 10**9
    call_command("verify_ledger", stdout=StringIO())
    assert value("postmate_books_checked_age_seconds") < 60
    tamper("UPDATE billing_tokenaccount SET balance = balance + 1")
    with pytest.raises(CommandError):
        call_command("verify_ledger", stdout=StringIO())
    assert value("postmate_books_violations") > 0


def test_requests_are_counted_by_route_and_outcome(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that fail and those that find nothing, too; never by the address, which could be a secret or endless."""
    forget()
    client.raise_request_exception = False
    for path in ("/", "/api/v1/usage", "/tokens/", "/nowhere/1", "/nowhere/2", "/admin/billing/purchase/7/change/"):
        client.get(path)
    with monkeypatch.context() as broken:
        broken.setattr("billing.catalogue.packages.list_offers", lambda: 1 / 0)
        assert client.get("/").status_code == 500
    samples = read()
    expected = {("", "2xx"): 1, ("", "5xx"): 1, ("api/v1/usage", "4xx"): 1, ("tokens/", "3xx"): 1, ("(none)", "4xx"): 2}
    for (route, status), number in {**expected, ("admin/", "3xx"): 1}.items():
        assert value("postmate_requests_total", samples, route=route, status=status) == number
    routes = {dict(labels)["route"] for name, labels in samples if name == "postmate_requests_total"}
    assert not any("nowhere" in route or "7" in route for route in routes)
    assert value("postmate_request_seconds_count", samples, route="") == 2
    assert value("postmate_request_seconds_bucket", samples, route="", le="+Inf") == 2
    assert 0 < value("postmate_request_seconds_sum", samples, route="") < 60
    for quiet in ("/healthz", "/readyz", "/metrics", "/static/css/none.css"):
        client.get(quiet)
    assert value("postmate_requests_total") == 7
    # What is counted while Redis is away waits for it.
    redis_url = settings.REDIS_URL
    settings.REDIS_URL = f"redis://127.0.0.1:{free_port()}/0"
    client.get("/nowhere/3")
    counters.flush()
    settings.REDIS_URL = redis_url
    assert value("postmate_requests_total", route="(none)") == 3


def test_processes_count_together_and_errors_of_providers_by_kind(alice: User, web: Server, ai: Server) -> None:
    """Counted where the draft ran, told here."""
    writer = Writer(alice, web)
    forget()
    assert value("postmate_provider_errors_total", provider="openai", kind="busy") == 0
    for fault in ("429", "401", "429"):
        assert writer.draft(topic=f"About tea. [[fault:{fault}]]").last.name == "failed"
    until(lambda: value("postmate_requests_total", route="live/<slug:name>/") == 3)  # it is counted as it begins
    until(lambda: value("postmate_provider_errors_total", provider="openai", kind="busy") == 2)
    samples = read()
    for kind, number in {"busy": 2, "misconfigured": 1, "refused": 0, "timed_out": 0, "unavailable": 0}.items():
        assert value("postmate_provider_errors_total", samples, provider="openai", kind=kind) == number


def test_the_backups_age_and_the_disks(settings: Settings, tmp_path: Path) -> None:
    settings.BACKUP_DIR, settings.MEDIA_ROOT = tmp_path, str(tmp_path / "not yet made")
    settings.BACKUP_MAX_AGE_HOURS = 26
    for name, hours in (("postmate-20261120T020000Z.tar", 50), ("postmate-20261121T020000Z.tar", 27)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - hours * 3_600,) * 2)
    samples = read()
    assert 27 * 3_600 <= value("postmate_backup_age_seconds", samples) < 28 * 3_600
    assert value("postmate_backup_allowed_age_seconds", samples) == 26 * 3_600
    assert value("postmate_disk_size_bytes", samples, folder="media") == shutil.disk_usage(tmp_path).total
    assert value("postmate_disk_free_bytes", samples, folder="backups") > 0
    settings.BACKUP_MAX_AGE_HOURS = 0  # by other means
    assert not any(name.startswith("postmate_backup") for name, _ in read())


def test_without_redis_the_rest_is_told(alice: User, settings: Settings) -> None:
    settings.REDIS_URL = f"redis://127.0.0.1:{free_port()}/0"
    samples = read()
    assert value("postmate_redis_up", samples) == 0
    assert value("postmate_database_up", samples) == 1
    assert value("postmate_balance_tokens", samples) == 10_000
    assert not any(name == "postmate_queue_length" for name, _ in samples)


def test_without_the_database_the_rest_is_told() -> None:
    """In a process of its own, whose database is not there: half of the counters would look like a fall."""
    code = "import django; django.setup(); from postmate.web import metrics; print(metrics.render().decode())"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "postmate.settings",
        "DATABASE_URL": f"postgresql://nobody@127.0.0.1:{free_port()}/nothing",
    }
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert "postmate_database_up 0.0" in answer.stdout, answer.stderr
    assert "postmate_redis_up 1.0" in answer.stdout
    assert "postmate_debits_total" not in answer.stdout


# --- Who may read it ------------------------------------------------------------------------------------------------


def test_only_the_token_opens_it(client: Client, settings: Settings) -> None:
    settings.METRICS_TOKENS = ["old-token", "new-token"]
    for good in ("Bearer old-token", "bearer new-token"):
        answer = client.get("/metrics", headers={"authorization": good})
        assert answer.status_code == 200
        assert answer["Content-Type"].startswith("text/plain; version=")
        assert b"postmate_build_info" in answer.content
    for bad in ("", "Bearer", "Bearer ", "Bearer wrong", "Basic new-token", "new-token", "Bearer new-tokén"):
        assert client.get("/metrics", headers={"authorization": bad}).status_code == 404


@pytest.mark.parametrize(
    ("debug", "address", "status"),
    [(True, "127.0.0.1", 200), (True, "::1", 200), (True, "192.0.2.7", 404), (False, "127.0.0.1", 404)],
)
def test_without_a_token_it_is_open_to_the_developers_machine_alone(
    client: Client, settings: Settings, debug: bool, address: str, status: int
) -> None:
    settings.METRICS_TOKENS, settings.DEBUG = [], debug
    assert client.get("/metrics", REMOTE_ADDR=address).status_code == status


# --- The files that read it -----------------------------------------------------------------------------------------


def alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from group["rules"]


def panel_expressions() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], re.sub(r"\$__\w+", "5m", target["expr"])


def selectors_in(expression: str) -> Iterator[promql_parser.VectorSelector]:
    """Each choice of samples in an expression; raises when it is no PromQL."""
    waiting: list[Any] = [promql_parser.parse(expression)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, promql_parser.VectorSelector):
            yield node
        inner = (getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector"))
        waiting += [each for each in (*inner, *getattr(node, "args", ())) if each is not None]


def chooses(selector: promql_parser.VectorSelector, labels: dict[str, str]) -> bool:
    def agrees(matcher: promql_parser.Matcher) -> bool:
        value, op = labels.get(matcher.name, ""), matcher.op
        if op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual):
            return bool((value == matcher.value) == (op == promql_parser.MatchOp.Equal))
        return bool(bool(re.fullmatch(matcher.value, value)) == (op == promql_parser.MatchOp.Re))

    return all(agrees(each) for each in selector.matchers.matchers)


def test_on_a_new_installation_alerts_and_panels_find_all_that_they_read(new_installation: Samples) -> None:
    """Where a sample is missing at first, a panel says "No data" and an alert misses the first of something."""
    used = set()
    for where, expression in [(rule["alert"], rule["expr"]) for rule in alerts()] + list(panel_expressions()):
        selectors = [each for each in selectors_in(expression) if each.name != "up"]  # Prometheus' own
        assert selectors or "up" in expression, where
        for selector in selectors:
            found = [labels for name, labels in new_installation if name == selector.name]
            assert any(chooses(selector, dict(labels)) for labels in found), (where, str(selector))
            used.add(selector.name)
    assert len(used) > 40
    # What has never happened is as old as the installation, not as the world; nor is it missing.
    ages = {name: seconds for (name, _), seconds in new_installation.items() if name.endswith("_age_seconds")}
    assert {f"postmate_{what}_age_seconds" for what in ("books_checked", "beat", "backup", "rollup")} <= set(ages)
    assert all(seconds < 3 * 3_600 for name, seconds in ages.items() if "allowed" not in name), ages


def test_the_guide_lists_every_metric(new_installation: Samples) -> None:
    families = text_string_to_metric_families(metrics.render().decode())
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    guide = GUIDE.read_text()
    assert {name for name in exposed if f"`{name}`" not in guide} == set()
    assert set(re.findall(r"`(postmate_\w+)`", guide)) <= exposed


def test_each_alert_says_what_to_do() -> None:
    anchors = {f"#{heading.lower()}" for heading in re.findall(r"^### (\w+)$", GUIDE.read_text(), re.MULTILINE)}
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) > 15
    for rule in alerts():
        notes = rule["annotations"]
        assert notes["summary"]
        assert notes["action"]
        path, anchor = notes["runbook"].split("#")
        assert (PROJECT / path, f"#{anchor}" in anchors) == (GUIDE, True), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
    assert yaml.safe_load(PROMETHEUS.read_text())["rule_files"] == [ALERTS.name]


def test_dashboard_is_one_that_grafana_imports() -> None:
    """No panel without a query, none over another, each from the data source that is chosen above."""
    board = json.loads(DASHBOARD.read_text())
    assert board["schemaVersion"] >= 36
    assert [each["type"] for each in board["templating"]["list"]] == ["datasource"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert all(each["expr"] and each["datasource"]["uid"] == "${datasource}" for each in panel["targets"])
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Money",
        "Usage",
        "Payments and webhooks",
        "Queue and services",
        "Requests and disks",
    ]
