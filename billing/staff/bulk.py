"""One action on many accounts: granted, suspended or exported, one small transaction each.

Which accounts is settled when the job is started. A worker takes a row, does it and notes what became of it in one
transaction: killed anywhere, another goes on, and no row is done twice. Any number of workers may run one job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from django.db import IntegrityError, transaction
from django.db.models import Count, QuerySet
from django.utils import timezone

from accounts import audit, teams
from accounts.models import User
from billing.models import BulkJob, BulkJobRow, GrantRequest, TokenAccount
from billing.models.bulk_job import BulkKind as Kind
from billing.models.bulk_job import BulkRowState as RowState
from billing.models.bulk_job import BulkState as State
from billing.staff import accounts, grants
from billing.staff.accounts import AccountFilter
from kit.database import repeated_after_conflicts
from kit.on_commit import enqueue_on_commit
from kit.refusal import Refusal

ROWS_PER_TASK = 200  # then the worker is free for other tasks
MAX_ROWS = 200_000


class BulkError(Refusal):
    """Refused; nothing was started. `message` is for the person."""


class BulkNotAllowed(BulkError):
    """Not by this person; the attempt is in the audit log."""

    http_status = 403


class BulkNotPossible(BulkError):
    pass


class BulkCountChanged(BulkNotPossible):
    """Other accounts match than the person has confirmed."""

    http_status = 409


class BulkKeyConflict(BulkError):
    http_status = 409


@dataclass(frozen=True, slots=True)
class Progress:
    """How many rows are in which state."""

    waiting: int
    done: int
    requested: int
    skipped: int
    failed: int
    cancelled: int

    @property
    def total(self) -> int:
        return self.waiting + self.done + self.requested + self.skipped + self.failed + self.cancelled

    @property
    def percent(self) -> int:
        """Rounded down: 100 is all."""
        return 100 * (self.total - self.waiting) // self.total if self.total else 100


# --- Starting and cancelling ----------------------------------------------------------------------------------------


def start_bulk_job(
    *,
    admin: User,
    kind: str,
    filter: AccountFilter,
    request_key: str,
    tokens: int | None = None,
    reason: str = "",
    expected_rows: int | None = None,
) -> BulkJob:
    """Start a job on the accounts that the filter finds now. Admins may export, superadmins everything.

    `request_key` is the form's: sent twice it is one job. `expected_rows` is how many accounts the person has
    confirmed: when others match by now, nothing is started, but for an export. Raises BulkNotAllowed, BulkNotPossible,
    BulkCountChanged, BulkKeyConflict, accounts.InvalidSearch.
    """
    actor = User.objects.filter(pk=admin.pk, is_active=True).first()
    if actor is None or not may_start(actor, kind):
        audit.write_refusal(action=audit.Action.BULK_JOB, summary=f"Was refused a bulk {kind}", actor=admin)
        raise BulkNotAllowed("Only superadmins change many accounts at once.")
    tokens, reason = _clean(kind, tokens, reason)
    found = accounts.filter_accounts(filter).order_by("pk")
    # What was searched for is kept as a hash: it may be somebody's address, who must stay free to be anonymised.
    search_hash = sha256(filter.search.encode()).hexdigest() if filter.search else ""
    filters = {"status": filter.status, "band": filter.band, "search_sha256": search_hash}
    with transaction.atomic():
        try:
            with transaction.atomic():
                job = BulkJob.objects.create(
                    kind=kind,
                    filters=filters,
                    tokens=tokens,
                    reason=reason,
                    requested_by=actor,
                    request_key=request_key,
                )
        except IntegrityError:
            job = BulkJob.objects.get(requested_by=actor, request_key=request_key)
            wanted = (kind, filters, tokens, reason)
            if (job.kind, job.filters, job.tokens, job.reason) != wanted:
                raise BulkKeyConflict("This form was already sent with other contents. Reload the page.") from None
            return job
        rows = _take_on(job, found, expected_rows)
        audit.write(
            action=audit.Action.EXPORT if kind == Kind.EXPORT else audit.Action.BULK_JOB,
            summary=f"{job.get_kind_display()}: {rows:,} accounts" + (f", {tokens:,} tokens each" if tokens else ""),
            actor=actor,
            about=("bulk_job", job.pk),
            after=filters,
            reason=reason,
        )
        enqueue_on_commit("billing.tasks.run_bulk_job", job.pk)
    return job


def may_start(user: User, kind: str) -> bool:
    """Whether their role allows jobs of the kind: to begin one, and to have its rows done."""
    return user.is_superadmin or (user.is_admin and kind == Kind.EXPORT)


def _clean(kind: str, tokens: int | None, reason: str) -> tuple[int | None, str]:
    """Tokens and reason as an action of the kind keeps them. Raises BulkNotPossible."""
    try:
        if kind == Kind.GRANT:
            grants.require_tokens(tokens)
            return tokens, grants.clean_reason(reason)
        if kind == Kind.SUSPEND:
            return None, accounts.clean_reason(reason)
    except (grants.GrantError, accounts.AccountError) as error:
        raise BulkNotPossible(error.message) from error
    if kind != Kind.EXPORT:
        raise BulkNotPossible("There is no such action.")
    return None, ""


def _take_on(job: BulkJob, found: QuerySet[TokenAccount], expected_rows: int | None) -> int:
    """Give the job its rows, one for each account. Returns how many. Raises BulkNotPossible, BulkCountChanged."""
    account_ids = list(found.values_list("pk", flat=True)[: MAX_ROWS + 1])
    if not account_ids:
        raise BulkNotPossible("No account matches.")
    if len(account_ids) > MAX_ROWS:
        raise BulkNotPossible(f"More than {MAX_ROWS:,} accounts match. Narrow the filter.")
    if job.kind != Kind.EXPORT and expected_rows not in (None, len(account_ids)):
        raise BulkCountChanged(
            f"Nothing was started: you confirmed {expected_rows:,} accounts, and by now {len(account_ids):,} match."
        )
    BulkJobRow.objects.bulk_create(
        [BulkJobRow(job=job, account_id=account_id) for account_id in account_ids], batch_size=5_000
    )
    return len(account_ids)


def cancel_bulk_job(*, admin: User, job_id: int) -> BulkJob:
    """Stop a job: what is done stays done, the rest is left alone. By its owner or a superadmin; twice is once."""
    job = BulkJob.objects.get(pk=job_id)
    actor = User.objects.filter(pk=admin.pk, is_active=True).first()
    if actor is None or not (actor.is_superadmin or (actor.is_admin and actor.pk == job.requested_by_id)):
        audit.write_refusal(
            action=audit.Action.BULK_JOB, summary="Was refused to cancel a bulk action", actor=admin,
            about=("bulk_job", job.pk),
        )  # fmt: skip
        raise BulkNotAllowed("Only superadmins cancel what somebody else has started.")
    with transaction.atomic():
        job = BulkJob.objects.select_for_update().get(pk=job_id)
        if job.state != State.RUNNING:
            return job
        # Rows that a worker holds at this moment are waited for: they are done, and say so.
        left = BulkJobRow.objects.filter(job=job, state=RowState.WAITING).update(state=RowState.CANCELLED)
        _end(job, State.CANCELLED)
        audit.write(
            action=audit.Action.BULK_JOB,
            summary=f"{job.get_kind_display()} cancelled with {left:,} accounts left",
            actor=actor,
            about=("bulk_job", job.pk),
        )
    return job


# --- Running --------------------------------------------------------------------------------------------------------


def run_bulk_job(*, job_id: int, limit: int = ROWS_PER_TASK) -> int:
    """Do up to `limit` rows of a job, then hand it on. Returns how many were done. May run any number of times."""
    done = 0
    while done < limit and _do_next(job_id):
        done += 1
    with transaction.atomic():
        job = BulkJob.objects.select_for_update().filter(pk=job_id, state=State.RUNNING).first()
        if job is None:
            return done
        if job.rows.filter(state=RowState.WAITING).exists():
            if done:  # another worker may hold the rest
                enqueue_on_commit("billing.tasks.run_bulk_job", job_id)
        else:
            _end(job, State.DONE)
    return done


def sweep_bulk_jobs() -> int:
    """Go on with the jobs whose worker died or that no worker was told of. Returns how many are running."""
    job_ids = list(BulkJob.objects.filter(state=State.RUNNING).values_list("pk", flat=True))
    with transaction.atomic():
        for job_id in job_ids:
            enqueue_on_commit("billing.tasks.run_bulk_job", job_id)
    return len(job_ids)


@repeated_after_conflicts
def _do_next(job_id: int) -> bool:
    """Take the next row that no other worker has, do it and note it, in one transaction (law 8)."""
    with transaction.atomic():
        row = (
            BulkJobRow.objects.select_for_update(skip_locked=True, of=("self",))
            .select_related("job", "job__requested_by", "account")
            .filter(job_id=job_id, state=RowState.WAITING)
            .order_by("id")
            .first()
        )
        if row is None:
            return False
        try:
            with transaction.atomic():
                row.state, row.message = _do(row)
        except (grants.GrantError, accounts.AccountError, BulkNotAllowed) as error:
            row.state, row.message = RowState.FAILED, error.message[:300]
        row.finished_at = timezone.now()
        row.save(update_fields=["state", "message", "data", "finished_at"])
    return True


def _do(row: BulkJobRow) -> tuple[RowState, str]:
    job, account, requester = row.job, row.account, row.job.requested_by
    if not requester.is_active or not may_start(requester, job.kind):
        raise BulkNotAllowed("Whoever started this may not do it any more.")
    if job.kind == Kind.GRANT:
        # The row's key: whatever repeats, this account has one grant of this job.
        request = grants.grant_tokens(
            admin=requester,
            account_id=account.pk,
            tokens=job.tokens or 0,
            reason=job.reason,
            request_key=f"bulk-{job.pk}-{row.pk}",
        )
        if request.state == GrantRequest.State.DONE:
            return RowState.DONE, f"{request.tokens:,} tokens granted"
        row.data = {"grant_request_id": request.pk}
        if requester.pk in teams.member_ids(account.workspace):
            return RowState.REQUESTED, "Nobody gives tokens to themselves: another superadmin decides"
        return RowState.REQUESTED, "So many tokens need a second superadmin"
    if job.kind == Kind.SUSPEND:
        if account.status != TokenAccount.Status.ACTIVE and not account.has_debt:
            return RowState.SKIPPED, f"Was {account.status} already"
        accounts.suspend_account(superadmin=requester, account_id=account.pk, reason=job.reason)
        return RowState.DONE, "Suspended"
    row.data = {name: getattr(account, name) for name in EXPORTED_FIELDS}
    return RowState.DONE, "Exported"


def _end(job: BulkJob, state: State) -> None:
    job.state, job.finished_at = state, timezone.now()
    job.save(update_fields=["state", "finished_at"])


# --- Reading --------------------------------------------------------------------------------------------------------

EXPORTED_FIELDS = (
    "balance", "reserved", "status", "status_reason", "lifetime_purchased_tokens", "lifetime_granted_tokens",
    "lifetime_used_tokens", "lifetime_spent_cents", "currency", "auto_recharge_enabled", "created_at",
)  # fmt: skip


def progress(job: BulkJob) -> Progress:
    """How far the job is."""
    return progress_of([job])[job.pk]


def progress_of(jobs: Iterable[BulkJob]) -> dict[int, Progress]:
    """How far each of the jobs is, by its id."""
    counts = {job.pk: dict.fromkeys(RowState.values, 0) for job in jobs}
    rows = BulkJobRow.objects.filter(job__in=counts).order_by().values_list("job_id", "state").annotate(Count("pk"))
    for job_id, state, number in rows:
        counts[job_id][state] = number
    return {job_id: Progress(**states) for job_id, states in counts.items()}


def find_rows(job: BulkJob, *, state: str = "") -> QuerySet[BulkJobRow]:
    """The rows that something has become of, in `state` or in any, the last ones first; each with its person."""
    ended = job.rows.exclude(state=RowState.WAITING)
    if state:
        ended = ended.filter(state=state)
    return ended.select_related("account__user", "account__workspace").order_by("-id")


def exported_rows(job: BulkJob) -> Iterator[list[str | int | None]]:
    """The lines of an export, its titles first; each as it was when its row was done, the person as they are now."""
    yield ["user", "email", "name", *EXPORTED_FIELDS]
    done = job.rows.filter(state=RowState.DONE)
    rows = done.select_related("account__user", "account__workspace").order_by("id")
    for row in rows.iterator(chunk_size=2_000):
        account, user = row.account, row.account.user
        who = [user.pk if user else None, account.receipts_email, account.name]
        yield [*who, *(row.data[name] for name in EXPORTED_FIELDS)]
