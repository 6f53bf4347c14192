"""The admin's pages of accounts, grants, requests, the audit log and the settings, as HTTP answers them."""

from collections.abc import Callable
from typing import Any

import pytest
from django.http import StreamingHttpResponse
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import AuditEntry, User
from billing import ledger
from billing.catalogue import system_settings
from billing.forms import SystemSettingsForm
from billing.models import (
    BulkJob,
    GrantRequest,
    Notification,
    Purchase,
    SettingChange,
    StripeEvent,
    TokenAccount,
    TokenUsage,
)
from billing.payments import gateway
from billing.staff import bulk, grants
from tests.conftest import MakeUser

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order")]

AsPerson = Callable[[User], Client]


@pytest.fixture
def as_person() -> AsPerson:
    def sign_in(user: User) -> Client:
        client = Client()
        client.force_login(user)
        return client

    return sign_in


def balance(user: User) -> int:
    return TokenAccount.objects.get(user=user).balance


def grant_form(user: User, **fields: Any) -> dict[str, Any]:
    form = {
        "account_id": TokenAccount.objects.get(user=user).pk,
        "kind": "grant",
        "tokens": "500",
        "reason": "Sorry for the outage",
    }
    return form | {"request_key": "key-of-the-form"} | fields


def settings_form(**fields: Any) -> dict[str, Any]:
    form = SystemSettingsForm(settings=system_settings.get_system_settings())
    return {name: "" if value is None else value for name, value in form.initial.items()} | fields


# --- Accounts -------------------------------------------------------------------------------------------------------


def test_accounts_are_found_filtered_and_sorted(
    as_person: AsPerson, adam: User, alice: User, make_user: MakeUser
) -> None:
    make_user("rita", tokens=5_000_000)
    client = as_person(adam)

    def found(**query: str) -> list[str]:
        context = client.get(reverse("dashboard:accounts"), query).context
        return [account.user.email for account in context["found"].accounts]

    assert found()[0] == "rita@example.com"
    assert found(sort="balance")[-1] == "rita@example.com"
    assert found(search="ALICE@") == found(search=str(alice.pk)) == ["alice@example.com"]
    assert found(band="high") == ["rita@example.com"]
    assert found(status="blocked") == []


def test_the_list_of_accounts_has_pages(as_person: AsPerson, adam: User, make_user: MakeUser) -> None:
    for number in range(30):
        make_user(f"person{number:02}", tokens=1_000 + number)
    client = as_person(adam)
    first = client.get(reverse("dashboard:accounts"), {"search": "person"}).context["found"]
    second = client.get(reverse("dashboard:accounts"), {"search": "person", "page": first.next_cursor}).context["found"]
    seen = [account.balance for account in first.accounts + second.accounts]
    assert seen == list(range(1_029, 999, -1))
    assert second.next_cursor == ""


@pytest.mark.parametrize("query", [{"sort": "name"}, {"status": "gone"}, {"band": "x"}, {"page": "nonsense"}])
def test_a_search_that_is_none_is_answered_with_its_error(
    as_person: AsPerson, adam: User, query: dict[str, str]
) -> None:
    response = as_person(adam).get(reverse("dashboard:accounts"), query)
    assert (response.status_code, "There is no such" in response.content.decode()) == (422, True)


def test_what_people_write_is_text_on_every_page(as_person: AsPerson, adam: User, susan: User, alice: User) -> None:
    """Row 72."""
    script = "<script>alert(1)</script>"
    alice.name = script
    alice.save()
    grants.grant_tokens(admin=susan, user_id=alice.pk, tokens=5, reason=script, request_key="at-once-key")
    grants.grant_tokens(admin=adam, user_id=alice.pk, tokens=5, reason=script, request_key="waiting-key")
    client = as_person(susan)
    for path in (
        reverse("dashboard:accounts"),
        reverse("dashboard:account", args=[alice.pk]),
        reverse("dashboard:new-grant") + f"?user={alice.pk}",
        reverse("dashboard:new-grant") + "?search=alice",
        reverse("dashboard:requests"),
        reverse("dashboard:audit"),
    ):
        page = client.get(path).content.decode()
        assert script not in page
        assert "&lt;script&gt;alert(1)" in page, path
    page = client.post(reverse("dashboard:new-grant"), grant_form(alice, reason=script)).content.decode()
    assert script not in page
    assert "&lt;script&gt;alert(1)" in page


def test_everything_about_an_account_can_be_read(as_person: AsPerson, adam: User, alice: User, bob: User) -> None:
    """Page after page, by what was chosen, nothing twice and nothing of anybody else."""
    account = ledger.get_account(user_id=alice.pk)
    usage_rows = {
        status: [
            TokenUsage.objects.create(
                account=account, user=alice, workspace=account.workspace, operation_type="chat", provider="openai",
                model="gpt-6-luna", status=status, charge_type="multiplier", multiplier=1, error_message=message,
                idempotency_key=f"{status}-{number}", completed_at=timezone.now(),
            ).pk
            for number in range(12)
        ]
        for status, message in (("succeeded", ""), ("failed", "The model is overloaded"))
    }  # fmt: skip
    purchases = [
        Purchase.objects.create(
            account=account, user=alice, workspace=account.workspace, kind="checkout", package_name="Starter",
            tokens=5, amount_cents=500, currency="usd", state="failed" if number % 2 else "open",
        ).pk
        for number in range(24)
    ]  # fmt: skip
    notices = [
        Notification.objects.create(
            user=alice, kind="low_balance", key=str(number), title="Low", read_at=None if number % 3 else timezone.now()
        ).pk
        for number in range(33)
    ]
    Notification.objects.create(user=bob, kind="low_balance", key="bobs", title="Low")
    client = as_person(adam)

    def read(name: str, show: str = "") -> list[int]:
        address: str = reverse("dashboard:account", args=[alice.pk]) + (f"?{name}_show={show}" if show else "")
        seen: list[int] = []
        while address:
            found = client.get(address).context[name]
            assert 0 < len(found.rows) <= 10
            seen += [row.pk for row in found.rows]
            address = found.next_url
        return seen

    both = usage_rows["succeeded"] + usage_rows["failed"]
    assert read("usage") == both[::-1]
    assert read("usage", "failed") == usage_rows["failed"][::-1]
    assert read("purchases") == purchases[::-1]
    assert read("purchases", "open") == purchases[::2][::-1]
    assert read("notices", "unread") == [pk for number, pk in enumerate(notices) if number % 3][::-1]
    page = client.get(
        reverse("dashboard:account", args=[alice.pk]),
        {"usage_before": str(both[0]), "notices_show": "x", "purchases_before": "1" * 30},
    )
    assert (page.context["usage"].rows, len(page.context["notices"].rows)) == ([], 10)
    assert [row.pk for row in page.context["purchases"].rows] == purchases[:-11:-1]


def test_a_superadmin_suspends_and_reactivates(as_person: AsPerson, susan: User, alice: User) -> None:
    client, path = as_person(susan), reverse("dashboard:account-status", args=[alice.pk])
    client.post(path, {"status": "suspended", "reason": "Chargebacks"})
    account = TokenAccount.objects.get(user=alice)
    assert (account.status, account.status_reason) == ("suspended", "Chargebacks")
    assert "Chargebacks" in client.get(reverse("dashboard:account", args=[alice.pk])).content.decode()
    client.post(path, {"status": "active", "reason": "Cleared up"})
    assert TokenAccount.objects.get(user=alice).status == "active"


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"status": "suspended", "reason": " "}, "reason"),
        ({"status": "suspended", "reason": "Debt"}, "reason"),
        ({"status": "active", "reason": "Why not"}, "status"),
        ({"reason": "Kept"}, "status"),
    ],
)
def test_a_change_of_status_that_is_none_keeps_what_was_typed(
    as_person: AsPerson, susan: User, alice: User, form: dict[str, str], field: str
) -> None:
    response = as_person(susan).post(reverse("dashboard:account-status", args=[alice.pk]), form)
    assert (response.status_code, list(response.context["status_form"].errors)) == (400, [field])
    assert f'value="{form["reason"]}"' in response.content.decode()
    assert TokenAccount.objects.get(user=alice).status == "active"


def test_an_admin_changes_no_status(as_person: AsPerson, adam: User, alice: User) -> None:
    """Row 64."""
    client = as_person(adam)
    assert "Change the status" not in client.get(reverse("dashboard:account", args=[alice.pk])).content.decode()
    form = {"status": "blocked", "reason": "I can"}
    assert client.post(reverse("dashboard:account-status", args=[alice.pk]), form).status_code == 403
    assert TokenAccount.objects.get(user=alice).status == "active"
    assert AuditEntry.objects.latest("pk").outcome == "refused"


# --- Grants ---------------------------------------------------------------------------------------------------------


def test_a_grant_is_confirmed_before_tokens_move(as_person: AsPerson, susan: User, alice: User) -> None:
    client, path = as_person(susan), reverse("dashboard:new-grant")
    page = client.post(path, grant_form(alice)).content.decode()
    assert "10,500 tokens" in page
    assert balance(alice) == 10_000
    page = client.post(path, grant_form(alice, confirmed="yes"), follow=True).content.decode()
    assert "Done: 500 tokens for alice@example.com." in page
    assert balance(alice) == 10_500


def test_a_grant_sent_twice_is_one(as_person: AsPerson, susan: User, alice: User) -> None:
    """Row 65."""
    client, path = as_person(susan), reverse("dashboard:new-grant")
    for _ in range(2):
        page = client.post(path, grant_form(alice, confirmed="yes"), follow=True).content.decode()
        assert "Done: 500 tokens for alice@example.com." in page
    assert balance(alice) == 10_500
    other = client.post(path, grant_form(alice, confirmed="yes", tokens="600"))
    assert (other.status_code, other.context["form"]["tokens"].value()) == (409, "600")
    assert other.context["form"]["request_key"].value() != "key-of-the-form"
    assert balance(alice) == 10_500


def test_an_admins_grant_becomes_a_request_and_the_page_says_so(as_person: AsPerson, adam: User, alice: User) -> None:
    """Row 64."""
    client, path = as_person(adam), reverse("dashboard:new-grant")
    assert "This becomes a request." in client.post(path, grant_form(alice)).content.decode()
    page = client.post(path, grant_form(alice, confirmed="yes"), follow=True).content.decode()
    assert "No token moves until a superadmin has approved it." in page
    assert (balance(alice), GrantRequest.objects.get().state) == (10_000, "requested")


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"tokens": value}, "tokens") for value in ("", "0", "-5", "1.5", "1e9", "１２", "true", str(2**63))]
    + [({"reason": ""}, "reason"), ({"reason": " \t "}, "reason"), ({"reason": "a\x00b"}, "reason")]
    + [({"kind": "gift"}, "kind"), ({"kind": "deduction", "tokens": "10001"}, "tokens")],
)
def test_a_wrong_grant_says_where_and_loses_nothing(
    as_person: AsPerson, susan: User, alice: User, changed: dict[str, str], field: str
) -> None:
    """Rows 56 and 57."""
    form = grant_form(alice, **changed)
    response = as_person(susan).post(reverse("dashboard:new-grant"), form)
    assert (response.status_code, list(response.context["form"].errors)) == (400, [field])
    kept = response.context["form"]
    assert (kept["tokens"].value(), kept["reason"].value()) == (form["tokens"], form["reason"])
    assert balance(alice) == 10_000


# --- Requests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(adam: User, alice: User) -> GrantRequest:
    return grants.grant_tokens(admin=adam, user_id=alice.pk, tokens=700, reason="A prize", request_key="adams-key")


def test_a_superadmin_approves(as_person: AsPerson, susan: User, alice: User, waiting: GrantRequest) -> None:
    path = reverse("dashboard:decide-request", args=[waiting.pk])
    page = as_person(susan).post(path, {"decision": "approve"}, follow=True).content.decode()
    assert "Approved and done: 700 tokens for alice@example.com." in page
    assert balance(alice) == 10_700


def test_declining_needs_a_reason(as_person: AsPerson, susan: User, alice: User, waiting: GrantRequest) -> None:
    client, path = as_person(susan), reverse("dashboard:decide-request", args=[waiting.pk])
    response = client.post(path, {"decision": "decline", "reason": " "})
    assert (response.status_code, "Enter a reason." in response.content.decode()) == (400, True)
    client.post(path, {"decision": "decline", "reason": "No prizes"})
    waiting.refresh_from_db()
    assert (waiting.state, waiting.decision_reason, balance(alice)) == ("declined", "No prizes", 10_000)
    late = client.post(path, {"decision": "approve"})
    assert (late.status_code, balance(alice)) == (409, 10_000)


def test_nobody_decides_on_their_own_request(as_person: AsPerson, adam: User, alice: User, susan: User) -> None:
    """Row 64."""
    system_settings.update_system_settings(changes={"grant_approval_tokens": 100}, changed_by_id=susan.pk)
    own = grants.grant_tokens(admin=susan, user_id=alice.pk, tokens=700, reason="A prize", request_key="susans-key")
    for person in (susan, adam):
        client = as_person(person)
        assert "Approve<" not in client.get(reverse("dashboard:requests")).content.decode()
        path = reverse("dashboard:decide-request", args=[own.pk])
        assert client.post(path, {"decision": "approve"}).status_code == 403
    assert balance(alice) == 10_000


# --- Audit log ------------------------------------------------------------------------------------------------------


def test_the_audit_log_is_searched_and_paged(as_person: AsPerson, susan: User, adam: User, alice: User) -> None:
    for number in range(30):
        grants.grant_tokens(
            admin=susan, user_id=alice.pk, tokens=5, reason=f"No. {number}", request_key=f"a-key-{number}"
        )
    client, path = as_person(adam), reverse("dashboard:audit")
    first = client.get(path, {"subject": "alice@", "action": "grant"}).context
    second = client.get(path, {"subject": "alice@", "action": "grant", "before": first["next_before_id"]}).context
    seen = [row["entry"].reason for row in first["entries"] + second["entries"]]
    assert seen == [f"No. {number}" for number in range(29, -1, -1)]
    assert client.get(path, {"actor": "bob"}).context["entries"] == []
    assert client.get(path, {"from": "2026-13-01"}).status_code == 422
    assert client.get(path, {"action": "\x00", "actor": "\x00", "before": "9" * 40}).status_code == 200


# --- Settings -------------------------------------------------------------------------------------------------------


def test_every_setting_is_on_the_page() -> None:
    assert set(SystemSettingsForm.base_fields) == set(system_settings.EDITABLE_FIELDS)
    assert [name for _, names in SystemSettingsForm.GROUPS for name in names] == list(SystemSettingsForm.base_fields)


def test_settings_are_previewed_then_saved(as_person: AsPerson, susan: User) -> None:
    client, path = as_person(susan), reverse("dashboard:settings")
    form = settings_form(token_multiplier="1.7", minimum_purchase_cents="7.50")
    response = client.post(path, form | {"preview": "yes"})
    assert "Preview: nothing is saved yet" in response.content.decode()
    assert system_settings.get_system_settings().minimum_purchase_cents == 500
    client.post(path, form | {"save": "yes", "previewed": response.context["fingerprint"]})
    settings = system_settings.get_system_settings()
    assert (str(settings.token_multiplier), settings.minimum_purchase_cents) == ("1.7000", 750)
    assert SettingChange.objects.count() == 2
    page = client.get(path)
    assert sorted(row[1:] for row in page.context["history"]) == [
        ("Multiplier", "1.5", "1.7"),
        ("Smallest purchase in US dollars", "$5.00", "$7.50"),
    ]
    assert 'value="7.50"' in client.get(path).content.decode()


def test_what_was_not_previewed_is_not_saved(as_person: AsPerson, susan: User) -> None:
    """Also when somebody else saves between the preview and the save: that would take their change back."""
    client, path = as_person(susan), reverse("dashboard:settings")
    form = settings_form(welcome_bonus_tokens="5000")
    fingerprint = client.post(path, form).context["fingerprint"]
    system_settings.update_system_settings(changes={"low_balance_tokens": 2_000}, changed_by_id=susan.pk)
    page = client.post(path, form | {"save": "yes", "previewed": fingerprint}).content.decode()
    assert "Not saved yet" in page
    settings = system_settings.get_system_settings()
    assert (settings.welcome_bonus_tokens, settings.low_balance_tokens) == (10_000, 2_000)


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"token_multiplier": value}, "token_multiplier") for value in ("0", "-1", "NaN", "1e400", "１", "x", "")]
    + [({"dalle3_cost_tokens": value}, "dalle3_cost_tokens") for value in ("-1", "0", "1.5", str(2**63), "")]
    + [({"minimum_purchase_cents": value}, "minimum_purchase_cents") for value in ("0", "-1", "1.005", "")]
    + [({"critical_balance_tokens": "1001"}, "critical_balance_tokens")],
)
def test_a_wrong_setting_says_where(as_person: AsPerson, susan: User, changed: dict[str, str], field: str) -> None:
    """Row 56."""
    response = as_person(susan).post(reverse("dashboard:settings"), settings_form(**changed))
    assert (response.status_code, list(response.context["form"].errors)) == (400, [field])
    assert response.context["form"][field].value() == changed[field]


def test_an_admin_only_looks_at_the_settings(as_person: AsPerson, adam: User) -> None:
    """Row 64."""
    client, path = as_person(adam), reverse("dashboard:settings")
    page = client.get(path).content.decode()
    assert "Superadmins change these settings." in page
    assert "<form id=" not in page
    assert client.post(path, settings_form(token_multiplier="9")).status_code == 403
    assert str(system_settings.get_system_settings().token_multiplier) == "1.5000"


# --- Many accounts --------------------------------------------------------------------------------------------------


def bulk_form(**fields: Any) -> dict[str, Any]:
    return {"search": "", "status": "", "band": "", "request_key": "key-of-the-job"} | fields


def test_a_bulk_grant_is_confirmed_started_once_and_told_of(
    as_person: AsPerson, susan: User, alice: User, bob: User
) -> None:
    """Row 65."""
    client, path = as_person(susan), reverse("dashboard:new-bulk-job")
    assert "accounts" in client.get(path).content.decode()
    form = bulk_form(kind="grant", tokens="50", reason="Happy birthday", search="@example.com")
    page = client.post(path, form)
    assert page.context["count"] == TokenAccount.objects.count() == 3
    assert "150 tokens" in page.content.decode()
    for unconfirmed in ({}, {"expected_rows": "2"}):  # without a number, and with that of before bob signed up
        page = client.post(path, form | {"confirmed": "yes"} | unconfirmed)
        assert '<input type="hidden" name="expected_rows" value="3">' in page.content.decode()
    assert page.status_code == 409
    assert "you confirmed 2 accounts, and by now 3 match" in page.content.decode()
    assert not BulkJob.objects.exists()
    for _ in range(2):
        response = client.post(path, form | {"confirmed": "yes", "expected_rows": "3"})
    job = BulkJob.objects.get()
    assert response["Location"] == reverse("dashboard:bulk-job", args=[job.pk])
    bulk.run_bulk_job(job_id=job.pk)
    page = client.get(response["Location"])
    assert (page.context["progress"].total, balance(alice), balance(bob)) == (3, 10_050, 10_050)
    assert "50 tokens granted" in page.content.decode()


def test_a_wrong_bulk_form_says_where(as_person: AsPerson, susan: User) -> None:
    client, path = as_person(susan), reverse("dashboard:new-bulk-job")
    response = client.post(path, bulk_form(kind="grant", tokens="", reason=" "))
    assert (response.status_code, set(response.context["form"].errors)) == (400, {"tokens", "reason"})
    assert not BulkJob.objects.exists()


def test_an_admin_exports_many_accounts_and_nothing_else(as_person: AsPerson, adam: User, alice: User) -> None:
    """Rows 64 and 67."""
    alice.name = "=1+1"
    alice.save()
    client, path = as_person(adam), reverse("dashboard:new-bulk-job")
    refused = client.post(path, bulk_form(kind="grant", tokens="5", reason="Mine", confirmed="yes"))
    assert (refused.status_code, AuditEntry.objects.latest("pk").outcome) == (403, "refused")
    client.post(path, bulk_form(kind="export", confirmed="yes"))
    job = BulkJob.objects.get()
    bulk.run_bulk_job(job_id=job.pk)
    answer = client.get(reverse("dashboard:bulk-job-export", args=[job.pk]))
    assert isinstance(answer, StreamingHttpResponse)
    text = b"".join(answer).decode()
    assert "alice@example.com,'=1+1,10000" in text


def test_a_bulk_job_is_cancelled(as_person: AsPerson, susan: User, alice: User) -> None:
    client = as_person(susan)
    client.post(
        reverse("dashboard:new-bulk-job"),
        bulk_form(kind="suspend", reason="A test", search="alice", confirmed="yes", expected_rows="1"),
    )
    job = BulkJob.objects.get()
    client.post(reverse("dashboard:bulk-job", args=[job.pk]))
    bulk.run_bulk_job(job_id=job.pk)
    job.refresh_from_db()
    assert (job.state, TokenAccount.objects.get(user=alice).status) == ("cancelled", "active")


# --- Stripe's events ------------------------------------------------------------------------------------------------


@pytest.fixture
def aside(db: None) -> StripeEvent:
    return StripeEvent.objects.create(
        event_id="evt_1", type="radar.early_fraud_warning.created", livemode=False, state="aside",
        payload={"id": "evt_1"}, message="The card's bank warns of fraud.",
    )  # fmt: skip


def test_events_that_need_somebody_are_listed_from_the_overview_on(
    as_person: AsPerson, adam: User, aside: StripeEvent
) -> None:
    StripeEvent.objects.create(event_id="evt_2", type="charge.refunded", livemode=False, payload={}, state="failed")
    StripeEvent.objects.create(event_id="evt_3", type="charge.refunded", livemode=False, payload={}, state="received")
    StripeEvent.objects.create(event_id="evt_4", type="charge.refunded", livemode=False, payload={}, state="processed")
    client = as_person(adam)
    overview = client.get(reverse("dashboard:section", args=["live"]), headers={"HX-Request": "true"})
    urls = {figure.label: figure.url for figure in overview.context["content"].figures}
    for label, events in {
        "Stripe events set aside": ["evt_1"],
        "Stripe events to repeat": ["evt_2"],
        "Stripe events waiting": ["evt_3"],
    }.items():
        assert f'href="{urls[label]}"' in overview.content.decode()
        assert [event.event_id for event in client.get(urls[label]).context["page"]] == events
    page = client.get(reverse("dashboard:events"))
    assert [event.event_id for event in page.context["page"]] == ["evt_3", "evt_2", "evt_1"]
    assert "Dealt with" not in page.content.decode()


def test_a_superadmin_deals_with_an_event(as_person: AsPerson, adam: User, susan: User, aside: StripeEvent) -> None:
    """Row 64: and an admin does not."""
    address = reverse("dashboard:handle-event", args=[aside.pk])
    assert as_person(adam).post(address, {"decision": "settle"}).status_code == 403
    aside.refresh_from_db()
    assert aside.state == "aside"
    client = as_person(susan)
    page = client.post(address, {"decision": "settle"}, follow=True).content.decode()
    assert "evt_1 is noted as dealt with." in page
    aside.refresh_from_db()
    assert (aside.state, "Dealt with by hand." in aside.message) == ("processed", True)
    assert AuditEntry.objects.get(action="event_settled").actor == susan


def test_an_event_is_handled_again(as_person: AsPerson, susan: User) -> None:
    """What no handler can read fails once more and stays; what is none of ours is done."""
    event: dict[str, Any] = {
        "id": "evt_9",
        "object": "event",
        "type": "charge.refunded",
        "livemode": False,
        "account": None,
    }
    event |= {
        "api_version": gateway.API_VERSION,
        "created": 1,
        "data": {"object": {"id": "ch_1", "refunds": {"data": [{}]}}},
    }
    row = StripeEvent.objects.create(
        event_id="evt_9", type=event["type"], livemode=False, payload=event, state="failed"
    )
    client, address = as_person(susan), reverse("dashboard:handle-event", args=[row.pk])
    assert "evt_9 failed again" in client.post(address, {"decision": "again"}, follow=True).content.decode()
    row.refresh_from_db()
    assert (row.state, row.attempts) == ("failed", 2)
    assert AuditEntry.objects.get(action="event_settled").actor == susan
    StripeEvent.objects.filter(pk=row.pk).update(type="plan.created", payload=event | {"type": "plan.created"})
    assert "Of no concern to us" in client.post(address, {"decision": "again"}, follow=True).content.decode()
