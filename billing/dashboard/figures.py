"""/admin/tokens/: the figures of the whole business, for admins. Each section is asked for by itself, or as a file."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from django.http import Http404, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_GET

from accounts import audit
from accounts.permissions import SignedInRequest, admin_required
from billing.dashboard.content import (
    Content,
)
from billing.dashboard.report import render_report
from billing.dashboard.sections import SECTIONS, Section
from billing.dashboard.span import Span, read_span
from billing.figures import business
from billing.history.exports import Cell, csv_lines
from kit import outgoing, periods

LIVE_EVERY_SECONDS = 30


@require_GET
@admin_required
def home(request: SignedInRequest) -> HttpResponse:
    """The page opens at once, its sections come by themselves. `?all=1` is one plain page, without scripts."""
    span = read_span(request)
    is_whole = "all" in request.GET
    context = {
        "sections": [_section_context(request, section, span, with_content=is_whole) for section in SECTIONS.values()],
        "is_whole": is_whole,
        "span": span,
        "period": span.period,
        "period_error": span.error,
        "presets": periods.PRESETS,
        "target": "figures",
        "time_zone": timezone.get_current_timezone_name(),
    }
    return render(request, "dashboard/figures.html", context)


@require_GET
@admin_required
def section(request: SignedInRequest, name: str) -> HttpResponse:
    """One section of the page. Opened in a window of its own, its address leads to the page."""
    wanted = _section_or_404(name)
    if not request.htmx:  # type: ignore[attr-defined]
        return redirect(f"{reverse('dashboard:home')}?{_query(request, all='1')}#figures-{name}")
    return render(request, "dashboard/_section.html", _section_context(request, wanted, read_span(request)))


@require_GET
@admin_required
@outgoing.limited
def export(request: SignedInRequest, name: str) -> HttpResponse:
    """The numbers of a section as a file, which the audit log notes."""
    wanted, content, about = _exported(request, name, "CSV")

    def rows() -> Iterator[Sequence[Cell]]:
        yield [f"Postmate: {wanted.title}", about, timezone.get_current_timezone_name()]
        yield from content.lines()

    filename = f"postmate-{name}-{timezone.localdate().isoformat()}.csv"
    return HttpResponse(
        csv_lines(rows()),
        content_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{filename}"'},
    )


@require_GET
@admin_required
@outgoing.limited
def export_pdf(request: SignedInRequest, name: str) -> HttpResponse:
    """A section as a report to print or to pass on, which the audit log notes."""
    wanted, content, about = _exported(request, name, "PDF")
    filename = f"postmate-{name}-{timezone.localdate().isoformat()}.pdf"
    return HttpResponse(
        render_report(name=name, title=wanted.title, about=about, content=content),
        content_type="application/pdf",
        headers={"Content-Disposition": f'attachment; filename="{filename}"'},
    )


def _exported(request: SignedInRequest, name: str, form: str) -> tuple[Section, Content, str]:
    """The section that a file is made of, and the period in words. The audit log has it before anybody has the file."""
    wanted = _section_or_404(name)
    span = read_span(request)
    content = wanted.content(span, request)
    about = "now" if wanted.polls else f"{span.since:%Y-%m-%d} to {span.until - timedelta(days=1):%Y-%m-%d}"
    audit.write(
        action=audit.Action.EXPORT,
        summary=f"Exported the dashboard’s section “{wanted.title}” ({about}) as {form}",
        actor=request.user,
    )
    return wanted, content, about


def _section_or_404(name: str) -> Section:
    if name not in SECTIONS:
        raise Http404
    return SECTIONS[name]


def _section_context(
    request: SignedInRequest, section: Section, span: Span, *, with_content: bool = True
) -> dict[str, Any]:
    query = _query(request)
    return {
        "section": section,
        "content": section.content(span, request) if with_content else None,
        "span": span,
        "section_url": f"{reverse('dashboard:section', args=[section.name])}?{query}",
        "export_url": f"{reverse('dashboard:figures-export', args=[section.name])}?{query}",
        "pdf_url": f"{reverse('dashboard:figures-pdf', args=[section.name])}?{query}",
        "poll_seconds": LIVE_EVERY_SECONDS,
        "timed_operations": business.MAX_TIMED_OPERATIONS,
    }


def _query(request: SignedInRequest, **more: str) -> str:
    """What of the address the sections understand, and more."""
    query = request.GET.copy()
    for name in set(query) - {"period", "from", "to", "by"}:
        del query[name]
    query.update(more)
    return query.urlencode()
