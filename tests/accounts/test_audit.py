"""The audit log: who did what to whom, kept for ever, and what people were refused."""

from datetime import timedelta
from decimal import Decimal
from io import StringIO
from typing import Any

import pgtrigger
import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection, transaction
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils import timezone

from accounts import audit, roles, two_persons
from accounts.audit import Action
from accounts.models import AuditEntry, ChangeRequest, User
from billing import catalogue
from billing.catalogue import packages, system_settings
from billing.models import Drift, ModelPrice, SettingChange, StripeEvent, SystemSettings, TokenPricing
from tests.conftest import PASSWORD, MakeUser

pytestmark = pytest.mark.django_db


TRIGGERS = ("accounts.AuditEntry:append_only", "accounts.AuditEntry:never_truncated")


def write(actor: User | None, **fields: Any) -> AuditEntry:
    return audit.write(**({"action": Action.EXPORT, "summary": "Test", "actor": actor} | fields))


def newest(before: int = 0) -> AuditEntry:
    return AuditEntry.objects.order_by("-pk")[before]


def is_refused_by_the_database(sql: str) -> bool:
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(sql)
    except DatabaseError as error:
        return "pgtrigger: Cannot" in str(error) or "append-only" in str(error)
    return False


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE accounts_auditentry SET summary = 'Nothing happened'",
        "UPDATE accounts_auditentry SET actor_id = NULL, actor_role = ''",
        "DELETE FROM accounts_auditentry",
        "TRUNCATE accounts_auditentry",
    ],
)
def test_entries_are_never_changed(susan: User, sql: str) -> None:
    """Row 71, for the audit log."""
    write(susan)
    before = list(AuditEntry.objects.values())
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert is_refused_by_the_database(sql)
    assert list(AuditEntry.objects.values()) == before
    with pgtrigger.ignore(*TRIGGERS), connection.cursor() as cursor:
        cursor.execute(sql)  # it is the triggers that refuse it
    assert list(AuditEntry.objects.values()) != before


def test_an_entry_is_there_only_with_what_it_tells_of(susan: User) -> None:
    count = AuditEntry.objects.count()

    def write_and_fail() -> None:
        with transaction.atomic():
            write(susan)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert AuditEntry.objects.count() == count


def test_an_entry_says_who_from_where_in_which_role(client: Client, susan: User, adam: User) -> None:
    client.force_login(adam)
    client.post(reverse("dashboard:resolve-drift", args=[1]), REMOTE_ADDR="192.0.2.7")
    entry = newest()
    assert (entry.actor, entry.actor_role, entry.ip_address) == (adam, "admin", "192.0.2.7")
    assert len(entry.request_id) == 32
    roles.change_role(user_id=adam.pk, role="user", changed_by=susan)
    entry.refresh_from_db()
    assert entry.actor_role == "admin"
    assert newest().ip_address is None  # no request: a shell


def test_texts_that_postgresql_cannot_keep_are_made_plain(susan: User) -> None:
    """Row 57."""
    entry = write(susan, summary="a\x00b\ud800\nc" + "x" * 1_000, reason="\x1b[31m")
    entry.refresh_from_db()
    assert entry.summary.startswith("a b c")
    assert len(entry.summary) == 500
    assert entry.reason == "[31m"


# --- Refusals -------------------------------------------------------------------------------------------------------


def refusals_of(user: User) -> int:
    return AuditEntry.objects.filter(actor=user, outcome="refused").count()


@pytest.mark.parametrize("who", ["alice", "adam"])
def test_refused_attempts_are_written(client: Client, request: pytest.FixtureRequest, who: str) -> None:
    """Row 64: whoever tries what is a superadmin's leaves a trace."""
    user = request.getfixturevalue(who)
    client.force_login(user)
    address = reverse("dashboard:resolve-drift", args=[1])
    assert client.post(address).status_code == 403
    entry = newest()
    assert (entry.actor, entry.outcome, entry.action) == (user, "refused", "access")
    assert entry.summary == f"Was refused POST {address}"


@pytest.mark.parametrize("who", ["alice", "adam"])
def test_django_admin_refuses_and_says_so(client: Client, request: pytest.FixtureRequest, who: str) -> None:
    """Row 64. Who is signed in is not offered another way of signing in."""
    user = request.getfixturevalue(who)
    client.force_login(user)
    response = client.get(reverse("admin:index"), follow=True)
    assert response.status_code == 403
    assert (newest().actor, newest().outcome) == (user, "refused")


def test_django_admin_has_no_door_of_its_own(client: Client, susan: User) -> None:
    """Row 69: its own form would know neither the limit on guesses nor the second factor."""
    response = client.post(reverse("admin:login"), {"username": susan.email, "password": PASSWORD})
    assert response.status_code == 302
    assert response["Location"].startswith(reverse("account_login"))
    assert "_auth_user_id" not in client.session
    client.force_login(susan)
    assert client.get(reverse("admin:login"))["Location"] == reverse("admin:index")


def test_trying_does_not_fill_the_log(client: Client, alice: User, adam: User) -> None:
    client.force_login(alice)
    for _ in range(2 * audit.REFUSALS_PER_MINUTE):
        assert client.get(reverse("dashboard:drifts")).status_code == 403
    assert refusals_of(alice) == audit.REFUSALS_PER_MINUTE
    client.force_login(adam)  # one's attempts do not hide another's
    client.post(reverse("dashboard:resolve-drift", args=[1]))
    assert refusals_of(adam) == 1
    with pgtrigger.ignore("accounts.AuditEntry:append_only"):
        AuditEntry.objects.update(created_at=timezone.now() - timedelta(minutes=2))
    client.force_login(alice)
    client.get(reverse("dashboard:drifts"))
    assert refusals_of(alice) == audit.REFUSALS_PER_MINUTE + 1


def test_an_address_of_any_kind_is_refused_all_the_same(alice: User) -> None:
    """Row 57: what cannot be stored must not turn a 403 into an error."""
    request = RequestFactory().get("/admin/tokens/")
    request.user = alice
    assert audit.write_refusal(action=Action.ACCESS, summary="Was refused GET /\x00\udcff", actor=alice)


# --- Roles ----------------------------------------------------------------------------------------------------------


def test_a_role_is_given_by_two_superadmins(make_user: MakeUser, susan: User, alice: User, adam: User) -> None:
    """One asks, another one approves: neither who asked nor whom it is for."""
    sandra = make_user("sandra", role="superadmin")
    request = roles.change_role(user_id=alice.pk, role="superadmin", changed_by=susan, reason="Support")
    assert request
    assert (newest().action, newest().outcome) == ("role_changed", "requested")
    assert roles.change_role(user_id=alice.pk, role="superadmin", changed_by=susan, reason="Support") == request
    for who in (susan, adam, alice):
        with pytest.raises(two_persons.ChangeNotDecided):
            two_persons.approve(request_id=request.pk, by=who)
        assert (newest().actor, newest().outcome) == (who, "refused")
    alice.refresh_from_db()
    assert alice.role == "user"
    two_persons.approve(request_id=request.pk, by=sandra)
    alice.refresh_from_db()
    assert alice.role == "superadmin"
    entry = newest()  # the database's own entry is not written beside it
    assert (entry.action, entry.actor, entry.subject) == ("role_changed", susan, alice)
    assert (entry.before, entry.after, entry.reason) == ({"role": "user"}, {"role": "superadmin"}, "Support")
    assert (ChangeRequest.objects.get().decided_by, newest(1).actor) == (sandra, sandra)
    with pytest.raises(two_persons.ChangeAlreadyDecided):
        two_persons.approve(request_id=request.pk, by=sandra)
    # Taking a role away is done at once, and giving it back is not.
    assert roles.change_role(user_id=alice.pk, role="admin", changed_by=susan) is None
    alice.refresh_from_db()
    assert alice.role == "admin"
    again = roles.change_role(user_id=alice.pk, role="superadmin", changed_by=susan)
    assert again
    two_persons.decline(request_id=again.pk, by=susan)  # taken back
    with pytest.raises(two_persons.ChangeAlreadyDecided):
        two_persons.approve(request_id=again.pk, by=sandra)
    # What nobody decided in time is closed, by the database's clock; who was switched off gets no role.
    late = roles.change_role(user_id=alice.pk, role="superadmin", changed_by=susan)
    assert late
    ChangeRequest.objects.filter(pk=late.pk).update(expires_at=timezone.now())
    with pytest.raises(two_persons.ChangeAlreadyDecided):
        two_persons.approve(request_id=late.pk, by=sandra)
    # Nor a person with two accounts, whose addresses lead to one mailbox.
    double = roles.change_role(user_id=adam.pk, role="superadmin", changed_by=susan)
    assert double
    for person, address in ((sandra, "su.san+2@googlemail.com"), (susan, "susan@gmail.com")):
        User.objects.filter(pk=person.pk).update(email=address)
    with pytest.raises(two_persons.ChangeNotDecided):
        two_persons.approve(request_id=double.pk, by=sandra)
    User.objects.filter(pk=sandra.pk).update(email="sandra@example.com")
    # The word of somebody who is no superadmin any more is none: else one is enough.
    alone = roles.change_role(user_id=adam.pk, role="superadmin", changed_by=susan)
    assert alone
    User.objects.filter(pk=susan.pk).update(is_active=False)
    with pytest.raises(two_persons.ChangeNotDecided):
        two_persons.approve(request_id=alone.pk, by=sandra)
    User.objects.filter(pk=susan.pk).update(is_active=True)
    off = roles.change_role(user_id=adam.pk, role="superadmin", changed_by=susan)
    assert off
    User.objects.filter(pk=adam.pk).update(is_active=False)
    with pytest.raises(roles.RoleNotChanged):
        two_persons.approve(request_id=off.pk, by=sandra)


def test_settings_that_guard_grants_are_loosened_by_two(client: Client, susan: User, make_user: MakeUser) -> None:
    """Tightened by one; also through the pages, with what else was changed at once; and on the server where there is
    one superadmin alone."""
    sandra = make_user("sandra", role="superadmin")

    def now() -> tuple[int, int | None, int]:
        found = system_settings.get_system_settings()
        return found.admin_grant_limit_tokens, found.grant_approval_tokens, found.low_balance_tokens

    def change(**changes: Any) -> None:
        system_settings.update_system_settings(changes=changes, changed_by_id=susan.pk)

    change(grant_approval_tokens=500, admin_grant_limit_tokens=90, low_balance_tokens=700)
    assert now() == (0, 500, 700)
    (limit,) = two_persons.list_open()
    two_persons.approve(request_id=limit.pk, by=sandra)
    assert now() == (90, 500, 700)
    change(grant_approval_tokens=None)
    change(grant_approval_tokens=501)  # in its place
    change(admin_grant_limit_tokens=80)
    assert now() == (80, 500, 700)
    (waiting,) = two_persons.list_open()
    with pytest.raises(two_persons.ChangeNotDecided):
        two_persons.approve(request_id=waiting.pk, by=susan)
    client.force_login(susan)
    address = reverse("dashboard:decide-change", args=[waiting.pk])
    assert "grant approval tokens: 501" in client.get(reverse("dashboard:requests")).content.decode()
    assert client.post(address, {"decision": "approve"}).status_code == 403
    assert now() == (80, 500, 700)
    client.force_login(sandra)
    assert client.post(address, {"decision": "approve"}).status_code == 302
    assert now() == (80, 501, 700)
    assert SettingChange.objects.latest("pk").changed_by == susan
    assert client.post(address, {"decision": "approve"}).status_code == 409

    # Row 134: a bonus above the limit, and tokens for next to nothing, are grants by another name.
    change(welcome_bonus_tokens=400, tokens_per_usd=Decimal(9_000))
    change(welcome_bonus_tokens=10_000, tokens_per_usd=Decimal("9000.5"))
    found = system_settings.get_system_settings()
    assert (found.welcome_bonus_tokens, found.tokens_per_usd) == (400, Decimal(9_000))
    for cheap in ({"tokens": 45_001}, {"tokens": 90_001, "price_usd_cents": 100}, {"price_gbp_cents": 1}):
        fields: dict[str, Any] = {"name": "Gift", "tokens": 901, "price_usd_cents": 50, **cheap}
        with pytest.raises(ValidationError, match="More than 10 times"):
            packages.create_package(changed_by_id=susan.pk, **fields)
    (waiting,) = two_persons.list_open()
    two_persons.approve(request_id=waiting.pk, by=sandra)
    found = system_settings.get_system_settings()
    assert (found.welcome_bonus_tokens, found.tokens_per_usd) == (10_000, Decimal("9000.5"))

    cheaper = {"token_multiplier": Decimal("0.01"), "billing_enabled": False, "imagen_cost_tokens": 1}
    dearer = {"token_multiplier": Decimal("1.6"), "billing_enabled": True, "dalle3_cost_tokens": 6_001}
    change(**dearer)
    change(**cheaper)
    found = system_settings.get_system_settings()
    assert {name: getattr(found, name) for name in dearer} == dearer
    (waiting,) = two_persons.list_open()
    two_persons.approve(request_id=waiting.pk, by=sandra)
    found = system_settings.get_system_settings()
    assert {name: getattr(found, name) for name in cheaper} == cheaper

    change(grant_approval_tokens=9_000)
    output = StringIO()
    call_command("approve_change", stdout=output)
    (waiting,) = two_persons.list_open()
    assert output.getvalue().startswith(f"{waiting.pk}  Settings: grant approval tokens: 9000, by susan@")
    call_command("approve_change", str(waiting.pk), stdout=output)
    assert now() == (80, 9_000, 700)
    with pytest.raises(CommandError, match="closed already"):
        call_command("approve_change", str(waiting.pk))


@pytest.mark.parametrize("who", ["alice", "adam", "susan"])
def test_nobody_gives_themselves_a_role(request: pytest.FixtureRequest, who: str) -> None:
    """Row 64; and the last superadmin stays one."""
    user = request.getfixturevalue(who)
    for role in ("user", "superadmin"):
        with pytest.raises(roles.RoleNotChanged):
            roles.change_role(user_id=user.pk, role=role, changed_by=user)
    before = user.role
    user.refresh_from_db()
    assert user.role == before
    assert refusals_of(user) == 2


def test_a_stale_superadmin_gives_no_roles(susan: User, alice: User) -> None:
    """Row 64: what counts is the role in the database, not the one of the object."""
    User.objects.filter(pk=susan.pk).update(role="admin")
    with pytest.raises(roles.RoleNotChanged):
        roles.change_role(user_id=alice.pk, role="superadmin", changed_by=susan)


def test_a_role_changed_past_the_pages_is_written_by_the_database(alice: User) -> None:
    User.objects.filter(pk=alice.pk).update(role="superadmin")
    entry = newest()
    assert (entry.action, entry.actor, entry.subject) == ("role_changed", None, alice)
    assert (entry.before, entry.after) == ({"role": "user"}, {"role": "superadmin"})
    count = AuditEntry.objects.count()
    User.objects.filter(pk=alice.pk).update(name="Alice", role="superadmin")
    assert AuditEntry.objects.count() == count
    root = User.objects.create_superuser("root@example.com", "x")
    assert (newest().subject, newest().after) == (root, {"role": "superadmin"})


def test_a_role_in_django_admin(client: Client, susan: User, alice: User) -> None:
    client.force_login(susan)
    address = reverse("admin:accounts_user_change", args=[alice.pk])
    fields = {"email": alice.email, "name": "Alice B.", "time_zone": "", "is_active": "on"}
    assert client.post(address, fields | {"role": "admin", "email": "thief@example.com"}).status_code == 302
    alice.refresh_from_db()
    assert (alice.role, alice.name, alice.email) == ("user", "Alice B.", "alice@example.com")
    promoted, edited = AuditEntry.objects.order_by("-pk")[:2]
    assert (promoted.action, promoted.actor, promoted.subject) == ("role_changed", susan, alice)
    assert promoted.outcome == "requested"
    assert (edited.action, edited.actor, edited.subject) == ("person_changed", susan, alice)
    assert "Alice" not in edited.summary  # no names in a log that is kept for ever
    # Who had a role and was switched off does not come back with it by one person's word.
    User.objects.filter(pk=alice.pk).update(role="superadmin", is_active=False)
    answer = client.post(address, fields | {"role": "superadmin"})
    assert "Take the role away first" in answer.content.decode()
    # Nobody's own role: the field is not read.
    own = reverse("admin:accounts_user_change", args=[susan.pk])
    client.post(own, {"email": susan.email, "name": "S", "time_zone": "", "is_active": "on", "role": "user"})
    susan.refresh_from_db()
    assert (susan.role, susan.name) == ("superadmin", "S")


# --- What else is written -------------------------------------------------------------------------------------------


def test_settings_packages_and_prices(seeded: None, susan: User) -> None:
    system_settings.update_system_settings(
        changes={"welcome_bonus_tokens": 5, "grant_approval_tokens": 9}, changed_by_id=susan.pk
    )
    entry = newest()
    assert (entry.action, entry.actor) == ("setting_changed", susan)
    assert entry.before == {"welcome_bonus_tokens": "10000", "grant_approval_tokens": ""}
    assert entry.after == {"welcome_bonus_tokens": "5", "grant_approval_tokens": "9"}

    starter = TokenPricing.objects.get(name="Starter")
    packages.update_package(starter.pk, changed_by_id=susan.pk, price_usd_cents=1_600, tokens=starter.tokens)
    packages.update_package(starter.pk, changed_by_id=susan.pk, price_usd_cents=1_600)  # no change, no entry
    (entry,) = packages.list_changes(starter.pk).entries
    assert (entry.actor, entry.before, entry.after) == (susan, {"price_usd_cents": 1_500}, {"price_usd_cents": 1_600})
    added = packages.create_package(changed_by_id=susan.pk, name="Tiny", tokens=5, price_usd_cents=500)
    assert packages.list_changes(added.pk).entries[0].after == {"name": "Tiny", "tokens": 5, "price_usd_cents": 500}

    luna = ModelPrice.objects.get(model="gpt-6-luna")
    catalogue.update_model_price(
        price_id=luna.pk, changes={"max_output_tokens": 9}, changed_by_id=susan.pk, source="admin"
    )
    assert (newest().action, newest().after) == ("price_changed", {"max_output_tokens": "9"})


def test_a_package_in_django_admin(client: Client, seeded: None, susan: User) -> None:
    client.force_login(susan)
    starter = TokenPricing.objects.get(name="Starter")
    address = reverse("admin:billing_tokenpricing_change", args=[starter.pk])
    form = client.get(address).context["adminform"].form
    fields = {name: form[name].value() for name in form.fields} | {"price_usd_cents": "1700"}
    fields = {name: value for name, value in fields.items() if value not in (None, False)}
    assert client.post(address, fields).status_code == 302
    assert TokenPricing.objects.get(pk=starter.pk).price_usd_cents == 1_700
    (entry,) = packages.list_changes(starter.pk).entries
    assert (entry.actor, entry.after) == (susan, {"price_usd_cents": 1_700})
    row = "<td>price_usd_cents</td><td>1500 → 1700</td><td>susan@example.com</td>"
    assert row in client.get(address).content.decode()
    # What is missing is said at its field, also where the tokens are held against the price.
    SystemSettings.objects.update_or_create(key="global", defaults={"grant_approval_tokens": 1_000})
    for name in ("tokens", "price_usd_cents"):
        answer = client.post(reverse("admin:billing_tokenpricing_add"), fields | {name: ""})
        assert (answer.status_code, list(answer.context["adminform"].form.errors)) == (200, [name])


def test_what_a_person_does_about_stripe(client: Client, susan: User) -> None:
    client.force_login(susan)
    drift = Drift.objects.create(kind="unknown_payment", stripe_id="pi_1", description="A payment")
    client.post(reverse("dashboard:resolve-drift", args=[drift.pk]), {"resolution": "Asked them"})
    assert (newest().action, newest().actor, newest().reason) == ("drift_resolved", susan, "Asked them")
    event = StripeEvent.objects.create(event_id="evt_1", type="x", livemode=False, payload={}, state="aside")
    client.post(
        reverse("admin:billing_stripeevent_changelist"), {"action": "settle_by_hand", "_selected_action": event.pk}
    )
    assert (newest().action, newest().actor, newest().object_id) == ("event_settled", susan, str(event.pk))


# --- Search ---------------------------------------------------------------------------------------------------------


def test_search(make_user: MakeUser, susan: User, alice: User, bob: User) -> None:
    other = make_user("sandra", role="superadmin")
    first = write(susan, subject_id=alice.pk, action=Action.GRANT, about=("grant_request", 7))
    second = write(other, subject_id=bob.pk, action=Action.GRANT, outcome="refused")
    third = write(susan, subject_id=bob.pk, action=Action.REFUND)
    written = {first.pk, second.pk, third.pk}

    def found(**filters: Any) -> list[int]:
        return [entry.pk for entry in audit.find_entries(**filters).entries if entry.pk in written]

    assert found() == [third.pk, second.pk, first.pk]
    assert found(actor="SUSAN@") == found(actor=str(susan.pk)) == [third.pk, first.pk]
    assert found(subject="bob") == [third.pk, second.pk]
    assert found(subject="bob", actor="sandra") == [second.pk]
    assert found(action="grant") == [second.pk, first.pk]
    assert found(outcome="refused") == [second.pk]
    assert found(about=("grant_request", 7)) == [first.pk]
    for nothing in ({"actor": "nobody"}, {"actor": "\x00"}, {"subject": "9" * 30}, {"about": ("grant_request", 8)}):
        assert found(**nothing) == []
    now = timezone.now()
    assert found(since=now - timedelta(minutes=1)) == found()
    assert found(until=now - timedelta(minutes=1)) == found(since=now + timedelta(minutes=1)) == []


def test_pages_hold_every_entry_once(susan: User) -> None:
    for _ in range(7):
        write(susan)
    everything = [entry.pk for entry in audit.find_entries(limit=100).entries]
    pages, before_id = [], None
    while True:
        page = audit.find_entries(limit=3, before_id=before_id)
        pages += [entry.pk for entry in page.entries]
        write(susan)  # what is new pushes nothing onto the next page
        before_id = page.next_before_id
        if before_id is None:
            break
    assert pages == everything
