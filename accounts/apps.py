from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "accounts"
    verbose_name = "People"

    def ready(self) -> None:
        from accounts import access, audit, roles, two_persons  # noqa: F401 – the first for its receivers
        from accounts.models import ChangeRequest

        two_persons.register(ChangeRequest.Kind.ROLE, audit.Action.ROLE_CHANGED, roles.carry_out)
