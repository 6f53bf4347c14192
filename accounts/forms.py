from datetime import datetime, timedelta
from typing import Any, cast
from uuid import uuid4

from allauth.account import forms
from allauth.account.adapter import get_adapter
from allauth.account.internal.userkit import filter_users_by_email
from allauth.account.models import EmailAddress
from allauth.core import context
from allauth.mfa.base import forms as mfa_forms
from django import forms as django_forms
from django.core.validators import MaxLengthValidator
from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone

from accounts import access, api_keys, guesses
from accounts.models import ApiKey, User


class SignupForm(forms.SignupForm):
    """allauth's, which would cut an address that is too long for its column, and send the confirmation to nobody."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        max_length = User._meta.get_field("email").max_length
        self.fields["email"].validators.append(MaxLengthValidator(max_length))

    def validate_unique_email(self, value: str) -> str:
        """A further address that somebody has written down and not proven is free for its owner."""
        found = filter_users_by_email(value)
        return value if found and not access.only_owners(found, value) else str(super().validate_unique_email(value))

    def try_save(self, request: HttpRequest) -> tuple[User | None, Any]:
        """For an address that has an account the same work is done, and undone: the time it takes tells nothing."""
        if self.account_already_exists:
            with transaction.atomic():
                user = User.objects.create_user(f"{uuid4().hex}@nobody.invalid", self.cleaned_data["password1"])
                EmailAddress.objects.create(user=user, email=user.email, primary=True)
                transaction.set_rollback(True)
        return cast(tuple[User | None, Any], super().try_save(request))


class ResetPasswordForm(forms.ResetPasswordForm):
    """allauth's, which also writes to the address for those who have not proven it."""

    users: list[User]

    def clean_email(self) -> str:
        email = str(super().clean_email())
        self.users = access.only_owners(self.users, email)
        return email


class _KeysMayEnd(django_forms.Form):
    """Mixed into the forms for a new password, which ends all other sessions by itself."""

    user: User
    end_keys = django_forms.BooleanField(
        required=False,
        initial=True,
        label="Revoke all my API keys as well",
        help_text="If somebody else may have been in your account. Programs that use them then need new ones.",
    )

    def save(self) -> None:
        with transaction.atomic():
            super().save()  # type: ignore[misc]  # of the form that it is mixed into
            if self.cleaned_data["end_keys"]:
                api_keys.revoke_all(user_id=self.user.pk)


class ChangePasswordForm(_KeysMayEnd, forms.ChangePasswordForm):
    field_order = ("oldpassword", "password1", "password2", "end_keys")


class SetPasswordForm(_KeysMayEnd, forms.SetPasswordForm):
    field_order = ("password1", "password2", "end_keys")


class ResetPasswordKeyForm(_KeysMayEnd, forms.ResetPasswordKeyForm):
    """Names the addresses that were added after the one that the link was sent to: somebody else may have done it."""

    field_order = ("password1", "password2", "end_keys", "remove_addresses")
    remove_addresses = django_forms.MultipleChoiceField(
        required=False,
        label="Remove these addresses, which also open my account",
        help_text="Tick those that are not yours.",
        widget=django_forms.CheckboxSelectMultiple,
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent_to = context.request.session.get(access.SENT_TO, "")
        _, removable = access.find_removable_addresses(self.user, sent_to=self.sent_to)
        if removable:
            field = cast(django_forms.MultipleChoiceField, self.fields["remove_addresses"])
            field.choices = [(each.email, each.email) for each in removable]
        else:
            del self.fields["remove_addresses"]

    def save(self) -> None:
        super().save()
        if removed := self.cleaned_data.get("remove_addresses"):
            access.remove_addresses(self.user, sent_to=self.sent_to, addresses=removed)


class AddEmailForm(forms.AddEmailForm):
    """A second address waits for the first: until then nobody knows whose account it is."""

    def clean_email(self) -> str:
        if not EmailAddress.objects.filter(user=self.user, verified=True).exists():
            raise django_forms.ValidationError("Confirm the address you have first: we can send you the link again.")
        return super().clean_email()


class _LimitedCode:
    """A code of a second factor: how often it may be guessed, by `guesses`."""

    user: User

    def clean_code(self) -> str:
        attempt = guesses.take_code_guess(context.request, self.user)
        if attempt is None:
            raise get_adapter().validation_error("too_many_login_attempts")
        code = super().clean_code()  # type: ignore[misc]  # of the form that it is mixed into
        attempt.rollback()
        return str(code)


class AuthenticateForm(_LimitedCode, mfa_forms.AuthenticateForm):
    """At the sign-in."""


class ReauthenticateForm(_LimitedCode, mfa_forms.ReauthenticateForm):
    """Before what is sensitive."""


class ApiKeyForm(django_forms.Form):
    """A new API key: what it is called, what it may read, how long it lives."""

    DAYS = {"30": "30 days", "90": "90 days", "365": "A year", "0": "Until it is revoked"}

    name = django_forms.CharField(
        max_length=ApiKey.NAME_LENGTH,
        help_text="Where it will be used, so that you know which one to revoke.",
        error_messages={"required": "Give the key a name."},
    )
    scopes = django_forms.MultipleChoiceField(
        label="May read",
        choices=ApiKey.Scope,
        initial=ApiKey.Scope.values,
        widget=django_forms.CheckboxSelectMultiple,
        error_messages={"required": "Choose at least one: a key that may read nothing is of no use."},
    )
    valid_days = django_forms.ChoiceField(label="Valid for", choices=DAYS, initial="90")

    @property
    def expires_at(self) -> datetime | None:
        days = int(self.cleaned_data["valid_days"])
        return timezone.now() + timedelta(days=days) if days else None
