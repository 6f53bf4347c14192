from .account import TokenAccount
from .bulk_job import BulkJob, BulkJobRow
from .drift import Drift
from .grant_request import GrantRequest
from .installation import Installation
from .lot import TokenLot
from .model_price import ModelPrice, ModelPriceChange
from .notification import Notification, NotificationPreference
from .pricing import TokenPricing
from .purchase import Purchase
from .reversal import PaymentReversal
from .stripe_event import StripeEvent
from .system_settings import SettingChange, SystemSettings
from .transaction import TokenTransaction
from .usage import TokenUsage
from .usage_hour import LedgerHour, RollUp, UsageDay, UsageHour
from .welcome import BonusKey, BonusMark

__all__ = [
    "BonusKey",
    "BonusMark",
    "BulkJob",
    "BulkJobRow",
    "Drift",
    "GrantRequest",
    "Installation",
    "LedgerHour",
    "ModelPrice",
    "ModelPriceChange",
    "Notification",
    "NotificationPreference",
    "PaymentReversal",
    "Purchase",
    "RollUp",
    "SettingChange",
    "StripeEvent",
    "SystemSettings",
    "TokenAccount",
    "TokenLot",
    "TokenPricing",
    "TokenTransaction",
    "TokenUsage",
    "UsageDay",
    "UsageHour",
]
