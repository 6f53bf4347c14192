"""The one settings file. Everything that differs between machines is read from the environment at its top.

Each variable is listed with its default and meaning in docs/TOKEN_BILLING_SETUP.md and .env.example.
"""

import logging
import os
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import environ
from celery.schedules import crontab
from csp.constants import SELF
from django.core.exceptions import ImproperlyConfigured
from django.urls import reverse_lazy
from kombu import Exchange, Queue

from postmate.web import logs

BASE_DIR = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((BASE_DIR / "pyproject.toml").read_text())["project"]["version"]

env = environ.Env()
env.read_env(BASE_DIR / ".env")


def _secret(name: str, default: str = "") -> str:
    """A secret: the variable itself, or what is in the file that <name>_FILE names, as containers get their secrets.
    An empty file is an empty variable: containers cannot leave one out.

    Raises ImproperlyConfigured in words that repeat neither: what was meant to be a path may be the secret itself.
    """
    value, path = os.environ.get(name, ""), os.environ.get(f"{name}_FILE", "")
    if not path:
        return value or default
    if value:
        raise ImproperlyConfigured(f"Both {name} and {name}_FILE are set. Set one of them.")
    try:
        value = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ImproperlyConfigured(f"{name}_FILE names a file that is not text.") from None
    except OSError as error:
        raise ImproperlyConfigured(f"{name}_FILE names a file that cannot be read: {error.strerror}.") from None
    if len(value.splitlines()) > 1:
        raise ImproperlyConfigured(f"{name}_FILE names a file that does not hold one line with the value.")
    return value or default


def _secrets(name: str) -> list[str]:
    """Secrets of which there may be several while one is rotated, comma separated, with or without blanks."""
    return [value.strip() for value in _secret(name).split(",") if value.strip()]


# --- From the environment -------------------------------------------------------------------------------------------

DEBUG = env.bool("DEBUG", True)  # development; compose and the Dockerfile set it to false
REHEARSAL = env.bool("REHEARSAL", False)  # production with stand-ins and without real money: `make run-production`
# The first signs; the others, while it is being rotated, are still good for what they have signed.
SECRET_KEY, *SECRET_KEY_FALLBACKS = _secrets("SECRET_KEY") or ["development-only-secret-key" if DEBUG else ""]
SITE_URL = env.str("SITE_URL", f"http://localhost:{env.int('PORT', 8000)}")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=[] if DEBUG else [str(urlsplit(SITE_URL).hostname)])
DATA_DIR = Path(env.str("POSTMATE_DATA_DIR", str(BASE_DIR / ".postmate")))
if DEBUG:
    os.umask(0o077)  # whoever makes DATA_DIR first: mails, images and exports lie in it, for their owner alone

# Set by postmate/local/embedded.py on a machine without servers.
DATABASE_URL = _secret("DATABASE_URL", "postgresql:///postmate")
DATABASE_POOL_SIZE = env.int("DATABASE_POOL_SIZE", 20)  # at least the number of threads of a process
DATABASE_TIMEOUT_SECONDS = env.int("DATABASE_TIMEOUT_SECONDS", 5)  # until a request that gets no connection is a 503
REDIS_URL = _secret("REDIS_URL", "redis://localhost:6379/0")

EMAIL_URL = _secret("EMAIL_URL")
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", "Postmate <billing@localhost>")
EMAIL_VERIFICATION = env.str("EMAIL_VERIFICATION", "optional" if DEBUG else "mandatory")
# Beside those of the package's list: what is withheld from throw-away addresses is withheld from these.
DISPOSABLE_EMAIL_DOMAINS = env.list("DISPOSABLE_EMAIL_DOMAINS", default=[])
ADMIN_MFA_REQUIRED = env.bool("ADMIN_MFA_REQUIRED", not DEBUG)  # for admins and superadmins, on the admin side

STRIPE_SECRET_KEY = _secret("STRIPE_SECRET_KEY")
STRIPE_PUBLISHABLE_KEY = env.str("STRIPE_PUBLISHABLE_KEY", "")
# More than one, comma separated, while a secret is being rotated. None: the webhook's address does not exist.
STRIPE_WEBHOOK_SECRETS = _secrets("STRIPE_WEBHOOK_SECRET")
STRIPE_API_BASE = env.str("STRIPE_API_BASE", "")  # empty: Stripe itself
STRIPE_AUTOMATIC_TAX = env.bool("STRIPE_AUTOMATIC_TAX", False)
STRIPE_PROMOTION_CODES = env.bool("STRIPE_PROMOTION_CODES", False)
STRIPE_INVOICES = env.bool("STRIPE_INVOICES", False)
STRIPE_TIMEOUT_SECONDS = env.float("STRIPE_TIMEOUT_SECONDS", 20.0)

# Who sells, as receipts say it: the lines of the address are separated by "|".
SELLER_NAME = env.str("SELLER_NAME", "Postmate")
SELLER_ADDRESS = [line.strip() for line in env.str("SELLER_ADDRESS", "").split("|") if line.strip()]
SELLER_TAX_ID = env.str("SELLER_TAX_ID", "")
RECEIPT_PREFIX = env.str("RECEIPT_PREFIX", "R-")

OPENAI_API_KEY = _secret("OPENAI_API_KEY")
OPENAI_BASE_URL = env.str("OPENAI_BASE_URL", "")
ANTHROPIC_API_KEY = _secret("ANTHROPIC_API_KEY")
ANTHROPIC_BASE_URL = env.str("ANTHROPIC_BASE_URL", "")
GOOGLE_API_KEY = _secret("GOOGLE_API_KEY")
GOOGLE_GEMINI_BASE_URL = env.str("GOOGLE_GEMINI_BASE_URL", "")
AI_TIMEOUT_SECONDS = env.float("AI_TIMEOUT_SECONDS", 60.0)  # between two chunks
AI_IMAGE_TIMEOUT_SECONDS = env.float("AI_IMAGE_TIMEOUT_SECONDS", 180.0)  # for images, which come all at once
# No operation runs longer; a reservation outlives it, so that a live stream is never expired under its reader.
AI_MAX_DURATION_SECONDS = env.int("AI_MAX_DURATION_SECONDS", 300)
RESERVATION_SECONDS = env.int("RESERVATION_SECONDS", 600)

# Shared with the platform's other servers. More than one, comma separated, while it is being rotated. None: closed.
BILLING_SECRETS = _secrets("BILLING_SECRET")
# The API's limits: for each secret, for each personal key, and for each address that shows neither.
API_SERVICE_CALLS_PER_MINUTE = env.int("API_SERVICE_CALLS_PER_MINUTE", 60_000)
API_USER_CALLS_PER_MINUTE = env.int("API_USER_CALLS_PER_MINUTE", 120)
API_ANONYMOUS_CALLS_PER_MINUTE = env.int("API_ANONYMOUS_CALLS_PER_MINUTE", 30)

LOG_FORMAT = env.str("LOG_FORMAT", "console" if DEBUG else "json")
LOG_LEVEL = env.str("LOG_LEVEL", "INFO")  # of our own lines
# Opens /metrics. More than one, comma separated, while it is being rotated. None: open in development, to the machine.
METRICS_TOKENS = _secrets("METRICS_TOKEN")
SENTRY_DSN = _secret("SENTRY_DSN")  # none: nothing is reported
SENTRY_ENVIRONMENT = env.str("SENTRY_ENVIRONMENT", "development" if DEBUG else "production")
SENTRY_TRACES_SAMPLE_RATE = env.float("SENTRY_TRACES_SAMPLE_RATE", 0.0)  # the part of all requests, 0 to 1

# Whether browsers are told that all hosts below this one's name speak HTTPS, too.
HSTS_INCLUDE_SUBDOMAINS = env.bool("HSTS_INCLUDE_SUBDOMAINS", False)

# How many proxies stand in front and name the caller in X-Forwarded-For. Where there is none, anybody could name
# any address there; where there is one that is not counted, all callers look like one.
TRUSTED_PROXY_COUNT = env.int("TRUSTED_PROXY_COUNT", 0 if DEBUG else 1)

# The files of generated images. Several machines share them: a common volume, or another storage.
MEDIA_ROOT = os.path.abspath(env.str("MEDIA_ROOT", str(DATA_DIR / "media")))  # noqa: PTH100 – without its ".."

# Where `manage.py backup` writes, and from which age on `manage.py doctor` finds the newest one too old. 0: backups
# are made by other means.
BACKUP_DIR = Path(env.str("BACKUP_DIR", str(DATA_DIR / "backups")))
BACKUP_MAX_AGE_HOURS = env.int("BACKUP_MAX_AGE_HOURS", 26)

# What goes after so many days (`manage.py apply_retention`, every night); 0 keeps it for ever. Not below 60: what
# Stripe tells again reaches back 35.
RETENTION_EVENT_PAYLOAD_DAYS = env.int("RETENTION_EVENT_PAYLOAD_DAYS", 180)
RETENTION_NOTIFICATION_DAYS = env.int("RETENTION_NOTIFICATION_DAYS", 365)
RETENTION_BULK_EXPORT_DAYS = env.int("RETENTION_BULK_EXPORT_DAYS", 90)
if _too_short := [name for name, value in list(vars().items()) if name.startswith("RETENTION_") and 0 != value < 60]:
    raise ImproperlyConfigured(f"{', '.join(_too_short)}: at least 60 days, or 0 to keep it for ever.")

# --- Django ---------------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.contenttypes",
    "django.contrib.humanize",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.usersessions",
    "csp",
    "django_htmx",
    "django_structlog",
    "ninja",
    "pgtrigger",
    "accounts",  # before Django's auth, whose changepassword it replaces
    "django.contrib.auth",
    "billing",
    "ai_ops",
    "postmate",
]

MIDDLEWARE = [
    "postmate.web.logs.request_middleware",
    "postmate.web.headers.asked_by_address_middleware",
    "django.middleware.security.SecurityMiddleware",
    "django_permissions_policy.PermissionsPolicyMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "postmate.web.headers.no_store_middleware",
    "csp.middleware.CSPMiddleware",
    "postmate.web.outage.outage_middleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "accounts.time_zones.time_zone_middleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]

ROOT_URLCONF = "postmate.urls"
WSGI_APPLICATION = "postmate.wsgi.application"
ASGI_APPLICATION = "postmate.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "billing.context_processors.balance",
                "billing.context_processors.unread_notifications",
                "postmate.web.context_processors.rehearsal",
                "postmate.web.context_processors.sign_in",
            ],
            "libraries": {"tables": "kit.tables"},
        },
    },
]

DATABASES = {"default": environ.Env.db_url_config(DATABASE_URL)}
DATABASES["default"] |= {
    "HOST": unquote(DATABASES["default"]["HOST"]),
    "ENGINE": "postmate.postgresql",
    "OPTIONS": {
        # A statement that has run twice on a connection is prepared there; ledger.py counts on it for its speed.
        "prepare_threshold": 2,
        # It tries to connect again with pauses that double, and anew for a request after `reconnect_timeout`: seconds
        # after the server is back, not minutes.
        "pool": {
            "min_size": 1,
            "max_size": DATABASE_POOL_SIZE,
            "timeout": DATABASE_TIMEOUT_SECONDS,
            "reconnect_timeout": 3,
        },
        "connect_timeout": DATABASE_TIMEOUT_SECONDS,
        # A network that drops everything silently is noticed, here and there: locks of the dead are let go.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "options": "-c idle_in_transaction_session_timeout=60s -c lock_timeout=15s -c tcp_user_timeout=20s",
        **DATABASES["default"].get("OPTIONS", {}),  # what DATABASE_URL says after its "?", such as sslmode=require
    },
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Redis may be away: no retries with back-off inside a request, the callers know what to do without it.
REDIS_OPTIONS = {"socket_timeout": 2, "socket_connect_timeout": 2}
# What is cached are the counts of sign-ins, password resets, checkouts and downloads. In the database, so that they
# hold while Redis is away, and nobody signs in uncounted. `allauth` counts in the default cache alone.
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.db.DatabaseCache",
        "LOCATION": "accounts_limit",
        "OPTIONS": {"MAX_ENTRIES": 100_000},  # above it a third goes: nobody shall push another one's count out
    }
}

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = None if DEBUG else BASE_DIR / "staticfiles"  # in development they are served where they lie
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = WHITENOISE_AUTOREFRESH = DEBUG
STORAGES = {
    "default": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"file_permissions_mode": 0o600, "directory_permissions_mode": 0o700},  # people's own
    },
    "staticfiles": {
        "BACKEND": (
            "django.contrib.staticfiles.storage.StaticFilesStorage"
            if DEBUG
            else "whitenoise.storage.CompressedManifestStaticFilesStorage"
        )
    },
}

if EMAIL_URL:
    vars().update(environ.Env.email_url_config(EMAIL_URL))
else:
    EMAIL_BACKEND = "django.core.mail.backends.filebased.EmailBackend"
    EMAIL_FILE_PATH = DATA_DIR / "mails"
EMAIL_TIMEOUT = 20  # seconds; a mail server that hangs must not hold its worker

LOGGING_CONFIG = "postmate.web.logs.configure"
LOGGING = logs.dict_config(format=LOG_FORMAT, level=LOG_LEVEL)

# --- People ---------------------------------------------------------------------------------------------------------

AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.Argon2PasswordHasher"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]
LOGIN_URL = reverse_lazy("account_login")
LOGIN_REDIRECT_URL = reverse_lazy("studio:home")

ALLAUTH_TRUSTED_PROXY_COUNT = TRUSTED_PROXY_COUNT
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_ADAPTER = "accounts.adapter.AccountAdapter"
ACCOUNT_FORMS = {
    "signup": "accounts.forms.SignupForm",
    "add_email": "accounts.forms.AddEmailForm",
    "change_password": "accounts.forms.ChangePasswordForm",
    "set_password": "accounts.forms.SetPasswordForm",
    "reset_password": "accounts.forms.ResetPasswordForm",
    "reset_password_from_key": "accounts.forms.ResetPasswordKeyForm",
}
MFA_FORMS = {"authenticate": "accounts.forms.AuthenticateForm", "reauthenticate": "accounts.forms.ReauthenticateForm"}
# Guesses, and mails to one address, are counted by accounts/guesses.py: by who asks, so that nobody locks others out.
ACCOUNT_RATE_LIMITS = {"login": None, "login_failed": None, "confirm_email": None, "reset_password": "20/m/ip"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_EMAIL_VERIFICATION = EMAIL_VERIFICATION
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
ACCOUNT_LOGOUT_REDIRECT_URL = "/"
ACCOUNT_SESSION_REMEMBER = True
ACCOUNT_EMAIL_NOTIFICATIONS = True  # of a new password, another address, a second factor
ACCOUNT_REAUTHENTICATION_REQUIRED = True  # a stolen session changes no address, password or second factor
MFA_SUPPORTED_TYPES = ["totp", "recovery_codes"]
MFA_TOTP_ISSUER = "Postmate"

# --- Security -------------------------------------------------------------------------------------------------------

SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = SITE_URL.startswith("https://")
CSRF_COOKIE_HTTPONLY = True  # pages take the token from their forms
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if not DEBUG else None
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$", r"^metrics$"]
# A rehearsal is often on localhost, where browsers would refuse plain HTTP on every port for as long as this says.
SECURE_HSTS_SECONDS = (60 if REHEARSAL else 31_536_000) if SECURE_SSL_REDIRECT else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = HSTS_INCLUDE_SUBDOMAINS
# Subdomains and browsers' preload lists concern a whole domain, of which this is one host: others may speak plain HTTP.
# So the first is asked for in the environment, and the second is nothing for an application to ask for.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
SECURE_REFERRER_POLICY = "same-origin"
# No page needs any of these; cards are entered on Stripe's pages.
PERMISSIONS_POLICY: dict[str, list[str]] = {
    feature: [] for feature in ("camera", "geolocation", "microphone", "payment", "usb")
}
CSRF_TRUSTED_ORIGINS = [SITE_URL] if not DEBUG else []
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_048_576  # a request's body, webhooks included: 413 above it

# Nothing is loaded from another host. A form may lead on to Stripe's pages (payment, saved card, the bank's
# confirmation): Chromium applies `form-action` to the redirect that answers a form, too.
STRIPE_PAGES = ["https://checkout.stripe.com", "https://billing.stripe.com", "https://hooks.stripe.com"]
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "img-src": [SELF, "data:"],
        "form-action": [SELF, *([STRIPE_API_BASE] if STRIPE_API_BASE else STRIPE_PAGES)],
        "frame-ancestors": ["'none'"],
        "base-uri": [SELF],
        "object-src": ["'none'"],
    }
}

# --- Celery ---------------------------------------------------------------------------------------------------------

CELERY_BROKER_URL = REDIS_URL.replace("unix://", "redis+socket://").replace("?db=", "?virtual_host=")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    # Who hands a task over gives up at once when Redis is away: a sweep does it later. Workers wait for Redis apart.
    "max_retries": 0,
}
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True  # a worker that dies leaves its task to another; every task is idempotent
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_TIMEZONE = "UTC"
# A worker takes from all of them in turn, unless `--queues` names some: docs/SCALING.md. The first is for the rest.
CELERY_TASK_QUEUES = [Queue(name, Exchange(name), routing_key=name) for name in ("celery", "payments", "mail", "slow")]
CELERY_TASK_ROUTES = {
    "billing.tasks.auto_recharge": {"queue": "payments"},
    "billing.tasks.remember_card": {"queue": "payments"},
    "billing.tasks.refresh_card": {"queue": "payments"},
    "billing.tasks.resume_refunds": {"queue": "payments"},
    "billing.tasks.sweep_auto_recharges": {"queue": "payments"},
    "billing.tasks.sweep_purchases": {"queue": "payments"},
    "accounts.tasks.send_invitations": {"queue": "mail"},
    "billing.tasks.send_notifications": {"queue": "mail"},
    "billing.tasks.weekly_summary": {"queue": "mail"},
    "ai_ops.tasks.sweep_content": {"queue": "slow"},
    "billing.tasks.apply_retention": {"queue": "slow"},
    "billing.tasks.check_books": {"queue": "slow"},
    "billing.tasks.export_finance": {"queue": "slow"},
    "billing.tasks.reconcile_stripe": {"queue": "slow"},
    "billing.tasks.roll_up_usage": {"queue": "slow"},
    "billing.tasks.run_bulk_job": {"queue": "slow"},
    "billing.tasks.sweep_bulk_jobs": {"queue": "slow"},
    "billing.tasks.sweep_outgoing": {"queue": "slow"},
    "billing.tasks.sweep_customers": {"queue": "slow"},
    "billing.tasks.tell_customer": {"queue": "slow"},
    "billing.tasks.tell_customers": {"queue": "slow"},
}
CELERY_BEAT_SCHEDULE = {
    "expire stale reservations": {"task": "billing.tasks.expire_reservations", "schedule": 30.0},
    "book away what has ended of tokens with an end": {"task": "billing.tasks.expire_lots", "schedule": 60.0},
    "close results whose operation died": {"task": "ai_ops.tasks.close_abandoned_results", "schedule": 60.0},
    "finish purchases whose webhook never came": {"task": "billing.tasks.sweep_purchases", "schedule": 60.0},
    "finish and start auto-recharges": {"task": "billing.tasks.sweep_auto_recharges", "schedule": 60.0},
    "finish refunds that Stripe did not answer": {"task": "billing.tasks.resume_refunds", "schedule": 60.0},
    "compare with Stripe": {
        "task": "billing.tasks.reconcile_stripe",
        "schedule": crontab(minute=17),
        "args": [3],
        "options": {"expires": 3_000},
    },
    # A refund may fail weeks after it was made, and Stripe lists it by when it was made.
    "compare the last weeks with Stripe": {
        "task": "billing.tasks.reconcile_stripe",
        "schedule": crontab(minute=37, hour=3),
        "args": [35],
    },
    "mail invitations that were not mailed yet": {"task": "accounts.tasks.send_invitations", "schedule": 60.0},
    "close grant requests that nobody decided": {"task": "billing.tasks.expire_grant_requests", "schedule": 3_600.0},
    "go on with bulk actions": {"task": "billing.tasks.sweep_bulk_jobs", "schedule": 60.0},
    "add up finished hours for the dashboard": {
        "task": "billing.tasks.roll_up_usage",
        "schedule": 120.0,
        "options": {"expires": 120},
    },
    "check all books": {"task": "billing.tasks.check_books", "schedule": crontab(minute=47, hour=2)},
    "write the finance export": {"task": "billing.tasks.export_finance", "schedule": crontab(minute=23, hour=1)},
    "delete what nobody needs any more": {
        "task": "billing.tasks.apply_retention",
        "schedule": crontab(minute=53, hour=2),
    },
    "erase anonymised people at Stripe": {"task": "billing.tasks.sweep_customers", "schedule": 600.0},
    "tell Stripe of new e-mail addresses and names": {"task": "billing.tasks.tell_customers", "schedule": 600.0},
    "delete files that were sent": {"task": "billing.tasks.sweep_outgoing", "schedule": 300.0},
    "erase anonymised people's work": {"task": "ai_ops.tasks.sweep_content", "schedule": 600.0},
    # One that waited for its worker longer than that has a successor.
    "send e-mails": {
        "task": "billing.tasks.send_notifications",
        "schedule": 10.0,
        "options": {"expires": 10},
    },
    "weekly summary": {
        "task": "billing.tasks.weekly_summary",
        "schedule": crontab(minute=0, hour=7, day_of_week="monday"),
    },
}

# --- Libraries ------------------------------------------------------------------------------------------------------

DJANGO_STRUCTLOG_CELERY_ENABLED = True  # a task's lines carry the id of the request that asked for it
DJANGO_STRUCTLOG_CELERY_TASK_START_LOG_LEVEL = logging.DEBUG

# --- What production cannot do without ------------------------------------------------------------------------------

if not DEBUG:
    _needed = {
        "SECRET_KEY": SECRET_KEY,
        "SITE_URL (the public address, https://…)": env.str("SITE_URL", ""),
        "DATABASE_URL": _secret("DATABASE_URL"),
        "REDIS_URL": _secret("REDIS_URL"),
        "EMAIL_URL": EMAIL_URL,
        "STRIPE_SECRET_KEY": STRIPE_SECRET_KEY,
        "STRIPE_WEBHOOK_SECRET": STRIPE_WEBHOOK_SECRETS,
        "OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY": OPENAI_API_KEY or ANTHROPIC_API_KEY or GOOGLE_API_KEY,
    }
    if _missing := [name for name, value in _needed.items() if not value]:
        raise ImproperlyConfigured(
            "Production (DEBUG=false) needs these environment variables, which are missing:\n  "
            + "\n  ".join(_missing)
            + "\ndocs/TOKEN_BILLING_SETUP.md explains each. For development, set DEBUG=true."
        )

# --- Reports of errors ----------------------------------------------------------------------------------------------

if SENTRY_DSN:
    from postmate.web import error_reports

    error_reports.start(
        dsn=SENTRY_DSN,
        environment=SENTRY_ENVIRONMENT,
        release=f"postmate@{VERSION}",
        traces_sample_rate=SENTRY_TRACES_SAMPLE_RATE,
    )
