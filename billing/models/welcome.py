from django.db import models


class BonusMark(models.Model):
    """A mailbox had the welcome bonus: a keyed hash of its address, and nothing else. It names no account and no
    moment, and stays when the account is anonymised. Written by billing/ledger/welcome.py."""

    digest = models.CharField(max_length=32, primary_key=True)

    def __str__(self) -> str:
        return self.digest


class BonusKey(models.Model):
    """The key of those hashes, encrypted with one of the installation's secrets: a row for each secret."""

    secret_id = models.CharField(max_length=16, primary_key=True)  # tells secrets apart, gives nothing away
    encrypted = models.CharField(max_length=200)

    def __str__(self) -> str:
        return self.secret_id
