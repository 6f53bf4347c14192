"""Django admin: for superadmins alone, and what moved tokens or money cannot be changed there."""

import json
from datetime import date
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from django.apps import apps
from django.contrib import admin
from django.db import models
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils import timezone

from accounts.models import AuditEntry, ChangeRequest, User
from ai_ops.models import (
    Chat,
    ChatTurn,
    ContentPiece,
    ContentVersion,
    GeneratedImage,
    ImageBatch,
    ImagePrompt,
    Project,
)
from billing import catalogue, ledger, usage
from billing.catalogue import system_settings
from billing.models import (
    BonusKey,
    BonusMark,
    ModelPrice,
    ModelPriceChange,
    Notification,
    NotificationPreference,
    Purchase,
    SettingChange,
    StripeEvent,
    SystemSettings,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
    TokenUsage,
    UsageHour,
)

pytestmark = pytest.mark.django_db

READ_ONLY = (
    TokenAccount,
    TokenTransaction,
    TokenUsage,
    Purchase,
    BonusMark,
    BonusKey,
    StripeEvent,
    Notification,
    NotificationPreference,
    UsageHour,
    SettingChange,
    ModelPriceChange,
    Project,
    ContentPiece,
    GeneratedImage,
)
EDITABLE = (TokenPricing, ModelPrice, SystemSettings)


def page(model: type[models.Model], name: str, *arguments: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{name}", args=arguments)


@pytest.fixture
def one_of_each(alice: User, susan: User) -> None:
    account = ledger.get_account(user_id=alice.pk)
    usage.record_usage(
        user_id=alice.pk,
        operation_type="chat",
        provider="openai",
        model="gpt-6-luna",
        input_tokens=10,
        output_tokens=10,
        idempotency_key="one",
    )
    package = TokenPricing.objects.get(name="Starter")
    Purchase.objects.create(
        account=account,
        user=alice,
        workspace=account.workspace,
        kind="checkout",
        package=package,
        package_name=package.name,
        tokens=package.tokens,
        amount_cents=package.price_usd_cents,
        currency="usd",
        metadata={},
    )
    StripeEvent.objects.create(event_id="evt_1", type="charge.refunded", livemode=False, payload={}, state="aside")
    Notification.objects.create(user=alice, kind="low_balance", key="low", title="<b>Low</b>")
    UsageHour.objects.create(
        hour=timezone.now(),
        provider="openai",
        model="gpt-6-luna",
        operation_type="chat",
        status="succeeded",
        operations=1,
        actual_tokens=20,
        billable_tokens=30,
        unbilled_tokens=0,
        provider_cost_microusd=6,
        duration_ms=0,
    )
    system_settings.update_system_settings(changes={"welcome_bonus_tokens": 9_000}, changed_by_id=susan.pk)
    luna = ModelPrice.objects.get(model="gpt-6-luna")
    catalogue.update_model_price(
        price_id=luna.pk, changes={"input_usd_per_million": Decimal("0.2")}, changed_by_id=susan.pk, source="admin"
    )
    project = Project.objects.create(workspace=account.workspace, name="Blog")
    ContentPiece.objects.create(project=project, author=alice, title="Hello", topic="Greetings")
    batch = ImageBatch.objects.create(project=project, author=alice, prompt="A fox", size="1024x1024", count=1)
    GeneratedImage.objects.create(batch=batch, position=1, file="images/fox.png", media_type="image/png")
    NotificationPreference.objects.create(user=alice, kind="low_balance", wants_email=False)


@pytest.fixture
def superadmin(client: Client, susan: User) -> Client:
    client.force_login(susan)
    return client


@pytest.mark.parametrize("model", [*READ_ONLY, *EDITABLE], ids=lambda model: model.__name__)
def test_superadmin_reads_every_table(
    one_of_each: None, superadmin: Client, model: type[models.Model], django_assert_max_num_queries: Any
) -> None:
    with django_assert_max_num_queries(15):
        assert superadmin.get(page(model, "changelist")).status_code == 200
    row = model._default_manager.first()
    assert row is not None
    detail = superadmin.get(page(model, "change", row.pk))
    assert detail.status_code == 200
    assert b"<b>Low</b>" not in detail.content
    assert b"fox.png" not in detail.content  # its author's alone
    assert superadmin.get(page(model, "changelist"), {"q": "alice"}).status_code == 200


def test_every_table_is_there_to_be_read(superadmin: Client) -> None:
    """Of our three apps, whatever is added to them."""
    models_of_ours = [
        model for name in ("accounts", "billing", "ai_ops") for model in apps.get_app_config(name).get_models()
    ]
    assert len(models_of_ours) > 30
    for model in models_of_ours:
        assert admin.site.is_registered(model), model
        assert superadmin.get(page(model, "changelist")).status_code == 200, model
        assert superadmin.get(page(model, "changelist"), {"q": "alice"}).status_code == 200, model


# What may be done in there, by table: whatever is not named may be read alone. Each leaves an entry: see below.
MAY = {
    "accounts.user": "change",
    "billing.modelprice": "add change",
    "billing.stripeevent": "handle_again settle_by_hand",
    "billing.systemsettings": "change",
    "billing.tokenpricing": "add change",
    "mfa.authenticator": "delete delete_selected",
}
# Beside our own tables: what a superadmin looks at or takes away for somebody who is locked out.
OF_OTHERS = {"mfa.authenticator", "usersessions.usersession"}


def test_nothing_else_can_be_done(susan: User) -> None:
    """No table is there that opens an account (addresses, groups, sessions themselves), and no way to write in those
    that are there but the ones listed."""
    request = RequestFactory().get("/admin/")
    request.user = susan
    found = {}
    for model, page_of in admin.site._registry.items():
        allowed = [verb for verb in ("add", "change", "delete") if getattr(page_of, f"has_{verb}_permission")(request)]
        if verbs := " ".join([*allowed, *page_of.get_actions(request)]):
            found[model._meta.label_lower] = verbs
        assert not page_of.list_editable
        if model._meta.label_lower != "ai_ops.imagebatch":
            assert not page_of.inlines, model
    assert found == MAY
    ours = {f"{name}." for name in ("accounts", "billing", "ai_ops")}
    labels = {model._meta.label_lower for model in admin.site._registry}
    assert {label for label in labels if not label.startswith(tuple(ours))} == OF_OTHERS


@pytest.mark.parametrize("crash", [False, True])
def test_every_change_is_written_in_its_own_transaction(
    superadmin: Client, susan: User, alice: User, monkeypatch: pytest.MonkeyPatch, crash: bool
) -> None:
    """Each thing that may be done: with its entry it is there, and without its entry it is not."""
    luna, starter = ModelPrice.objects.get(model="gpt-6-luna"), TokenPricing.objects.get(name="Starter")
    settings = system_settings.get_system_settings()
    event = StripeEvent.objects.create(event_id="evt_1", type="x", livemode=False, payload={}, state="aside")
    factors = [Authenticator.objects.create(user=who, type="totp", data={}) for who in (alice, susan)]
    new_package = {"name": "Tiny", "tokens": 5, "price_usd_cents": 500, "features": "[]", "sort_order": 9}
    new_price = filled_in(superadmin, luna) | {"provider": "openai", "model": "new", "kind": "text"}

    def act(path: str, fields: dict[str, Any]) -> Any:
        data = {name: value for name, value in fields.items() if value is not None and value is not False}
        return lambda: superadmin.post(path, data)

    deeds: dict[str, Any] = {
        "person": act(page(User, "change", alice.pk), {"name": "A", "role": "user", "is_active": "on"}),
        "role": act(page(User, "change", alice.pk), {"name": "A", "role": "admin", "is_active": "on"}),
        "price": lambda: edit(superadmin, luna, display_name="Renamed"),
        "new price": act(page(ModelPrice, "add"), new_price),
        "package": lambda: edit(superadmin, starter, name="Beginner"),
        "new package": act(page(TokenPricing, "add"), new_package),
        "settings": lambda: edit(superadmin, settings, low_balance_tokens="2000"),
        "event": act(page(StripeEvent, "changelist"), {"action": "settle_by_hand", "_selected_action": event.pk}),
        "factor": act(page(Authenticator, "delete", factors[0].pk), {"post": "yes"}),
        "factors": act(
            page(Authenticator, "changelist"),
            {"action": "delete_selected", "_selected_action": factors[1].pk, "post": "yes"},
        ),
    }

    def state() -> dict[str, Any]:
        tables = (User, ChangeRequest, ModelPrice, TokenPricing, SystemSettings, StripeEvent, Authenticator)
        return {each.__name__: list(each._default_manager.order_by("pk").values()) for each in tables}

    superadmin.raise_request_exception = False
    for name, deed in deeds.items():
        before, entries = state(), AuditEntry.objects.count()
        with monkeypatch.context() as patch:
            if crash:
                patch.setattr(AuditEntry.objects, "create", None)
            status = deed().status_code
        assert status == (500 if crash else 302), name
        assert (state() == before) == crash, name
        assert AuditEntry.objects.count() - entries == (0 if crash else 1), name


def test_what_people_made_is_read_for_a_reason_that_is_kept(
    one_of_each: None, superadmin: Client, susan: User, alice: User
) -> None:
    """Of every table of theirs: neither lists nor searches show a word of it, its page asks why."""
    words = "a word that only its author knows"
    project = Project.objects.get()
    Project.objects.update(name=words)
    ContentPiece.objects.update(title=words, topic=words)
    ImageBatch.objects.update(prompt=words)
    piece = ContentPiece.objects.get()
    ContentVersion.objects.create(piece=piece, number=1, body=words, origin="edit")
    chat = Chat.objects.create(project=project, author=alice, title=words)
    ChatTurn.objects.create(chat=chat, question=words, answer=words, state="done")
    ImagePrompt.objects.create(project=project, author=alice, idea=words)
    # What other servers wrote beside an operation, and a provider about its failure, may repeat it.
    TokenUsage.objects.update(metadata={"prompt": words}, error_message=words)
    assert words not in superadmin.get(reverse("dashboard:account", args=[alice.pk])).content.decode()
    pages = 0
    with_contents: list[type[models.Model]] = [*apps.get_app_config("ai_ops").get_models(), TokenUsage]
    for model in with_contents:
        row = model._default_manager.first()
        assert row is not None, model
        for query in ({}, {"q": words}):
            shown = superadmin.get(page(model, "changelist"), query).content.decode()
            assert words not in shown.replace(f'value="{words}"', ""), model
        entries = AuditEntry.objects.count()
        address = page(model, "change", row.pk)
        for refused in (superadmin.get(address), superadmin.post(address, {"reason": " "})):
            assert words not in refused.content.decode(), model
        assert AuditEntry.objects.count() == entries
        opened = superadmin.post(address, {"reason": "They asked us to look"})
        assert opened.status_code == 200
        pages += words in opened.content.decode()
        entry = AuditEntry.objects.order_by("-pk")[0]
        assert (entry.action, entry.actor, entry.subject) == ("content_read", susan, alice), model
        assert (entry.reason, entry.object_id) == ("They asked us to look", str(row.pk))
        assert superadmin.post(f"{address}?_popup=1", {"name": "Mine"}).status_code == 400
        assert superadmin.get(page(model, "history", row.pk)).status_code == 403, model
    assert pages >= 7


@pytest.mark.parametrize("model", READ_ONLY, ids=lambda model: model.__name__)
def test_what_moved_tokens_cannot_be_changed(one_of_each: None, superadmin: Client, model: type[models.Model]) -> None:
    """Row 71, at the page: neither added, nor changed, nor deleted, not even by a superadmin."""
    row = model._default_manager.first()
    assert row is not None
    before = list(model._default_manager.order_by("pk").values())
    assert superadmin.get(page(model, "add")).status_code == 403
    assert superadmin.post(page(model, "add"), {"amount": 5}).status_code == 403
    status = superadmin.post(page(model, "change", row.pk), {"balance": 10**9, "amount": 5}).status_code
    has_contents = model._meta.app_label == "ai_ops" or model is TokenUsage
    assert status == (400 if has_contents else 403)  # where contents are, a reason is missing
    assert superadmin.post(page(model, "delete", row.pk), {"post": "yes"}).status_code == 403
    superadmin.post(page(model, "changelist"), {"action": "delete_selected", "_selected_action": row.pk})
    assert list(model._default_manager.order_by("pk").values()) == before


@pytest.mark.parametrize("model", EDITABLE, ids=lambda model: model.__name__)
def test_what_is_on_offer_is_never_deleted(one_of_each: None, superadmin: Client, model: type[models.Model]) -> None:
    row = model._default_manager.first()
    assert row is not None
    assert superadmin.post(page(model, "delete", row.pk), {"post": "yes"}).status_code == 403
    assert model._default_manager.filter(pk=row.pk).exists()


@pytest.mark.parametrize("who", ["adam", "alice", None])
def test_nobody_else_gets_in(
    client: Client, request: pytest.FixtureRequest, one_of_each: None, who: str | None
) -> None:
    """Row 64: an admin looks at the dashboard, not in here."""
    if who is not None:
        client.force_login(request.getfixturevalue(who))
    for model in (*READ_ONLY, *EDITABLE):
        row = model._default_manager.first()
        assert row is not None
        for address in (page(model, "changelist"), page(model, "change", row.pk)):
            response = client.get(address)
            assert response.status_code == 302
            assert response["Location"].startswith(reverse("admin:login"))


class HiddenInitials(HTMLParser):
    """What the page carries along of the values that its form was opened with."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self.feed(answer.content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = dict(attrs)
        name = fields.get("name") or ""
        if tag == "input" and name.startswith("initial-"):
            self.values[name] = fields.get("value") or ""


def filled_in(superadmin: Client, row: models.Model) -> dict[str, Any]:
    """The form of a row as it was opened just now."""
    answer = superadmin.get(page(type(row), "change", row.pk))
    form = answer.context["adminform"].form
    return {name: form[name].value() for name in form.fields} | HiddenInitials(answer).values


def send(superadmin: Client, row: models.Model, fields: dict[str, Any]) -> Any:
    data = {name: value for name, value in fields.items() if value is not None and value is not False}
    return superadmin.post(page(type(row), "change", row.pk), data)


def edit(superadmin: Client, row: models.Model, **changes: Any) -> Any:
    return send(superadmin, row, filled_in(superadmin, row) | changes)


def test_setting_change_is_kept(superadmin: Client, susan: User) -> None:
    """Who changed what, from which value to which, and when."""
    settings = system_settings.get_system_settings()
    response = edit(superadmin, settings, token_multiplier="2.25", low_balance_tokens="2000")
    assert response.status_code == 302
    settings.refresh_from_db()
    assert (settings.token_multiplier, settings.low_balance_tokens) == (Decimal("2.25"), 2_000)
    changes = SettingChange.objects.values_list("field", "old_value", "new_value", "changed_by__email")
    assert set(changes) == {
        ("token_multiplier", "1.5000", "2.25", susan.email),
        ("low_balance_tokens", "1000", "2000", susan.email),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_multiplier", "0"),
        ("token_multiplier", "-1"),
        ("token_multiplier", "NaN"),
        ("token_multiplier", "1e400"),
        ("token_multiplier", "１２"),
        ("welcome_bonus_tokens", "-1"),
        ("welcome_bonus_tokens", "1.5"),
        ("welcome_bonus_tokens", "true"),
        ("welcome_bonus_tokens", "１２"),
        ("welcome_bonus_tokens", str(2**63)),
        ("welcome_bonus_tokens", "1\x002"),
        ("minimum_purchase_cents", "0"),
        ("dalle3_cost_tokens", "0"),
        ("low_balance_tokens", "1"),  # below the critical one
    ],
)
def test_setting_of_a_wrong_kind_is_refused(superadmin: Client, field: str, value: str) -> None:
    """Rows 56 and 57: an error at the form, and nothing is written."""
    settings = system_settings.get_system_settings()
    before = SystemSettings.objects.values().get()
    response = edit(superadmin, settings, **{field: value})
    assert response.status_code == 200
    assert response.context["errors"]
    assert SystemSettings.objects.values().get() == before
    assert not SettingChange.objects.exists()


def test_package_and_price_are_edited(superadmin: Client) -> None:
    package = TokenPricing.objects.get(name="Starter")
    assert edit(superadmin, package, price_usd_cents="1600", features='["One"]').status_code == 302
    package.refresh_from_db()
    assert (package.price_usd_cents, package.features) == (1_600, ["One"])

    price = ModelPrice.objects.get(model="gpt-image-2")
    assert edit(superadmin, price, image_cost_tokens='{"1024x1024/hd": 9000}').status_code == 302
    price.refresh_from_db()
    assert price.image_cost_tokens == {"1024x1024/hd": 9_000}


@pytest.mark.parametrize(
    ("model", "theirs", "mine"),
    [
        (
            SystemSettings,
            {"token_multiplier": Decimal("2.5000"), "billing_enabled": False},
            {"low_balance_tokens": 2_000},
        ),
        (TokenPricing, {"price_usd_cents": 1_600, "is_active": False, "features": ["New"]}, {"name": "Beginner"}),
        (
            ModelPrice,
            {"input_usd_per_million": Decimal("9.500000"), "retired_on": date(2027, 1, 1), "replacement": "gpt-7"},
            {"display_name": "Renamed"},
        ),
    ],
)
def test_form_that_was_opened_before_another_save(
    superadmin: Client, model: type[models.Model], theirs: dict[str, Any], mine: dict[str, Any]
) -> None:
    """It writes what was changed in it, and takes nothing back that was changed meanwhile."""
    system_settings.get_system_settings()
    row = model._default_manager.all()[0]
    fields = filled_in(superadmin, row)
    typed = {name: json.dumps(value) if isinstance(value, list) else value for name, value in theirs.items()}
    assert edit(superadmin, row, **typed).status_code == 302
    assert send(superadmin, row, fields | mine).status_code == 302
    assert model._default_manager.filter(pk=row.pk).values(*theirs, *mine).get() == theirs | mine


def test_price_that_stripe_does_not_know(superadmin: Client) -> None:
    """A new amount beside the id of Stripe's old price would charge the old one."""
    package = TokenPricing.objects.get(name="Starter")
    assert edit(superadmin, package, stripe_price_id_usd="price_old").status_code == 302
    answer = edit(superadmin, package, price_usd_cents="1600")
    assert "This Stripe price has the old amount" in answer.content.decode()
    for price_id in ("price_new", ""):
        assert edit(superadmin, package, price_usd_cents="1600", stripe_price_id_usd=price_id).status_code == 302
    package.refresh_from_db()
    assert (package.price_usd_cents, package.stripe_price_id_usd) == (1_600, "")


@pytest.mark.parametrize(
    "features",
    [
        '{"a": 1}',
        "[1]",
        '["a\\u0000"]',
        '["\\ud800"]',
        '"text"',
        "[",
        pytest.param("[" * 20_000, id="deep"),
        '["One", ""]',
    ],
)
def test_package_features_are_texts(superadmin: Client, features: str) -> None:
    """Row 57, and a page that lists them."""
    package = TokenPricing.objects.get(name="Starter")
    before = TokenPricing.objects.values().get(pk=package.pk)
    assert edit(superadmin, package, features=features).status_code == 200
    assert TokenPricing.objects.values().get(pk=package.pk) == before


@pytest.mark.parametrize(
    "costs",
    ["[1]", '{"a": true}', '{"a": 1.5}', '{"a": 0}', '{"a": -1}', '{"a": NaN}', '{"a": 1e400}', '{"a": "6"}',
     '{"\\u0000": 6}', '{"": 6}', '{"a": 9223372036854775808}'],
)  # fmt: skip
def test_image_costs_are_tokens(superadmin: Client, costs: str) -> None:
    """Row 56."""
    price = ModelPrice.objects.get(model="gpt-image-2")
    before = ModelPrice.objects.values().get(pk=price.pk)
    assert edit(superadmin, price, image_cost_tokens=costs).status_code == 200
    assert ModelPrice.objects.values().get(pk=price.pk) == before
