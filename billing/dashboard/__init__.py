"""The pages of admins, /admin/tokens/."""

from billing.dashboard import accounts, bulk, figures, finance, payments

__all__ = ["accounts", "bulk", "figures", "finance", "payments"]
