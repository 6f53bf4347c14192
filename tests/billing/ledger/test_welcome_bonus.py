"""The welcome bonus comes once for a person: for an account, and for a mailbox (row 132)."""

from importlib import import_module
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from django.apps import apps
from django.core import mail
from django.core.management import CommandError, call_command
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import AuditEntry, User
from ai_ops import own_data
from billing import ledger
from billing.ledger import welcome
from billing.models import BonusKey, BonusMark, SystemSettings, TokenAccount, TokenTransaction
from billing.staff import grants
from tests.accounts.test_people import link_in, sign_up
from tests.conftest import prove_address
from tests.payments import verify_books
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("seeded", "fresh_limits")]

BONUS = 10_000


@pytest.fixture(autouse=True)
def mandatory(settings: Settings) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"


def join(email: str) -> User:
    """Signs up and confirms, as far as the rows go."""
    user = User.objects.create_user(email)
    prove_address(user)
    return user


def balance(user: User) -> int:
    return TokenAccount.objects.get(user=user).balance


def withheld(user: User) -> str:
    return TokenAccount.objects.get(user=user).bonus_withheld


def confirm_by_link(client: Client) -> User:
    """Follow the link of the newest mail."""
    client.post(link_in(mail.outbox[-1].body))
    return User.objects.get(emailaddress__email=mail.outbox[-1].to[0])


def test_signing_up_again_after_being_anonymised_brings_nothing(stripe: StripeStandIn) -> None:
    """By the pages, in every spelling; the address itself is in no row any more."""
    for number, email in enumerate(["john.doe@gmail.com", "john.doe@gmail.com", "JohnDoe+2@googlemail.com"]):
        client = Client()
        sign_up(client, email)
        user = confirm_by_link(client)
        assert (balance(user), withheld(user)) == ((0, "given_before") if number else (BONUS, ""))
        client.force_login(user)
        told = client.get(reverse("tokens:home")).content.decode()
        assert ("was given to this mailbox before" in told) == bool(number)
        own_data.anonymize_user(user_id=user.pk)
        assert (balance(user), EmailAddress.objects.count()) == (0 if number else BONUS, 0)
    verify_books()


def test_nobody_is_told_before_the_address_is_confirmed(settings: Settings) -> None:
    """It says that somebody with this mailbox was here: a stranger must not learn it by signing an address up."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "optional"
    sign_up(Client(), "nora@example.com")
    client = Client()
    sign_up(client, "nora+x@example.com")
    user = User.objects.get(email="nora+x@example.com")
    assert withheld(user) == "given_before"
    assert "was given to this mailbox" not in client.get(reverse("tokens:home")).content.decode()
    EmailAddress.objects.filter(user=user).update(verified=True)
    assert "was given to this mailbox" in client.get(reverse("tokens:home")).content.decode()


def test_further_addresses_are_the_same_person(stripe: StripeStandIn) -> None:
    """Whatever was confirmed by who had the bonus has had it: added before or after, removed or changed back."""
    user = join("first@example.com")
    second = EmailAddress.objects.create(user=user, email="second@example.com", verified=True)
    EmailAddress.objects.filter(user=user, primary=True).delete()
    second.set_as_primary()
    third = EmailAddress.objects.create(user=user, email="third@example.com")  # not confirmed: anybody's
    assert balance(join("first+again@example.com")) == 0
    assert balance(join("second+1@example.com")) == 0
    third.delete()
    assert balance(join("third@example.com")) == BONUS
    # Refused once is refused for good: a fresh address brings nothing, and is theirs from then on.
    refused = join("second+2@example.com")
    EmailAddress.objects.create(user=refused, email="fourth@example.com", verified=True)
    assert (balance(refused), withheld(refused)) == (0, "given_before")
    assert balance(join("fourth+x@example.com")) == 0
    # What no signal told of is remembered when nobody can know it any more.
    EmailAddress.objects.filter(user=user).update(email="quietly@example.com")
    own_data.anonymize_user(user_id=user.pk)
    assert balance(join("quietly@example.com")) == 0
    verify_books()


def test_deleted_in_the_middle_is_nobody(settings: Settings, stripe: StripeStandIn) -> None:
    """What was to come after the confirmation finds somebody anonymised: no bonus for nobody, by any road."""
    user = User.objects.create_user("gone@example.com")
    EmailAddress.objects.bulk_create([EmailAddress(user=user, email=user.email, verified=True)])  # tells no receiver
    own_data.anonymize_user(user_id=user.pk)
    settings.ACCOUNT_EMAIL_VERIFICATION = "optional"
    ledger.initialize_account(user_id=user.pk)
    call_command("initialize_accounts")
    assert balance(user) == 0
    assert balance(join("gone@example.com")) == BONUS  # nothing was given


@pytest.mark.parametrize("broken", ["billing.ledger.add_tokens", "billing.ledger.welcome.claim"])
def test_entry_and_mark_are_there_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Law 8. Killed between the two: neither is there, and the next call gives it."""
    user = User.objects.create_user("nora@example.com")
    TokenAccount.objects.all().delete()
    EmailAddress.objects.bulk_create([EmailAddress(user=user, email=user.email, verified=True)])
    module, name = broken.rsplit(".", 1)
    before = getattr(welcome if "welcome" in module else ledger, name)

    def die(*arguments: Any, **options: Any) -> None:
        before(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, die)
        with pytest.raises(KeyboardInterrupt):
            ledger.initialize_account(user_id=user.pk)
    for model in (BonusMark, TokenTransaction, TokenAccount):
        assert not model.objects.exists()
    assert ledger.get_account(user_id=user.pk).balance == BONUS


# --- The key ------------------------------------------------------------------------------------------------


def test_a_new_secret_key_knows_who_had_it(settings: Settings, stripe: StripeStandIn) -> None:
    own_data.anonymize_user(user_id=join("nora@example.com").pk)
    kept = str(BonusMark.objects.values_list()) + str(BonusKey.objects.values_list())
    assert "nora" not in kept
    for secret_key, fallbacks in (("new", [settings.SECRET_KEY]), ("new", []), ("newer", ["new"]), ("newer", [])):
        settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = secret_key, fallbacks
        again = join("nora+1@example.com")
        assert withheld(again) == "given_before", (secret_key, fallbacks)
        own_data.anonymize_user(user_id=again.pk)


def test_a_secret_key_replaced_at_once_gives_nobody_a_bonus(settings: Settings) -> None:
    """It is not known any more who had it. Nothing is decided, and nothing lost: the old key brings it back."""
    join("nora@example.com")
    old, settings.SECRET_KEY = settings.SECRET_KEY, "new"
    other = join("other@example.com")
    assert (balance(other), withheld(other)) == (0, "")
    with pytest.raises(CommandError, match="SECRET_KEY"):
        call_command("initialize_accounts")
    settings.SECRET_KEY_FALLBACKS = [old]
    call_command("seed_billing")
    settings.SECRET_KEY_FALLBACKS = []
    call_command("initialize_accounts")
    assert balance(other) == BONUS
    assert balance(join("nora+x@example.com")) == 0


def test_who_had_it_before_there_were_marks(monkeypatch: pytest.MonkeyPatch, stripe: StripeStandIn) -> None:
    """The migration: in batches, again after an interruption, also for an address added since."""
    migration = import_module("billing.migrations.0020_who_had_the_welcome_bonus")
    users = [join(f"old{number}@example.com") for number in range(5)]
    EmailAddress.objects.create(user=users[0], email="older@example.com", verified=True)
    SystemSettings.objects.update(welcome_bonus_tokens=0)
    without = join("without@example.com")
    SystemSettings.objects.update(welcome_bonus_tokens=BONUS)
    BonusMark.objects.all().delete()
    BonusKey.objects.all().delete()
    monkeypatch.setattr(migration, "BATCH_ACCOUNTS", 2)
    for _ in range(2):
        migration.remember(apps, None)
    assert BonusMark.objects.count() == 6
    assert balance(join("older+x@example.com")) == balance(join("old4+x@example.com")) == 0
    ledger.initialize_account(user_id=without.pk)
    assert balance(without) == BONUS


# --- Disposable addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "state"), [("wait", "waits"), ("none", "disposable"), ("give", "")])
def test_disposable_addresses(setting: str, state: str) -> None:
    SystemSettings.objects.create(welcome_bonus_disposable=setting)
    user = join("nora@sub.mailinator.com")
    assert (balance(user), withheld(user)) == (0 if state else BONUS, state)
    # An address of their own brings it at once, and then both have had it.
    EmailAddress.objects.create(user=user, email="nora@example.com", verified=True)
    assert (balance(user), withheld(user)) == (BONUS, "")
    again = [join(email) for email in ("nora+x@example.com", "nora+x@sub.mailinator.com")]
    assert [withheld(each) for each in again] == ["given_before"] * 2
    verify_books()


def test_an_admin_gives_the_one_that_waits(client: Client, adam: User) -> None:
    user = join("nora@mailinator.com")
    client.force_login(user)
    assert "waits until somebody here" in client.get(reverse("tokens:home")).content.decode()
    give, account = reverse("dashboard:give-bonus", args=[user.pk]), reverse("dashboard:account", args=[user.pk])
    admins = Client()
    admins.force_login(adam)
    assert give in admins.get(reverse("dashboard:requests")).content.decode()
    assert give in admins.get(account).content.decode()
    for _ in range(2):
        admins.post(give)
    assert (balance(user), TokenTransaction.objects.filter(user=user).count()) == (BONUS, 1)
    assert AuditEntry.objects.get(subject=user, outcome="done").actor == adam
    assert give not in admins.get(account).content.decode()
    again = join("nora+x@mailinator.com")
    assert withheld(again) == "given_before"
    assert "given before to this mailbox" in admins.get(reverse("dashboard:account", args=[again.pk])).content.decode()
    # Nobody gives their own, also not by another account at the same mailbox; nor does a former admin.
    waits, same_person = join("eve@mailinator.com"), join("eve+2@mailinator.com")
    User.objects.filter(pk__in=(waits.pk, same_person.pk)).update(role=User.Role.ADMIN)
    User.objects.filter(pk=adam.pk).update(role=User.Role.USER)
    for someone in (waits, same_person, adam):
        with pytest.raises(grants.GrantNotAllowed):
            grants.give_waiting_bonus(admin=someone, user_id=waits.pk)
    assert balance(waits) == 0
    verify_books()


def test_what_was_given_meanwhile_is_found_out(adam: User) -> None:
    """Two spellings wait; the second is told that it had it."""
    first, second = join("nora@mailinator.com"), join("nora+x@mailinator.com")
    grants.give_waiting_bonus(admin=adam, user_id=first.pk)
    with pytest.raises(grants.GrantNotPossible, match="had the bonus before"):
        grants.give_waiting_bonus(admin=adam, user_id=second.pk)
    assert (balance(second), withheld(second)) == (0, "given_before")
    verify_books()
