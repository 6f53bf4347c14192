"""Name, time zone and currency; whose clock the times are shown by."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from django.db import connection
from django.template.loader import render_to_string
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from accounts import time_zones
from accounts.models import User
from accounts.templatetags.devices import device_name
from billing import ledger
from billing.catalogue import packages
from billing.models import Notification, Purchase, TokenAccount, TokenPricing
from billing.notifications import messages, outbox
from billing.payments import checkout
from tests.payments import begin_checkout
from tests.servers import Server, StripeStandIn

pytestmark = pytest.mark.django_db

MOMENT = datetime(2026, 7, 1, 22, 30, tzinfo=UTC)
SAVED = {"name": "Alice", "time_zone": "", "currency": "usd"}


@pytest.fixture(autouse=True)
def _utc_afterwards() -> object:
    """A request leaves its time zone to the next one; a test does not."""
    yield
    timezone.deactivate()


@pytest.fixture
def in_euros(seeded: None) -> None:
    packages.update_package(TokenPricing.objects.get(name="Starter").pk, price_eur_cents=1_400)


def zone_after(client: Client, path: str = "/healthz") -> str:
    client.get(path)
    return timezone.get_current_timezone_name()


# --- The time zone --------------------------------------------------------------------------------------------------


def test_the_settings_decide_then_the_browser_then_utc(buyer: Client, alice: User) -> None:
    assert zone_after(buyer) == "UTC"
    buyer.cookies["time_zone"] = "Asia/Tokyo"
    assert zone_after(buyer) == "Asia/Tokyo"
    alice.time_zone = "America/New_York"
    alice.save()
    assert zone_after(buyer) == "America/New_York"
    assert zone_after(Client()) == "UTC"  # the next person's request does not inherit it


@pytest.mark.parametrize(
    "name", ["", "Mars/Olympus", "../../etc/passwd", "/etc/localtime", "a" * 5_000, "Europe/Berlin\x00"]
)
def test_a_cookie_that_names_no_zone_is_utc(client: Client, name: str) -> None:
    client.cookies["time_zone"] = name
    assert zone_after(client) == "UTC"


def test_nobody_is_looked_up_for_a_stranger(client: Client) -> None:
    client.cookies["time_zone"] = "Asia/Tokyo"
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert zone_after(client) == "Asia/Tokyo"
    assert len(queries) == 0


def test_times_on_pages_follow_it_and_name_it() -> None:
    with timezone.override("Europe/Berlin"):
        html = render_to_string("_time.html", {"at": MOMENT})
    assert "2 Jul 2026, 00:30<" in html
    assert 'title="Thursday, 2 July 2026, 00:30 CEST"' in html


@pytest.mark.django_db(transaction=True)
def test_async_pages_follow_it_too(alice: User, web: Server) -> None:
    """Over the process that serves streams, where the middleware is asynchronous."""
    alice.time_zone = "Pacific/Auckland"
    alice.save()
    client = Client()
    client.force_login(alice)
    cookies = {name: morsel.value for name, morsel in client.cookies.items()}
    page = web.get("/accounts/settings/", cookies=cookies)
    assert page.status_code == 200
    assert "(Pacific/Auckland)" in page.text


def test_every_choice_is_known_to_the_database() -> None:
    """Charts group by the zone's name in SQL."""
    offered = {name for _, zones in time_zones.list_choices(MOMENT) for name, _ in zones}
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM pg_timezone_names")
        known = {name for (name,) in cursor.fetchall()}
    assert len(offered) > 300
    assert offered <= known


def test_choices_tell_their_distance_from_utc() -> None:
    labels = {name: label for _, zones in time_zones.list_choices(MOMENT) for name, label in zones}
    assert labels["Europe/Berlin"] == "Berlin (UTC+02:00)"
    assert labels["Asia/Kolkata"] == "Kolkata (UTC+05:30)"
    assert labels["America/St_Johns"] == "St Johns (UTC−02:30)"


def test_emails_use_the_zone_of_the_settings(alice: User) -> None:
    account = ledger.get_account(user_id=alice.pk)
    package = TokenPricing.objects.get(name="Starter")
    for zone, words in (("Europe/Berlin", "2 July 2026 at 00:30 CEST"), ("", "1 July 2026 at 22:30 UTC")):
        alice.time_zone = zone
        alice.save()
        purchase = Purchase.objects.create(
            account=account, user=alice, workspace_id=account.workspace_id, kind="auto_recharge", state="failed",
            package=package, package_name="Starter", tokens=1, amount_cents=1, currency="usd",
        )  # fmt: skip
        messages.auto_recharge_failed(purchase, retry_at=MOMENT)
        email = outbox.render_email(Notification.objects.get(key=f"auto_recharge_failed:{purchase.pk}"))
        assert words in email.body


# --- The page -------------------------------------------------------------------------------------------------------


def test_profile_is_saved(buyer: Client, alice: User) -> None:
    answer = buyer.post(reverse("settings"), SAVED | {"name": " Alice Liddell ", "time_zone": "Europe/Berlin"})
    assert answer.status_code == 302
    alice.refresh_from_db()
    assert (alice.name, alice.time_zone) == ("Alice Liddell", "Europe/Berlin")
    assert time_zones.zone_of(alice) == ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a" * 151),
        ("name", "Ali\x00ce"),  # row 57
        ("time_zone", "Mars/Olympus"),
        ("currency", "eur"),  # nothing is sold in it
        ("currency", "xxx"),
        ("currency", ""),
    ],
)
def test_wrong_settings_save_nothing(buyer: Client, alice: User, field: str, value: str) -> None:
    answer = buyer.post(reverse("settings"), SAVED | {"name": "New", "time_zone": "Asia/Tokyo", field: value})
    assert answer.status_code == 400
    assert list(answer.context["form"].errors) == [field]
    alice.refresh_from_db()
    assert (alice.name, alice.time_zone) == ("Alice", "")


def test_role_and_address_cannot_be_changed_there(buyer: Client, alice: User) -> None:
    """Row 64: a forged role."""
    buyer.post(reverse("settings"), SAVED | {"role": "superadmin", "email": "eve@example.com", "is_active": ""})
    alice.refresh_from_db()
    assert (alice.role, alice.email, alice.is_active) == ("user", "alice@example.com", True)


# --- The currency ---------------------------------------------------------------------------------------------------


def test_currency_is_free_until_the_first_payment(in_euros: None, buyer: Client, alice: User) -> None:
    assert buyer.post(reverse("settings"), SAVED | {"currency": "eur"}).status_code == 302
    assert TokenAccount.objects.get(user=alice).currency == "eur"
    assert buyer.get(reverse("tokens:home")).context["currency"] == "eur"


def test_currency_is_fixed_by_the_first_payment(in_euros: None, buyer: Client, bought: Purchase) -> None:
    """What was spent is one sum: it must not be counted in two currencies."""
    with pytest.raises(checkout.CurrencyNotChanged, match="first payment"):
        checkout.update_currency(user_id=bought.user_id, currency="eur")
    answer = buyer.post(reverse("settings"), SAVED | {"name": "Alice L.", "currency": "eur"}, follow=True)
    assert answer.status_code == 200  # the rest is saved; the page said that the currency stays
    assert "It was fixed by your first payment" in answer.content.decode()
    assert TokenAccount.objects.get(user=bought.user_id).currency == "usd"
    assert User.objects.get(pk=bought.user_id or 0).name == "Alice L."


def test_currency_waits_for_an_open_payment_page(
    in_euros: None, stripe: StripeStandIn, buyer: Client, alice: User
) -> None:
    begin_checkout(buyer)
    with pytest.raises(checkout.CurrencyNotChanged, match="payment page"):
        checkout.update_currency(user_id=alice.pk, currency="eur")
    assert checkout.update_currency(user_id=alice.pk, currency="usd").currency == "usd"  # no change


# --- Sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_agent", "words"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 Safari/537.36", "Chrome on Linux"),
        ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/156.0 Safari/537.36 Edg/156.0", "Edge on Windows"),
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) Version/19.0 Safari/604.1", "Safari on iPhone"),
        ("Mozilla/5.0 (Android 16; Mobile; rv:150.0) Gecko/150.0 Firefox/150.0", "Firefox on Android"),
        ("curl/8.0", "A browser"),
        ("", "A browser"),
    ],
)
def test_browsers_are_called_by_their_names(user_agent: str, words: str) -> None:
    assert device_name(user_agent) == words
