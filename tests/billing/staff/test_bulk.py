"""One action on many accounts: each row once, whatever happens to the workers."""

from typing import Any

import pytest
from django.test import Client
from pytest_django.fixtures import Settings

from accounts.models import AuditEntry, User
from billing.catalogue import system_settings
from billing.models import BulkJob, BulkJobRow, GrantRequest, TokenAccount, TokenTransaction
from billing.staff import accounts, bulk, grants
from billing.staff.accounts import AccountFilter
from tests.conftest import MakeUser

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order")]

EVERYBODY = AccountFilter(search="team-")


@pytest.fixture
def team(make_user: MakeUser) -> list[User]:
    """Seven people."""
    return [make_user(f"team-{number}") for number in range(7)]


def start(admin: User, kind: str = "grant", **fields: Any) -> BulkJob:
    values: dict[str, Any] = {"filter": EVERYBODY, "request_key": "form-1"}
    if kind != "export":
        values["reason"] = "Sorry for the outage"
    if kind == "grant":
        values["tokens"] = 100
    return bulk.start_bulk_job(admin=admin, kind=kind, **(values | fields))


def run(job: BulkJob) -> None:
    while bulk.run_bulk_job(job_id=job.pk, limit=3):
        pass
    job.refresh_from_db()


def balances(team: list[User]) -> list[int]:
    return list(TokenAccount.objects.filter(user__in=team).order_by("user_id").values_list("balance", flat=True))


def rows(job: BulkJob) -> list[tuple[str, str]]:
    return list(job.rows.order_by("id").values_list("state", "message"))


def test_everybody_is_granted_tokens_once(susan: User, team: list[User], alice: User) -> None:
    job = start(susan)
    assert (job.state, bulk.progress(job).waiting, bulk.progress(job).percent) == ("running", 7, 0)
    assert balances(team) == [10_000] * 7
    bulk.run_bulk_job(job_id=job.pk, limit=3)
    assert (bulk.progress(job).done, bulk.progress(job).percent) == (3, 42)
    run(job)
    assert (job.state, bulk.progress(job).done, bulk.progress(job).percent) == ("done", 7, 100)
    assert job.finished_at is not None
    assert balances(team) == [10_100] * 7
    assert TokenAccount.objects.get(user=alice).balance == 10_000
    assert rows(job) == [("done", "100 tokens granted")] * 7
    assert AuditEntry.objects.filter(action="grant", actor=susan).count() == 7
    run(job)
    assert balances(team) == [10_100] * 7


def test_a_form_sent_twice_is_one_job(susan: User, team: list[User]) -> None:
    """Row 65."""
    job = start(susan)
    assert start(susan) == job
    for other in ({"tokens": 101}, {"reason": "Another"}, {"filter": AccountFilter(search="team-1")}):
        with pytest.raises(bulk.BulkKeyConflict):
            start(susan, **other)
    assert BulkJob.objects.count() == 1


def test_no_more_accounts_than_were_confirmed(susan: User, team: list[User], make_user: MakeUser) -> None:
    """Somebody signs up between the question and the answer; a form sent twice asks for nothing anew."""
    job = start(susan, expected_rows=7)
    make_user("team-7")
    assert start(susan, expected_rows=7) == job
    for kind in ("grant", "suspend"):
        with pytest.raises(bulk.BulkCountChanged, match="confirmed 7 accounts, and by now 8 match"):
            start(susan, kind, expected_rows=7, request_key=f"form-{kind}")
    assert BulkJob.objects.count() == 1
    assert bulk.progress(start(susan, "export", expected_rows=7, request_key="form-2")).total == 8


def test_rows_that_a_dead_worker_left_are_done_once(
    susan: User, team: list[User], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies after a grant, before the row says so: both are one transaction, so neither is there."""
    job = start(susan)
    real, calls = grants.grant_tokens, []

    def die_in_the_third(**arguments: Any) -> GrantRequest:
        request = real(**arguments)
        calls.append(request)
        if len(calls) == 3:
            raise KeyboardInterrupt  # what a killed worker raises, past every `except`
        return request

    with monkeypatch.context() as patch:
        patch.setattr(grants, "grant_tokens", die_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            bulk.run_bulk_job(job_id=job.pk)
    assert sum(balances(team)) == 70_200
    assert bulk.progress(job).done == 2
    run(job)
    assert balances(team) == [10_100] * 7
    assert TokenTransaction.objects.filter(type="admin_grant").count() == 7


def test_a_job_is_cancelled(susan: User, adam: User, team: list[User]) -> None:
    job = start(susan)
    bulk.run_bulk_job(job_id=job.pk, limit=2)
    with pytest.raises(bulk.BulkNotAllowed):
        bulk.cancel_bulk_job(admin=adam, job_id=job.pk)
    assert bulk.cancel_bulk_job(admin=susan, job_id=job.pk).state == "cancelled"
    assert bulk.cancel_bulk_job(admin=susan, job_id=job.pk).state == "cancelled"
    run(job)
    assert sum(balances(team)) == 70_200
    assert (bulk.progress(job).done, bulk.progress(job).cancelled, job.state) == (2, 5, "cancelled")


def test_what_fails_is_said_beside_its_row(susan: User, team: list[User]) -> None:
    TokenAccount.objects.filter(user=team[2]).update(status="blocked", status_reason="anonymised")
    job = start(susan)
    run(job)
    assert (job.state, bulk.progress(job).failed, bulk.progress(job).done) == ("done", 1, 6)
    state, message = rows(job)[2]
    assert (state, "anonymised" in message) == ("failed", True)
    assert balances(team)[2] == 10_000


def test_many_tokens_each_wait_for_a_second_superadmin(susan: User, team: list[User]) -> None:
    system_settings.update_system_settings(changes={"grant_approval_tokens": 99}, changed_by_id=susan.pk)
    job = start(susan)
    run(job)
    assert balances(team) == [10_000] * 7
    assert bulk.progress(job).requested == 7
    assert {row.data["grant_request_id"] for row in job.rows.all()} == set(
        grants.list_open_requests().values_list("pk", flat=True)
    )


def test_who_gives_to_many_gives_nothing_to_themselves(susan: User, alice: User, client: Client) -> None:
    """Row 64: their own row becomes a request, and the job says so and leads to it."""
    job = start(susan, filter=AccountFilter(search="example.com"))
    run(job)
    progress = bulk.progress(job)
    assert (progress.done, progress.requested) == (1, 1)
    assert (TokenAccount.objects.get(user=susan).balance, TokenAccount.objects.get(user=alice).balance) == (
        10_000,
        10_100,
    )
    request = grants.list_open_requests().get()
    client.force_login(susan)
    page = client.get(f"/admin/tokens/bulk/{job.pk}/?outcome=requested").content.decode()
    assert "another superadmin decides" in page
    assert "alice@example.com" not in page
    assert f'href="/admin/tokens/requests/?request={request.pk}"' in page
    assert "susan@example.com" in client.get(f"/admin/tokens/requests/?request={request.pk}").content.decode()


def test_every_job_and_every_outcome_has_its_page(susan: User, adam: User, make_user: MakeUser, client: Client) -> None:
    people = [make_user(f"team-{number:02}") for number in range(60)]
    accounts.block_account(superadmin=susan, user_id=people[0].pk, reason="Fraud")
    jobs = [start(adam, "export", request_key=f"form-{number}") for number in range(27)]
    suspension = start(susan, "suspend", request_key="form-s")
    bulk.run_bulk_job(job_id=suspension.pk, limit=58)
    client.force_login(adam)

    def found(address: str, name: str, **query: str) -> list[Any]:
        pages = [client.get(address, {"page": number, **query}).context for number in (1, 2, 3)]
        numbers = range(1, pages[0]["page"].paginator.num_pages + 1)
        return [row for number in numbers for row in pages[number - 1][name]]

    assert [job for job, _ in found("/admin/tokens/bulk/", "jobs")] == [suspension, *reversed(jobs)]
    address = f"/admin/tokens/bulk/{suspension.pk}/"
    done = list(suspension.rows.order_by("-id")[2:])
    assert [row for row, _ in found(address, "rows")] == done
    assert [row for row, _ in found(address, "rows", outcome="skipped")] == done[-1:]
    shown = client.get(address)
    assert len(shown.context["rows"]) == 25
    assert f'hx-get="{address}?page=3"' in client.get(address, {"page": 3}).content.decode()  # polled where one reads


def test_suspended_in_bulk(susan: User, team: list[User]) -> None:
    accounts.block_account(superadmin=susan, user_id=team[0].pk, reason="Fraud")
    job = start(susan, "suspend", filter=AccountFilter(search="e"))  # susan herself among them
    run(job)
    assert TokenAccount.objects.get(user=team[0]).status == "blocked"
    assert set(TokenAccount.objects.filter(user__in=team[1:]).values_list("status", flat=True)) == {"suspended"}
    assert TokenAccount.objects.get(user=susan).status == "active"
    progress = bulk.progress(job)
    assert (progress.done, progress.skipped, progress.failed) == (6, 1, 1)


def test_an_admin_exports_and_nothing_else(adam: User, alice: User, team: list[User]) -> None:
    """Row 64."""
    for kind in ("grant", "suspend"):
        with pytest.raises(bulk.BulkNotAllowed):
            start(adam, kind)
    with pytest.raises(bulk.BulkNotAllowed):
        start(alice, "export")
    assert AuditEntry.objects.filter(action="bulk_job", outcome="refused").count() == 3
    job = start(adam, "export")
    run(job)
    titles, *lines = bulk.exported_rows(job)
    assert titles[:4] == ["user", "email", "name", "balance"]
    assert [line[1:4] for line in lines] == [[user.email, user.name, 10_000] for user in team]
    entry = AuditEntry.objects.filter(action="export").get()
    assert (entry.actor, entry.summary) == (adam, "Export: 7 accounts")


def test_an_export_keeps_nobodys_address(adam: User, team: list[User]) -> None:
    """Row 70: whoever is anonymised later is in no job."""
    job = start(adam, "export", filter=AccountFilter(search="team-1@example.com"))
    run(job)
    assert "example.com" not in str(BulkJob.objects.values().get()) + str(BulkJobRow.objects.values().get())
    assert "example.com" not in str(AuditEntry.objects.filter(action="export").values().get())


def test_who_was_demoted_does_nothing_more(susan: User, team: list[User]) -> None:
    job = start(susan)
    bulk.run_bulk_job(job_id=job.pk, limit=1)
    User.objects.filter(pk=susan.pk).update(role="admin")
    run(job)
    assert sum(balances(team)) == 70_100
    assert bulk.progress(job).failed == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "delete"},
        {"tokens": None},
        {"tokens": 0},
        {"tokens": True},
        {"reason": " "},
        {"kind": "suspend", "reason": "debt"},
        {"filter": AccountFilter(search="nobody at all")},
    ],
)
def test_what_cannot_be_started_writes_nothing(susan: User, team: list[User], wrong: dict[str, Any]) -> None:
    values: dict[str, Any] = {"admin": susan, "kind": "grant"} | wrong
    with pytest.raises(bulk.BulkNotPossible):
        start(**values)
    assert not BulkJob.objects.exists()


def test_a_job_that_no_worker_was_told_of_is_swept(
    susan: User, team: list[User], settings: Settings, django_capture_on_commit_callbacks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Row 40, for bulk actions: the broker was away."""
    from celery import current_app

    job = start(susan)
    sent: list[Any] = []
    monkeypatch.setattr(current_app, "send_task", lambda name, args, **options: sent.append((name, *args)))
    with django_capture_on_commit_callbacks(execute=True):
        assert bulk.sweep_bulk_jobs() == 1
    assert sent == [("billing.tasks.run_bulk_job", job.pk)]
    run(job)
    assert bulk.sweep_bulk_jobs() == 0
