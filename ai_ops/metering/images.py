"""Makes reserved images, and charges for those that come."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from django.conf import settings

from ai_ops import providers
from ai_ops.metering.closing import (
    LEFT_BEFORE_AN_IMAGE,
    Finished,
    close_shielded,
    close_somehow,
    close_with,
    failure_words,
    ids_of,
    keep_too_late,
    log_end,
    release_unsettled,
    tell_failure,
)
from ai_ops.metering.quotes import Quote, begun_cost_microusd, images_cost_microusd
from ai_ops.providers import Images, ProviderError, ProviderTimedOut
from billing import ledger
from billing.ledger import Posting, statements
from billing.pricing import TokenPools

KeepImages = Callable[[Images | None], None]
"""Keeps the images of an operation, None when there are none. Runs in the transaction that closes the hold."""


async def make_images(*, quote: Quote, usage_id: int, keep: KeepImages) -> Finished:
    """Run a reserved image operation. What came is charged, at the price of an image each.

    It failed: the hold is released, nothing is charged, and ProviderError is raised. Its task is cancelled because
    the reader left: the provider is stopped, and all is charged, for providers charge for what they have begun.
    """
    operation = quote.operation
    started_at = time.monotonic()
    images: Images | None = None
    failure: Exception | None = None

    def duration_ms() -> int:
        return int((time.monotonic() - started_at) * 1_000)

    log_ids = ids_of(quote, usage_id)

    def used() -> tuple[TokenPools, int, int]:
        """What the provider counted, the images that came, and what it cost us."""
        pools, count = (images.usage or TokenPools(), len(images.images)) if images else (TokenPools(), 0)
        if images is None and isinstance(failure, ProviderError) and failure.usage:
            pools = failure.usage
        # The reader left, or we did: what has been begun is made.
        if images is None and (failure is None or isinstance(failure, ProviderTimedOut)):
            pools = TokenPools(input_tokens=quote.read_tokens)
            return pools, 0, begun_cost_microusd(quote, pools)
        spoilt = failure.spoilt_images if isinstance(failure, ProviderError) else 0
        is_nothing_used = count + spoilt == 0 and pools == TokenPools()
        return pools, count, 0 if is_nothing_used else images_cost_microusd(quote, pools, count + spoilt)

    def keep_images_too_late() -> Posting:
        pools, count, provider_cost_microusd = used()
        return keep_too_late(
            usage_id,
            partial(keep, images),
            **{name: getattr(pools, name) for name in statements.COUNTS},
            image_count=count,
            provider_cost_microusd=provider_cost_microusd,
            is_estimated=images is None,
            duration_ms=duration_ms(),
        )

    def settle_or_release() -> Posting:
        pools, count, provider_cost_microusd = used()
        if images is not None:
            return ledger.settle_usage(
                usage_id=usage_id,
                pools=pools,
                image_count=count,
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=duration_ms(),
            )
        if failure is not None:
            return ledger.release_usage(
                usage_id=usage_id,
                error_message=failure_words(failure),
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=duration_ms(),
            )
        return ledger.settle_usage(
            usage_id=usage_id,
            pools=pools,
            is_estimated=True,
            provider_cost_microusd=provider_cost_microusd,
            duration_ms=duration_ms(),
            error_message=LEFT_BEFORE_AN_IMAGE,
        )

    def release() -> Posting:
        return release_unsettled(usage_id, failure, duration_ms())

    def close() -> Posting:
        keep_images = partial(keep, images)
        posting = close_somehow(
            log_ids,
            partial(close_with, keep_images, settle_or_release),
            partial(close_with, keep_images, release),
            release,
            too_late=keep_images_too_late,
        )
        if failure is None:
            log_end(log_ids, posting, duration_ms())
        return posting

    try:
        async with asyncio.timeout(settings.AI_MAX_DURATION_SECONDS):
            images = await providers.generate_images(
                provider=operation.provider,
                model=operation.model,
                prompt=quote.ask.prompt.messages[-1].text,
                size=operation.image_size,
                quality=operation.image_quality,
                count=operation.image_count,
            )
    except TimeoutError:
        failure = ProviderTimedOut(quote.price.get_provider_display())
    except Exception as error:
        failure = error
    finally:
        await close_shielded(close)
    if failure is not None:
        await tell_failure(failure, log_ids)
        raise failure
    return Finished(usage_id)
