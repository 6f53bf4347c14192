"""Quote → reserve → run → settle or release: the one way an AI operation is paid for.

The hold is committed before the provider is called, no transaction is open while it answers, and the result is kept in
the same transaction that charges for it. Killed anywhere in between, the hold expires and nothing is charged; what the
provider has read by then was noted with the hold, so that what it cost us is not lost.

`quotes.py` says what it costs at most and holds it, `text.py` and `images.py` run it, `closing.py` charges, whatever
happens.
"""

from ai_ops.metering.closing import (
    CAME_TO_NOTHING,
    ENDED_TOO_LATE,
    LEFT_BEFORE_A_WORD,
    LEFT_EARLY,
    NOTHING_TO_READ,
    ONLY_THOUGHT,
    SETTLEMENT_FAILED,
    STOP_NOTES,
    Finished,
    StoppedBy,
    abandon,
)
from ai_ops.metering.images import make_images
from ai_ops.metering.quotes import (
    MIN_OUTPUT_TOKENS,
    QUOTE_MARGIN,
    Ask,
    Quote,
    TooLongForModel,
    quote_images,
    quote_text,
    reserve_quote,
)
from ai_ops.metering.text import BalanceTooSmallToThink, NothingToRead, OnlyThought, stream_text

__all__ = [
    "CAME_TO_NOTHING",
    "ENDED_TOO_LATE",
    "LEFT_BEFORE_A_WORD",
    "LEFT_EARLY",
    "MIN_OUTPUT_TOKENS",
    "NOTHING_TO_READ",
    "ONLY_THOUGHT",
    "QUOTE_MARGIN",
    "SETTLEMENT_FAILED",
    "STOP_NOTES",
    "Ask",
    "BalanceTooSmallToThink",
    "Finished",
    "NothingToRead",
    "OnlyThought",
    "Quote",
    "StoppedBy",
    "TooLongForModel",
    "abandon",
    "make_images",
    "quote_images",
    "quote_text",
    "reserve_quote",
    "stream_text",
]
