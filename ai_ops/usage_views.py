"""/tokens/usage/: what a person's AI operations cost. Not in billing, because projects and results are named here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, cast

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.utils import timezone
from django.views.decorators.http import require_GET

from accounts.models import User, Workspace
from accounts.permissions import SignedInRequest
from accounts.workspaces import find_place, place_of
from ai_ops import operations
from ai_ops.models import Project
from billing import payer, pricing
from billing.models import ModelPrice, TokenTransaction, TokenUsage
from billing.models.fields import Provider
from billing.usage import UnknownCursor, get_user_usage, stats
from billing.usage.charts import BUCKET_LABELS, Chart, Table, bucket_head, bucket_labels, number_or_dash, percent
from billing.usage.stats import BucketName, Dimension, Figures, UsageGroup
from kit import periods
from kit.periods import InvalidPeriod, Period
from kit.text import read_id

DEFAULT_PERIOD = "30d"
LOG_PAGE = 25
MAX_SERIES = 7  # colours that are told apart; what is less used is added up as "Other"
MAX_BARS = 10
DIMENSION_LABELS: dict[Dimension, str] = {
    "operation": "Operation", "model": "Model", "project": "Project", "member": "Member",
}  # fmt: skip
OTHER = "Other"
AUTHORS_ALONE = (TokenUsage.OperationType.CHAT, TokenUsage.OperationType.PROMPT)  # whose results no colleague reads


# --- Charts -----------------------------------------------------------------------------------------------------------


def _charts_over_time(
    edges: Sequence[datetime],
    bucket: BucketName,
    dimension: Dimension,
    over_time: Mapping[tuple[int, Any], Figures],
    name_of: Callable[[Dimension, Any], str],
) -> list[Chart]:
    labels, head = bucket_labels(edges, bucket), bucket_head(bucket)
    totals = [Figures()] * len(labels)
    of_key: dict[Any, Figures] = {}
    for (number, key), figures in over_time.items():
        totals[number] += figures
        of_key[key] = of_key.get(key, Figures()) + figures
    keys = sorted(of_key, key=lambda key: (-of_key[key].billable_tokens, name_of(dimension, key)))
    shown, rest = (keys, []) if len(keys) <= MAX_SERIES + 1 else (keys[:MAX_SERIES], keys[MAX_SERIES:])

    def tokens(keys: Sequence[Any]) -> list[int | None]:
        return [
            sum(over_time.get((number, key), Figures()).billable_tokens for key in keys)
            for number in range(len(labels))
        ]

    series = [(name_of(dimension, key), tokens([key])) for key in shown]
    if rest:
        series.append((OTHER, tokens(rest)))
    return [
        _tokens_chart(labels, head, totals, series),
        _outcomes_chart(labels, head, totals),
        _cost_chart(labels, head, totals),
    ]


def _tokens_chart(
    labels: list[str], head: str, totals: Sequence[Figures], series: list[tuple[str, list[int | None]]]
) -> Chart:
    highest, label = max(zip(totals, labels, strict=True), key=lambda each: each[0].billable_tokens)
    return Chart(
        id="tokens",
        title="Tokens over time",
        summary=(
            f"Bars of the tokens paid: {sum(figures.billable_tokens for figures in totals):,} in all, "
            f"the most in {label}: {highest.billable_tokens:,}."
        ),
        kind="stacked",
        labels=labels,
        series=series,
        table=Table(
            [head, *(name for name, _ in series), "All"],
            [
                [label, *(f"{values[number]:,}" for _, values in series), f"{figures.billable_tokens:,}"]
                for number, (label, figures) in enumerate(zip(labels, totals, strict=True))
            ],
        ),
    )


def _outcomes_chart(labels: list[str], head: str, totals: Sequence[Figures]) -> Chart:
    total = sum(totals, Figures())
    return Chart(
        id="outcomes",
        title="Operations and success",
        summary=(
            f"Bars of the operations that succeeded, {total.succeeded:,} in all, "
            f"and of those that failed, {total.failed:,}."
        ),
        kind="stacked",
        labels=labels,
        series=[
            ("Succeeded", [figures.succeeded for figures in totals]),
            ("Failed", [figures.failed for figures in totals]),
        ],
        tones=("ok", "bad"),
        note="A failed operation costs nothing.",
        table=Table(
            [head, "Succeeded", "Failed", "Success rate"],
            [
                [label, f"{figures.succeeded:,}", f"{figures.failed:,}", percent(figures.success_permille)]
                for label, figures in zip(labels, totals, strict=True)
            ],
        ),
    )


def _cost_chart(labels: list[str], head: str, totals: Sequence[Figures]) -> Chart:
    average = number_or_dash(sum(totals, Figures()).tokens_per_operation)
    return Chart(
        id="cost",
        title="Cost per operation",
        summary=f"A line of the tokens an operation cost: {average} on average.",
        kind="line",
        labels=labels,
        series=[("Tokens per operation", [figures.tokens_per_operation for figures in totals])],
        note="The average of the operations that were charged.",
        table=Table(
            [head, "Operations charged", "Tokens per operation"],
            [
                [label, f"{figures.charged:,}", number_or_dash(figures.tokens_per_operation)]
                for label, figures in zip(labels, totals, strict=True)
            ],
        ),
    )


def _breakdown(dimension: Dimension, groups: Sequence[UsageGroup], name_of: Callable[[Dimension, Any], str]) -> Chart:
    """Tokens by what the dimension tells apart, the most first."""
    sums: dict[Any, Figures] = {}
    for group in groups:
        key = group.key(dimension)
        sums[key] = sums.get(key, Figures()) + group.figures
    total_tokens = sum(figures.billable_tokens for figures in sums.values())
    named = [(name_of(dimension, key), figures) for key, figures in sums.items()]
    named.sort(key=lambda row: (-row[1].billable_tokens, -row[1].operations, row[0]))
    bars = named[:MAX_BARS]
    return Chart(
        id=f"by-{dimension}",
        title=f"By {DIMENSION_LABELS[dimension].lower()}",
        summary="Bars of the tokens paid: "
        + "; ".join(f"{name} {figures.billable_tokens:,}" for name, figures in bars)
        + ".",
        kind="bars",
        labels=[name for name, _ in bars],
        series=[("Tokens", [figures.billable_tokens for _, figures in bars])],
        note=f"The chart shows the first {MAX_BARS}." if len(named) > MAX_BARS else "",
        is_table_folded=False,
        table=Table(
            [DIMENSION_LABELS[dimension], "Tokens", "Share", "Operations", "Tokens each", "Success rate"],
            [
                [
                    name,
                    f"{figures.billable_tokens:,}",
                    percent(figures.billable_tokens * 1_000 // total_tokens if total_tokens else None),
                    f"{figures.operations:,}",
                    number_or_dash(figures.tokens_per_operation),
                    percent(figures.success_permille),
                ]
                for name, figures in named
            ],
        ),
    )


# --- Spans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """What a page is about, with its bounds; `cut_at` is where it begins instead when it holds too many operations."""

    period: Period
    since: datetime
    until: datetime
    cut_at: datetime | None
    error: str = ""


class Whose(TypedDict):
    account_id: int
    actor_id: int | None


def _whose(request: SignedInRequest) -> Whose:
    """Whose operations a page shows: all that the account paid for; to a team's plain members what they did of it."""
    account_id = payer.account_of(request).pk
    return {"account_id": account_id, "actor_id": None if place_of(request).manages else request.user.pk}


def _read_span(request: SignedInRequest, first_at: datetime) -> Span:
    try:
        period, error = periods.read_period(request.GET, default=DEFAULT_PERIOD), ""
        since, until = _bounds(period, first_at)
    except InvalidPeriod as invalid:
        period, error = periods.preset_period(DEFAULT_PERIOD), invalid.message
        since, until = _bounds(period, first_at)
    begins_at = stats.newest_operations_since(**_whose(request), since=since, until=until)
    is_cut = begins_at > since.astimezone(UTC)
    return Span(period, begins_at if is_cut else since, until, begins_at if is_cut else None, error)


def _bounds(period: Period, first_at: datetime) -> tuple[datetime, datetime]:
    """Not beyond today; a long span begins with the first operation, for all before would be empty."""
    first_day, tomorrow = timezone.localdate(first_at), timezone.localdate() + timedelta(days=1)
    last_day = period.last_day
    end_day = min(last_day + timedelta(days=1), tomorrow) if last_day else tomorrow
    begin_day = period.first_day or min(first_day, end_day - timedelta(days=1))
    if begin_day >= end_day:
        raise InvalidPeriod("That period has not begun yet.")
    if (end_day - begin_day).days > stats.BUCKET_DAYS["day"][1] and first_day < end_day:
        begin_day = max(begin_day, first_day)
    return periods.midnight(begin_day), periods.midnight(end_day)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The span as long as this one, right before it; only as far as this one has come."""

    figures: Figures
    days: int
    is_so_far: bool


def _change(now: int | None, before: int | None) -> str:
    """In words: by how many per cent a figure rose or fell."""
    if not now or not before:
        return ""
    change = abs(now - before) * 100 // before
    if change == 0:
        return "as before"
    return f"{change:,} % {'more' if now > before else 'less'}"


def _compare(whose: Whose, span: Span) -> Comparison | None:
    """None where there is nothing that could be compared: all time, or more operations than are added up."""
    if span.cut_at or span.period.since is None or span.since != span.period.since:
        return None
    days = (span.until.date() - span.since.date()).days
    since = periods.midnight(span.since.date() - timedelta(days=days))
    elapsed = timezone.now() - span.since
    is_so_far = elapsed < span.until.astimezone(UTC) - span.since.astimezone(UTC)
    until = min((since.astimezone(UTC) + elapsed), span.since.astimezone(UTC)) if is_so_far else span.since
    if stats.newest_operations_since(**whose, since=since, until=until) != since:
        return None
    return Comparison(stats.usage_totals(**whose, since=since, until=until), days, is_so_far)


# --- Pages ------------------------------------------------------------------------------------------------------------


@require_GET
@login_required
def usage(request: SignedInRequest) -> HttpResponse:
    whose = _whose(request)
    first_at = stats.first_used_at(**whose)
    if first_at is None:
        return render(request, "billing/usage.html", {"is_empty": True})
    span = _read_span(request, first_at)
    offered = stats.list_buckets(since=span.since, until=span.until)
    bucket = cast(BucketName, request.GET.get("by"))
    if bucket not in offered:
        bucket = stats.default_bucket(since=span.since, until=span.until)
    dimension = cast(Dimension, request.GET.get("split"))
    place = place_of(request)
    # Who it was is of interest to those alone who look after a team.
    dimensions = [each for each in DIMENSION_LABELS if each != "member" or (place.is_team and place.manages)]
    if dimension not in dimensions:
        dimension = "operation"

    groups = stats.usage_groups(**whose, since=span.since, until=span.until)
    total = sum((group.figures for group in groups), Figures())
    edges = stats.time_edges(since=span.since, until=span.until, bucket=bucket)
    over_time = stats.usage_over_time(**whose, edges=edges, dimension=dimension)
    name_of = _names(place.workspace, groups)
    comparison = _compare(whose, span)
    context = {
        "span": span,
        "period": span.period,
        "period_error": span.error,
        "presets": periods.PRESETS,
        "target": "usage",
        "buckets": {name: BUCKET_LABELS[name] for name in offered},
        "bucket": bucket,
        "dimensions": {each: DIMENSION_LABELS[each] for each in dimensions},
        "dimension": dimension,
        "total": total,
        "cards": _cards(total, comparison),
        "comparison": comparison,
        "charts": _charts_over_time(edges, bucket, dimension, over_time, name_of) if total.operations else [],
        "breakdowns": [_breakdown(each, groups, name_of) for each in dimensions] if total.operations else [],
        "max_operations": stats.MAX_OPERATIONS,
        "hours_up_to_days": stats.BUCKET_DAYS["hour"][1],
        "days_up_to_days": stats.BUCKET_DAYS["day"][1],
        "time_zone": timezone.get_current_timezone_name(),
    }
    return render(request, "billing/usage.html", context)


def _cards(total: Figures, comparison: Comparison | None) -> list[tuple[str, str, str]]:
    """The figures on top: name, value, and how it was before."""
    before = comparison.figures if comparison else Figures()

    rate_before = percent(before.success_permille)
    return [
        ("Tokens paid", f"{total.billable_tokens:,}", _change(total.billable_tokens, before.billable_tokens)),
        ("Operations", f"{total.operations:,}", _change(total.operations, before.operations)),
        (
            "Cost per operation",
            number_or_dash(total.tokens_per_operation),
            _change(total.tokens_per_operation, before.tokens_per_operation),
        ),
        (
            "Success rate",
            percent(total.success_permille),
            f"{rate_before} before" if comparison and before.success_permille is not None else "",
        ),
    ]


def _names(workspace: Workspace, groups: Sequence[UsageGroup]) -> Callable[[Dimension, Any], str]:
    """How operations, models and the workspace's projects are called."""
    ids = {group.project_id for group in groups if group.project_id is not None}
    projects = dict(Project.objects.filter(workspace=workspace, pk__in=ids).values_list("pk", "name"))
    models = _model_names()
    types = dict(TokenUsage.OperationType.choices)
    people = User.objects.in_bulk({group.user_id for group in groups})

    def name_of(dimension: Dimension, key: Any) -> str:
        if dimension == "operation":
            return str(types[key])
        if dimension == "model":
            return models.get(key, key[1])
        if dimension == "member":
            return str(people[key])
        # Two that are gone are told apart by their numbers.
        return "No project" if key is None else projects.get(key, f"Deleted project ({key})")

    return name_of


def _model_names() -> dict[tuple[str, str], str]:
    return {(price.provider, price.model): price.display_name for price in ModelPrice.objects.all()}


@require_GET
@login_required
def usage_log(request: SignedInRequest) -> HttpResponse:
    """Every operation, newest first. Nothing is counted, so that it opens as quickly for a million as for ten."""
    whose = _whose(request)
    first_at = stats.first_used_at(**whose)
    if first_at is None:
        return render(request, "billing/usage_log.html", {"is_empty": True})
    span = _read_span(request, first_at)
    models = _model_names()
    choices = {
        "type": dict(TokenUsage.OperationType.choices),
        "model": {f"{provider}:{model}": name for (provider, model), name in sorted(models.items())},
        "status": dict(TokenUsage.Status.choices),
    }
    asked = {name: request.GET.get(name, "") for name in choices}
    chosen = {name: value if value in choices[name] else "" for name, value in asked.items()}
    provider, _, model = chosen["model"].partition(":")
    before_id, after_id = _cursor(request, "before"), _cursor(request, "after")
    is_filtered = any(chosen.values())
    try:
        rows = get_user_usage(
            **whose,
            operation_type=chosen["type"] or None,
            status=chosen["status"] or None,
            provider=provider or None,
            model=model or None,
            # A filter that little passes would read the whole history; without one a page ends by itself.
            since=span.since if is_filtered else span.period.since,
            until=span.until,
            before_id=before_id,
            after_id=after_id,
            limit=LOG_PAGE + 1,
        )
    except UnknownCursor as error:
        raise Http404 from error
    has_more = len(rows) > LOG_PAGE
    rows = rows[-LOG_PAGE:] if after_id else rows[:LOG_PAGE]
    has_newer = has_more if after_id else before_id is not None
    has_older = after_id is not None or has_more
    context = {
        "span": span,
        "period": span.period,
        "period_error": span.error,
        "presets": periods.PRESETS,
        "target": "usage-log",
        "filters": [
            ("type", "Operation", "All operations", choices["type"], chosen["type"]),
            ("model", "Model", "All models", choices["model"], chosen["model"]),
            ("status", "Status", "Any status", choices["status"], chosen["status"]),
        ],
        "is_filtered": is_filtered,
        "rows": [(row, models.get((row.provider, row.model), row.model)) for row in rows],
        "newer_id": rows[0].pk if rows and has_newer else None,
        "older_id": rows[-1].pk if rows and has_older else None,
        "max_operations": stats.MAX_OPERATIONS,
    }
    return render(request, "billing/usage_log.html", context)


def _cursor(request: SignedInRequest, name: str) -> int | None:
    text = request.GET.get(name, "")
    if not text:
        return None
    if (before_id := read_id(text)) is None:
        raise Http404
    return before_id


@require_GET
@login_required
def usage_entry(request: SignedInRequest, pk: int) -> HttpResponse:
    """One operation, with every field of its row: of one's own, or of a team that one manages."""
    row = get_object_or_404(TokenUsage.objects.select_related("workspace", "user"), pk=pk)
    place = find_place(request, row.workspace_id)
    is_own = row.user_id == request.user.pk
    if place is None or not (place.manages or is_own):
        raise Http404
    price = ModelPrice.objects.filter(provider=row.provider, model=row.model).first()
    exact_tokens = None if row.multiplier is None else row.actual_tokens * row.multiplier
    context = {
        "usage": row,
        "model_name": price.display_name if price else row.model,
        "provider_name": dict(Provider.choices)[row.provider],
        "project": Project.objects.filter(pk=row.project_id or 0, workspace=row.workspace).first(),
        "result": operations.find_result(row) if is_own or row.operation_type not in AUTHORS_ALONE else None,
        "exact_tokens": exact_tokens,
        "exact_text": None if exact_tokens is None else f"{exact_tokens.normalize():,f}",
        "rounded_tokens": None if row.multiplier is None else pricing.ceil_multiply(row.actual_tokens, row.multiplier),
        "given_back_tokens": (row.reserved_tokens or 0) - row.billable_tokens,
        "entry": TokenTransaction.objects.filter(usage=row).first(),
        "links": [
            ("Project’s number", row.project_id),
            ("Piece’s number", row.content_id),
            ("Chat’s number", row.chat_id),
        ],
    }
    return render(request, "billing/usage_entry.html", context)
