"""What `manage.py check --deploy` says of an installation: settings that are dangerous, or that cannot work.

An error is something that would lose money, open a door or stop the product; a warning may be meant so. Ids are
stable. No message repeats a secret.
"""

import ipaddress
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from email.utils import parseaddr
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from django.conf import settings
from django.contrib.staticfiles.storage import ManifestFilesMixin, staticfiles_storage
from django.core import checks
from django.http.request import validate_host

from billing.models.fields import Provider
from billing.payments import gateway

# The most that docker-compose.yml gives one process: the requests that `web` answers at once, the worker's tasks.
THREADS = 8

EXAMPLE_WORDS = ("change", "development", "example", "insecure", "password", "placeholder", "secret")
BACKENDS_THAT_SEND_NOTHING = ("console", "dummy", "filebased", "locmem")
MAKE_ONE = "Make one with `openssl rand -hex 32`."


# --- Secrets --------------------------------------------------------------------------------------------------------


@checks.register(checks.Tags.security, deploy=True)
def secrets_are_hard_to_guess(**options: Any) -> Iterator[checks.CheckMessage]:
    for secret in [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]:
        if weakness := _weakness(secret, min_length=50):
            yield checks.Error(
                f"SECRET_KEY {weakness}. Who guesses it confirms any e-mail address and forges all else that we sign.",
                hint=f"{MAKE_ONE} docs/SECURITY.md says how to change it while people are signed in.",
                id="postmate.E001",
            )
    for secret in settings.BILLING_SECRETS:
        if weakness := _weakness(secret, min_length=32):
            yield checks.Error(
                f"BILLING_SECRET {weakness}. Who guesses it reads every balance and spends anybody's tokens.",
                hint=MAKE_ONE,
                id="postmate.E002",
            )
    for secret in settings.METRICS_TOKENS:
        if weakness := _weakness(secret, min_length=32):
            yield checks.Warning(
                f"METRICS_TOKEN {weakness}. Who guesses it reads the turnover.", hint=MAKE_ONE, id="postmate.W003"
            )
    password = unquote(urlsplit(settings.DATABASE_URL).password or "")
    if password and (weakness := _weakness(password, min_length=12)):
        yield checks.Error(
            f"The password in DATABASE_URL {weakness}. Who guesses it reads and writes the books.",
            hint=f"{MAKE_ONE} docs/SECURITY.md says how to change it.",
            id="postmate.E004",
        )


@checks.register(checks.Tags.security, deploy=True)
def secrets_have_one_purpose(**options: Any) -> Iterator[checks.CheckMessage]:
    purposes: dict[str, set[str]] = defaultdict(set)
    for name, values in _secrets().items():
        for value in values:
            purposes[value].add(name)
    for names in purposes.values():
        if len(names) > 1:
            yield checks.Error(
                f"{' and '.join(sorted(names))} hold the same secret. Who learns it in one place has the other, too.",
                hint=f"Give each one of its own. {MAKE_ONE}",
                id="postmate.E005",
            )


def _ai_keys() -> dict[str, list[str]]:
    names = [f"{provider.upper()}_API_KEY" for provider in Provider.values]
    return {name: [getattr(settings, name)] for name in names}


def _secrets() -> dict[str, list[str]]:
    """Every secret that is configured, by the variable it comes from."""
    values = {
        "SECRET_KEY": [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS],
        "BILLING_SECRET": settings.BILLING_SECRETS,
        "METRICS_TOKEN": settings.METRICS_TOKENS,
        "STRIPE_SECRET_KEY": [settings.STRIPE_SECRET_KEY],
        "STRIPE_WEBHOOK_SECRET": settings.STRIPE_WEBHOOK_SECRETS,
        "DATABASE_URL": [unquote(urlsplit(settings.DATABASE_URL).password or "")],
        "REDIS_URL": [unquote(urlsplit(settings.REDIS_URL).password or "")],
        "EMAIL_URL": [unquote(urlsplit(settings.EMAIL_URL).password or "")],
        **_ai_keys(),
    }
    # The stand-ins take any key, and get the same one.
    return {name: [value for value in found if value and not _is_of_stand_in(value)] for name, found in values.items()}


def _weakness(secret: str, *, min_length: int) -> str:
    """What makes a secret easy to guess, in words that follow its name; empty when nothing does."""
    if any(word in secret.lower() for word in EXAMPLE_WORDS):
        return "looks like the one of an example"
    if len(secret) < min_length:
        return f"has {len(secret)} characters, {min_length} are needed"
    pieces = [secret[at : at + 3] for at in range(len(secret) - 2)]
    if len(set(secret)) < 8 or len(set(pieces)) < len(pieces) / 2:
        return "repeats itself"
    return ""


# --- Money ----------------------------------------------------------------------------------------------------------


@checks.register(checks.Tags.security)
def rehearsal_takes_no_money(**options: Any) -> Iterator[checks.CheckMessage]:
    if settings.REHEARSAL and gateway.is_live_mode():
        yield checks.Error(
            "REHEARSAL is on and STRIPE_SECRET_KEY is a live one. Every page says that no real money moves, and cards "
            "would be charged.",
            hint="Switch REHEARSAL off, or use a test key.",
            id="postmate.E010",
        )


@checks.register(checks.Tags.security, deploy=True)
def stripe_keys_belong_together(**options: Any) -> Iterator[checks.CheckMessage]:
    key = settings.STRIPE_SECRET_KEY
    if gateway.is_live_mode():
        if settings.STRIPE_API_BASE:
            yield checks.Error(
                "STRIPE_SECRET_KEY is a live one and STRIPE_API_BASE sends it somewhere else than to Stripe.",
                hint="Remove STRIPE_API_BASE. If the key was used like that, roll it in Stripe's dashboard.",
                id="postmate.E011",
            )
        if any(_looks_like_test(secret) for secret in settings.STRIPE_WEBHOOK_SECRETS):
            yield checks.Error(
                "STRIPE_SECRET_KEY is a live one and a STRIPE_WEBHOOK_SECRET looks invented. Anybody who knows it can "
                "forge payments.",
                hint="Take the signing secret of the live endpoint from Stripe's dashboard; it begins with whsec_.",
                id="postmate.E012",
            )
    elif key.startswith(("sk_test_", "rk_test_")):
        if not settings.REHEARSAL:
            yield checks.Warning(
                "STRIPE_SECRET_KEY is a test key. People get tokens for test cards, and no money comes.",
                hint="Use a live key (sk_live_… or rk_live_…), or set REHEARSAL=true so that pages say so.",
                id="postmate.W013",
            )
    elif key:
        yield checks.Error(
            "STRIPE_SECRET_KEY is no secret key of Stripe's. No payment can begin.",
            hint="It begins with sk_live_ or rk_live_. The publishable key (pk_…) is another one.",
            id="postmate.E014",
        )


@checks.register(checks.Tags.security, deploy=True)
def stand_ins_are_for_rehearsals(**options: Any) -> Iterator[checks.CheckMessage]:
    if settings.REHEARSAL:
        return
    bases = ("STRIPE_API_BASE", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL")
    for name in bases:
        if _is_loopback(getattr(settings, name)):
            yield checks.Error(
                f"{name} is an address of this machine, where a stand-in may answer: payments and texts would be "
                "made up.",
                hint=f"Remove {name}, or set REHEARSAL=true where no real money moves.",
                id="postmate.E015",
            )
    keys = {
        "STRIPE_SECRET_KEY": [settings.STRIPE_SECRET_KEY],
        "STRIPE_WEBHOOK_SECRET": settings.STRIPE_WEBHOOK_SECRETS,
        **_ai_keys(),
    }
    for name, values in keys.items():
        if any(_is_of_stand_in(value) for value in values):
            yield checks.Error(
                f"{name} is the one of a stand-in, which everybody knows.",
                hint="Put in the real one, or set REHEARSAL=true where no real money moves.",
                id="postmate.E016",
            )


def _is_of_stand_in(value: str) -> bool:
    return bool(re.search(r"stand[-_]in", value))


def _looks_like_test(webhook_secret: str) -> bool:
    return (
        not webhook_secret.startswith("whsec_")
        or len(webhook_secret) < 32
        or bool(_weakness(webhook_secret, min_length=0))
    )


def _is_loopback(url: str) -> bool:
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


# --- Addresses ------------------------------------------------------------------------------------------------------


@checks.register(checks.Tags.security, deploy=True)
def addresses_are_right(**options: Any) -> Iterator[checks.CheckMessage]:
    if not settings.SITE_URL.startswith("https://"):
        yield checks.Error(
            "SITE_URL does not begin with https://. Passwords and sessions cross the network for all to read.",
            hint="Put a proxy with a certificate in front, as docker-compose.yml does, and give its address.",
            id="postmate.E020",
        )
    if any(host.startswith(("*", ".")) for host in settings.ALLOWED_HOSTS):
        yield checks.Error(
            "ALLOWED_HOSTS takes hosts that you did not name. A forged one would stand in the links of our e-mails.",
            hint="Name the hosts, or leave it out: then it is that of SITE_URL.",
            id="postmate.E021",
        )
    elif not validate_host(urlsplit(settings.SITE_URL).hostname or "", settings.ALLOWED_HOSTS):
        yield checks.Error(
            "The host of SITE_URL is not one of ALLOWED_HOSTS. Every page answers 400.",
            hint="Add it, or leave ALLOWED_HOSTS out.",
            id="postmate.E022",
        )
    if settings.TRUSTED_PROXY_COUNT < 1:
        yield checks.Warning(
            "TRUSTED_PROXY_COUNT is 0. Behind a proxy all people then seem to come from one address, and a few wrong "
            "passwords lock everybody out.",
            hint="Say how many proxies stand in front; with docker-compose.yml it is 1.",
            id="postmate.W023",
        )


# --- People ---------------------------------------------------------------------------------------------------------


@checks.register(checks.Tags.security, deploy=True)
def people_are_known(**options: Any) -> Iterator[checks.CheckMessage]:
    backend = settings.EMAIL_BACKEND.split(".")[-2]
    if backend in BACKENDS_THAT_SEND_NOTHING and not settings.REHEARSAL:
        yield checks.Error(
            "EMAIL_URL names a way that sends nothing. Nobody can confirm an address, reset a password or learn of a "
            "failed payment.",
            hint="Give a mail server: smtp+tls://user:password@host:587.",
            id="postmate.E030",
        )
    sender = parseaddr(settings.DEFAULT_FROM_EMAIL)[1].rpartition("@")[2]
    if (sender == "localhost" or sender.endswith("example.com")) and not settings.REHEARSAL:
        yield checks.Warning(
            f"DEFAULT_FROM_EMAIL is an address at {sender}. Mail servers refuse e-mails from there.",
            hint="Give an address of a domain of yours.",
            id="postmate.W031",
        )
    if settings.ACCOUNT_EMAIL_VERIFICATION != "mandatory":
        yield checks.Warning(
            "EMAIL_VERIFICATION is not mandatory. Anybody collects the welcome bonus again and again with invented "
            "addresses.",
            hint="Set EMAIL_VERIFICATION=mandatory, or leave it out.",
            id="postmate.W032",
        )
    if not settings.ADMIN_MFA_REQUIRED:
        yield checks.Warning(
            "ADMIN_MFA_REQUIRED is off. An admin's stolen password is enough to see all people and grant tokens.",
            hint="Set ADMIN_MFA_REQUIRED=true, or leave it out.",
            id="postmate.W033",
        )


# --- What it runs on ------------------------------------------------------------------------------------------------


@checks.register(checks.Tags.security)
def reservations_outlive_operations(**options: Any) -> Iterator[checks.CheckMessage]:
    if settings.RESERVATION_SECONDS <= settings.AI_MAX_DURATION_SECONDS:
        yield checks.Error(
            "RESERVATION_SECONDS is not above AI_MAX_DURATION_SECONDS. A hold would expire while its operation runs, "
            "and what it costs would not be paid.",
            hint="Leave a minute or more between them; the defaults are 600 and 300.",
            id="postmate.E040",
        )


@checks.register(checks.Tags.security, deploy=True)
def every_thread_has_a_connection(**options: Any) -> Iterator[checks.CheckMessage]:
    if settings.DATABASE_POOL_SIZE < THREADS:
        yield checks.Warning(
            f"DATABASE_POOL_SIZE is below {THREADS}, the number of threads of a process. They wait for one another's "
            "connections.",
            hint="Leave it out, or raise it; PostgreSQL's max_connections must allow that many for each process.",
            id="postmate.W041",
        )


@checks.register(checks.Tags.security, deploy=True)
def files_can_be_kept_and_served(**options: Any) -> Iterator[checks.CheckMessage]:
    if not is_writable(Path(settings.MEDIA_ROOT)):
        yield checks.Error(
            "MEDIA_ROOT cannot be written to. Images are made and paid for at the provider, and cannot be kept.",
            hint="Give the user that runs the product a directory of its own there.",
            id="postmate.E042",
        )
    if isinstance(staticfiles_storage, ManifestFilesMixin) and not _has_manifest(staticfiles_storage):
        yield checks.Error(
            "Static files were not collected. Every page answers 500.",
            hint="Run `manage.py collectstatic --noinput`.",
            id="postmate.E043",
        )


def is_writable(directory: Path) -> bool:
    there = existing(directory)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _has_manifest(storage: Any) -> bool:
    return bool(storage.manifest_storage.exists(storage.manifest_name))
