import secrets

from django.db import models
from django.db.models import Q

from .fields import created_at_field


class Installation(models.Model):
    """This installation's name at Stripe, one row: made once, at random. It is part of every idempotency key, so that
    a second installation on the same Stripe account, whose rows have the same numbers, never meets ours."""

    NAME_LENGTH = 12

    name = models.CharField(max_length=20)
    created_at = created_at_field()

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(id=1), name="installation_one_row")]

    def __str__(self) -> str:
        return self.name

    @classmethod
    def read_name(cls) -> str:
        """The name; made at the first call, which should be in no transaction: others wait for its end."""
        name = secrets.token_hex(cls.NAME_LENGTH // 2)
        return cls.objects.get_or_create(pk=1, defaults={"name": name})[0].name


def stripe_key(installation: str, what: str, *parts: object) -> str:
    """An idempotency key for Stripe. A row made before installations had names has none, and keeps the key it began
    with."""
    return "-".join(str(part) for part in ("postmate", installation, what, *parts) if part != "")
