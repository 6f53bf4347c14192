from typing import Any, ClassVar

from allauth.account.models import EmailAddress
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.postgres.fields import ArrayField
from django.db import models, transaction
from django.db.models.functions import Lower, Now
from django.utils import timezone

from accounts import time_zones


class UserKept(models.ProtectedError):
    """A person whom the ledger names is not deleted; nothing was changed (row 70)."""

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


class UserManager(BaseUserManager["User"]):
    def get_queryset(self) -> UserQuerySet:
        return UserQuerySet(self.model, using=self._db)

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> "User":
        user = self.model(email=self.normalize_email(email), **fields)
        user.set_password(password)
        user.save()
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> "User":
        """A superadmin, for `manage.py createsuperuser`."""
        return self.create_user(email, password, **{"role": User.Role.SUPERADMIN, **fields})

    def get_by_natural_key(self, username: str | None) -> "User":
        return self.get(email__iexact=username)


class User(AbstractBaseUser):
    """A person who signs in with an e-mail address. What they may do follows from the role alone."""

    class Role(models.TextChoices):
        USER = "user", "User"
        ADMIN = "admin", "Admin"
        SUPERADMIN = "superadmin", "Superadmin"

    email = models.EmailField("e-mail address", unique=True)
    name = models.CharField(max_length=150, blank=True)
    role = models.CharField(max_length=10, choices=Role, default=Role.USER)
    is_active = models.BooleanField(default=True)
    # The zone their times are shown in, such as "Europe/Berlin"; empty: the browser's.
    time_zone = models.CharField(max_length=time_zones.MAX_NAME_LENGTH, blank=True, default="")
    anonymised_at = models.DateTimeField(null=True, blank=True, editable=False)  # for ever: who it was is not known
    date_joined = models.DateTimeField(default=timezone.now, editable=False)

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
    def has_verified_email(self) -> bool:
        """True when the address is verified, or when this installation does not ask for that."""
        if settings.ACCOUNT_EMAIL_VERIFICATION != "mandatory":
            return True
        return EmailAddress.objects.filter(user_id=self.pk, verified=True).exists()

    # What Django admin asks for: superadmins may do everything in it, nobody else may enter it.
    @property
    def is_staff(self) -> bool:
        return self.is_superadmin

    def has_perm(self, perm: str, obj: object = None) -> bool:
        return self.is_active and self.is_superadmin

    def has_module_perms(self, app_label: str) -> bool:
        return self.is_active and self.is_superadmin


class Workspace(models.Model):
    """Where content lives. Each user has a personal one; billing rows name it beside the user."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="workspaces")
    name = models.CharField(max_length=150)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


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
