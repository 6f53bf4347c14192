"""The packages on sale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction

from accounts import audit
from accounts.models import User
from billing import pricing
from billing.models import TokenPricing
from billing.models.fields import Currency

DEFAULT_PACKAGES: Sequence[dict[str, Any]] = (
    {
        "name": "Starter",
        "tokens": 150_000,
        "price_usd_cents": 1_500,
        "description": "To try things out, or for the occasional text.",
        "features": ["Every model, one balance", "Tokens never expire"],
    },
    {
        "name": "Pro",
        "tokens": 750_000,
        "price_usd_cents": 6_500,
        "is_popular": True,
        "description": "For people who write every week.",
        "features": ["Every model, one balance", "Tokens never expire"],
    },
    {
        "name": "Business",
        "tokens": 2_250_000,
        "price_usd_cents": 17_500,
        "description": "For a content team with a steady output.",
        "features": ["Every model, one balance", "Tokens never expire"],
    },
    {
        "name": "Enterprise",
        "tokens": 7_500_000,
        "price_usd_cents": 50_000,
        "description": "For publishing at scale, at our best price per token.",
        "features": ["Every model, one balance", "Tokens never expire"],
    },
)


@dataclass(frozen=True, slots=True)
class Offer:
    """A package as a person sees it in one currency."""

    package: TokenPricing
    price_cents: int
    currency: str
    savings_percent: int  # against the smallest package
    worth: Sequence[tuple[str, int]] = ()  # what it is enough for: "drafts", 37

    @property
    def price_display(self) -> str:
        return pricing.display_price(self.price_cents, self.currency)

    @property
    def per_1k_display(self) -> str:
        cents = pricing.price_per_1k_cents(tokens=self.package.tokens, price_cents=self.price_cents)
        return f"{pricing.CURRENCY_SYMBOLS[self.currency]}{cents / 100:.3f}"


def list_active_packages() -> list[TokenPricing]:
    """Those on sale in any currency, in their order on the page."""
    return list(TokenPricing.objects.filter(is_active=True))


def list_offers(currency: str = "usd") -> list[Offer]:
    """The active packages sold in `currency`, with their price per token and what they save."""
    priced = [(package, package.price_cents(currency)) for package in list_active_packages()]
    sold = [(package, price_cents) for package, price_cents in priced if price_cents is not None]
    if not sold:
        return []
    base, base_price_cents = min(sold, key=lambda offer: offer[0].tokens)
    return [
        Offer(
            package,
            price_cents,
            currency,
            pricing.savings_percent(
                tokens=package.tokens,
                price_cents=price_cents,
                base_tokens=base.tokens,
                base_price_cents=base_price_cents,
            ),
        )
        for package, price_cents in sold
    ]


def list_currencies() -> list[str]:
    """The currencies in which some active package has a price, US dollars first."""
    active = list_active_packages()
    return [currency for currency in Currency.values if any(package.price_cents(currency) for package in active)]


def get_package_by_id(package_id: int) -> TokenPricing | None:
    """The package, on sale or not; None when there is none."""
    return TokenPricing.objects.filter(pk=package_id).first()


def create_package(*, changed_by_id: int | None = None, **fields: Any) -> TokenPricing:
    """Put a package on sale. Raises ValidationError naming each wrong field."""
    package = TokenPricing(**fields)
    package.full_clean()
    with transaction.atomic():
        package.save()
        _keep_change(
            package, "added", changed_by_id, before=None, after={name: getattr(package, name) for name in fields}
        )
    return package


def update_package(package_id: int, *, changed_by_id: int | None = None, **fields: Any) -> TokenPricing:
    """Change a package; checkouts under way keep what they began with. Raises ValidationError, DoesNotExist."""
    with transaction.atomic():
        package = TokenPricing.objects.select_for_update().get(pk=package_id)
        before = {name: getattr(package, name) for name in fields}
        for name, value in fields.items():
            setattr(package, name, value)
        package.full_clean()
        changed = {name: old for name, old in before.items() if old != getattr(package, name)}
        if changed:
            package.save()
            after = {name: getattr(package, name) for name in changed}
            _keep_change(package, "changed", changed_by_id, before=changed, after=after)
    return package


def forget_stripe_price(stripe_price_id: str) -> None:
    """Stripe does not sell at the price, or not what we sell: from now on the package's own is given inline. The audit
    log says so."""
    for currency in Currency.values:
        name = f"stripe_price_id_{currency}"
        for package in TokenPricing.objects.filter(**{name: stripe_price_id}):
            with transaction.atomic():
                if TokenPricing.objects.filter(pk=package.pk, **{name: stripe_price_id}).update(**{name: ""}):
                    _keep_change(package, "changed", None, before={name: stripe_price_id}, after={name: ""})


def list_changes(package_id: int, *, before_id: int | None = None, limit: int = 50) -> audit.AuditPage:
    """A package's history, newest first: it is kept in the audit log alone."""
    return audit.find_entries(
        action=audit.Action.PACKAGE_CHANGED, about=("package", package_id), before_id=before_id, limit=limit
    )


def _keep_change(
    package: TokenPricing, what: str, changed_by_id: int | None, *, before: dict[str, Any] | None, after: dict[str, Any]
) -> None:
    audit.write(
        action=audit.Action.PACKAGE_CHANGED,
        summary=f"Package {package.name} {what}: {', '.join(after)}",
        actor=None if changed_by_id is None else User.objects.get(pk=changed_by_id),
        about=("package", package.pk),
        before=before,
        after=after,
    )


def seed_default_packages() -> int:
    """Put the four default packages on sale, unless there are packages already. Returns how many were made."""
    if TokenPricing.objects.exists():
        return 0
    made = TokenPricing.objects.bulk_create(
        TokenPricing(sort_order=position, **fields) for position, fields in enumerate(DEFAULT_PACKAGES, start=1)
    )
    return len(made)
