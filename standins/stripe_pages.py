"""The HTML of the Stripe stand-in: checkout, 3-D Secure, portal, control. No scripts, no other hosts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

Object = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --bg:#f6f8fa; --card:#fff; --ink:#1a1f36; --soft:#59617a;
  --line:#d9dee8;
  --accent:#4f46e5; --on:#fff; --bad:#b3093c; --badbg:#fdeef2; --note:#fff4d6; --noteink:#6b4a00; }
@media (prefers-color-scheme: dark) { :root { --bg:#0f1220; --card:#191d2f; --ink:#eef0fa; --soft:#a6adc6;
  --line:#343a55; --accent:#8b85ff; --on:#0f1220; --bad:#ff9db8; --badbg:#3a1524; --note:#3a2f10;
  --noteink:#ffe2a0; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.5 system-ui,-apple-system,sans-serif; }
.note { background:var(--note); color:var(--noteink); text-align:center; padding:.5rem 1rem;
  font-size:.875rem; }
main { max-width:60rem; margin:0 auto; padding:1.5rem 1rem 3rem; }
main.narrow { max-width:32rem; } main.wide { max-width:84rem; }
.columns { display:grid; gap:1.5rem; }
@media (min-width:800px) { .columns { grid-template-columns:1fr 1.1fr; gap:3rem; padding-top:2rem; } }
h1 { font-size:1.25rem; margin:0 0 .25rem; } h2 { font-size:1rem; margin:1.75rem 0 .5rem; }
.amount { font-size:2.25rem; font-weight:650; margin:.25rem 0 1rem; letter-spacing:-.02em; }
.panel { background:var(--card); border:1px solid var(--line); border-radius:.75rem; padding:1.25rem; }
.soft { color:var(--soft); font-size:.875rem; } .error { background:var(--badbg); color:var(--bad);
  padding:.75rem 1rem;
  border-radius:.5rem; margin:0 0 1rem; }
ul.items { list-style:none; margin:0; padding:0; } ul.items li { display:flex;
  justify-content:space-between; gap:1rem;
  padding:.75rem 0; border-top:1px solid var(--line); } ul.items li > :last-child { white-space:nowrap; }
label { display:block; font-size:.875rem; font-weight:550; margin:.75rem 0 .25rem; }
input, select { width:100%; font:inherit; color:inherit; background:transparent; border:1px solid
  var(--line);
  border-radius:.5rem; padding:.6rem .75rem; min-height:2.75rem; } select option { color:#1a1f36; }
.two { display:grid; grid-template-columns:1fr 1fr; gap:.75rem; }
button { font:inherit; font-weight:600; color:var(--ink); background:transparent; border:1px solid
  var(--line);
  border-radius:.5rem; padding:.5rem .75rem; min-height:2.75rem; cursor:pointer; }
button.main { width:100%; margin-top:1.25rem; background:var(--accent); border-color:var(--accent);
  color:var(--on); }
button.choice { text-align:left; font-weight:500; font-size:.875rem; } button small { display:block;
  color:var(--soft); }
button:hover { border-color:var(--accent); }
a { color:var(--accent); } :focus-visible { outline:3px solid var(--accent); outline-offset:2px; }
.choices { display:grid; grid-template-columns:1fr 1fr; gap:.5rem; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-size:.875rem; }
th, td { text-align:left; padding:.4rem .6rem; border-top:1px solid var(--line); vertical-align:top; }
td form, .row form { display:inline-flex; gap:.25rem; margin:0 .4rem .25rem 0; align-items:end; }
td button, td input, .row button, .row input, .row select { min-height:2rem; padding:.15rem .5rem;
  font-size:.8125rem; }
td input, .row input { width:6rem; } .row select { width:auto; } code { font-size:.8125rem;
  overflow-wrap:anywhere; }
"""

SIGNS = {"usd": "$", "eur": "€", "gbp": "£"}


def money(cents: int, currency: str | None) -> str:
    """$15.00"""
    currency = currency or "usd"
    return f"{SIGNS.get(currency, currency.upper() + ' ')}{cents // 100:,}.{cents % 100:02}"


def layout(
    title: str, content: str, *, note: str = "Local stand-in for Stripe – no real money", width: str = ""
) -> str:
    """The frame of every page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<div class="note" role="note">{escape(note)}</div>'
        f'<main class="{width}">{content}</main></body></html>'
    )


def message(title: str, text: str, link: str = "", link_text: str = "Back") -> str:
    """A page that only says something."""
    back = f'<p><a href="{escape(link)}">{escape(link_text)}</a></p>' if link else ""
    return layout(
        title, f'<div class="panel"><h1>{escape(title)}</h1><p>{escape(text)}</p>{back}</div>', width="narrow"
    )


def closed_checkout(session: Object, success_url: str) -> str:
    """A session that cannot be paid (again)."""
    if session["status"] == "complete":
        text = "You can close this page, or go back to the shop."
        return message("This checkout is already complete", text, success_url, "Continue")
    text = "This checkout has expired. Please start again in the shop; nothing was charged."
    return message("This checkout has expired", text, session["cancel_url"] or "", "Back to the shop")


def error_box(error: str) -> str:
    """What went wrong, announced to screen readers."""
    return f'<p class="error" role="alert">{escape(error)}</p>' if error else ""


def card_fields() -> str:
    """Card number, expiry and CVC, filled in with the card that always works."""
    return (
        '<label for="card_number">Card number</label>'
        '<input id="card_number" name="card_number" inputmode="numeric"'
        ' autocomplete="cc-number" value="4242 4242 4242 4242" required>'
        '<div class="two"><div><label for="expiry">Expiry (MM / YY)</label><input id="expiry" name="expiry"'
        ' autocomplete="cc-exp" value="12 / 34" required></div><div><label for="cvc">CVC</label>'
        '<input id="cvc" name="cvc" inputmode="numeric" autocomplete="cc-csc" value="123" required>'
        "</div></div>"
    )


def test_cards(cards: Iterable[Any]) -> str:
    """One click pays with that card."""
    buttons = "".join(
        f'<button class="choice" name="test_card" value="{card.number}" formnovalidate>{escape(card.label)}'
        f"<small>{card.brand or 'bank'} •••• {card.number[-4:] if card.brand else '6789'}</small></button>"
        for card in cards
    )
    return f'<h2>Or try a test card with one click</h2><div class="choices">{buttons}</div>'


def item_line(item: Object) -> str:
    """One thing that is bought."""
    count = f" x {item['quantity']}" if item["quantity"] > 1 else ""
    note = f'<br><span class="soft">{escape(item.get("_note") or "")}</span>'
    price = money(item["amount_subtotal"], item["currency"])
    return f"<li><span>{escape(item['description'])}{count}{note}</span><span>{price}</span></li>"


def checkout(session: Object, items: list[Object], email: str, cards: Iterable[Any], error: str) -> str:
    """The page to pay on (or, with mode=setup, to save a card on)."""
    currency, setup = session["currency"], session["mode"] == "setup"
    lines = "".join(map(item_line, items))
    total = "" if setup else money(session["amount_total"], currency)
    promotion = (
        '<label for="promotion_code">Promotion code</label><input id="promotion_code" name="promotion_code"'
        ' placeholder="FREE100 or SAVE20">'
        if session.get("allow_promotion_codes")
        else ""
    )
    company = ""
    if session.get("tax_id_collection", {}).get("enabled"):
        asked = {"company": "Company", "tax_id": "Tax ID"}
        if session.get("billing_address_collection") == "required":
            asked |= {"line1": "Address", "postal_code": "Postal code", "city": "City", "country": "Country"}
        company = "".join(
            f'<label for="{name}">{label}</label><input id="{name}" name="{name}">' for name, label in asked.items()
        )
    back = f'<p><a href="{escape(session["cancel_url"])}">← Back</a></p>' if session["cancel_url"] else ""
    heading, action = ("Save a card", "Save card") if setup else ("Pay Postmate", f"Pay {total}")
    summary = f'{back}<h1>{heading}</h1><p class="amount">{total}</p><ul class="items">{lines}</ul>'
    form = (
        f'<form method="post" class="panel">{error_box(error)}<label for="email">Email</label>'
        f'<input id="email" name="email" type="email" autocomplete="email" value="{escape(email)}">'
        f'{card_fields()}<label for="name">Name on card</label>'
        '<input id="name" name="name" autocomplete="cc-name">'
        f'{company}{promotion}<button class="main">{action}</button>{test_cards(cards)}</form>'
    )
    content = f'<div class="columns"><section>{summary}</section><section>{form}</section></div>'
    return layout(f"{heading} – Checkout", content, note="Local stand-in for Stripe Checkout – no real money")


def authenticate(intent: Object) -> str:
    """What the buyer's bank would show."""
    amount = f" of {money(intent['amount'], intent['currency'])}" if "amount" in intent else ""
    content = (
        '<form method="post" class="panel"><h1>3-D Secure</h1>'
        f"<p>Your test bank asks you to confirm the payment{amount}.</p>"
        '<button class="main" name="outcome" value="complete">Complete authentication</button>'
        '<p><button name="outcome" value="fail">Fail authentication</button></p></form>'
    )
    return layout("3-D Secure", content, width="narrow")


def portal(session: Object, customer: Object, methods: list[Object], error: str) -> str:
    """The billing portal: the saved cards, and a form for another one."""
    default = (customer.get("invoice_settings") or {}).get("default_payment_method")
    rows = "".join(
        f"<li><span>{method_name(method)}{' (default)' if method['id'] == default else ''}</span>"
        '<form method="post">'
        f'<input type="hidden" name="payment_method" value="{method["id"]}">'
        '<button name="action" value="remove">Remove</button></form></li>'
        for method in methods
    )
    back = f'<p><a href="{escape(session["return_url"])}">← Back</a></p>' if session["return_url"] else ""
    content = (
        f'{back}<h1>Payment methods</h1><ul class="items">{rows or "<li>No card is saved.</li>"}</ul>'
        f'<h2>Use another card</h2><form method="post" class="panel">{error_box(error)}{card_fields()}'
        '<button class="main" name="action" value="add">Save card</button></form>'
    )
    return layout("Billing portal", content, width="narrow")


def method_name(method: Object) -> str:
    """visa •••• 4242"""
    details = method[method["type"]]
    return f"{escape(details.get('brand') or details['bank_name'])} •••• {details['last4']}"


# -- control page


def button(action: str, label: str, fields: str = "", **hidden: str) -> str:
    """A form with one button that posts to /control/…"""
    values = "".join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in hidden.items())
    content = f"{values}{fields}<button>{escape(label)}</button>"
    return f'<form method="post" action="/control/{action}">{content}</form>'


def entry(name: str, placeholder: str, value: str = "") -> str:
    """A small labelled field."""
    return f'<input name="{name}" aria-label="{placeholder}" placeholder="{placeholder}" value="{value}">'


def table(heading: str, columns: str, rows: Iterable[str]) -> str:
    """A titled table."""
    head = "".join(f"<th>{name}</th>" for name in columns.split("|"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<h2>{heading}</h2><div class="scroll"><table>{content}</table></div>'


def control(state: Object) -> str:
    """Everything that happened, newest first, with buttons for what else may happen."""
    hold = button("deliveries/hold", "Hold deliveries")
    if state["held"]:
        choices = "".join(f"<option>{order}</option>" for order in ("forward", "reverse", "random"))
        order = f'<select name="order" aria-label="order">{choices}</select>'
        hold = button("deliveries/release", "Release", order + entry("seed", "seed", "1"))
    kinds = ("500", "500_after", "429", "timeout_after", "slow", "processing", "requires_action")
    options = "".join(f"<option>{name}</option>" for name in kinds)
    kind = f'<select name="kind" aria-label="fault">{options}</select>'
    faults = kind + entry("path_prefix", "path prefix", "/v1/") + entry("count", "times", "1")
    counts = ", ".join(f"{number} {name}" for name, number in sorted(state["deliveries"].items())) or "none"
    active = "; ".join(f"{f['count']} x {f['kind']} on {f['path_prefix']}" for f in state["faults"]) or "none"
    content = (
        "<h1>Stripe stand-in: control</h1>"
        f'<p class="soft">{state["succeeded_charges"]} succeeded charges · deliveries: {escape(counts)} ·'
        f" to drop: {state['drop']} · faults: {escape(active)}</p>"
        f'<div class="row">{hold}{button("deliveries/retry", "Retry pending now")}'
        f"{button('deliveries/drop', 'Drop the next', entry('count', 'number', '1'))}"
        f"{button('faults', 'Add fault', faults + entry('seconds', 'seconds', '30'))}"
        f"{button('faults/clear', 'Clear faults')}</div>"
    )
    content += table("Payments", "Payment|Amount|Status|", map(payment_row, state["payment_intents"]))
    content += table("Refunds", "Refund|Amount|Status|", map(refund_row, state["refunds"]))
    content += table("Disputes", "Dispute|Amount|Status|", map(dispute_row, state["disputes"]))
    content += table("Events", "Event|Type|Deliveries|", map(event_row, state["events"]))
    return layout("Stripe stand-in: control", content, width="wide")


def cells(obj: Object) -> str:
    """Id, amount and status."""
    amount = money(obj["amount"], obj["currency"])
    return f"<td><code>{obj['id']}</code></td><td>{amount}</td><td>{obj['status']}</td>"


def payment_row(intent: Object) -> str:
    """A payment and what may happen to it."""
    path, actions = f"payments/{intent['id']}", ""
    if intent["status"] == "succeeded":
        actions = button(f"{path}/refund", "Refund", entry("amount", "cents, or all")) + button(
            f"{path}/dispute", "Dispute"
        )
        actions += button(f"{path}/dispute", "Inquiry", status="warning_needs_response")
        actions += button(f"{path}/warn", "Fraud warning")
    elif intent["status"] == "processing":
        actions = button(f"{path}/settle", "Succeed", outcome="succeeded") + button(
            f"{path}/settle", "Fail", outcome="failed"
        )
    return f"{cells(intent)}<td>{actions}</td>"


def refund_row(refund: Object) -> str:
    """A refund, which may fail."""
    fail = button(f"refunds/{refund['id']}/fail", "Fail") if refund["status"] == "succeeded" else ""
    return f"{cells(refund)}<td>{fail}</td>"


def dispute_row(dispute: Object) -> str:
    """A dispute, which may be won or lost."""
    path, actions = f"disputes/{dispute['id']}/close", ""
    if dispute["status"].endswith("needs_response"):
        actions = button(path, "Win", outcome="won") + button(path, "Lose", outcome="lost")
    return f"{cells(dispute)}<td>{actions}</td>"


def event_row(event: Object) -> str:
    """An event with the state of its deliveries."""
    states = "<br>".join(escape(f"{d['state']} after {d['attempts']}: {d['answer']}") for d in event["deliveries"])
    path = f"events/{event['id']}"
    actions = button(f"{path}/resend", "Resend") + button(
        f"{path}/duplicate", "Duplicate", entry("count", "copies", "3")
    )
    name = f"<td><code>{event['id']}</code></td><td>{event['type']}</td>"
    return f"{name}<td>{states or '-'}</td><td>{actions}</td>"
