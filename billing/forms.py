from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, cast

from django import forms
from django.utils import timezone

from accounts import teams
from accounts.models import TeamRole, User, Workspace
from accounts.profile import ProfileForm
from billing.catalogue import packages
from billing.ledger import MAX_TOKENS
from billing.models import Purchase, SystemSettings, TokenAccount, TokenPricing
from billing.models.bulk_job import BulkKind
from billing.models.fields import Currency
from billing.models.grant_request import GrantKind
from billing.models.system_settings import MAX_BONUS_DAYS, DisposableBonus
from billing.payments import checkout, refund_requests
from billing.payments.checkout import Terms
from billing.pricing import display_price
from billing.staff import accounts, grants
from kit.periods import midnight

CURRENCY_NAMES: dict[str, str] = {Currency.USD: "US dollars", Currency.EUR: "euros", Currency.GBP: "pounds sterling"}


class PlainDigits(forms.Field):
    """For a number's field: in our own digits; Python would take any script's."""

    def to_python(self, value: Any) -> Any:
        if isinstance(value, str) and not value.strip().isascii():
            raise forms.ValidationError(self.error_messages["invalid"], code="invalid")
        return super().to_python(value)


class WholeNumberField(PlainDigits, forms.IntegerField):
    pass


class PlainDecimalField(PlainDigits, forms.DecimalField):
    pass


class KeyField(forms.RegexField):
    """The key that a form was given when it was shown, so that sent twice it is one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(r"\A[A-Za-z0-9_-]{8,100}\Z", **options)


class MoneyField(PlainDecimalField):
    """An amount such as 25 or 25.50; cleaned, it is in cents."""

    def __init__(self, **options: Any) -> None:
        super().__init__(min_value=0, max_digits=12, decimal_places=2, **options)

    def clean(self, value: Any) -> int | None:
        amount = super().clean(value)
        return None if amount is None else int(amount * 100)


class AmountForm(forms.Form):
    amount = MoneyField(required=False)
    currency = forms.ChoiceField(required=False, choices=Currency)

    def __init__(self, *args: Any, currency: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        shown = currency or self.data.get("currency") or ""
        self.fields["amount"].label = f"Amount in {CURRENCY_NAMES.get(shown, CURRENCY_NAMES[Currency.USD])}"


class CheckoutForm(AmountForm):
    """Which package or what amount, and the key of this form. A browser's word on price or tokens is not read."""

    package_id = forms.IntegerField(required=False, min_value=1, max_value=2**63 - 1)
    checkout_key = KeyField()

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if not self.errors and (cleaned["package_id"] is None) == (cleaned["amount"] is None):
            raise forms.ValidationError("Choose a package or enter an amount.")
        return cleaned

    @property
    def terms(self) -> Terms:
        """What is bought. The form must be valid. Raises PackageNotSold, AmountNotSold."""
        data = self.cleaned_data
        currency = data["currency"] or Currency.USD
        if data["package_id"] is not None:
            return checkout.terms_of_package(data["package_id"], currency=currency)
        return checkout.terms_of_amount(data["amount"], currency=currency)


class AutoRechargeForm(forms.Form):
    """The settings of auto-recharge; its fields are the arguments of `recharge_settings.update_auto_recharge`."""

    enabled = forms.BooleanField(required=False, label="Buy tokens automatically")
    threshold_tokens = WholeNumberField(
        label="When fewer tokens than this are available", min_value=1, max_value=MAX_TOKENS
    )
    # Each choice carries what it is shown to be, so that nobody agrees to a price that they have not seen.
    package_id = forms.TypedChoiceField(
        label="Buy this package",
        coerce=lambda choice: int(choice.partition(":")[0]),
        error_messages={"invalid_choice": "Packages and prices have changed. Choose the package that you want."},
    )
    monthly_cap_cents = MoneyField(
        required=False,
        label="Most to spend in a month",
        help_text="By auto-recharge alone, in a calendar month (UTC). Empty: no limit.",
    )

    def __init__(self, *args: Any, account: TokenAccount, **options: Any) -> None:
        cap_cents, chosen = account.auto_recharge_monthly_cap_cents, account.auto_recharge_package
        self.chosen_id = account.auto_recharge_package_id
        options.setdefault("auto_id", "id_recharge_%s")
        options["initial"] = {
            "enabled": account.auto_recharge_enabled,
            "threshold_tokens": account.auto_recharge_threshold_tokens,
            "package_id": package_choice(chosen, account.currency) if chosen else None,
            "monthly_cap_cents": None if cap_cents is None else f"{cap_cents // 100}.{cap_cents % 100:02}",
        }
        super().__init__(*args, **options)
        package_field = self.fields["package_id"]
        assert isinstance(package_field, forms.ChoiceField)  # noqa: S101 – for the type checker
        package_field.choices = _package_choices(account)
        if self.is_bound and self.data.get("package_id") not in dict(package_field.choices):
            package_field.choices.insert(0, ("", "Choose a package"))  # else the browser would take the first one
        self.fields["monthly_cap_cents"].label = f"Most to spend in a month ({account.currency.upper()})"

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if not cleaned.get("enabled") and "package_id" in self.errors:
            # Switching it off must always work, whatever has become of the package.
            del self.errors["package_id"]
            cleaned["package_id"] = self.chosen_id
        return cleaned


def package_choice(package: TokenPricing, currency: str) -> str:
    """The value of a package in the form: which, and what is bought for how much."""
    return f"{package.pk}:{package.tokens}:{package.price_cents(currency)}:{currency}"


def _package_choices(account: TokenAccount) -> list[tuple[str, str]]:
    choices = [
        (
            package_choice(offer.package, account.currency),
            f"{offer.package.name}: {offer.package.tokens:,} tokens, {offer.price_display}",
        )
        for offer in packages.list_offers(account.currency)
    ]
    chosen = account.auto_recharge_package
    if chosen is not None and package_choice(chosen, account.currency) not in dict(choices):
        choices.append((package_choice(chosen, account.currency), f"{chosen.name} (not on sale any more)"))
    return choices


class ConfirmForm(forms.Form):
    confirm_key = KeyField()


class RefundForm(forms.Form):
    """What a superadmin wants to refund of a purchase; cleaned, `amount_cents` says how much that is."""

    what = forms.ChoiceField(label="What to refund", widget=forms.RadioSelect)
    amount = MoneyField(required=False, label="Amount")
    reason = forms.CharField(max_length=300, label="Reason", help_text="It is kept with the refund.")
    request_key = KeyField(widget=forms.HiddenInput)

    def __init__(self, *args: Any, purchase: Purchase, **options: Any) -> None:
        super().__init__(*args, **options)
        self.refundable_cents = refund_requests.refundable_cents(purchase)
        self.unused_cents = refund_requests.unused_cents(purchase)
        full, unused = purchase.money(self.refundable_cents), purchase.money(self.unused_cents)
        cast(forms.ChoiceField, self.fields["what"]).choices = [
            ("unused", f"What is unused of it: {unused}"),
            ("full", f"All that is left of it: {full}"),
            ("amount", "Another amount"),
        ]
        self.fields["amount"].label = f"Amount in {purchase.currency.upper()}"
        self.fields["amount"].help_text = f"Only for another amount, at most {full}."

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if self.errors:
            return cleaned
        what = cleaned["what"]
        amount_cents = {"full": self.refundable_cents, "unused": self.unused_cents}.get(what, cleaned["amount"])
        if what == "amount" and not amount_cents:
            self.add_error("amount", "Enter the amount.")
        elif amount_cents > self.refundable_cents:
            self.add_error("amount", "That is more than is left of this purchase.")
        elif not amount_cents:
            self.add_error("what", "Nothing of it is unused.")
        return cleaned | {"amount_cents": amount_cents}


class RefundConfirmationForm(forms.Form):
    """The refund as it was shown for confirmation."""

    amount_cents = forms.IntegerField(min_value=1, max_value=2**63 - 1)
    reason = forms.CharField(max_length=300)
    request_key = KeyField()


class ResolutionForm(forms.Form):
    resolution = forms.CharField(max_length=300)


class SettingsForm(ProfileForm):
    """The profile, with the currency that the account buys in."""

    currency = forms.ChoiceField(
        choices=(), help_text="Prices are shown in it, and auto-recharge pays in it. Your first payment fixes it."
    )

    def __init__(self, *args: Any, account: TokenAccount, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        currency = cast(forms.ChoiceField, self.fields["currency"])
        sold = {*packages.list_currencies(), account.currency}
        currency.choices = [(value, f"{value.upper()}, {CURRENCY_NAMES[value]}") for value in Currency if value in sold]
        currency.initial = account.currency
        if reason := checkout.why_currency_is_fixed(account):
            # Disabled, the field keeps the account's whatever a browser sends.
            currency.disabled = True
            currency.help_text = reason


# --- Teams ----------------------------------------------------------------------------------------------------------


class TeamForm(forms.Form):
    name = forms.CharField(
        label="Name of the team",
        max_length=teams.MAX_NAME_LENGTH,
        help_text="As it stands on quotes and receipts.",
        widget=forms.TextInput(attrs={"autocomplete": "organization"}),
    )


class TeamReceiptsForm(TeamForm):
    billing_email = forms.EmailField(
        label="Receipts go to", required=False, help_text="Empty: to the address that is entered at the payment."
    )


class InvitationForm(forms.Form):
    email = forms.EmailField(label="E-mail address", widget=forms.EmailInput(attrs={"autocomplete": "off"}))
    role = forms.ChoiceField(choices=[(TeamRole.MEMBER, "Member"), (TeamRole.ADMIN, "Admin")], initial=TeamRole.MEMBER)

    def __init__(self, *args: Any, may_invite_admins: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        if not may_invite_admins:
            self.fields["role"].choices = [(TeamRole.MEMBER, "Member")]  # type: ignore[attr-defined]


class HandOverForm(forms.Form):
    receiver = forms.ModelChoiceField(label="New owner", queryset=User.objects.none(), empty_label="Choose a member")

    def __init__(self, *args: Any, workspace: Workspace, owner: User, **options: Any) -> None:
        super().__init__(*args, **options)
        others = User.objects.filter(memberships__workspace=workspace, is_active=True).exclude(pk=owner.pk)
        self.fields["receiver"].queryset = others.order_by("email")  # type: ignore[attr-defined]


class CloseTeamForm(forms.Form):
    typed_name = forms.CharField(
        label="Type the name of the team", widget=forms.TextInput(attrs={"autocomplete": "off"})
    )

    def __init__(self, *args: Any, name: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.name = name

    def clean_typed_name(self) -> str:
        if self.cleaned_data["typed_name"] != self.name:
            raise forms.ValidationError(f"That is not it. Type “{self.name}” to go on.")
        return self.name


# --- The dashboard --------------------------------------------------------------------------------------------------


class GrantForm(forms.Form):
    """Tokens for somebody, or from them; cleaned, the reason is as it will be kept."""

    account_id = forms.IntegerField(min_value=1, max_value=2**63 - 1, widget=forms.HiddenInput)
    kind = forms.ChoiceField(
        label="What to do",
        choices=[(GrantKind.GRANT, "Give tokens"), (GrantKind.DEDUCTION, "Take tokens")],
        widget=forms.RadioSelect,
    )
    tokens = WholeNumberField(label="Tokens", min_value=1, max_value=MAX_TOKENS)
    last_day = forms.DateField(
        label="Last day",
        required=False,
        widget=forms.DateInput(attrs={"type": "date"}, format="%Y-%m-%d"),
        input_formats=["%Y-%m-%d"],
        help_text="On which they can be spent, by your clock. Empty: they never end.",
    )
    reason = forms.CharField(
        label="Reason",
        max_length=grants.MAX_REASON_LENGTH,
        help_text="The person reads it in their history and in the notice.",
    )
    request_key = KeyField(widget=forms.HiddenInput)

    @property
    def expires_at(self) -> datetime | None:
        """The first moment at which they can be spent no more. The form must be valid."""
        last_day = self.cleaned_data["last_day"]
        return midnight(last_day + timedelta(days=1)) if last_day else None

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if last_day := cleaned.get("last_day"):
            today = timezone.localdate()
            if cleaned.get("kind") == GrantKind.DEDUCTION:
                self.add_error("last_day", "Only tokens that are given can have an end.")
            elif not today <= last_day <= today + timedelta(days=grants.MAX_LOT_DAYS):
                self.add_error("last_day", "Choose a day from today on, within ten years.")
        return cleaned

    def clean_reason(self) -> str:
        try:
            return grants.clean_reason(self.cleaned_data["reason"])
        except grants.GrantNotPossible as error:
            raise forms.ValidationError(error.message) from error


class AccountStatusForm(forms.Form):
    """What becomes of an account, out of what it can become now."""

    status = forms.ChoiceField(label="What to do", widget=forms.RadioSelect)
    reason = forms.CharField(
        label="Reason",
        max_length=accounts.MAX_REASON_LENGTH,
        help_text="The person is told it.",
    )

    def __init__(self, *args: Any, account: TokenAccount, **options: Any) -> None:
        options.setdefault("auto_id", "id_status_%s")
        super().__init__(*args, **options)
        status = TokenAccount.Status
        words = {
            status.SUSPENDED: "Suspend: nothing new starts until it is reactivated",
            status.BLOCKED: "Block: for good",
            status.ACTIVE: "Reactivate",
        }
        if not account.has_debt:  # a debt's suspension can be made one that does not lift itself
            words.pop(status(account.status), None)
        else:
            del words[status.ACTIVE]
        cast(forms.ChoiceField, self.fields["status"]).choices = list(words.items())

    def clean_reason(self) -> str:
        try:
            return accounts.clean_reason(self.cleaned_data["reason"])
        except accounts.StatusNotPossible as error:
            raise forms.ValidationError(error.message) from error


class BulkForm(forms.Form):
    """What to do with many accounts; cleaned, its fields are arguments of `bulk.start_bulk_job`."""

    kind = forms.ChoiceField(label="What to do", choices=BulkKind, widget=forms.RadioSelect)
    tokens = WholeNumberField(
        label="Tokens for each", required=False, min_value=1, max_value=MAX_TOKENS, help_text="Only for a grant."
    )
    reason = forms.CharField(
        label="Reason",
        required=False,
        max_length=accounts.MAX_REASON_LENGTH,
        help_text="For a grant or a suspension. The people are told it.",
    )
    request_key = KeyField(widget=forms.HiddenInput)
    # How many accounts the confirmation named: empty until then.
    expected_rows = WholeNumberField(required=False, min_value=0, widget=forms.HiddenInput)

    def __init__(self, *args: Any, person: User, **options: Any) -> None:
        super().__init__(*args, **options)
        if not person.is_superadmin:
            # What they may choose. What they send all the same is refused, and noted, by billing/staff/bulk.py.
            kind = cast(forms.RadioSelect, self.fields["kind"].widget)
            kind.choices = [(BulkKind.EXPORT.value, BulkKind.EXPORT.label)]
            del self.fields["tokens"], self.fields["reason"]

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        kind = cleaned.get("kind")
        if "tokens" in self.fields and kind == BulkKind.GRANT and cleaned.get("tokens", 0) is None:
            self.add_error("tokens", "Enter how many tokens each of them gets.")
        if "reason" in self.fields and kind in (BulkKind.GRANT, BulkKind.SUSPEND) and "reason" in cleaned:
            try:
                cleaned["reason"] = accounts.clean_reason(cleaned["reason"])
            except accounts.StatusNotPossible as error:
                self.add_error("reason", error.message)
        return cleaned


def _tokens_setting(
    label: str, help_text: str = "", *, min_value: int = 0, max_value: int = MAX_TOKENS, required: bool = True
) -> WholeNumberField:
    return WholeNumberField(
        label=label, help_text=help_text, min_value=min_value, max_value=max_value, required=required
    )


class SystemSettingsForm(forms.Form):
    """Every setting of the installation; `changes` are those that differ from what applies now."""

    billing_enabled = forms.BooleanField(
        required=False,
        label="Charge for operations",
        help_text="Switched off, AI operations run and are recorded, and cost nothing.",
    )
    token_multiplier = PlainDecimalField(
        label="Multiplier",
        min_value=Decimal("0.0001"),
        max_digits=8,
        decimal_places=4,
        help_text="A text costs the provider’s tokens times this, rounded up.",
    )
    dalle3_cost_tokens = _tokens_setting("DALL-E 3", "Tokens for one image.", min_value=1)
    dalle2_cost_tokens = _tokens_setting("DALL-E 2", "Tokens for one image.", min_value=1)
    imagen_cost_tokens = _tokens_setting("Imagen", "Tokens for one image.", min_value=1)
    tokens_per_usd = PlainDecimalField(
        label="Tokens for one US dollar",
        min_value=Decimal("0.0001"),
        max_digits=14,
        decimal_places=4,
        help_text="For amounts that people choose themselves; packages have prices of their own.",
    )
    minimum_purchase_cents = MoneyField(label="Smallest purchase in US dollars")
    welcome_bonus_tokens = _tokens_setting("Welcome bonus", "Tokens, once for each person.")
    welcome_bonus_disposable = forms.ChoiceField(
        label="Welcome bonus for disposable addresses",
        choices=DisposableBonus,
        help_text="For people whose only addresses come from services of throw-away mailboxes or masks.",
    )
    welcome_bonus_days = _tokens_setting(
        "Welcome bonus ends after",
        "Days. Empty: it never ends. What was given before stays as it is.",
        min_value=1,
        max_value=MAX_BONUS_DAYS,
        required=False,
    )
    low_balance_tokens = _tokens_setting("Low balance", "With this many tokens or fewer, people are told.")
    critical_balance_tokens = _tokens_setting("Critical balance", "With fewer tokens, they are told again.")
    admin_grant_limit_tokens = _tokens_setting(
        "Admins grant by themselves",
        "Tokens in 24 hours, for each admin. 0: every grant of an admin waits for a superadmin.",
    )
    grant_approval_tokens = _tokens_setting(
        "Two superadmins above",
        "Grants and deductions of more tokens need two superadmins. Empty: one is enough.",
        required=False,
    )

    GROUPS = (
        ("Operations", ("billing_enabled", "token_multiplier")),
        ("Images without a price of their own", ("dalle3_cost_tokens", "dalle2_cost_tokens", "imagen_cost_tokens")),
        (
            "Purchases and the welcome bonus",
            (
                "tokens_per_usd",
                "minimum_purchase_cents",
                "welcome_bonus_tokens",
                "welcome_bonus_disposable",
                "welcome_bonus_days",
            ),
        ),
        ("Balances", ("low_balance_tokens", "critical_balance_tokens")),
        ("Grants", ("admin_grant_limit_tokens", "grant_approval_tokens")),
    )

    def __init__(self, *args: Any, settings: SystemSettings, **options: Any) -> None:
        self.settings = settings
        initial = {name: getattr(settings, name) for name in self.base_fields}
        for name in ("token_multiplier", "tokens_per_usd"):
            initial[name] = f"{initial[name].normalize():f}"
        cents = settings.minimum_purchase_cents
        initial["minimum_purchase_cents"] = f"{cents // 100}.{cents % 100:02}"
        options["initial"] = initial
        super().__init__(*args, **options)

    def clean_minimum_purchase_cents(self) -> int:
        cents = int(self.cleaned_data["minimum_purchase_cents"])
        if cents <= 0:
            raise forms.ValidationError("Enter an amount above 0.")
        return cents

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        low, critical = cleaned.get("low_balance_tokens"), cleaned.get("critical_balance_tokens")
        if low is not None and critical is not None and critical > low:
            self.add_error("critical_balance_tokens", "It cannot be above the low balance.")
        return cleaned

    @property
    def groups(self) -> list[tuple[str, list[forms.BoundField]]]:
        return [(title, [self[name] for name in names]) for title, names in self.GROUPS]

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that would get another value. The form must be valid."""
        return {name: value for name, value in self.cleaned_data.items() if value != getattr(self.settings, name)}

    @property
    def changed_rows(self) -> list[tuple[str, str, str]]:
        """The changes for people: label, from, to."""
        return [
            (self.label_of(name), self._in_words(name, getattr(self.settings, name)), self._in_words(name, value))
            for name, value in self.changes.items()
        ]

    @property
    def current_groups(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """What applies now, for those who may only look: label, value, help."""
        return [
            (
                title,
                [
                    (
                        self.label_of(name),
                        self._in_words(name, getattr(self.settings, name)),
                        str(self.fields[name].help_text),
                    )
                    for name in names
                ],
            )
            for title, names in self.GROUPS
        ]

    def label_of(self, name: str) -> str:
        """What a setting is called on the page; an old one goes by its name."""
        return str(self.base_fields[name].label) if name in self.base_fields else name

    @classmethod
    def kept_in_words(cls, name: str, text: str) -> str:
        """A value out of the history of changes, which keeps them as text."""
        if text in ("", "True", "False"):
            return cls._in_words(name, {"True": True, "False": False}.get(text))
        try:
            number = Decimal(text)
        except InvalidOperation:
            return cls._in_words(name, text) if name == "welcome_bonus_disposable" else text
        return cls._in_words(name, int(number) if number == number.to_integral_value() else number)

    @staticmethod
    def _in_words(name: str, value: Any) -> str:
        if value is None:
            return "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if name == "minimum_purchase_cents":
            return display_price(value)
        if name == "welcome_bonus_disposable":
            return DisposableBonus(value).label
        return f"{value.normalize():,f}" if isinstance(value, Decimal) else f"{value:,}"
