"""The Studio."""

import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import Count, Model, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts.permissions import SignedInRequest
from accounts.workspaces import enter, place_of, visible_to
from ai_ops import metering, operations, pieces, prompts, providers
from ai_ops.forms import (
    IMAGE_SIZES,
    ChatForm,
    ContinuationForm,
    DraftForm,
    EditForm,
    ImageForm,
    ImagePromptForm,
    OperationForm,
    RefinementForm,
    RepurposeForm,
    SelectionForm,
    SendingForm,
)
from ai_ops.metering import STOP_NOTES, Quote
from ai_ops.models import (
    Chat,
    ContentPiece,
    ContentVersion,
    GeneratedImage,
    ImageBatch,
    ImagePrompt,
    Project,
    ResultState,
)
from ai_ops.operations import Event, Events, Replayed, Started
from ai_ops.pieces import OperationError
from ai_ops.providers import ProviderError
from ai_ops.streams import outcome_of, stream, why_stopped
from billing import catalogue, payer
from billing.catalogue import CatalogueError, system_settings
from billing.ledger import IdempotencyConflict, InsufficientTokens, LedgerError
from billing.models import ModelPrice, TokenAccount, TokenUsage
from kit import outgoing
from kit.database import in_thread
from kit.text import read_id

REFUSALS = (LedgerError, CatalogueError, OperationError)
PAGE_SIZE = 24


# --- Pages ------------------------------------------------------------------------------------------------------------


@require_GET
@login_required
def home(request: SignedInRequest) -> HttpResponse:
    return _render_home(request)


def _render_home(request: SignedInRequest, form: OperationForm | None = None, status: int = 200) -> HttpResponse:
    pieces = _made_here(request, ContentPiece).select_related("project").order_by("-updated_at")
    context = {"form": form or DraftForm(), "key": _new_key(), "pieces": pieces[:8]}
    return render(request, "ai_ops/studio.html", context, status=status)


def _made_here(request: SignedInRequest, model: type[Model], *, is_shared: bool = True) -> QuerySet[Any]:
    """What was made in the workspace that the page works in: all of it, or unless it `is_shared` the person's own."""
    place = place_of(request)
    here: QuerySet[Any] = model._default_manager.filter(project__workspace=place.workspace)
    return here if place.is_team and is_shared else here.filter(author=request.user)


@require_GET
@login_required
def projects(request: SignedInRequest) -> HttpResponse:
    rows = (
        Project.objects.filter(workspace=place_of(request).workspace)
        .annotate(
            piece_count=Count("pieces", distinct=True),
            chat_count=Count("chats", distinct=True, filter=Q(chats__author=request.user)),
            batch_count=Count("image_batches", distinct=True),
        )
        .order_by("name")
    )
    return render(request, "ai_ops/projects.html", {"page": _page(request, rows)})


@require_GET
@login_required
def project(request: SignedInRequest, pk: int) -> HttpResponse:
    row = get_object_or_404(Project, pk=pk, workspace__in=visible_to(request.user.pk))
    enter(request, row.workspace_id)
    context = {
        "project": row,
        "page": _page(request, row.pieces.select_related("author").order_by("-updated_at")),
        "chats": row.chats.filter(author=request.user).order_by("-updated_at")[:PAGE_SIZE],
        "batches": row.image_batches.order_by("-id").prefetch_related("images")[:PAGE_SIZE],
    }
    return render(request, "ai_ops/project.html", context)


@require_GET
@login_required
def content(request: SignedInRequest, pk: int) -> HttpResponse:
    return _render_content(request, content_id=pk)


def _render_content(
    request: SignedInRequest, form: Any = None, status: int = 200, content_id: int | None = None
) -> HttpResponse:
    """The piece with its forms; `form` is the one that was refused, and shows why."""
    if content_id is None:
        content_id = _number(form.data.get("content_id"))
    piece = get_object_or_404(
        ContentPiece.objects.select_related("project", "source", "author"),
        pk=content_id,
        project__workspace__in=visible_to(request.user.pk),
    )
    enter(request, piece.project.workspace_id)
    number = pieces.newest_number(piece)
    about = {"content_id": piece.pk, "base_number": number, "body": piece.body}
    forms = {
        "edit": EditForm(initial=about),
        "refinement": RefinementForm(initial=about),
        "selection": SelectionForm(initial=about),
        "repurpose": RepurposeForm(initial=about),
        "continuation": ContinuationForm(initial=about),
    }
    for name, initial in forms.items():
        if type(form) is type(initial):
            forms[name] = form
    # What stood in the editor when it was refused; nothing typed is lost.
    body = form.data.get("body") if form is not None else None
    if body is not None and form is not forms["edit"]:
        forms["edit"] = EditForm(initial=about | {"body": body, "base_number": form.data.get("base_number")})
    for name, shown in forms.items():
        shown.auto_id = f"{name}_%s"  # they stand on one page, and share names of fields
    operations_here = TokenUsage.objects.filter(content_id=piece.pk, account=payer.account_of(request))
    usages = _may_be_read(request, operations_here).in_bulk()
    context = {
        "piece": piece,
        "forms": forms,
        "open_form": next(
            (name for name, shown in forms.items() if shown.is_bound and name != "edit"),
            "continuation" if piece.state == ResultState.CUT_SHORT else "refinement",
        ),
        "key": _new_key(),
        "newest_number": number,
        "versions": [
            (version, usages.get(version.usage_id or 0)) for version in piece.versions.select_related("author")[:50]
        ],
        "derived": piece.derived.order_by("-id")[:20],
        "usages": sorted(usages.values(), key=lambda usage: -usage.pk),
        "is_running": operations_here.filter(status=TokenUsage.Status.RESERVED).exists(),
    }
    return render(request, "ai_ops/content.html", context, status=status)


def _may_be_read(request: SignedInRequest, usages: QuerySet[TokenUsage]) -> QuerySet[TokenUsage]:
    """Of a team's operations its owners and admins see all, members what they did themselves."""
    return usages if place_of(request).manages else usages.filter(user=request.user)


def _usage_of(request: SignedInRequest, usage_id: int | None) -> TokenUsage | None:
    found = TokenUsage.objects.filter(pk=usage_id or 0, account=payer.account_of(request))
    return _may_be_read(request, found).first()


@require_http_methods(["GET", "POST"])
@login_required
def save_content(request: SignedInRequest, pk: int) -> HttpResponse:
    if request.method == "GET":  # after a sign-in that stood between
        return redirect("studio:content", pk)
    form = EditForm(request.POST)
    if not form.is_valid():
        return _render_content(request, form, 400, content_id=pk)
    try:
        pieces.save_edit(user_id=request.user.pk, content_id=pk, **form.cleaned_data)
    except pieces.NotYours as error:
        raise Http404 from error
    except OperationError as error:
        form.add_error(None, error.message)
        return _render_content(request, form, error.http_status, content_id=pk)
    messages.success(request, "Your changes are saved.")
    return redirect("studio:content", pk)


@require_GET
@login_required
def version(request: SignedInRequest, pk: int, number: int) -> HttpResponse:
    row = get_object_or_404(
        ContentVersion.objects.select_related("piece__project", "author"), piece_id=pk, number=number,
        piece__project__workspace__in=visible_to(request.user.pk),
    )  # fmt: skip
    enter(request, row.piece.project.workspace_id)
    usage = _usage_of(request, row.usage_id)
    newest_number = pieces.newest_number(row.piece)
    context = {"version": row, "piece": row.piece, "usage": usage, "newest_number": newest_number}
    return render(request, "ai_ops/version.html", context)


@require_http_methods(["GET", "POST"])
@login_required
def restore(request: SignedInRequest, pk: int, number: int) -> HttpResponse:
    if request.method == "GET":  # after a sign-in that stood between
        return redirect("studio:version", pk, number)
    try:
        pieces.restore_version(user_id=request.user.pk, content_id=pk, number=number)
    except pieces.NotYours as error:
        raise Http404 from error
    messages.success(request, f"Version {number} is the text again.")
    return redirect("studio:content", pk)


@require_GET
@login_required
def chats(request: SignedInRequest) -> HttpResponse:
    return _render_chat(request)


@require_GET
@login_required
def chat(request: SignedInRequest, pk: int) -> HttpResponse:
    return _render_chat(request, chat_id=pk)


def _render_chat(
    request: SignedInRequest, form: Any = None, status: int = 200, chat_id: int | None = None
) -> HttpResponse:
    """A chat, or the page that opens one, beside the list of all."""
    if form is not None:
        chat_id = _number(form.data.get("chat_id"))
    row = None
    if chat_id:
        own = Chat.objects.select_related("project").filter(project__workspace__in=visible_to(request.user.pk))
        row = get_object_or_404(own, pk=chat_id, author=request.user)
        enter(request, row.project.workspace_id)
    turns = list(row.turns.all()) if row else []
    usages = TokenUsage.objects.in_bulk([turn.usage_id for turn in turns if turn.usage_id])
    last = usages.get(turns[-1].usage_id or 0) if turns else None
    initial = {"chat_id": chat_id, "model": f"{last.provider}:{last.model}" if last else None}
    context = {
        "chat": row,
        "turns": [(turn, usages.get(turn.usage_id or 0)) for turn in turns],
        "chats": _made_here(request, Chat, is_shared=False).select_related("project").order_by("-updated_at")[:30],
        "form": form or ChatForm(initial={key: value for key, value in initial.items() if value}),
        "key": _new_key(),
        "paid_tokens": sum(usage.billable_tokens for usage in usages.values()),
        "can_go_on": bool(turns) and turns[-1].state == ResultState.CUT_SHORT,
        "has_run_out": last is not None and last.error_message == STOP_NOTES["balance"],
    }
    return render(request, "ai_ops/chat.html", context, status=status)


@require_GET
@login_required
def images(request: SignedInRequest) -> HttpResponse:
    return _render_images(request)


def _render_images(request: SignedInRequest, form: Any = None, status: int = 200) -> HttpResponse:
    """The gallery, with the forms for an image prompt and for images."""
    prompt_form = form if isinstance(form, ImagePromptForm) else ImagePromptForm()
    prompt_form.auto_id = "id_prompt_%s"  # both forms have a model, a style and a project
    written = list(_made_here(request, ImagePrompt, is_shared=False).exclude(text="").order_by("-id")[:5])
    usages = TokenUsage.objects.in_bulk([row.usage_id for row in written if row.usage_id])
    batches = _made_here(request, ImageBatch).prefetch_related("images").order_by("-id")
    context = {
        "image_form": form if isinstance(form, ImageForm) else ImageForm(initial=_image_initial(request)),
        "prompt_form": prompt_form,
        "key": _new_key(),
        "prompts": [(row, usages.get(row.usage_id or 0)) for row in written],
        "image_prices": _image_prices(),
        "image_size_labels": [label.partition(",")[0] for _, label in IMAGE_SIZES],
        "page": _page(request, batches),
    }
    return render(request, "ai_ops/images.html", context, status=status)


def _image_initial(request: SignedInRequest) -> dict[str, Any]:
    """What the form begins with: a description that a model wrote (`?prompt=`), or images made before (`?like=`)."""
    prompts_here = _made_here(request, ImagePrompt, is_shared=False)
    prompt = prompts_here.filter(pk=_number(request.GET.get("prompt")) or 0).first()
    if prompt:
        return {"prompt": prompt.text, "style": prompt.style, "project": prompt.project.name}
    batch = _made_here(request, ImageBatch).filter(pk=_number(request.GET.get("like")) or 0).first()
    if batch is None:
        return {}
    usage = TokenUsage.objects.filter(pk=batch.usage_id or 0).first()
    fields = ("prompt", "style", "size", "count") + (("quality",) if batch.quality else ())
    initial: dict[str, Any] = {name: getattr(batch, name) for name in fields} | {"project": batch.project.name}
    return initial | ({"model": f"{usage.provider}:{usage.model}"} if usage else {})


def _image_prices() -> list[dict[str, Any]]:
    """What an image costs in tokens: a row for each model and quality, the sizes of the form beside each other."""
    settings = system_settings.get_system_settings()
    rows = []
    for price in catalogue.list_active_models(ModelPrice.Kind.IMAGE):
        costs: dict[str, dict[str, int]] = {}
        for option in catalogue.image_options(price, settings):
            costs.setdefault(option.quality, {})[option.size] = option.cost_tokens
        if providers.is_configured(price.provider):
            rows += [
                {
                    "model": price.display_name,
                    "quality": quality,
                    "costs": [tokens.get(size) for size, _ in IMAGE_SIZES],
                }
                for quality, tokens in costs.items()
            ]
    return rows


@require_GET
@login_required
def image_batch(request: SignedInRequest, pk: int) -> HttpResponse:
    batch = get_object_or_404(
        ImageBatch.objects.select_related("project", "author").prefetch_related("images"),
        pk=pk,
        project__workspace__in=visible_to(request.user.pk),
    )
    enter(request, batch.project.workspace_id)
    usage = _usage_of(request, batch.usage_id)
    style = prompts.IMAGE_STYLES.get(batch.style)
    context = {"batch": batch, "usage": usage, "style": style.label if style and batch.style else ""}
    return render(request, "ai_ops/image_batch.html", context)


@require_GET
@login_required
@cache_control(private=True, max_age=31_536_000, immutable=True)
def image_file(request: SignedInRequest, pk: int) -> HttpResponseBase:
    """The file of an image, to those alone who may work where it was made. It never changes."""
    image = get_object_or_404(GeneratedImage, pk=pk, batch__project__workspace__in=visible_to(request.user.pk))
    try:
        return outgoing.send(
            request,
            image.file,
            filename=f"postmate-{image.batch_id}-{image.position}.{operations.FILE_ENDINGS[image.media_type]}",
            content_type=image.media_type,
            as_attachment="download" in request.GET,
        )
    except FileNotFoundError as error:
        raise Http404 from error


def _page(request: HttpRequest, rows: Any) -> Any:
    return Paginator(rows, PAGE_SIZE).get_page(request.GET.get("page"))


def _number(value: Any) -> int | None:
    """An id out of an address or a form, None when it is none."""
    return read_id(str(value or ""))


def _new_key() -> str:
    return uuid4().hex


# --- Operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """How an operation is asked for: its form, its function, and the page that the form is on, as it is refused and by
    the name of its address."""

    form: type[OperationForm]
    run: Callable[..., Events]
    render_page: Callable[[SignedInRequest, Any, int], HttpResponse]
    page: str = "studio:home"
    quote: Callable[..., Quote] = metering.quote_text


OPERATIONS: Mapping[str, Operation] = {
    "draft": Operation(DraftForm, operations.generate_draft, _render_home),
    "continuation": Operation(ContinuationForm, operations.continue_draft, _render_content),
    "chat": Operation(ChatForm, operations.generate_chat_response, _render_chat, "studio:chats"),
    "refinement": Operation(RefinementForm, operations.refine_content, _render_content),
    "selection": Operation(SelectionForm, operations.refine_selection, _render_content),
    "repurpose": Operation(RepurposeForm, operations.repurpose_content, _render_content),
    "image-prompt": Operation(ImagePromptForm, operations.generate_image_prompt, _render_images, "studio:images"),
    "images": Operation(ImageForm, operations.generate_images, _render_images, "studio:images", metering.quote_images),
}


def _operation(name: str) -> Operation:
    if name not in OPERATIONS:
        raise Http404
    return OPERATIONS[name]


@require_POST
@login_required
def quote(request: SignedInRequest, name: str) -> HttpResponse:
    """The quote for the form as it stands, as a partial. Posted, since a text has no place in an address."""
    operation = _operation(name)
    form = operation.form.for_quote(request.POST)
    context: dict[str, Any] = {"operation": name}
    if form.is_valid():
        try:
            place = place_of(request)
            ask = dataclasses.replace(form.request, team_id=place.team_id).ask(request.user.pk)
            account_id = payer.account_of(request).pk
            context["quote"] = operation.quote(user_id=request.user.pk, account_id=account_id, ask=ask)
            context["payer"] = place.workspace.name if place.is_team else ""
        except InsufficientTokens as error:
            context["shortfall_tokens"] = error.missing_tokens
        except REFUSALS as error:
            context["refusal"] = error.message
    return render(request, "ai_ops/_quote.html", context)


@require_http_methods(["GET", "POST"])
async def operate(request: SignedInRequest, name: str) -> HttpResponse | StreamingHttpResponse:
    """Run an operation. A script gets it as server-sent events; a plain form gets the page of the result."""
    # Not by `login_required`, whose query would keep a connection from the pool for as long as the stream lasts.
    user_id = await in_thread(lambda: request.user.pk)()
    if user_id is None:
        return redirect_to_login(request.get_full_path())
    operation = _operation(name)
    if request.method == "GET":  # after a sign-in that stood between
        return redirect(operation.page)
    form, sending = operation.form(request.POST), SendingForm(request.POST)
    wants_stream = "text/event-stream" in request.headers.get("Accept", "")
    if not await in_thread(form.is_valid)() or not sending.is_valid():
        message = "" if form.errors else "This form is out of date. Reload the page and try again."
        return await _refuse(request, operation, form, wants_stream, message, 400)
    try:
        place = await in_thread(place_of)(request)
    except PermissionDenied as error:
        return await _refuse(request, operation, form, wants_stream, str(error), 403)
    events = operation.run(
        user_id=user_id,
        request=dataclasses.replace(form.request, shown_price=sending.shown_price, team_id=place.team_id),
        idempotency_key=sending.cleaned_data["idempotency_key"],
    )
    try:
        # The first item says whether the operation may run at all; only then is the answer a stream.
        first = cast(Started | Replayed, await anext(events))
    except IdempotencyConflict as error:
        message = "This form was sent before, with other contents. Nothing was started now: send it once more."
        return await _refuse(request, operation, form, wants_stream, message, error.http_status)
    except REFUSALS as error:
        return await _refuse(request, operation, form, wants_stream, error.message, error.http_status)
    if wants_stream:
        return StreamingHttpResponse(
            stream(first, events),
            content_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    return await _run_to_the_end(request, operation, form, first, events)


@require_GET
@login_required
def outcome(request: SignedInRequest) -> JsonResponse:
    """How the operation of this `idempotency_key` ended, for a page that hears no more of it: stopped, or cut off.

    `state` is "running" until it is settled, "ended" then, and "unknown" where no operation has that key.
    """
    sending = SendingForm(request.GET)
    usage = None
    if sending.is_valid():
        key = sending.cleaned_data["idempotency_key"]
        accounts = TokenAccount.objects.filter(workspace__in=visible_to(request.user.pk))
        usage = TokenUsage.objects.filter(account__in=accounts, user=request.user, idempotency_key=key).first()
    if usage is None:
        return JsonResponse({"state": "unknown"})
    if usage.status == TokenUsage.Status.RESERVED:
        return JsonResponse({"state": "running"})
    result = operations.find_result(usage)
    return JsonResponse({"state": "ended"} | outcome_of(usage, result, why_stopped(usage)))


async def _refuse(
    request: SignedInRequest, operation: Operation, form: OperationForm, wants_stream: bool, message: str, status: int
) -> HttpResponse:
    if wants_stream:
        return JsonResponse({"message": message or "Please correct the form.", "fields": form.errors}, status=status)
    if message:
        form.add_error(None, message)
    return await in_thread(operation.render_page)(request, form, status)


async def _run_to_the_end(
    request: SignedInRequest,
    operation: Operation,
    form: OperationForm,
    first: Started | Replayed,
    events: AsyncGenerator[Event, None],
) -> HttpResponse:
    try:
        async for _ in events:
            pass
    except ProviderError as error:
        return await _refuse(request, operation, form, False, error.message, error.http_status)
    if first.result is None:
        return redirect("studio:home")
    return redirect(first.result)
