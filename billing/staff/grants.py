"""Grants and deductions: tokens that admins give and take, each with a reason and an entry in the audit log.

A superadmin's is carried out at once. An admin's grant waits for a superadmin, unless it is within what the settings
let admins grant by themselves; an admin's deduction always waits, and so does anything for oneself. Above a number of
tokens in the settings it takes two superadmins; what one person's word moved in a day counts together. Nobody approves
what they asked for.

Locks are taken in one order: the request, whose word it is, whom it is for, then (in the ledger) the account.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F, QuerySet, Sum
from django.db.models.functions import Now
from django.utils import timezone

from accounts import audit, roles, teams
from accounts.audit import Action
from accounts.models import User
from billing import ledger
from billing.catalogue import system_settings
from billing.models import GrantRequest, SystemSettings, TokenAccount, TokenTransaction
from billing.models.account import WithheldBonus
from billing.models.fields import ClockTimestamp
from billing.models.grant_request import GrantKind as Kind
from billing.models.grant_request import GrantState as State
from billing.models.lot import LotKind
from billing.notifications import messages
from kit import database
from kit.database import repeated_after_conflicts
from kit.locks import lock_until_commit
from kit.refusal import Refusal
from kit.text import one_line

MAX_REASON_LENGTH = 500
MAX_LOT_DAYS = 3_650
LIMIT_SPAN = timedelta(hours=24)
REQUEST_LIFETIME = timedelta(days=14)


class GrantError(Refusal):
    """Refused; no token moved. `message` is for the person."""


class GrantNotPossible(GrantError):
    """The account, the tokens or the reason do not allow it."""


class GrantNotAllowed(GrantError):
    """Not by this person; the attempt is in the audit log."""

    http_status = 403


class GrantKeyConflict(GrantError):
    """The form was sent before with other contents."""

    http_status = 409


class GrantAlreadyDecided(GrantError):
    """Somebody else was quicker."""

    http_status = 409


@dataclass(frozen=True, slots=True)
class GrantPreview:
    """What a grant or deduction would do, for the confirmation."""

    balance_tokens: int
    new_balance_tokens: int
    approvals_needed: int  # by superadmins other than the asker; 0: it is carried out at once


# --- Asking ---------------------------------------------------------------------------------------------------------


def preview(
    *,
    admin: User,
    user_id: int | None = None,
    account_id: int | None = None,
    tokens: int,
    kind: str = Kind.GRANT,
) -> GrantPreview:
    """What `grant_tokens` or `deduct_granted_tokens` would do now; raises what they raise. Writes nothing."""
    require_tokens(tokens)
    account = _get_account(ledger.Party(user_id, account_id))
    amount_tokens = tokens if kind == Kind.GRANT else -tokens
    if kind == Kind.DEDUCTION:
        _require_available(account, tokens)
    settings = system_settings.get_system_settings()
    needs_two = _needs_two(settings, kind, tokens, account=account, by=admin)
    is_own = _is_own(admin, account)
    if _is_at_once(admin, kind, is_own=is_own, tokens=tokens, settings=settings, needs_two=needs_two):
        approvals_needed = 0
    else:
        counts_as_first = admin.is_superadmin and not is_own
        approvals_needed = 2 if needs_two and not counts_as_first else 1
    return GrantPreview(account.balance, account.balance + amount_tokens, approvals_needed)


def grant_tokens(
    *,
    admin: User,
    user_id: int | None = None,
    account_id: int | None = None,
    tokens: int,
    reason: str,
    request_key: str,
    expires_at: datetime | None = None,
) -> GrantRequest:
    """Give tokens to an account, or to the user's own, or ask for it: the returned request is `done`, or open and waits
    for a superadmin. With `expires_at` they are a lot and end then, also where the request is approved later.

    `request_key` is the form's: sent twice it is one grant, and the second time returns the first outcome (law 8).
    Raises GrantNotAllowed for non-admins, GrantNotPossible, GrantKeyConflict.
    """
    return _ask(Kind.GRANT, admin, ledger.Party(user_id, account_id), tokens, reason, request_key, expires_at)


def deduct_granted_tokens(
    *,
    admin: User,
    user_id: int | None = None,
    account_id: int | None = None,
    tokens: int,
    reason: str,
    request_key: str,
) -> GrantRequest:
    """Take tokens, or ask for it, like `grant_tokens`. It leaves no debt: more than is available is not possible."""
    return _ask(Kind.DEDUCTION, admin, ledger.Party(user_id, account_id), tokens, reason, request_key)


@repeated_after_conflicts
def _ask(
    kind: Kind,
    admin: User,
    receiver: ledger.Party,
    tokens: int,
    reason: str,
    request_key: str,
    expires_at: datetime | None = None,
) -> GrantRequest:
    require_tokens(tokens)
    reason = clean_reason(reason)
    asker = User.objects.filter(pk=admin.pk, is_active=True).first()  # the role of this moment, not of the sign-in
    if asker is None or not asker.is_admin:
        _refuse(admin, receiver.user_id, f"Was refused a {kind} of {tokens:,} tokens", Action(kind))
        raise GrantNotAllowed("Only admins give or take tokens.")
    account = _get_account(receiver)
    with transaction.atomic():
        settings = system_settings.get_system_settings()
        _one_at_a_time(settings, asker, account)
        needs_two = _needs_two(settings, kind, tokens, account=account, by=asker)
        try:
            with transaction.atomic():
                request = GrantRequest.objects.create(
                    kind=kind,
                    account=account,
                    user_id=account.user_id,
                    tokens=tokens,
                    tokens_end_at=expires_at,
                    reason=reason,
                    requested_by=asker,
                    requested_by_role=asker.role,
                    request_key=request_key,
                    admin_limit_tokens=settings.admin_grant_limit_tokens,
                    needs_two=needs_two,
                    state=State.REQUESTED,
                    expires_at=database.now() + REQUEST_LIFETIME,
                )
        except IntegrityError:
            # Law 8: the unique key of the form. The first one has committed by now.
            return _sent_before(kind, asker, account, tokens, reason, request_key, expires_at)
        now = database.now()
        if expires_at and not now < expires_at <= now + timedelta(days=MAX_LOT_DAYS + 1):
            raise GrantNotPossible("The end of these tokens must lie in the future, within ten years.")
        is_own = _is_own(asker, account)
        if _is_at_once(asker, kind, is_own=is_own, tokens=tokens, settings=settings, needs_two=needs_two):
            return _carry_out(request, by=asker, action=Action(kind))
        if asker.is_superadmin and needs_two and not is_own:
            _approve_first(request, by=asker)
        if kind == Kind.DEDUCTION:
            _require_available(account, tokens)
        _write(request, Action(kind), by=asker, words="asked for", outcome=audit.Outcome.REQUESTED)
    return request


def _is_at_once(
    asker: User, kind: str, *, is_own: bool, tokens: int, settings: SystemSettings, needs_two: bool
) -> bool:
    """Whether it needs nobody else's approval. Call it under `_one_at_a_time`."""
    if is_own or needs_two:
        return False
    if asker.is_superadmin:
        return True
    if kind != Kind.GRANT:
        return False
    # Together in a day: else the limit is passed in small pieces.
    granted_tokens = GrantRequest.objects.filter(
        requested_by=asker,
        decided_by=F("requested_by"),
        kind=Kind.GRANT,
        state=State.DONE,
        created_at__gt=Now() - LIMIT_SPAN,
    ).aggregate(tokens=Sum("tokens", default=0))["tokens"]
    return int(granted_tokens) + tokens <= settings.admin_grant_limit_tokens


def _needs_two(settings: SystemSettings, kind: str, tokens: int, *, account: TokenAccount, by: User) -> bool:
    """Whether so many tokens need two superadmins, together with what one person's word moved in a day: the word of
    `by`, whoever got it, and anybody's for this account. Else the limit is passed in small pieces. Call it under
    `_one_at_a_time`."""
    limit_tokens = settings.grant_approval_tokens
    if limit_tokens is None or tokens > limit_tokens:
        return limit_tokens is not None
    on_one_word = GrantRequest.objects.filter(
        kind=kind, needs_two=False, state=State.DONE, decided_at__gt=Now() - LIMIT_SPAN
    )
    return any(
        tokens + int(moved.aggregate(tokens=Sum("tokens", default=0))["tokens"]) > limit_tokens
        for moved in (on_one_word.filter(decided_by=by), on_one_word.filter(account=account))
    )


def _one_at_a_time(settings: SystemSettings, by: User, account: TokenAccount) -> None:
    """Two grants at once must not both count the same rest of a limit. Locked in this order, by everybody."""
    if by.role == User.Role.ADMIN or settings.grant_approval_tokens is not None:
        lock_until_commit(f"grants-of-{by.pk}")
    if settings.grant_approval_tokens is not None:
        lock_until_commit(f"grants-for-{account.pk}")


def _sent_before(
    kind: str,
    asker: User,
    account: TokenAccount,
    tokens: int,
    reason: str,
    request_key: str,
    expires_at: datetime | None,
) -> GrantRequest:
    request = GrantRequest.objects.get(requested_by=asker, request_key=request_key)
    sent = (request.kind, request.account_id, request.tokens, request.reason, request.tokens_end_at)
    if sent != (kind, account.pk, tokens, reason, expires_at):
        raise GrantKeyConflict("This form was already sent with other contents. Reload the page.")
    return request


# --- Deciding -------------------------------------------------------------------------------------------------------


@repeated_after_conflicts
def approve_request(*, superadmin: User, request_id: int) -> GrantRequest:
    """Carry a request out, or be the first of two superadmins who approve it. Approving twice is once.

    Raises GrantNotAllowed (also for one's own, and for what is for oneself), GrantAlreadyDecided, GrantNotPossible.
    """
    approver = _require_decider(superadmin, request_id, "approve")
    with transaction.atomic():
        # The lock decides between two who approve, or decline, at once: the second finds it decided.
        request = GrantRequest.objects.select_for_update().get(pk=request_id)
        if request.state == State.DONE and request.decided_by_id == approver.pk:
            return request
        _require_open(request)
        settings = system_settings.get_system_settings()
        _one_at_a_time(settings, approver, request.account)
        if not request.needs_two:  # by now it may: what else the approver let through in this day counts
            request.needs_two = _needs_two(settings, request.kind, request.tokens, account=request.account, by=approver)
        first_id = request.approved_by_id
        is_approved = first_id is not None and roles.find_superadmin(first_id) is not None
        if request.needs_two and not is_approved:  # by nobody, or by somebody who is no superadmin any more
            _approve_first(request, by=approver)
            _write(request, Action.GRANT_APPROVED, by=approver, words="approved first", outcome=audit.Outcome.REQUESTED)
            return request
        if request.needs_two and request.approved_by_id == approver.pk:
            return request  # the second must be somebody else
        if request.needs_two and request.approved_by and roles.are_one_person(approver, request.approved_by):
            raise GrantNotAllowed("The second superadmin must be somebody else, with a mailbox of their own.")
        return _carry_out(request, by=approver, action=Action.GRANT_APPROVED)


@repeated_after_conflicts
def decline_request(*, superadmin: User, request_id: int, reason: str) -> GrantRequest:
    """Close a request without moving a token. Raises as `approve_request`."""
    reason = clean_reason(reason)
    decider = _require_decider(superadmin, request_id, "decline")
    with transaction.atomic():
        request = GrantRequest.objects.select_for_update().get(pk=request_id)
        if request.state == State.DECLINED and request.decided_by_id == decider.pk:
            return request
        _require_open(request)
        _close(request, State.DECLINED, by=decider, decision_reason=reason)
        _write(request, Action.GRANT_DECLINED, by=decider, words="declined", reason=reason)
    return request


def expire_requests() -> int:
    """Close what nobody decided within two weeks. Returns how many."""
    due = GrantRequest.objects.filter(state__in=GrantRequest.OPEN_STATES, expires_at__lt=ClockTimestamp())
    return due.update(state=State.EXPIRED)


def list_open_requests() -> QuerySet[GrantRequest]:
    """The queue, oldest first."""
    waiting = GrantRequest.objects.filter(state__in=GrantRequest.OPEN_STATES)
    return waiting.select_related("account__user", "account__workspace", "requested_by", "approved_by").order_by("id")


def may_decide(request: GrantRequest, user: User) -> bool:
    """Whether to show somebody the buttons; `approve_request` and `decline_request` decide."""
    return (
        request.is_open
        and user.is_superadmin
        and user.pk not in (request.requested_by_id, request.approved_by_id)
        and user.pk not in teams.member_ids(request.account.workspace)
    )


def _require_decider(superadmin: User, request_id: int, verb: str) -> User:
    request = GrantRequest.objects.filter(pk=request_id).first()
    if request is None:
        raise GrantNotPossible("There is no such request.")
    decider = roles.find_superadmin(superadmin.pk)
    if decider is None:
        message = "Only superadmins decide on requests."
    elif roles.are_one_person(decider, request.requested_by):
        message = "Nobody decides on their own request: ask another superadmin."
    elif _is_own(decider, request.account):
        message = "Nobody decides on tokens of their own: ask another superadmin."
    else:
        return decider
    _refuse(superadmin, request.user_id, f"Was refused to {verb} a request", Action.GRANT_APPROVED, request)
    raise GrantNotAllowed(message)


def _require_open(request: GrantRequest) -> None:
    if not request.is_open:
        raise GrantAlreadyDecided(f"This request is closed already: {request.get_state_display().lower()}.")
    # Row 76: by the database's clock.
    if GrantRequest.objects.filter(pk=request.pk, expires_at__lt=ClockTimestamp()).exists():
        raise GrantAlreadyDecided("This request has expired. It can be made again.")


# --- A welcome bonus that waits -------------------------------------------------------------------------------------


def give_waiting_bonus(*, admin: User, user_id: int) -> TokenAccount:
    """Give the welcome bonus that waits for an admin, since the person's addresses are all disposable.

    No grant, so no superadmin decides: how much it is and that admins give it is what superadmins set. Twice is once
    (law 8); entry, mark and audit entry are one transaction. Raises GrantNotAllowed, GrantNotPossible.
    """
    giver = User.objects.filter(pk=admin.pk, is_active=True).first()  # the role of this moment, not of the sign-in
    receiver = User.objects.filter(pk=user_id).first()
    if giver is None or not giver.is_admin or receiver is None or roles.are_one_person(giver, receiver):
        _refuse(admin, user_id, "Was refused to give a welcome bonus", Action.WELCOME_BONUS)
        raise GrantNotAllowed("Only admins give a welcome bonus that waits, and nobody their own.")
    with transaction.atomic():
        account = TokenAccount.objects.select_for_update().filter(user_id=user_id).first()
        if account is None or account.bonus_withheld != WithheldBonus.WAITS:
            raise GrantNotPossible("No welcome bonus waits here any more.")
        before_tokens, sequence = account.balance, account.sequence
        account = ledger.initialize_account(user_id=user_id, may_be_disposable=True)
        bonus = TokenTransaction.objects.filter(account=account, type="bonus", sequence__gt=sequence).first()
        if given_tokens := bonus.amount if bonus else 0:
            audit.write(
                action=Action.WELCOME_BONUS,
                summary=f"Welcome bonus of {given_tokens:,} tokens given to a disposable address",
                actor=giver,
                subject_id=user_id,
                before={"balance_tokens": before_tokens},
                after={"balance_tokens": account.balance},
            )
    if not given_tokens:  # what has been found out stays written
        raise GrantNotPossible("No token moved: this mailbox had the bonus before, or the bonus is 0 now.")
    return account


# --- What moves tokens ----------------------------------------------------------------------------------------------


def _carry_out(request: GrantRequest, *, by: User, action: Action) -> GrantRequest:
    """Move the tokens, close the request, tell the user: all in the caller's transaction, so all of it or nothing."""
    if request.account.status_reason in (TokenAccount.ANONYMISED, TokenAccount.CLOSED):
        raise GrantNotPossible(f"This account was {request.account.status_reason}: nobody can use its tokens.")
    entry: dict[str, Any] = {
        "account_id": request.account_id,
        "tokens": request.tokens,
        "admin_id": by.pk,
        "description": request.reason,
        # Law 8: the request's own key, so a request moves tokens once, whoever runs this however often.
        "idempotency_key": f"grant-request-{request.pk}",
        # What made it right at that time, in a row that is never changed (law 3): `verify_ledger` reads it.
        "metadata": {
            "grant_request_id": request.pk,
            "admin_role": by.role,
            "admin_limit_tokens": request.admin_limit_tokens,
            "requested_by_id": request.requested_by_id,
            "first_approved_by_id": request.approved_by_id,
        },
    }
    try:
        # Laws 1 and 2: the ledger writes balance and entry; law 12: a grant is recorded for suspended accounts, too.
        if request.kind == Kind.GRANT:
            # Laws 14 and 15: with an end they are a lot, written by the same statement.
            posting = ledger.add_tokens(
                type=TokenTransaction.Type.ADMIN_GRANT,
                expires_at=request.tokens_end_at,
                lot_kind=LotKind.GRANT,
                **entry,
            )
        else:
            posting = ledger.deduct_tokens(type=TokenTransaction.Type.ADMIN_DEDUCTION, **entry)  # law 4: no debt
    except ledger.InvalidExpiry as error:
        raise GrantNotPossible("These tokens would have ended already. Decline it and ask anew.") from error
    except (ledger.InsufficientTokens, ledger.AccountNotActive) as error:  # the latter: a suspended account
        raise _too_much(request) from error
    request.transaction_id = posting.transaction_id
    _close(request, State.DONE, by=by)
    account = TokenAccount.objects.get(pk=request.account_id)
    _write(
        request,
        action,
        by=by,
        words="carried out",
        before={"balance_tokens": posting.balance_tokens - posting.amount_tokens},
        after={"balance_tokens": posting.balance_tokens},
    )
    tell = messages.grant_received if request.kind == Kind.GRANT else messages.tokens_deducted
    tell(account, tokens=request.tokens, reason=request.reason, key=f"grant-request-{request.pk}")
    return request


def _approve_first(request: GrantRequest, *, by: User) -> None:
    request.state = State.APPROVED
    request.approved_by = by
    request.approved_at = timezone.now()
    request.save(update_fields=["state", "needs_two", "approved_by", "approved_at"])


def _close(request: GrantRequest, state: State, *, by: User, decision_reason: str = "") -> None:
    request.state = state
    request.decided_by = by
    request.decided_at = timezone.now()
    request.decision_reason = decision_reason
    request.save(update_fields=["state", "decided_by", "decided_at", "decision_reason", "transaction"])


# --- Helpers --------------------------------------------------------------------------------------------------------


def _get_account(receiver: ledger.Party) -> TokenAccount:
    account = TokenAccount.objects.select_related("user", "workspace").filter(**receiver.of_account).first()
    if account is None:
        raise GrantNotPossible("There is no such token account.")
    return account


def _is_own(admin: User, account: TokenAccount) -> bool:
    """Whether the tokens are the admin's as well: their own account, or that of a team they are in. Who has another
    name at the same mailbox is the same person."""
    return any(
        roles.are_one_person(admin, each) for each in User.objects.filter(pk__in=teams.member_ids(account.workspace))
    )


def require_tokens(tokens: Any) -> None:
    """Raises GrantNotPossible unless it is a number of tokens that can be granted."""
    # Row 56: `True` is an int to Python.
    if type(tokens) is not int or not 0 < tokens <= ledger.MAX_TOKENS:
        raise GrantNotPossible(f"The number of tokens must be a whole number from 1 to {ledger.MAX_TOKENS:,}.")


def _require_available(account: TokenAccount, tokens: int) -> None:
    if account.available < tokens:
        raise GrantNotPossible(_available_words(account))


def _too_much(request: GrantRequest) -> GrantNotPossible:
    return GrantNotPossible(_available_words(TokenAccount.objects.get(pk=request.account_id)))


def _available_words(account: TokenAccount) -> str:
    return f"Only {max(account.available, 0):,} tokens are available, and a deduction leaves no debt."


def clean_reason(reason: str) -> str:
    """One line of readable text. Raises GrantNotPossible."""
    reason = one_line(reason)
    if not reason:
        raise GrantNotPossible("Enter a reason.")
    if len(reason) > MAX_REASON_LENGTH:
        raise GrantNotPossible(f"Enter a reason of at most {MAX_REASON_LENGTH} characters.")
    return reason


def _write(request: GrantRequest, action: Action, *, by: User, words: str, **details: Any) -> None:
    audit.write(
        action=action,
        summary=f"{request.get_kind_display()} of {request.tokens:,} tokens {words}",
        actor=by,
        subject_id=request.user_id,
        about=("grant_request", request.pk),
        **({"reason": request.reason} | details),
    )


def _refuse(who: User, user_id: int | None, summary: str, action: Action, request: GrantRequest | None = None) -> None:
    audit.write_refusal(
        action=action,
        summary=summary,
        actor=who,
        subject_id=user_id if User.objects.filter(pk=user_id or 0).exists() else None,
        about=("grant_request", request.pk) if request else None,
    )
