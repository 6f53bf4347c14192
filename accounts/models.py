from typing import Any, ClassVar

import pgtrigger
from allauth.account.models import EmailAddress
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.postgres.fields import ArrayField
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models, transaction
from django.db.models.functions import Lower, Now
from django.utils import timezone
from django.utils.crypto import salted_hmac


class UserKept(models.ProtectedError):
    """A person whom the ledger names is not deleted; nothing was changed."""

    message = (
        "The ledger names this person, so they cannot be deleted. Anonymise them instead: "
        "under Settings, Your data, or with manage.py anonymize_user."
    )

    def __init__(self, protected_objects: set[models.Model]) -> None:
        super().__init__(self.message, protected_objects)


class UserQuerySet(models.QuerySet["User"]):
    def delete(self) -> tuple[int, dict[str, int]]:
        """Raises UserKept for people with a token account."""
        try:
            return super().delete()
        except models.ProtectedError as error:
            raise UserKept(error.protected_objects) from error


class AddressField(models.EmailField):
    """An e-mail address in lower case, whoever writes it and however it is asked for: sign-in, reset and sign-up find
    it so."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        value = self.get_prep_value(super().pre_save(model_instance, add))
        setattr(model_instance, self.attname, value)
        return value

    def get_prep_value(self, value: Any) -> Any:
        value = super().get_prep_value(value)
        return value.lower() if isinstance(value, str) else value


class UserManager(BaseUserManager["User"]):
    def get_queryset(self) -> UserQuerySet:
        return UserQuerySet(self.model, using=self._db)

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> "User":
        user = self.model(email=email, **fields)
        user.set_password(password)
        user.save()
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> "User":
        """A superadmin, for `manage.py createsuperuser`."""
        return self.create_user(email, password, **{"role": User.Role.SUPERADMIN, **fields})

    def get_by_natural_key(self, username: str | None) -> "User":
        return self.get(email__iexact=username)


ROLE_CHANGE_IS_WRITTEN = "postmate.role_change_is_written"  # a setting of the database's transaction


def _audit_role_sql(summary: str, before: str) -> str:
    """A role that changes past `roles.change_role` (a shell, SQL by hand) is in the audit log all the same."""
    return f"""
        IF coalesce(current_setting('{ROLE_CHANGE_IS_WRITTEN}', true), '') <> 'yes' THEN
            INSERT INTO accounts_auditentry (action, summary, subject_id, before, after)
            VALUES ('role_changed', {summary}, NEW.id, {before}, jsonb_build_object('role', NEW.role));
        END IF;
        RETURN NULL;
    """  # noqa: S608 – our own names and constants, no input


# Switched off, or with less of a role, a person's sessions end for good, on whichever road it came: given again, none
# of them goes on, nor a key of who was switched off. An older copy of the row, saved, brings no session back.
_END_ACCESS_SQL = """
    NEW.session_epoch := greatest(OLD.session_epoch, NEW.session_epoch);
    IF OLD.is_active AND NOT NEW.is_active
        OR array_position(ARRAY['user', 'admin', 'superadmin'], NEW.role::text)
            < array_position(ARRAY['user', 'admin', 'superadmin'], OLD.role::text) THEN
        NEW.session_epoch := greatest(OLD.session_epoch + 1, NEW.session_epoch);
    END IF;
    IF OLD.is_active AND NOT NEW.is_active THEN
        UPDATE accounts_apikey SET revoked_at = now() WHERE user_id = NEW.id AND revoked_at IS NULL;
    END IF;
    RETURN NEW;
"""


class User(AbstractBaseUser):
    """A person who signs in with an e-mail address. What they may do follows from the role alone."""

    class Role(models.TextChoices):
        USER = "user", "User"
        ADMIN = "admin", "Admin"
        SUPERADMIN = "superadmin", "Superadmin"

    email = AddressField("e-mail address", unique=True)
    name = models.CharField(max_length=150, blank=True)
    role = models.CharField(max_length=10, choices=Role, default=Role.USER)
    is_active = models.BooleanField(default=True)
    # The zone their times are shown in, such as "Europe/Berlin"; empty: the browser's.
    time_zone = models.CharField(max_length=64, blank=True, default="")
    anonymised_at = models.DateTimeField(null=True, blank=True, editable=False)  # for ever: who it was is not known
    date_joined = models.DateTimeField(default=timezone.now, editable=False)
    session_epoch = models.PositiveIntegerField(default=0, db_default=0, editable=False)  # raised, all sessions end
    # The workspace they chose last; empty, or not theirs any more: the personal one.
    chosen_workspace = models.ForeignKey(
        "accounts.Workspace", on_delete=models.SET_NULL, null=True, blank=True, related_name="+", db_index=False,
        editable=False,
    )  # fmt: skip

    USERNAME_FIELD = "email"
    EMAIL_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    objects = UserManager()

    class Meta:
        constraints = [
            models.UniqueConstraint(Lower("email"), name="accounts_user_email_case_insensitive"),
            models.CheckConstraint(
                condition=models.Q(role__in=["user", "admin", "superadmin"]), name="accounts_user_role_known"
            ),
        ]
        triggers = [
            pgtrigger.Trigger(
                name="role_change_audited",
                operation=pgtrigger.UpdateOf("role"),  # type: ignore[no-untyped-call]
                when=pgtrigger.After,
                condition=pgtrigger.Q(old__role__df=pgtrigger.F("new__role")),
                func=_audit_role_sql(
                    "'Role changed from ' || OLD.role || ' to ' || NEW.role || ', not on a page'",
                    "jsonb_build_object('role', OLD.role)",
                ),
            ),
            pgtrigger.Trigger(
                name="first_role_audited",
                operation=pgtrigger.Insert,
                when=pgtrigger.After,
                condition=~pgtrigger.Q(new__role="user"),
                func=_audit_role_sql("'Made as ' || NEW.role || ', not on a page'", "NULL"),
            ),
            pgtrigger.Trigger(
                name="access_ends",
                operation=pgtrigger.UpdateOf("is_active", "role", "session_epoch"),  # type: ignore[no-untyped-call]
                when=pgtrigger.Before,
                func=_END_ACCESS_SQL,
            ),
        ]

    def __str__(self) -> str:
        return self.email

    def save(self, *args: Any, **kwargs: Any) -> None:
        """A new user gets their personal workspace in the same transaction."""
        is_new = self._state.adding
        with transaction.atomic():
            super().save(*args, **kwargs)
            if is_new:
                Workspace.objects.create(owner=self, name=f"{self.display_name}'s workspace"[:150])

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        """Raises UserKept when they have a token account."""
        try:
            return super().delete(*args, **kwargs)
        except models.ProtectedError as error:
            raise UserKept(error.protected_objects) from error

    @property
    def display_name(self) -> str:
        return self.name or self.email.partition("@")[0]

    @property
    def is_admin(self) -> bool:
        """May see the dashboard: admins and superadmins."""
        return self.role in (self.Role.ADMIN, self.Role.SUPERADMIN)

    @property
    def is_superadmin(self) -> bool:
        return self.role == self.Role.SUPERADMIN

    @property
    def proven_addresses(self) -> set[str]:
        """The addresses that count as theirs: those that are confirmed, and where this installation does not ask for
        that, the one they sign in with. None of somebody who was anonymised."""
        if self.anonymised_at:
            return set()
        proven = set(EmailAddress.objects.filter(user_id=self.pk, verified=True).values_list("email", flat=True))
        return proven if settings.ACCOUNT_EMAIL_VERIFICATION == "mandatory" else proven | {self.email}

    def _get_session_auth_hash(self, secret: str | None = None) -> str:
        """What each session carries, made of the password and of the epoch: changed, the session is over."""
        value = f"{self.password}#{self.session_epoch}" if self.session_epoch else self.password
        salt = "django.contrib.auth.models.AbstractBaseUser.get_session_auth_hash"  # as Django's own
        return salted_hmac(salt, value, secret=secret, algorithm="sha256").hexdigest()

    # What Django admin asks for: superadmins may do everything in it, nobody else may enter it.
    @property
    def is_staff(self) -> bool:
        return self.is_superadmin

    def has_perm(self, perm: str, obj: object = None) -> bool:
        return self.is_active and self.is_superadmin

    def has_module_perms(self, app_label: str) -> bool:
        return self.is_active and self.is_superadmin


class WorkspaceKind(models.TextChoices):
    PERSONAL = "personal", "Personal"
    TEAM = "team", "Team"


class Workspace(models.Model):
    """Where content lives, and whose token account pays for it. Each user has a personal one, which they own; a team's
    has members. Teams are written by accounts/teams.py."""

    Kind = WorkspaceKind

    kind = models.CharField(
        max_length=10, choices=WorkspaceKind, default=WorkspaceKind.PERSONAL, db_default=WorkspaceKind.PERSONAL
    )
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True, blank=True, related_name="workspaces"
    )  # of a personal one alone
    name = models.CharField(max_length=150)
    created_at = models.DateTimeField(auto_now_add=True)
    closed_at = models.DateTimeField(null=True, blank=True, editable=False)  # a team's, for ever

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=models.Q(kind="personal", owner__isnull=False, closed_at=None)
                | models.Q(kind="team", owner=None),
                name="workspace_owner_of_personal_alone",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_team(self) -> bool:
        return self.kind == self.Kind.TEAM


class TeamRole(models.TextChoices):
    OWNER = "owner", "Owner"
    ADMIN = "admin", "Admin"
    MEMBER = "member", "Member"


class Membership(models.Model):
    """That somebody works in a team, and what they may do there. Nothing of it follows from their role on the platform,
    nor the other way round."""

    Role = TeamRole

    workspace = models.ForeignKey(Workspace, on_delete=models.CASCADE, related_name="memberships", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=10, choices=TeamRole)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["workspace", "user"], name="membership_once"),
            models.CheckConstraint(
                condition=models.Q(role__in=["owner", "admin", "member"]), name="membership_role_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.user} in {self.workspace}: {self.get_role_display().lower()}"

    @property
    def manages(self) -> bool:
        """Owners and admins: they buy, invite, and see everybody's use."""
        return self.role in (self.Role.OWNER, self.Role.ADMIN)

    @property
    def is_owner(self) -> bool:
        return self.role == self.Role.OWNER


class Invitation(models.Model):
    """That an address may join a team, or that a member may become its owner. The link's secret is kept as a hash.

    Open until it is accepted, taken back or over; what opens it is decided by the database's clock.
    """

    workspace = models.ForeignKey(Workspace, on_delete=models.CASCADE, related_name="invitations")
    email = models.EmailField()
    role = models.CharField(max_length=10, choices=TeamRole)
    hands_over = models.BooleanField("whoever invites is an admin afterwards", default=False)
    token_hash = models.CharField(max_length=64, unique=True, null=True, editable=False)  # none until it is sent
    invited_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField()
    sent_at = models.DateTimeField(null=True, blank=True)
    accepted_at = models.DateTimeField(null=True, blank=True)
    accepted_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                "workspace",
                Lower("email"),
                condition=models.Q(accepted_at=None, revoked_at=None),
                name="invitation_one_open_per_address",
            ),
            models.CheckConstraint(
                condition=models.Q(role__in=["owner", "admin", "member"]), name="invitation_role_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.workspace}: {self.get_role_display().lower()}"


class ApiKey(models.Model):
    """A person's key to their own data over the HTTP API. What opens the door is kept as a hash only.

    Made, used and revoked by accounts/api_keys.py. A revoked key stays, for the record.
    """

    class Scope(models.TextChoices):
        BALANCE_READ = "balance:read", "Balance"
        TRANSACTIONS_READ = "transactions:read", "Transactions"
        USAGE_READ = "usage:read", "Usage"
        PACKAGES_READ = "packages:read", "Packages and prices"

    NAME_LENGTH = 60

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=NAME_LENGTH)
    scopes = ArrayField(models.CharField(max_length=30, choices=Scope))
    token_start = models.CharField("how it begins", max_length=12)  # to tell keys apart; gives nothing away
    token_hash = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)  # to the minute
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "API key"
        constraints = [
            models.CheckConstraint(
                condition=models.Q(
                    scopes__len__gt=0,
                    scopes__contained_by=["balance:read", "transactions:read", "usage:read", "packages:read"],
                ),
                name="accounts_apikey_scopes_known",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.token_start}…)"

    @property
    def scope_labels(self) -> list[str]:
        return [self.Scope(scope).label for scope in self.scopes]

    @property
    def has_expired(self) -> bool:
        """For pages; what opens the door is decided by the database's clock."""
        return self.expires_at is not None and self.expires_at <= timezone.now()

    @property
    def is_live(self) -> bool:
        return self.revoked_at is None and not self.has_expired


class ChangeRequest(models.Model):
    """A change that needs two superadmins, and what became of it. Written by accounts/two_persons.py."""

    class Kind(models.TextChoices):
        ROLE = "role", "Role"
        SETTINGS = "settings", "Settings"

    class State(models.TextChoices):
        REQUESTED = "requested", "Waits for another superadmin"
        DONE = "done", "Done"
        DECLINED = "declined", "Declined"
        LAPSED = "lapsed", "Replaced by another"

    kind = models.CharField(max_length=10, choices=Kind)
    subject = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )  # whose role
    changes = models.JSONField()  # names to new values
    reason = models.CharField(max_length=500, blank=True, db_default="")
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False
    )
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField()
    state = models.CharField(max_length=10, choices=State, db_default=State.REQUESTED, default=State.REQUESTED)
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )  # nobody: whoever has the server
    decided_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("-id",)
        indexes = [
            models.Index(fields=["id"], condition=models.Q(state="requested"), name="change_request_open"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["kind", "subject"], condition=models.Q(state="requested"), name="change_request_one_open"
            ),
            models.UniqueConstraint(
                fields=["kind"],
                condition=models.Q(state="requested", subject=None),
                name="change_request_one_open_of_nobody",
            ),
            models.CheckConstraint(
                condition=~models.Q(state="done")
                | models.Q(decided_by=None)
                | ~models.Q(decided_by=models.F("requested_by"))
                & (models.Q(subject=None) | ~models.Q(decided_by=models.F("subject"))),
                name="change_request_approved_by_others",
            ),
        ]

    def __str__(self) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')}: {'none' if value is None else value}" for name, value in self.changes.items()
        )


class AuditEntry(models.Model):
    """Who did what, to whom or what, from which state to which: one row, never changed, never deleted.

    Written through accounts/audit.py, in the transaction of what it tells of. People stand in it by reference alone:
    no e-mail address or name is written down here, so that somebody can still be anonymised.
    """

    class Outcome(models.TextChoices):
        DONE = "done", "Done"
        REQUESTED = "requested", "Requested"  # it waits for somebody's approval
        REFUSED = "refused", "Refused"

    created_at = models.DateTimeField(db_default=Now(), editable=False)
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    actor_role = models.CharField("their role at that time", max_length=10, blank=True, db_default="")
    ip_address = models.GenericIPAddressField(null=True, blank=True)
    request_id = models.CharField(max_length=64, blank=True, db_default="")
    action = models.CharField(max_length=50)  # one of audit.Action
    summary = models.CharField("what happened, in words", max_length=500)
    reason = models.CharField("the reason they gave", max_length=500, blank=True, db_default="")
    outcome = models.CharField(max_length=10, choices=Outcome, db_default=Outcome.DONE)
    subject = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    object_type = models.CharField(max_length=50, blank=True, db_default="")
    object_id = models.CharField(max_length=50, blank=True, db_default="")
    before = models.JSONField(null=True, blank=True, encoder=DjangoJSONEncoder)
    after = models.JSONField(null=True, blank=True, encoder=DjangoJSONEncoder)

    class Meta:
        verbose_name_plural = "audit entries"
        ordering = ("-id",)
        indexes = [
            models.Index(fields=["actor", "-id"], name="audit_by_actor"),
            models.Index(fields=["subject", "-id"], name="audit_by_subject"),
            models.Index(fields=["action", "-id"], name="audit_by_action"),
            models.Index(fields=["object_type", "object_id", "-id"], name="audit_by_object"),
            models.Index(fields=["created_at"], name="audit_by_time"),
            # What the bound on refusals counts.
            models.Index(
                fields=["actor", "created_at"], condition=models.Q(outcome="refused"), name="audit_refusals_by_actor"
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(outcome__in=["done", "requested", "refused"]), name="audit_outcome_known"
            ),
            models.CheckConstraint(
                condition=models.Q(actor=None, actor_role="")
                | models.Q(actor__isnull=False, actor_role__in=["user", "admin", "superadmin"]),
                name="audit_actor_has_role",
            ),
        ]
        triggers = [
            pgtrigger.Protect(name="append_only", operation=pgtrigger.Update | pgtrigger.Delete),
            pgtrigger.Trigger(
                name="never_truncated",
                level=pgtrigger.Statement,
                operation=pgtrigger.Truncate,
                when=pgtrigger.Before,
                func="RAISE EXCEPTION 'The audit log is append-only: cannot truncate %', TG_TABLE_NAME;",
            ),
        ]

    def __str__(self) -> str:
        return self.summary
