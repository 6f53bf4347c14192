"""Where people get in otherwise than allauth has it: limits, proof of an address, links and mails."""

from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import structlog
from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.forms import default_token_generator
from allauth.account.internal.flows.manage_email import sync_email_address
from allauth.account.internal.userkit import filter_users_by_email
from allauth.account.models import EmailAddress, EmailConfirmationHMAC
from allauth.account.utils import user_pk_to_url_str
from allauth.core import context as current
from allauth.core.internal.ratelimit import RateLimitUsage
from allauth.mfa.utils import is_mfa_enabled
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.db import transaction
from django.http import HttpRequest, HttpResponse

from accounts import access, guesses
from accounts.models import User

logger = structlog.get_logger(__name__)

# Whoever knows an address can have these sent to it; all others tell of what its owner did. What each is good for: one
# stands for another of the same kind, about the same account.
SENT_TO_ANY_ADDRESS = {
    "account/email/account_already_exists": "tells",
    "account/email/unknown_account": "tells",
    "account/email/email_confirmation": "proves",
    "account/email/email_confirmation_signup": "proves",
    "account/email/prove_address": "proves",
    "account/email/password_reset_key": "opens",
}


class AccountAdapter(DefaultAccountAdapter):
    # --- Guesses ----------------------------------------------------------------------------------------------------

    def pre_authenticate(self, request: HttpRequest, **credentials: Any) -> None:
        address = str(credentials.get("email", ""))
        usage = guesses.take_password_guess(request, address)
        if usage is None:
            raise self.validation_error("too_many_login_attempts")
        self._login_failed_rl_usage: RateLimitUsage = usage  # given back by the parent when the password was right

    def _delete_login_attempts_cached_email(self, request: HttpRequest, **credentials: Any) -> None:
        """After a reset, which proved the address: its owner starts afresh."""
        guesses.forget(request, str(credentials.get("email", "")))

    def post_login(self, request: HttpRequest, user: AbstractBaseUser, **details: Any) -> HttpResponse:
        response = super().post_login(request, user, **details)
        guesses.remember_device(request, response, user)
        return response

    def get_reauthentication_methods(self, user: AbstractBaseUser | AnonymousUser) -> list[dict[str, Any]]:
        """People with a second factor show that one: a password alone must not be able to remove it."""
        methods: list[dict[str, Any]] = super().get_reauthentication_methods(user)
        if isinstance(user, User) and is_mfa_enabled(user):
            return [each for each in methods if each["id"] != "reauthenticate"]
        return methods

    # --- Proof of an address ----------------------------------------------------------------------------------------

    def confirm_email(self, request: HttpRequest, email_address: EmailAddress) -> bool:
        """The first proof of an account's address hands the account to whoever brings it, unless they have its
        password already. A further address is added by the person signed in, and by nobody else."""
        with access.lock(email_address.user_id) as user:
            addresses = EmailAddress.objects.filter(user=user)
            if addresses.filter(pk=email_address.pk, verified=True).exists():
                return True  # somebody was quicker with the same link
            is_theirs = request.user.pk == user.pk
            is_proven = addresses.filter(verified=True).exists()
            if is_proven and not is_theirs:
                words = "Sign in first, then open the link again: an address is added to your own account only."
                self.add_message(request, messages.ERROR, message=words)
                return False
            is_handed_over = not (is_proven or is_theirs or access.knows_password(request, user))
            if is_handed_over:
                access.hand_over(user, proven=email_address)
            email_address.user = user  # what was read before the lock is old by now
            is_confirmed = super().confirm_email(request, email_address)
            if not is_confirmed:
                transaction.set_rollback(True)
            elif is_handed_over:
                request.handed_over = user.pk  # type: ignore[attr-defined]
            elif is_proven:
                access.free_address(email_address)
                added = {"added_email": email_address.email}
                transaction.on_commit(
                    lambda: self.send_notification_mail("account/email/address_added", user, added, user.email)
                )
            return is_confirmed

    def get_email_verification_redirect_url(self, email_address: EmailAddress) -> str:
        if getattr(self.request, "handed_over", None) == email_address.user_id:
            # The lock has been let go, so this is the user as the hand-over left them.
            user = User.objects.get(pk=email_address.user_id)
            self.add_message(
                self.request,
                messages.INFO,
                message="This is not the browser that signed up, so the password given there is void. Choose yours.",
            )
            key = f"{user_pk_to_url_str(user)}-{default_token_generator.make_token(user)}"
            return urlsplit(self.get_reset_password_from_key_url(key)).path
        return super().get_email_verification_redirect_url(email_address)

    def send_password_reset_mail(self, user: AbstractBaseUser, email: str, context: dict[str, Any]) -> None:
        """To an address that nobody has confirmed goes the link that does: see `confirm_email`."""
        sync_email_address(user, email.lower())
        address = EmailAddress.objects.get(user=user, email=email.lower())
        if address.verified:
            url = f"{context['password_reset_url']}?{urlencode({access.SENT_TO: access.sign_address(address)})}"
            super().send_password_reset_mail(user, email, {**context, "password_reset_url": url})
        else:
            self._send_proof_link(address)

    def send_account_already_exists_mail(self, email: str) -> None:
        """Signing up with an address that somebody else signed up with and never confirmed sends the same link."""
        users = access.only_owners(filter_users_by_email(email, prefer_verified=True, for_login=True), email)
        unproven = EmailAddress.objects.filter(user__in=users, email=email.lower(), verified=False).first()
        if unproven:
            self._send_proof_link(unproven)
        else:
            super().send_account_already_exists_mail(email)

    def _send_proof_link(self, address: EmailAddress) -> None:
        url = self.get_email_confirmation_url(current.request, EmailConfirmationHMAC(address))
        self.send_mail("account/email/prove_address", address.email, {"user": address.user, "activate_url": url})

    # --- Mails ------------------------------------------------------------------------------------------------------

    def send_mail(self, template_prefix: str, email: str, context: dict[str, Any]) -> None:
        """Links come from SITE_URL, whatever host the request named. Of the mails that anybody can have sent to an
        address, those beyond the limit are left out silently: the ones before them, of the same kind and about
        the same account, do the same."""
        if kind := SENT_TO_ANY_ADDRESS.get(template_prefix):
            account_id = getattr(context.get("user"), "pk", None)
            if not guesses.may_send_mail(current.request, email, what=f"{kind} {account_id}"):
                return
        site = urlsplit(settings.SITE_URL)
        links = {name: _at_our_site(value) for name, value in context.items() if name.endswith("_url")}
        said = {
            "request": current.request,  # none in a worker
            "email": email,
            **context,
            **links,
            "current_site": SimpleNamespace(name=site.netloc, domain=site.netloc),
        }
        self.render_mail(template_prefix, email, said).send()

    def send_notification_mail(
        self,
        template_prefix: str,
        user: AbstractBaseUser,
        context: dict[str, Any] | None = None,
        email: str | None = None,
    ) -> None:
        """What it tells of has been done: a mail server that is away must not make an error of it."""
        if template_prefix == "account/email/password_reset" and isinstance(user, User):
            context = {**(context or {}), "openers": access.list_openers(user)}
        try:
            super().send_notification_mail(template_prefix, user, context, email)
        except OSError:
            logger.exception("A notice of security was not sent", user_id=user.pk, notice=template_prefix)


def _at_our_site(url: str) -> str:
    """The same path and query at SITE_URL."""
    site, parts = urlsplit(settings.SITE_URL), urlsplit(url)
    return urlunsplit((site.scheme, site.netloc, parts.path, parts.query, parts.fragment))
