"""Row 79: which models the Studio offers, on any day."""

from datetime import timedelta
from typing import Any

import pytest
import time_machine
from django.test import Client
from django.utils import timezone

from accounts.models import User
from ai_ops import forms
from billing.models import ModelPrice

PAGES = {"/studio/": forms.DraftForm, "/studio/images/": forms.ImageForm}


@pytest.mark.parametrize("day", ["2026-12-02", "2028-02-29", "2033-01-01"])
def test_the_model_that_a_form_begins_with_is_never_a_retired_one(client: Client, alice: User, day: str) -> None:
    client.force_login(alice)
    with time_machine.travel(f"{day}T12:00:00Z", tick=False):
        for path, form in PAGES.items():
            field: Any = form().fields["model"]
            (_, *_), *_ = choices = list(field.choices)
            gone = ModelPrice.objects.filter(retired_on__lte=timezone.now().date()).values_list("provider", "model")
            assert not {f"{provider}:{model}" for provider, model in gone}.intersection(dict(choices)), path


def test_a_page_without_a_model_says_so(client: Client, alice: User) -> None:
    client.force_login(alice)
    for path in PAGES:
        assert forms.NO_MODEL not in client.get(path).content.decode(), path
    ModelPrice.objects.update(retired_on=timezone.now().date() - timedelta(days=1))
    for path in PAGES:
        response = client.get(path)
        assert (response.status_code, forms.NO_MODEL in response.content.decode()) == (200, True), path
