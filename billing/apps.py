from django.apps import AppConfig


class BillingConfig(AppConfig):
    name = "billing"

    def ready(self) -> None:
        from accounts import audit, two_persons
        from accounts.models import ChangeRequest
        from billing import signup  # noqa: F401  (the first connects the receivers that open accounts)
        from billing.catalogue import system_settings

        two_persons.register(ChangeRequest.Kind.SETTINGS, audit.Action.SETTING_CHANGED, system_settings.carry_out)
