"""Our own receipt for a purchase, as a PDF."""

from typing import TYPE_CHECKING

from django.conf import settings
from django.utils import timezone

from billing.models import PaymentReversal, Purchase

if TYPE_CHECKING:
    from kit.pdf import Document


def number_of(purchase: Purchase) -> str:
    """The receipt's number, as printed."""
    return f"{settings.RECEIPT_PREFIX}{purchase.receipt_number:06}"


def render_receipt(purchase: Purchase) -> bytes:
    """The receipt of a paid purchase that has its number: who sold, who paid, how, what for, how much, which tax, and
    what of it went back since."""
    from kit.pdf import Document  # half a second, for those alone who print

    paid_at = timezone.localtime(purchase.paid_at or purchase.created_at)
    title = f"Receipt {number_of(purchase)}"
    pdf = Document(title=title, subtitle=title, written_at=paid_at)
    pdf.fact("Sold by", "\n".join(filter(None, (settings.SELLER_NAME, *settings.SELLER_ADDRESS))))
    if settings.SELLER_TAX_ID:
        pdf.fact("Tax ID", settings.SELLER_TAX_ID)
    pdf.rule()
    pdf.fact("Paid by", "\n".join(_payer(purchase)))
    if purchase.buyer_tax_ids:
        pdf.fact("Buyer’s tax ID", purchase.buyer_tax_ids)
    pdf.fact("Paid on", f"{paid_at:%-d %B %Y, %H:%M %Z}")
    pdf.fact("Paid with", _way_of_payment(purchase))
    pdf.fact("Payment", purchase.stripe_payment_intent_id or "No payment was needed")
    pdf.rule()
    pdf.fact(purchase.package_name, f"{purchase.tokens:,} tokens")
    pdf.fact("Price", purchase.price_display)
    if purchase.discount_cents:
        pdf.fact("Discount", f"\N{MINUS SIGN}{purchase.money(purchase.discount_cents)}")
    if purchase.tax_cents:
        is_included = purchase.included_tax_cents == purchase.tax_cents
        pdf.fact("Tax, in the price" if is_included else "Tax", purchase.money(purchase.tax_cents))
    pdf.fact("Paid", f"{purchase.paid_display} {purchase.currency.upper()}", style="B")
    _returned(pdf, purchase)
    pdf.small_print("Tokens do not expire.")
    return bytes(pdf.output())


def _payer(purchase: Purchase) -> list[str]:
    """A team by the company's name and address that were entered, or by its own name, with who of it bought."""
    company = [purchase.buyer_name or purchase.account.workspace.name, *purchase.buyer_address.splitlines()]
    team = [] if purchase.account.user_id else company
    return [*team, *(filter(None, (purchase.user.name, purchase.user.email)) if purchase.user else ())]


def _way_of_payment(purchase: Purchase) -> str:
    how = purchase.get_kind_display()
    if purchase.card_last4:
        return f"{purchase.card_brand.replace('_', ' ').capitalize()} ending in {purchase.card_last4} ({how})"
    if purchase.payment_method_type:
        return f"{purchase.payment_method_type.replace('_', ' ').capitalize()} ({how})"
    return how


def _returned(pdf: "Document", purchase: Purchase) -> None:
    """The part of a credit note: each refund and dispute that took money, and what is left."""
    taking = [each for each in purchase.reversals.order_by("created_at", "pk") if each.takes_money]
    if not taking:
        return
    pdf.rule()
    for each in taking:
        what = "Refunded" if each.kind == PaymentReversal.Kind.REFUND else "Disputed"
        pdf.fact(f"{what} on {timezone.localtime(each.created_at):%-d %B %Y}", f"\N{MINUS SIGN}{each.taken_display}")
    left_cents = purchase.paid_total_cents - sum(each.taken_cents for each in taking)
    if all(each.currency == purchase.currency for each in taking):
        left = purchase.money(max(0, left_cents))
        pdf.fact("Paid in the end", f"{left} {purchase.currency.upper()}", style="B")
