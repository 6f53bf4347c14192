from django.conf import settings
from django.db import models
from django.db.models import F, Q

from .fields import choices_constraint, created_at_field


class GrantKind(models.TextChoices):
    GRANT = "grant", "Grant"
    DEDUCTION = "deduction", "Deduction"


class GrantState(models.TextChoices):
    REQUESTED = "requested", "Waits for a superadmin"
    APPROVED = "approved", "Waits for a second superadmin"
    DONE = "done", "Done"
    DECLINED = "declined", "Declined"
    EXPIRED = "expired", "Nobody decided in time"


class GrantRequest(models.Model):
    """An admin's wish to give tokens or to take them, and what became of it. Also of those carried out at once.

    Written by billing/staff/grants.py. Roles and limits are as they were when it was asked for: who is an admin later
    does not change what was right then.
    """

    Kind = GrantKind
    State = GrantState
    OPEN_STATES = (GrantState.REQUESTED, GrantState.APPROVED)

    kind = models.CharField(max_length=10, choices=GrantKind)
    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, related_name="grant_requests")
    # Who receives it; nobody where it is a team.
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    tokens = models.BigIntegerField()
    tokens_end_at = models.DateTimeField("when the given tokens end; empty: never", null=True, blank=True)
    reason = models.CharField(max_length=500)

    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False
    )
    requested_by_role = models.CharField(max_length=10)
    request_key = models.CharField("the form's, so that sent twice it is one", max_length=100)
    admin_limit_tokens = models.BigIntegerField("what an admin could grant without approval then")
    needs_two = models.BooleanField("needs two superadmins")

    state = models.CharField(max_length=10, choices=GrantState)
    # The first of two superadmins; the one who asked, where that is a superadmin.
    approved_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    approved_at = models.DateTimeField(null=True, blank=True)
    # Who carried it out or declined it.
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    decided_at = models.DateTimeField(null=True, blank=True)
    decision_reason = models.CharField("why it was declined", max_length=500, blank=True, db_default="")
    transaction = models.OneToOneField(
        "billing.TokenTransaction", on_delete=models.PROTECT, null=True, blank=True, related_name="grant_request"
    )
    created_at = created_at_field()
    expires_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)
        indexes = [
            models.Index(fields=["requested_by", "created_at"], name="grant_request_by_requester"),
            # What one person's word moved in a day.
            models.Index(
                fields=["decided_by", "decided_at"], condition=Q(state="done"), name="grant_request_by_decider"
            ),
            models.Index(fields=["id"], condition=Q(state__in=["requested", "approved"]), name="grant_request_open"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["requested_by", "request_key"], name="grant_request_once_per_form"),
            models.CheckConstraint(condition=Q(tokens__gt=0) & ~Q(reason=""), name="grant_request_sane"),
            models.CheckConstraint(
                condition=Q(tokens_end_at=None) | Q(kind="grant"), name="grant_request_only_grants_end"
            ),
            # Tokens have moved exactly when it is done.
            models.CheckConstraint(
                condition=Q(state="done", transaction__isnull=False, decided_by__isnull=False)
                | ~Q(state="done") & Q(transaction=None),
                name="grant_request_done_has_its_entry",
            ),
            # Nobody approves what they asked for, nor what is for themselves; nor counts as two.
            models.CheckConstraint(
                condition=~Q(state="done")
                | ~Q(decided_by=F("user"))
                & (Q(needs_two=False) | (Q(approved_by__isnull=False) & ~Q(approved_by=F("decided_by"))))
                & (
                    ~Q(decided_by=F("requested_by"))
                    | Q(requested_by_role="superadmin", needs_two=False)
                    | Q(requested_by_role="admin", kind="grant", tokens__lte=F("admin_limit_tokens"), needs_two=False)
                ),
                name="grant_request_approved_by_others",
            ),
            models.CheckConstraint(
                condition=~Q(state="declined") | Q(decided_by__isnull=False) & ~Q(decision_reason=""),
                name="grant_request_declined_has_reason",
            ),
            choices_constraint("kind", GrantKind, "grant_request_kind_known"),
            choices_constraint("state", GrantState, "grant_request_state_known"),
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()} of {self.tokens:,} tokens ({self.state})"

    @property
    def is_open(self) -> bool:
        return self.state in self.OPEN_STATES
