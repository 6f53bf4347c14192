"""`manage.py check --deploy` on production's settings: clean when they are complete, and one id for each defect."""

import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from django.conf import UserSettingsHolder, global_settings, settings
from django.core.files.storage.handler import StorageHandler
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from postmate.ops import checks
from tests.environment import MEDIA_ROOT
from tests.servers import PROJECT

GOOD_SECRET = "b7Qx2LmNf9RtYw4KzC6vHs8JdGp3TaEuXn5BqVrM1oWkDiPyZcFh0SgA"  # noqa: S105 – random, and of no use
OTHER_SECRET = "kD8sVu2QeXr6TzBn4MwLj9PfHc3GyRa7"  # noqa: S105 – the same
WEBHOOK_SECRET = "whsec_Jh4Tq9WzXc2Vb7NmKp3RsLd8Fg6YaEuQ"  # noqa: S105 – the same

Variables = Mapping[str, str]
PRODUCTION: Variables = {
    "DEBUG": "false",
    "SECRET_KEY": GOOD_SECRET,
    "SITE_URL": "https://tokens.postmate.test",
    "DATABASE_URL": "postgresql://postmate:Rw7Kx2mQv9Lt@db:5432/postmate",
    "REDIS_URL": "redis://redis:6379/0",
    "EMAIL_URL": "smtp+tls://postmate:Hn5Bz8Yc@mail.postmate.test:587",
    "DEFAULT_FROM_EMAIL": "Postmate <billing@postmate.test>",
    "STRIPE_SECRET_KEY": "sk_live_51Qx",
    "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
    "OPENAI_API_KEY": "sk-proj-Tz3Vb",
    "BILLING_SECRET": OTHER_SECRET,
    "MEDIA_ROOT": MEDIA_ROOT,
}

# The variables that make the defect, and the ids of what is then said.
DEFECTS: list[tuple[Variables, list[str]]] = [
    ({"SECRET_KEY": "development-only-secret-key"}, ["postmate.E001", "security.W009"]),
    ({"SECRET_KEY": GOOD_SECRET[:40]}, ["postmate.E001", "security.W009"]),
    ({"SECRET_KEY": "abcd1234" * 8}, ["postmate.E001"]),
    ({"SECRET_KEY": f"{GOOD_SECRET},old-key"}, ["postmate.E001", "security.W025"]),
    ({"BILLING_SECRET": "short"}, ["postmate.E002"]),
    ({"BILLING_SECRET": f"{OTHER_SECRET},{'a' * 64}"}, ["postmate.E002"]),
    ({"METRICS_TOKEN": "prometheus"}, ["postmate.W003"]),
    ({"DATABASE_URL": "postgresql://postmate:password@db:5432/postmate"}, ["postmate.E004"]),
    ({"DATABASE_URL": f"postgresql://postmate:{OTHER_SECRET}@db:5432/postmate"}, ["postmate.E005"]),
    ({"METRICS_TOKEN": OTHER_SECRET}, ["postmate.E005"]),
    ({"REHEARSAL": "true"}, ["postmate.E010"]),
    ({"STRIPE_API_BASE": "https://stripe.postmate.test"}, ["postmate.E011"]),
    ({"STRIPE_API_BASE": "http://localhost:8001"}, ["postmate.E011", "postmate.E015"]),
    ({"STRIPE_WEBHOOK_SECRET": "whsec_test"}, ["postmate.E012"]),
    ({"STRIPE_WEBHOOK_SECRET": f"{WEBHOOK_SECRET},anything"}, ["postmate.E012"]),
    ({"STRIPE_WEBHOOK_SECRET": "whsec_local_stand_in"}, ["postmate.E012", "postmate.E016"]),
    ({"STRIPE_SECRET_KEY": "sk_test_51Qx"}, ["postmate.W013"]),
    ({"STRIPE_SECRET_KEY": "rk_test_51Qx"}, ["postmate.W013"]),
    ({"STRIPE_SECRET_KEY": "pk_live_51Qx"}, ["postmate.E014"]),
    ({"STRIPE_SECRET_KEY": "sk_test_local_stand_in"}, ["postmate.W013", "postmate.E016"]),
    ({"OPENAI_BASE_URL": "http://127.0.0.1:8002/openai/v1"}, ["postmate.E015"]),
    ({"ANTHROPIC_BASE_URL": "http://[::1]:8002/anthropic"}, ["postmate.E015"]),
    ({"GOOGLE_GEMINI_BASE_URL": "http://ai.localhost:8002"}, ["postmate.E015"]),
    ({"OPENAI_API_KEY": "local-stand-in"}, ["postmate.E016"]),
    (
        {"SITE_URL": "http://tokens.postmate.test"},
        ["postmate.E020", "security.W004", "security.W008", "security.W012", "security.W016"],
    ),
    ({"ALLOWED_HOSTS": "*"}, ["postmate.E021"]),
    ({"ALLOWED_HOSTS": ".postmate.test"}, ["postmate.E021"]),
    ({"ALLOWED_HOSTS": "localhost"}, ["postmate.E022"]),
    ({"TRUSTED_PROXY_COUNT": "0"}, ["postmate.W023"]),
    ({"EMAIL_URL": "consolemail://"}, ["postmate.E030"]),
    ({"EMAIL_URL": "dummymail://"}, ["postmate.E030"]),
    ({"DEFAULT_FROM_EMAIL": "Postmate <billing@localhost>"}, ["postmate.W031"]),
    ({"EMAIL_VERIFICATION": "optional"}, ["postmate.W032"]),
    ({"ADMIN_MFA_REQUIRED": "false"}, ["postmate.W033"]),
    ({"RESERVATION_SECONDS": "300", "AI_MAX_DURATION_SECONDS": "300"}, ["postmate.E040"]),
    ({"DATABASE_POOL_SIZE": "4"}, ["postmate.W041"]),
    ({"MEDIA_ROOT": "/dev/null/media"}, ["postmate.E042"]),
    ({"STATIC": "never collected"}, ["postmate.E043"]),
]

# A rehearsal has stand-ins for everything, and that is right.
REHEARSAL: Variables = {
    "REHEARSAL": "true",
    "SITE_URL": "https://localhost:8443",
    "EMAIL_URL": "filemail:///tmp/mails",
    "DEFAULT_FROM_EMAIL": "Postmate <billing@localhost>",
    "STRIPE_SECRET_KEY": "sk_test_local_stand_in",
    "STRIPE_WEBHOOK_SECRET": "whsec_local_stand_in",
    "STRIPE_API_BASE": "http://localhost:8001",
    "OPENAI_API_KEY": "local-stand-in",
    "OPENAI_BASE_URL": "http://127.0.0.1:8002/openai/v1",
    "ANTHROPIC_API_KEY": "local-stand-in",
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:8002/anthropic",
}


Answer = tuple[int, str, str]  # exit code, stdout, stderr


def manage(directory: Path, variables: Variables, *arguments: str) -> Answer:
    """`manage.py …` in a process of its own, on `variables` alone, with collected static files."""
    (directory / "deployed_settings.py").write_text(
        "from pathlib import Path\nfrom postmate.settings import *\nSTATIC_ROOT = Path(__file__).parent / 'static'\n"
    )
    _collected(directory)
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments, "--settings", "deployed_settings"],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(directory), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def check_deploy(directory: Path, variables: Variables) -> Answer:
    """`check --deploy` in this process, on the settings that `variables` alone make: a tenth of a process's time.
    With collected static files unless STATIC says otherwise."""
    static = directory / "static" if "STATIC" in variables else _collected(directory)
    stdout, stderr = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch:
        with mock.patch.dict(os.environ, {"PATH": os.environ["PATH"], **variables}, clear=True):
            values = runpy.run_path(str(PROJECT / "postmate" / "settings.py")) | {"STATIC_ROOT": static}
        deployed = UserSettingsHolder(global_settings)
        for name, value in values.items():
            if name.isupper():
                setattr(deployed, name, value)
        patch.setattr(settings, "_wrapped", deployed)
        patch.setattr(checks, "staticfiles_storage", StorageHandler()["staticfiles"])  # Django's keeps its settings
        try:
            call_command("check", deploy=True, stdout=stdout, stderr=stderr)
        except SystemCheckError as error:
            return 1, stdout.getvalue(), stderr.getvalue() + str(error)
    return 0, stdout.getvalue(), stderr.getvalue()


def _collected(directory: Path) -> Path:
    static = directory / "static"
    static.mkdir(exist_ok=True)
    (static / "staticfiles.json").write_text('{"version": "1.1", "paths": {}}')
    return static


def ids_in(stderr: str) -> Counter[str]:
    return Counter(re.findall(r"\(((?:postmate|security)\.[EW]\d+)\)", stderr))


def test_complete_settings_are_clean(tmp_path: Path) -> None:
    for code, stdout, stderr in (
        manage(tmp_path, PRODUCTION, "check", "--deploy"),
        check_deploy(tmp_path, PRODUCTION),
        check_deploy(tmp_path, {**PRODUCTION, **REHEARSAL}),
    ):
        assert (code, stderr) == (0, "")
        assert stdout.startswith("System check identified no issues")


@pytest.mark.parametrize(("defect", "ids"), DEFECTS)
def test_each_defect_is_named(tmp_path: Path, defect: Variables, ids: list[str]) -> None:
    """By its own message and no other."""
    variables = {**PRODUCTION, **defect}
    code, stdout, stderr = check_deploy(tmp_path, variables)
    assert ids_in(stderr) == Counter(ids), stderr
    assert code == any(".E" in id for id in ids)
    for name, value in variables.items():
        if name.endswith(("KEY", "SECRET", "TOKEN")) and len(value) > 10:
            assert value not in stdout + stderr, f"{name} was shown"


def test_a_rehearsal_with_a_live_key_does_nothing_at_all(tmp_path: Path) -> None:
    """Not only when somebody asks: no command of manage.py runs, migrations included."""
    code, _, stderr = manage(tmp_path, {**PRODUCTION, "REHEARSAL": "true"}, "migrate", "--plan")
    assert code != 0
    assert ids_in(stderr) == Counter({"postmate.E010": 1})


def test_every_id_has_its_defect() -> None:
    ids = set(re.findall(r'id="(postmate\.[EW]\d+)"', Path(checks.__file__).read_text()))
    assert len(ids) >= 20
    assert ids == {id for _, ids in DEFECTS for id in ids if id.startswith("postmate.")}


def test_number_of_threads_is_that_of_production() -> None:
    """W041 counts on it."""
    options = re.compile(r'--(?:blocking-threads|threads|concurrency)(?:[ =]|", ")(\d+)')
    files = [PROJECT / "docker-compose.yml", PROJECT / "Dockerfile"]
    found = [int(number) for path in files for number in options.findall(path.read_text())]
    assert found
    assert max(found) <= checks.THREADS
