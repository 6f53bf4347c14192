"""Our own receipt for a purchase, as a PDF."""

from django.utils import timezone

from billing.models import Purchase


def render_receipt(purchase: Purchase) -> bytes:
    """The receipt of a paid purchase: who paid, when, what for, how much."""
    from billing.pdf import Document  # half a second, for those alone who print

    paid_at = timezone.localtime(purchase.paid_at or purchase.created_at)
    title = f"Receipt {purchase.pk}"
    pdf = Document(title=title, subtitle=title, written_at=paid_at)
    pdf.fact("Paid by", purchase.user.email)
    pdf.fact("Paid on", f"{paid_at:%-d %B %Y, %H:%M %Z}")
    pdf.fact("Payment", purchase.stripe_payment_intent_id or "No payment was needed")
    pdf.fact("Way of payment", purchase.get_kind_display())
    pdf.rule()
    pdf.fact(purchase.package_name, f"{purchase.tokens:,} tokens")
    pdf.fact("Price", f"{purchase.price_display} {purchase.currency.upper()}", style="B")
    pdf.small_print(
        "Tax and discounts, where there were any, are on the payment service's own receipt or invoice. "
        "Tokens do not expire."
    )
    return bytes(pdf.output())
