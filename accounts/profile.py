"""What a person says of themselves: their name, and their time zone."""

from typing import Any

from django import forms
from django.core.validators import ProhibitNullCharactersValidator
from django.utils import timezone

from accounts import time_zones
from accounts.models import User

THE_BROWSERS = "The one of the device I use"


class ProfileForm(forms.ModelForm):
    """Name and time zone; `save` writes them."""

    class Meta:
        model = User
        fields = ("name", "time_zone")
        help_texts = {"name": "How our emails address you."}

    time_zone = forms.ChoiceField(
        required=False,
        label="Time zone",
        help_text="For times on pages, in emails and statements. An email knows no device: it uses UTC then.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["name"].validators.append(ProhibitNullCharactersValidator())
        self.fields["name"].widget.attrs["autocomplete"] = "name"
        choices = [("", THE_BROWSERS), *time_zones.list_choices(timezone.now())]
        current = self.instance.time_zone
        if current and current not in {name for _, zones in choices[1:] for name, _ in zones}:
            choices.append((current, current))  # an older name of a zone, which a script may have set
        self.fields["time_zone"].choices = choices  # type: ignore[attr-defined]
