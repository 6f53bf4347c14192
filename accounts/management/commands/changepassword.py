"""Django's own, for the server: what the old password may have opened to somebody else ends with it."""

import getpass
from typing import Any

from django.contrib.auth.management.commands import changepassword

from accounts import access, api_keys, audit
from accounts.models import User


class Command(changepassword.Command):
    help = "Change somebody's password. It ends their sessions and revokes their API keys."

    def handle(self, *args: Any, **options: Any) -> str | None:
        said: str | None = super().handle(*args, **options)
        user = User.objects.get_by_natural_key(options["username"] or getpass.getuser())
        access.end_sessions(user)
        api_keys.revoke_all(user_id=user.pk)
        audit.write(
            action=audit.Action.PERSON_CHANGED,
            summary="A new password was set on the server: sessions and keys of before ended",
            actor=None,
            subject_id=user.pk,
        )
        return said
