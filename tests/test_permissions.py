"""Who may open what: every address of the URLconf × every role × GET and POST (rows 63, 64 and 66).

A new address without a line in ROUTES fails the test, which shows the line that it has now: paste it after you have
thought about each cell. The cells are, in this order: somebody who is not signed in, the owner of the rows that the
address names, another user, an admin, a superadmin, and a server of the platform with the shared secret.

"login" is a redirect to the page for signing in, "302" one to anywhere else. A POST here is an empty form (the API's:
an empty body): 400 and 422 say that it was let in and read.
"""

# ruff: noqa: E501  (the table)

import json
import re
from collections.abc import Iterator
from datetime import date, timedelta
from http.cookies import SimpleCookie
from typing import Any

import pytest
from django.core.cache import cache
from django.core.files.base import ContentFile
from django.db import connection, transaction
from django.http import HttpResponseBase
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse
from django.utils import timezone

from accounts import api_keys
from accounts.models import ApiKey, ChangeRequest, Invitation, Membership, User, Workspace
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, Project
from billing import ledger
from billing.models import BulkJob, Drift, Purchase, StripeEvent, TokenAccount, TokenUsage
from billing.staff import grants
from tests.conftest import MakeUser
from tests.environment import BILLING_SECRET

pytestmark = pytest.mark.django_db

ROLES = ("anonymous", "owner", "other", "admin", "superadmin", "service")

# Address: what GET is answered with, what POST is answered with; one cell for each role.
# fmt: off
ROUTES: dict[str, tuple[str, str]] = {
    "": ("200 302 302 302 302 200", "405 405 405 405 405 405"),
    "accounts/2fa/": ("login 200 200 200 200 login", "login 405 405 405 405 login"),
    "accounts/2fa/authenticate/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/2fa/reauthenticate/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/2fa/recovery-codes/": ("login 404 404 404 404 login", "login 405 405 405 405 login"),
    "accounts/2fa/recovery-codes/download/": ("login 404 404 404 404 login", "login 404 404 404 404 login"),
    "accounts/2fa/recovery-codes/generate/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/2fa/totp/activate/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/2fa/totp/deactivate/": ("login 404 404 404 404 login", "login 404 404 404 404 login"),
    "accounts/anonymise/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/api-keys/": ("login 200 200 200 200 login", "login 302 302 302 302 login"),
    "accounts/api-keys/<int:pk>/revoke/": ("405 405 405 405 405 405", "login 302 404 404 404 login"),
    "accounts/confirm-email/": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "accounts/confirm-email/(?P<key>[-:\\w]+)/$": ("200 200 200 200 200 200", "404 404 404 404 404 404"),
    "accounts/data/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "accounts/data/download/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/email/": ("login 200 200 200 200 login", "login 302 302 302 302 login"),
    "accounts/inactive/": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "accounts/login/": ("200 302 302 302 302 200", "200 302 302 302 302 200"),
    "accounts/login/code/confirm/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/logout/": ("302 200 200 200 200 302", "302 302 302 302 302 302"),
    "accounts/password/change/": ("login 200 200 200 200 login", "login 200 200 200 200 login"),
    "accounts/password/reset/": ("200 200 200 200 200 200", "200 200 200 200 200 200"),
    "accounts/password/reset/done/": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "accounts/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$": ("200 200 200 200 200 200", "200 200 200 200 200 200"),
    "accounts/password/reset/key/done/": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "accounts/password/set/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "accounts/reauthenticate/": ("login 200 200 200 200 login", "login 200 200 200 200 login"),
    "accounts/sessions/": ("login 200 200 200 200 login", "login 302 302 302 302 login"),
    "accounts/settings/": ("login 200 200 200 200 login", "login 200 200 200 200 login"),
    "accounts/signup/": ("200 302 302 302 302 200", "200 302 302 302 302 200"),
    "admin/tokens/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/accounts/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/accounts/<int:user_id>/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/accounts/<int:user_id>/status/": ("405 405 405 405 405 405", "login 403 403 403 400 login"),
    "admin/tokens/accounts/<int:user_id>/welcome-bonus/": ("405 405 405 405 405 405", "login 403 403 302 302 login"),
    "admin/tokens/audit/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/bulk/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/bulk/new/": ("login 403 403 200 200 login", "login 403 403 400 400 login"),
    "admin/tokens/bulk/<int:pk>/": ("login 403 403 200 200 login", "login 403 403 302 302 login"),
    "admin/tokens/bulk/<int:pk>.csv": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/drifts/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/drifts/<int:pk>/": ("405 405 405 405 405 405", "login 403 403 403 302 login"),
    "admin/tokens/events/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/events/<int:pk>/": ("405 405 405 405 405 405", "login 403 403 403 302 login"),
    "admin/tokens/finance/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/finance/postmate-(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})\\.zip$": ("login 403 403 404 404 login", "405 405 405 405 405 405"),
    "admin/tokens/grants/new/": ("login 403 403 200 200 login", "login 403 403 404 404 login"),
    "admin/tokens/purchases/<int:pk>/": ("login 403 403 200 200 login", "login 403 403 403 400 login"),
    "admin/tokens/requests/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/requests/changes/<int:pk>/": ("405 405 405 405 405 405", "login 403 403 403 400 login"),
    "admin/tokens/requests/<int:pk>/": ("405 405 405 405 405 405", "login 403 403 403 400 login"),
    "admin/tokens/sections/<slug:name>.csv": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/sections/<slug:name>.pdf": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/sections/<slug:name>/": ("login 403 403 302 302 login", "405 405 405 405 405 405"),
    "admin/tokens/settings/": ("login 403 403 200 200 login", "login 403 403 403 400 login"),
    "api/docs": ("200 200 200 200 200 200", "200 200 200 200 200 200"),
    "api/v1/": ("404 404 404 404 404 404", "404 404 404 404 404 404"),
    "admin/tokens/teams/<int:account_id>/": ("login 403 403 200 200 login", "405 405 405 405 405 405"),
    "admin/tokens/teams/<int:account_id>/status/": ("405 405 405 405 405 405", "login 403 403 403 400 login"),
    "api/v1/accounts/<user_id>/balance": ("401 401 401 401 401 200", "405 405 405 405 405 405"),
    "api/v1/accounts/<user_id>/usage": ("401 401 401 401 401 200", "405 405 405 405 405 405"),
    "api/v1/me/balance": ("401 401 401 401 401 401", "405 405 405 405 405 405"),
    "api/v1/me/packages": ("401 401 401 401 401 401", "405 405 405 405 405 405"),
    "api/v1/me/transactions": ("401 401 401 401 401 401", "405 405 405 405 405 405"),
    "api/v1/me/usage": ("401 401 401 401 401 401", "405 405 405 405 405 405"),
    "api/v1/openapi.json": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "api/v1/quotes": ("405 405 405 405 405 405", "401 401 401 401 401 400"),
    "api/v1/reservations": ("405 405 405 405 405 405", "401 401 401 401 401 400"),
    "api/v1/reservations/<usage_id>/release": ("405 405 405 405 405 405", "401 401 401 401 401 200"),
    "api/v1/reservations/<usage_id>/settle": ("405 405 405 405 405 405", "401 401 401 401 401 400"),
    "api/v1/token-accounts/<account_id>/balance": ("401 401 401 401 401 200", "405 405 405 405 405 405"),
    "api/v1/token-accounts/<account_id>/usage": ("401 401 401 401 401 200", "405 405 405 405 405 405"),
    "api/v1/usage": ("405 405 405 405 405 405", "401 401 401 401 401 400"),
    "dev/mails/": ("404 404 404 404 404 404", "405 405 405 405 405 405"),
    "dev/mails/<str:file>/<int:number>/": ("404 404 404 404 404 404", "405 405 405 405 405 405"),
    "dev/mails/<str:file>/<int:number>/html/": ("404 404 404 404 404 404", "405 405 405 405 405 405"),
    "healthz": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "live/<slug:name>/": ("login 302 302 302 302 login", "login 400 400 400 400 login"),
    "live/balance/": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "metrics": ("404 404 404 404 404 404", "405 405 405 405 405 405"),
    "readyz": ("200 200 200 200 200 200", "405 405 405 405 405 405"),
    "stripe/webhook/": ("405 405 405 405 405 405", "400 400 400 400 400 400"),
    "studio/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "studio/chats/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "studio/chats/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/content/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/content/<int:pk>/save/": ("login 302 302 302 302 login", "login 400 404 404 404 login"),
    "studio/content/<int:pk>/versions/<int:number>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/content/<int:pk>/versions/<int:number>/restore/": ("login 302 302 302 302 login", "login 302 404 404 404 login"),
    "studio/images/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "studio/images/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/images/files/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/outcome/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "studio/projects/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "studio/projects/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "studio/quote/<slug:name>/": ("405 405 405 405 405 405", "login 200 200 200 200 login"),
    "team/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "team/<int:workspace_id>/": ("login 200 403 403 403 login", "405 405 405 405 405 405"),
    "team/<int:workspace_id>/close/": ("login 200 403 403 403 login", "login 200 403 403 403 login"),
    "team/<int:workspace_id>/enter/": ("login 302 403 403 403 login", "405 405 405 405 405 405"),
    "team/<int:workspace_id>/hand-over/": ("405 405 405 405 405 405", "login 302 403 403 403 login"),
    "team/<int:workspace_id>/invitations/": ("405 405 405 405 405 405", "login 400 403 403 403 login"),
    "team/<int:workspace_id>/invitations/<int:pk>/revoke/": ("405 405 405 405 405 405", "login 302 403 403 403 login"),
    "team/<int:workspace_id>/members/<int:user_id>/remove/": ("login 200 403 403 403 login", "login 302 403 403 403 login"),
    "team/<int:workspace_id>/members/<int:user_id>/role/": ("405 405 405 405 405 405", "login 400 403 403 403 login"),
    "team/<int:workspace_id>/settings/": ("login 200 403 403 403 login", "login 200 403 403 403 login"),
    "team/join/<str:token>/": ("login 404 404 404 404 login", "login 404 404 404 404 login"),
    "team/new/": ("login 200 200 200 200 login", "login 200 200 200 200 login"),
    "team/switch/": ("405 405 405 405 405 405", "login 403 403 403 403 login"),
    "tokens/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/auto-recharge/": ("405 405 405 405 405 405", "login 400 400 400 400 login"),
    "tokens/balance/": ("401 200 200 200 200 401", "405 405 405 405 405 405"),
    "tokens/cancelled/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "tokens/card/": ("login 302 302 302 302 login", "login 302 302 302 302 login"),
    "tokens/checkout/": ("405 405 405 405 405 405", "login 400 400 400 400 login"),
    "tokens/confirm/<int:pk>/": ("login 404 404 404 404 login", "login 404 404 404 404 login"),
    "tokens/export.csv": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/history/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/notifications/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/notifications/bell/": ("401 200 200 200 200 401", "405 405 405 405 405 405"),
    "tokens/notifications/read/": ("405 405 405 405 405 405", "login 302 302 302 302 login"),
    "tokens/notifications/settings/": ("login 200 200 200 200 login", "login 302 302 302 302 login"),
    "tokens/price/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/receipts/<int:pk>.pdf": ("login 404 404 404 404 login", "405 405 405 405 405 405"),
    "tokens/statements/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/statements/(?P<year>[0-9]{4})-(?P<month>[0-9]{2})\\.pdf$": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/success/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "tokens/usage/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
    "tokens/usage/<int:pk>/": ("login 200 404 404 404 login", "405 405 405 405 405 405"),
    "tokens/usage/log/": ("login 200 200 200 200 login", "405 405 405 405 405 405"),
}
# fmt: on


# What a team's roles open, at addresses that are about a workspace: all others ask for the platform's roles alone. The
# things are Bob's, a member's; the superadmin is in no team. One cell for each of TEAM_ROLES.
TEAM_ROLES = ("team owner", "team admin", "member", "its author", "superadmin")
ABOUT_WORKSPACES = ("team/", "studio/", "tokens/")
# fmt: off
TEAM_ROUTES: dict[str, tuple[str, str]] = {
    "studio/": ("200 200 200 200 403", "405 405 405 405 405"),
    "studio/chats/": ("200 200 200 200 403", "405 405 405 405 405"),
    "studio/chats/<int:pk>/": ("404 404 404 200 404", "405 405 405 405 405"),
    "studio/content/<int:pk>/": ("200 200 200 200 404", "405 405 405 405 405"),
    "studio/content/<int:pk>/save/": ("302 302 302 302 302", "400 400 400 400 404"),
    "studio/content/<int:pk>/versions/<int:number>/": ("200 200 200 200 404", "405 405 405 405 405"),
    "studio/content/<int:pk>/versions/<int:number>/restore/": ("302 302 302 302 302", "302 302 302 302 404"),
    "studio/images/": ("200 200 200 200 403", "405 405 405 405 405"),
    "studio/images/<int:pk>/": ("200 200 200 200 404", "405 405 405 405 405"),
    "studio/images/files/<int:pk>/": ("200 200 200 200 404", "405 405 405 405 405"),
    "studio/outcome/": ("200 200 200 200 200", "405 405 405 405 405"),
    "studio/projects/": ("200 200 200 200 403", "405 405 405 405 405"),
    "studio/projects/<int:pk>/": ("200 200 200 200 404", "405 405 405 405 405"),
    "studio/quote/<slug:name>/": ("405 405 405 405 405", "200 200 200 200 200"),
    "team/": ("200 200 200 200 200", "405 405 405 405 405"),
    "team/<int:workspace_id>/": ("200 200 200 200 403", "405 405 405 405 405"),
    "team/<int:workspace_id>/close/": ("200 403 403 403 403", "200 403 403 403 403"),
    "team/<int:workspace_id>/enter/": ("302 302 302 302 403", "405 405 405 405 405"),
    "team/<int:workspace_id>/hand-over/": ("405 405 405 405 405", "302 403 403 403 403"),
    "team/<int:workspace_id>/invitations/": ("405 405 405 405 405", "400 400 403 403 403"),
    "team/<int:workspace_id>/invitations/<int:pk>/revoke/": ("405 405 405 405 405", "302 302 403 403 403"),
    "team/<int:workspace_id>/members/<int:user_id>/remove/": ("200 200 403 200 403", "302 302 403 302 403"),
    "team/<int:workspace_id>/members/<int:user_id>/role/": ("405 405 405 405 405", "400 403 403 403 403"),
    "team/<int:workspace_id>/settings/": ("200 200 403 403 403", "200 200 403 403 403"),
    "team/join/<str:token>/": ("404 404 404 404 404", "404 404 404 404 404"),
    "team/new/": ("200 200 200 200 200", "200 200 200 200 200"),
    "team/switch/": ("405 405 405 405 405", "403 403 403 403 403"),
    "tokens/": ("200 200 200 200 403", "405 405 405 405 405"),
    "tokens/auto-recharge/": ("405 405 405 405 405", "400 400 403 403 403"),
    "tokens/balance/": ("200 200 200 200 403", "405 405 405 405 405"),
    "tokens/cancelled/<int:pk>/": ("200 200 403 403 404", "405 405 405 405 405"),
    "tokens/card/": ("302 302 403 403 403", "302 302 403 403 403"),
    "tokens/checkout/": ("405 405 405 405 405", "400 400 403 403 403"),
    "tokens/confirm/<int:pk>/": ("404 404 404 404 404", "404 404 404 404 404"),
    "tokens/export.csv": ("200 200 403 403 403", "405 405 405 405 405"),
    "tokens/history/": ("200 200 403 403 403", "405 405 405 405 405"),
    "tokens/notifications/": ("200 200 200 200 200", "405 405 405 405 405"),
    "tokens/notifications/bell/": ("200 200 200 200 200", "405 405 405 405 405"),
    "tokens/notifications/read/": ("405 405 405 405 405", "302 302 302 302 302"),
    "tokens/notifications/settings/": ("200 200 200 200 200", "302 302 302 302 302"),
    "tokens/price/": ("200 200 200 200 200", "405 405 405 405 405"),
    "tokens/receipts/<int:pk>.pdf": ("404 404 404 404 404", "405 405 405 405 405"),
    "tokens/statements/": ("200 200 403 403 403", "405 405 405 405 405"),
    "tokens/statements/(?P<year>[0-9]{4})-(?P<month>[0-9]{2})\\.pdf$": ("200 200 403 403 403", "405 405 405 405 405"),
    "tokens/success/<int:pk>/": ("200 200 403 403 404", "405 405 405 405 405"),
    "tokens/usage/": ("200 200 200 200 403", "405 405 405 405 405"),
    "tokens/usage/<int:pk>/": ("200 200 404 200 404", "405 405 405 405 405"),
    "tokens/usage/log/": ("200 200 200 200 403", "405 405 405 405 405"),
}
# fmt: on


def routes() -> Iterator[tuple[str, URLPattern]]:
    """Each address of the URLconf, as it is written there, and its pattern."""

    def walk(prefix: str, resolver: URLResolver) -> Iterator[tuple[str, URLPattern]]:
        for each in resolver.url_patterns:
            address = prefix + str(each.pattern).removeprefix("^")
            if isinstance(each, URLResolver):
                yield from walk(address, each)
            else:
                yield address, each

    yield from walk("", get_resolver())


def is_django_admin(address: str) -> bool:
    return address.startswith("admin/") and not address.startswith("admin/tokens/")


@pytest.fixture
def things(alice: User) -> dict[str, dict[str, Any]]:
    return make_things(alice, "Hello")


def make_things(alice: User, text: str, *, account: TokenAccount | None = None) -> dict[str, dict[str, Any]]:
    """A row of Alice's for every address that names one: the arguments by the beginning of the address. With `account`
    they are in its team."""
    account = account or ledger.get_account(user_id=alice.pk)
    project = Project.objects.create(workspace=account.workspace, name=text)
    piece = ContentPiece.objects.create(project=project, author=alice, title=text, topic=text, body=text)
    ContentVersion.objects.create(piece=piece, number=1, body=text, origin="edit")
    chat = Chat.objects.create(project=project, author=alice, title=text)
    ChatTurn.objects.create(chat=chat, question=text, answer=text, state="done")
    batch = ImageBatch.objects.create(
        project=project, author=alice, prompt=text, size="1024x1024", count=1, state="done"
    )
    image = GeneratedImage(batch=batch, position=1, media_type="image/png")
    image.file.save("fox.png", ContentFile(b"\x89PNG"))
    posting = ledger.reserve_tokens(
        account_id=account.pk,
        actor_id=alice.pk,
        tokens=5,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", fixed_cost_tokens=5),
        idempotency_key="alices",
        lifetime_seconds=600,
    )
    purchase = Purchase.objects.create(
        account=account, user=alice, workspace=account.workspace, kind="checkout", package_name=text,
        tokens=5, amount_cents=500, currency="usd", state="failed",
    )  # fmt: skip
    key, _ = api_keys.make_key(user_id=alice.pk, name=text, scopes=["balance:read"])
    drift = Drift.objects.create(kind="unknown_payment", stripe_id="pi_1", description=text)
    event = StripeEvent.objects.create(
        event_id="evt_1", type="charge.refunded", livemode=False, payload={"id": "evt_1"}, state="aside", message=text
    )
    assert TokenUsage.objects.get().pk == posting.usage_id
    asker = User.objects.create(email="asker@example.com", role="admin")
    wish = grants.grant_tokens(admin=asker, user_id=alice.pk, tokens=5, reason=text, request_key="wish")
    change = ChangeRequest.objects.create(
        kind="role", subject=alice, changes={"role": "admin"}, reason=text, requested_by=asker,
        expires_at=timezone.now() + timedelta(days=1),
    )  # fmt: skip
    team = account.workspace if account.user_id is None else Workspace.objects.create(kind="team", name=text)
    Membership.objects.get_or_create(workspace=team, user=alice, defaults={"role": "owner"})
    invitation = Invitation.objects.create(
        workspace=team, email="x@example.com", role="member", invited_by=alice,
        expires_at=timezone.now() + timedelta(days=1),
    )  # fmt: skip
    team_account = ledger.open_team_account(workspace_id=team.pk)
    job = BulkJob.objects.create(kind="export", filters={}, requested_by=asker, request_key="job")
    own: dict[str, dict[str, Any]] = {
        "studio/projects/": {"pk": project.pk},
        "studio/content/": {"pk": piece.pk, "number": 1},
        "studio/chats/": {"pk": chat.pk},
        "studio/images/files/": {"pk": image.pk},
        "studio/images/": {"pk": batch.pk},
        "studio/quote/": {"name": "draft"},
        "live/": {"name": "draft"},
        "tokens/usage/": {"pk": posting.usage_id},
        "tokens/statements/": {"year": f"{date.today():%Y}", "month": f"{date.today():%m}"},  # noqa: DTZ011
        "tokens/": {"pk": purchase.pk},
        "team/": {"workspace_id": team.pk, "user_id": alice.pk, "pk": invitation.pk, "token": "x"},
        "accounts/api-keys/": {"pk": key.pk},
        "accounts/": {"key": "x", "uidb36": "1", "key_": "x"},
        "admin/tokens/": {"user_id": alice.pk, "pk": account.pk, "account_id": team_account.pk},
        "admin/tokens/purchases/": {"pk": purchase.pk},
        "admin/tokens/sections/": {"name": "system"},
        "admin/tokens/requests/": {"pk": wish.pk},
        "admin/tokens/requests/changes/": {"pk": change.pk},
        "admin/tokens/finance/": {"day": "2000-01-01"},
        "admin/tokens/bulk/": {"pk": job.pk},
        "admin/tokens/drifts/": {"pk": drift.pk},
        "admin/tokens/events/": {"pk": event.pk},
        "api/": {"usage_id": posting.usage_id, "user_id": alice.pk, "account_id": team_account.pk},
        "dev/": {"file": "x.log", "number": 0},
        "admin/": {"object_id": "1", "content_type_id": 1, "app_label": "billing", "url": "x", "id": "1"},
    }
    assert ApiKey.objects.get().pk == key.pk
    return own


def path_of(address: str, own: dict[str, dict[str, Any]]) -> str:
    """The address with the arguments of Alice's rows in it."""
    arguments: dict[str, Any] = {}
    for prefix in sorted(own, key=len):  # what is said of a longer beginning counts more
        arguments |= own[prefix] if address.startswith(prefix) else {}

    def fill(match: re.Match[str]) -> str:
        return str(arguments.get(match["name"], 1))

    path = re.sub(r"<(?:\w+:)?(?P<name>\w+)>", fill, address) if "(?P" not in address else address
    path = re.sub(r"\(\?P<(?P<name>\w+)>(?:[^()]|\([^()]*\))*\)", fill, path)
    return "/" + path.removesuffix("\\Z").removesuffix("$").replace("\\.", ".").replace("\\", "")


def outcome(response: HttpResponseBase) -> str:
    if response.status_code != 302:
        return str(response.status_code)
    to = response["Location"]
    return "login" if to.startswith((reverse("account_login"), reverse("admin:login"))) else "302"


def missing_headers(response: Any) -> list[str]:
    """What an answer lacks."""
    policy = response.headers.get("Content-Security-Policy", "")
    wanted = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    }
    missing = [name for name, value in wanted.items() if response.headers.get(name) != value]
    is_strict = "unsafe" not in policy and {"default-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    return missing if is_strict else [*missing, f"Content-Security-Policy: {policy}"]


@pytest.fixture
def ask(alice: User, bob: User, adam: User, susan: User) -> Any:
    """Asks for a path as each role in turn, and looks for the headers that every answer has: pages, files, refusals and
    redirects. What one request has changed is undone before the next."""
    cookies = {}
    for role, person in {"owner": alice, "other": bob, "admin": adam, "superadmin": susan}.items():
        client = Client()
        client.force_login(person)
        cookies[role] = client.cookies

    def as_role(role: str, method: str, path: str) -> str:
        if path.startswith("/accounts/"):
            cache.clear()  # limits on guesses
        savepoint = transaction.savepoint() if connection.in_atomic_block else None
        client = Client()
        client.cookies = SimpleCookie(cookies[role].output(header="", sep=";") if role in cookies else "")
        headers = {"Authorization": f"Bearer {BILLING_SECRET}"} if role == "service" else {}
        try:
            response = client.generic(method, path, content_type=_CONTENT_TYPES.get(path[:5], _FORM), headers=headers)
            assert not missing_headers(response), (role, method, path, response.status_code)
            return outcome(response)
        finally:
            if savepoint is not None:
                transaction.savepoint_rollback(savepoint)

    return lambda method, path, roles=ROLES: " ".join(as_role(role, method, path) for role in roles)


_FORM = "application/x-www-form-urlencoded"
_CONTENT_TYPES = {"/api/": "application/json"}


def differences(ask: Any, things: dict[str, dict[str, Any]], *, is_live: bool) -> str:
    """The lines of ROUTES as they would have to be, where they are not."""
    lines = []
    for address, _ in routes():
        if is_django_admin(address) or address.startswith("live/") != is_live:
            continue
        path = path_of(address, things)
        actual = (ask("GET", path), ask("POST", path))
        if ROUTES.get(address) != actual:
            lines.append(f"    {json.dumps(address)}: ({json.dumps(actual[0])}, {json.dumps(actual[1])}),")
    return "\n".join(lines)


def test_every_address_is_answered_as_each_role_deserves(ask: Any, things: dict[str, dict[str, Any]]) -> None:
    wrong = differences(ask, things, is_live=False)
    assert not wrong, f"ROUTES says otherwise, or nothing, of these:\n{wrong}"


@pytest.mark.django_db(transaction=True)
def test_every_stream_is_answered_as_each_role_deserves(ask: Any, things: dict[str, dict[str, Any]]) -> None:
    """They read the database on connections of their own, which see what is committed."""
    wrong = differences(ask, things, is_live=True)
    assert not wrong, f"ROUTES says otherwise, or nothing, of these:\n{wrong}"


def test_django_admin_is_for_superadmins(ask: Any, things: dict[str, dict[str, Any]]) -> None:
    """Row 64: nobody else gets in, at whatever address of whatever table. What superadmins may do in there, tells
    tests/billing/test_admin.py. Being sent to its sign-in does not help: that is a 403 for who is signed in."""
    everybody_else = ["anonymous", "owner", "admin", "service"]  # another user is one like the owner, in there
    addresses = [address for address, _ in routes() if is_django_admin(address)]
    assert len(addresses) > 50
    for address in addresses:
        path = path_of(address, things)
        for method, roles in (("GET", everybody_else), ("POST", ["anonymous", "admin"])):
            cells = dict(zip(roles, ask(method, path, roles).split(), strict=True))
            if address == "admin/login/":
                signed_in = dict.fromkeys(("owner", "admin"), "403")
                wanted = {"anonymous": "login", "service": "login"} | signed_in
                assert cells == {role: wanted[role] for role in roles}
            elif address == "admin/logout/":  # it has nothing to show; signing out is everybody's
                assert set(cells.values()) <= {"302", "405"}
            else:
                assert set(cells.values()) == {"login"}, (method, path, cells)


def test_a_form_from_elsewhere_is_refused(alice: User, susan: User, things: dict[str, dict[str, Any]]) -> None:
    """Row 62: at every address that takes a POST, but for the webhook and the API, which know no cookie."""
    owner, superadmin = Client(enforce_csrf_checks=True), Client(enforce_csrf_checks=True)
    owner.force_login(alice)
    superadmin.force_login(susan)
    tried = 0
    for address, _ in routes():
        if address.startswith(("stripe/webhook/", "api/", "live/")):
            continue
        client = superadmin if address.startswith("admin/") else owner
        response = client.post(path_of(address, things), {"confirmed": "1"})
        # Before anything else, also where there is nothing to post to: Django looks at the token first.
        assert response.status_code in (403, 404, 405), (address, response.status_code)
        tried += response.status_code == 403
    assert tried > 100


NASTY = '<img src=x onerror="steal()">&'


def test_what_people_write_is_text_on_every_page(make_user: MakeUser, susan: User) -> None:
    """Row 72: names, titles, prompts, reasons and a model's words, on every page that opens; and a strict CSP."""
    alice = make_user("nasty")
    User.objects.filter(pk=alice.pk).update(name=NASTY)
    own = make_things(alice, NASTY)
    grants.grant_tokens(admin=susan, user_id=alice.pk, tokens=5, reason=NASTY, request_key="nasty")
    pages = shown = 0
    for person in (alice, susan):
        client = Client()
        client.force_login(person)
        for address, _ in routes():
            if address.startswith("live/") or address == "accounts/logout/":
                continue
            path = path_of(address, own)
            response = client.get(path)
            if response.status_code != 200 or not response["Content-Type"].startswith("text/html"):
                continue
            page = response.content.decode()
            assert "<img src=x" not in page, address
            assert 'onerror="steal' not in page, address
            policy = response["Content-Security-Policy"]
            assert "default-src 'self'" in policy, address
            assert "unsafe" not in policy, address
            pages += 1
            shown += "&lt;img src=x onerror=" in page
    assert pages > 60
    assert shown >= 10  # and it was there to be shown


def test_every_role_of_a_team_opens_what_it_should(bob: User, susan: User, make_user: MakeUser) -> None:
    """Row 96: the platform's roles and a team's open nothing of each other. A new address about workspaces needs a
    line in TEAM_ROUTES."""
    team = Workspace.objects.create(kind="team", name="Acme")
    people = {"team owner": make_user("olga"), "team admin": make_user("tina"), "member": make_user("mia")}
    people |= {"its author": bob, "superadmin": susan}
    for name, role in {
        "team owner": "owner",
        "team admin": "admin",
        "member": "member",
        "its author": "member",
    }.items():
        Membership.objects.create(workspace=team, user=people[name], role=role)
    account = ledger.open_team_account(workspace_id=team.pk)
    ledger.add_tokens(account_id=account.pk, tokens=99, type="bonus", description="Test", idempotency_key="test")
    own = make_things(bob, "Hello", account=account)
    cookies = {}
    for role, person in people.items():
        client = Client()
        client.force_login(person)
        cookies[role] = client.cookies.output(header="", sep=";")

    def ask(method: str, path: str) -> str:
        cells = []
        for role in TEAM_ROLES:
            savepoint, client = transaction.savepoint(), Client()
            client.cookies = SimpleCookie(cookies[role])
            response = client.generic(method, f"{path}?workspace={team.pk}", content_type=_FORM)
            transaction.savepoint_rollback(savepoint)
            cells.append(outcome(response))
        return " ".join(cells)

    wrong = []
    for address, _ in routes():
        if address.startswith(ABOUT_WORKSPACES):
            path = path_of(address, own)
            actual = (ask("GET", path), ask("POST", path))
            if TEAM_ROUTES.get(address) != actual:
                wrong.append(f"    {json.dumps(address)}: ({json.dumps(actual[0])}, {json.dumps(actual[1])}),")
    assert not wrong, "TEAM_ROUTES says otherwise, or nothing, of these:\n" + "\n".join(wrong)


def test_no_line_is_left_over() -> None:
    assert set(ROUTES) | set(TEAM_ROUTES) <= {address for address, _ in routes()}


def test_every_role_has_a_cell() -> None:
    for address, methods in ROUTES.items():
        assert [len(cells.split()) for cells in methods] == [len(ROLES)] * 2, address
