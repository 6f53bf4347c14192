"""The pages of admins, /admin/tokens/."""

from billing.dashboard import accounts, audit_log, bulk, figures, finance, grants, payments, settings

__all__ = ["accounts", "audit_log", "bulk", "figures", "finance", "grants", "payments", "settings"]
