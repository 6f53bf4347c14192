from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models import Q, Value

from .fields import choices_constraint, created_at_field


class BulkKind(models.TextChoices):
    GRANT = "grant", "Grant tokens"
    SUSPEND = "suspend", "Suspend"
    EXPORT = "export", "Export"


class BulkState(models.TextChoices):
    RUNNING = "running", "Running"
    DONE = "done", "Done"
    CANCELLED = "cancelled", "Cancelled"


class BulkRowState(models.TextChoices):
    WAITING = "waiting", "Waiting"
    DONE = "done", "Done"
    REQUESTED = "requested", "Waits for approval"  # `data` names the request
    SKIPPED = "skipped", "Nothing to do"
    FAILED = "failed", "Failed"
    CANCELLED = "cancelled", "Cancelled"


class BulkJob(models.Model):
    """One action on many accounts, those that a filter found when it was started. Run by billing/staff/bulk.py."""

    Kind = BulkKind
    State = BulkState

    kind = models.CharField(max_length=10, choices=BulkKind)
    filters = models.JSONField()  # what found the accounts; a text that was searched for only as its hash
    tokens = models.BigIntegerField("tokens for each (grant)", null=True, blank=True)
    reason = models.CharField(max_length=500, blank=True, db_default="")
    requested_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    request_key = models.CharField("the form's, so that sent twice it is one", max_length=100)
    state = models.CharField(max_length=10, choices=BulkState, default=BulkState.RUNNING)
    created_at = created_at_field()
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)
        indexes = [models.Index(fields=["id"], condition=Q(state="running"), name="bulk_job_running")]
        constraints = [
            models.UniqueConstraint(fields=["requested_by", "request_key"], name="bulk_job_once_per_form"),
            models.CheckConstraint(
                condition=Q(kind="grant", tokens__gt=0) & ~Q(reason="")
                | Q(kind="suspend", tokens=None) & ~Q(reason="")
                | Q(kind="export", tokens=None),
                name="bulk_job_has_what_it_needs",
            ),
            choices_constraint("kind", BulkKind, "bulk_job_kind_known"),
            choices_constraint("state", BulkState, "bulk_job_state_known"),
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()} #{self.pk}"


class BulkJobRow(models.Model):
    """What became of one account in a bulk job. `data` are an export's figures (the person is looked up when read), or
    the request that a grant became (`grant_request_id`)."""

    State = BulkRowState

    job = models.ForeignKey(BulkJob, on_delete=models.PROTECT, related_name="rows", db_index=False)
    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, related_name="+")
    state = models.CharField(max_length=10, choices=BulkRowState, db_default=BulkRowState.WAITING)
    message = models.CharField("what happened, in words", max_length=300, blank=True, db_default="")
    data = models.JSONField(db_default=Value({}, models.JSONField()), default=dict, encoder=DjangoJSONEncoder)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["job", "account"], name="bulk_row_once_per_account"),
            choices_constraint("state", BulkRowState, "bulk_row_state_known"),
        ]
        indexes = [models.Index(fields=["job", "state", "id"], name="bulk_row_by_state")]

    def __str__(self) -> str:
        return f"{self.job_id}/{self.account_id}: {self.state}"
