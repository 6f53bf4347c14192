"""What an operation costs at most, what its user can afford of it now, and the hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from django.conf import settings

from ai_ops import counting
from ai_ops.prompts import Prompt
from billing import catalogue, ledger, pricing, usage
from billing.catalogue import CatalogueError
from billing.ledger import AccountNotActive, InsufficientTokens, Operation, Posting
from billing.models import ModelPrice, TokenAccount
from billing.pricing import TokenPools

# A quote is a ceiling, and our count is not quite the provider's. The benchmark of the tokens holds it to both.
QUOTE_MARGIN = Decimal("1.14")
MESSAGE_OVERHEAD_TOKENS = 16  # of what stands around each message, and around the system prompt
MIN_OUTPUT_TOKENS = 100  # less is no text: refuse rather than write half a sentence


@dataclass(frozen=True, slots=True)
class Ask:
    """An operation before it is paid for: what the model is asked, and what the usage row says of it."""

    operation_type: str
    provider: str
    model: str
    prompt: Prompt
    wanted_output_tokens: int = 0  # text, without what the model thinks
    least_output_tokens: int = 0  # text: less of it is of no use, as of a revision that is cut short
    image_count: int = 0  # images
    image_size: str = ""
    image_quality: str = ""
    project_id: int | None = None
    content_id: int | None = None
    chat_id: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quote:
    """The most an operation can cost, and what is held for it at first.

    The hold is smaller than the quote when the balance is small (`is_reduced`): then less text is asked for, and when
    that is written and more has become available, the hold is extended, up to the quote.
    """

    user_id: int  # who acts
    account_id: int  # who pays
    ask: Ask
    price: ModelPrice
    operation: Operation  # with the prices of now, and by the catalogue's name of the model
    read_tokens: int  # what is asked, by our bare count
    input_tokens: int  # the same as a ceiling; 0 for images, which are priced by the image
    thinking_tokens: int  # room for it, on top of the text
    wanted_output_tokens: int  # the text and the room for thinking
    output_limit_tokens: int  # what is affordable of it now
    max_billable_tokens: int
    held_tokens: int
    available_tokens: int

    @property
    def is_reduced(self) -> bool:
        return self.held_tokens < self.max_billable_tokens

    @property
    def unit(self) -> str:
        """What `unit_price` is the price of: a token of the model, or an image of its size and quality."""
        of = self.operation
        return " ".join((of.provider, of.model, of.image_size, of.image_quality)).rstrip()

    @property
    def unit_price(self) -> Decimal:
        """In tokens."""
        of = self.operation
        return Decimal(0) if of.is_free else of.multiplier or Decimal(of.fixed_cost_tokens or 0)

    @property
    def multiplier(self) -> Decimal:
        """Of a text."""
        return self.operation.multiplier or Decimal(1)

    @property
    def text_tokens(self) -> int:
        """The most that is written, thinking apart."""
        return self.wanted_output_tokens - self.thinking_tokens


class TooLongForModel(CatalogueError):
    """The model could not do it, whatever is paid: it reads or writes less at once than this takes."""


def quote_text(*, user_id: int, account_id: int | None = None, ask: Ask) -> Quote:
    """What the text costs at most, and how much of it the payer can afford now: the account, or the user's own.

    Reserves nothing. Raises CatalogueError for a model that cannot be used, or not for so long a text
    (TooLongForModel), AccountNotActive, and InsufficientTokens when not even the least that is of use is affordable.
    """
    priced, account = _price(user_id, account_id, ask)
    price, operation = priced.price, priced.operation
    read_tokens = count_tokens(operation, ask.prompt.text)
    _require_fit(price, ask, read_tokens)
    multiplier = operation.multiplier or Decimal(1)
    input_tokens = quoted_input_tokens(ask.prompt, read_tokens)
    text_tokens = min(ask.wanted_output_tokens, price.max_output_tokens)
    wanted_tokens = min(text_tokens + price.thinking_tokens, price.max_output_tokens)
    most = pricing.calculate_llm_billable_tokens(input_tokens, wanted_tokens, multiplier)
    output_limit_tokens, held_tokens = wanted_tokens, most.billable_tokens
    if operation.is_free:
        held_tokens = 0
    elif most.billable_tokens > account.available:
        output_limit_tokens = pricing.affordable_output_tokens(
            available_tokens=account.available, input_tokens=input_tokens, multiplier=multiplier
        )
        least_tokens = min(_least_output_tokens(price, ask), wanted_tokens)
        if output_limit_tokens < least_tokens:
            least = pricing.calculate_llm_billable_tokens(input_tokens, least_tokens, multiplier)
            raise InsufficientTokens(needed_tokens=least.billable_tokens, available_tokens=account.available)
        held_tokens = pricing.calculate_llm_billable_tokens(
            input_tokens, output_limit_tokens, multiplier
        ).billable_tokens
    return Quote(
        user_id=user_id,
        account_id=account.pk,
        ask=ask,
        price=price,
        operation=operation,
        read_tokens=read_tokens,
        input_tokens=input_tokens,
        thinking_tokens=wanted_tokens - text_tokens,
        wanted_output_tokens=wanted_tokens,
        output_limit_tokens=output_limit_tokens,
        max_billable_tokens=0 if operation.is_free else most.billable_tokens,
        held_tokens=held_tokens,
        available_tokens=account.available,
    )


def quote_images(*, user_id: int, account_id: int | None = None, ask: Ask) -> Quote:
    """What the images cost the account, or the user's own. Reserves nothing. Raises CatalogueError, InvalidUsage,
    AccountNotActive, InsufficientTokens."""
    priced, account = _price(user_id, account_id, ask)
    operation = priced.operation
    tokens = operation.billable_tokens(TokenPools())
    if tokens > account.available and not operation.is_free:
        raise InsufficientTokens(needed_tokens=tokens, available_tokens=account.available)
    return Quote(
        user_id=user_id,
        account_id=account.pk,
        ask=ask,
        price=priced.price,
        operation=operation,
        read_tokens=count_tokens(operation, ask.prompt.text),
        input_tokens=0,
        thinking_tokens=0,
        wanted_output_tokens=0,
        output_limit_tokens=0,
        max_billable_tokens=tokens,
        held_tokens=tokens,
        available_tokens=account.available,
    )


def _price(user_id: int, account_id: int | None, ask: Ask) -> tuple[usage.PricedOperation, TokenAccount]:
    priced = usage.price_operation(
        operation_type=ask.operation_type,
        provider=ask.provider,
        model=ask.model,
        image_count=ask.image_count,
        image_size=ask.image_size,
        image_quality=ask.image_quality,
        project_id=ask.project_id,
        content_id=ask.content_id,
        chat_id=ask.chat_id,
        metadata=ask.metadata,
    )
    account = ledger.get_account(user_id=user_id) if account_id is None else ledger.get_account(account_id=account_id)
    if not account.may_operate(is_free=priced.operation.is_free):
        raise AccountNotActive(status=account.status, reason=account.status_reason)
    return priced, account


def _least_output_tokens(price: ModelPrice, ask: Ask) -> int:
    """With less it would most likely think and not write, or write what is of no use. Models seldom use their room for
    thinking: to ask for all of it would keep small balances from texts that they can pay."""
    return max(MIN_OUTPUT_TOKENS, ask.least_output_tokens) + price.thinking_tokens // 4


def _require_fit(price: ModelPrice, ask: Ask, read_tokens: int) -> None:
    """Refuse before anything is held what the model cannot do, with its limit and what helps."""
    written_tokens = _least_output_tokens(price, ask)
    if read_tokens > price.max_input_tokens:
        raise TooLongForModel(
            f"{price.display_name} reads at most {price.max_input_tokens:,} tokens at once, and this has about "
            f"{read_tokens:,}. Shorten the text, take a part of it, or choose another model."
        )
    if ask.least_output_tokens and written_tokens > price.max_output_tokens:
        raise TooLongForModel(
            f"{price.display_name} writes at most {price.max_output_tokens:,} tokens at once, and this needs about "
            f"{written_tokens:,}. Work on one passage after the other, or choose another model."
        )


def quoted_input_tokens(prompt: Prompt, counted_tokens: int) -> int:
    """Our bare count of a prompt as a ceiling of the provider's."""
    around_tokens = (len(prompt.messages) + bool(prompt.system)) * MESSAGE_OVERHEAD_TOKENS
    return pricing.ceil_multiply(counted_tokens, QUOTE_MARGIN) + around_tokens


def count_tokens(operation: Operation, text: str) -> int:
    """By our own count, for the operation's model."""
    return counting.count_tokens(text, provider=operation.provider, model=operation.model)


def reserve_quote(
    quote: Quote, *, idempotency_key: str, request: Mapping[str, Any], links: Mapping[str, Any] | None = None
) -> Posting:
    """Hold what the quote says, and note what the provider will have read. Raises what `ledger.reserve_tokens` raises.

    `links` are the fields of the operation that say where its result is. The provider is asked right after the commit:
    noting here what it will have read costs no statement of its own.
    """
    read_pools = TokenPools(input_tokens=quote.read_tokens)
    metadata = {**quote.operation.metadata, "quoted_tokens": quote.max_billable_tokens}
    return ledger.reserve_tokens(
        account_id=quote.account_id,
        actor_id=quote.user_id,
        tokens=quote.held_tokens,
        operation=replace(quote.operation, metadata=metadata, **(links or {})),
        idempotency_key=idempotency_key,
        lifetime_seconds=settings.RESERVATION_SECONDS,
        request=request,
        read_pools=read_pools,
        provider_cost_microusd=begun_cost_microusd(quote, read_pools),
    )


def begun_cost_microusd(quote: Quote, read_pools: TokenPools) -> int:
    """What it costs us as soon as the provider has begun: a text, what it reads; images, all of them."""
    if quote.operation.fixed_cost_tokens is None:
        return catalogue.provider_cost_microusd(quote.price, read_pools)
    return images_cost_microusd(quote, TokenPools(), quote.operation.image_count)


def images_cost_microusd(quote: Quote, pools: TokenPools, image_count: int) -> int:
    """What so many of the operation's images cost us, with what the provider counted beside them."""
    return catalogue.provider_cost_microusd(
        quote.price,
        pools,
        image_count=image_count,
        image_size=quote.operation.image_size,
        image_quality=quote.operation.image_quality,
    )
