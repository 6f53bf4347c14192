from .account import TokenAccount
from .drift import Drift
from .model_price import ModelPrice, ModelPriceChange
from .notification import Notification, NotificationPreference
from .pricing import TokenPricing
from .purchase import Purchase
from .reversal import PaymentReversal
from .stripe_event import StripeEvent
from .system_settings import SettingChange, SystemSettings
from .transaction import TokenTransaction
from .usage import TokenUsage
from .usage_hour import UsageHour

__all__ = [
    "Drift",
    "ModelPrice",
    "ModelPriceChange",
    "Notification",
    "NotificationPreference",
    "PaymentReversal",
    "Purchase",
    "SettingChange",
    "StripeEvent",
    "SystemSettings",
    "TokenAccount",
    "TokenPricing",
    "TokenTransaction",
    "TokenUsage",
    "UsageHour",
]
