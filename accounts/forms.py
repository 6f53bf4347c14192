from datetime import datetime, timedelta
from typing import Any

from allauth.account import forms
from django import forms as django_forms
from django.core.validators import MaxLengthValidator
from django.utils import timezone

from accounts.models import ApiKey, User


class SignupForm(forms.SignupForm):
    """allauth's, which would cut an address that is too long for its column, and send the confirmation to nobody."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        max_length = User._meta.get_field("email").max_length
        self.fields["email"].validators.append(MaxLengthValidator(max_length))


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
