"""What `make run-production` has set up when it says that it runs, and what a start without settings says."""

import re
import stat
import subprocess
import sys
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.production.conftest import SHELL, Production
from tests.servers import PROJECT

LIVE_KEY = {"STRIPE_SECRET_KEY": "sk_live_0123456789abcdefghijklmnopqrstuvwxyz", "STRIPE_WEBHOOK_SECRET": "whsec_0"}


@pytest.mark.parametrize("kind", ["web", "live"])
def test_start_without_settings_lists_what_is_missing(kind: str) -> None:
    command = [sys.executable, "-m", "postmate.serving", kind, "--port", "1"]
    refused = subprocess.run(
        command, cwd=PROJECT, env=SHELL | {"DEBUG": "false"}, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    for name in ("SECRET_KEY", "SITE_URL", "DATABASE_URL", "REDIS_URL", "EMAIL_URL", "STRIPE_SECRET_KEY"):
        assert re.search(rf"^  {name}\b", refused.stderr, re.M), refused.stderr
    assert "Traceback" not in refused.stderr


def test_settings_leave_nothing_to_wish_for(production: Production) -> None:
    secret = production.secret("SECRET_KEY")
    checked = production.run("manage", "check", "--deploy", "--fail-level=WARNING")
    assert checked.returncode == 0, checked.stderr
    assert "no issues" in checked.stdout
    assert production.secret("SECRET_KEY") == secret


def test_live_key_in_a_rehearsal_is_refused(production: Production) -> None:
    checked = production.run("manage", "check", "--deploy", env=production.environment | LIVE_KEY)
    assert checked.returncode == 1
    assert "REHEARSAL is on" in checked.stderr


def test_visitors_get_https_and_are_told_that_it_is_a_rehearsal(production: Production) -> None:
    with production.http() as http:
        page = http.get("/")
        assert page.status_code == 200
        assert "no real money moves here" in page.text
        assert page.headers["strict-transport-security"]
        [styles] = re.findall(r'href="(/static/css/postmate\.[0-9a-f]{12}\.css)"', page.text)
        file = http.get(styles, headers={"Accept-Encoding": "gzip"})
        assert (file.status_code, file.headers["content-encoding"]) == (200, "gzip")
        assert "immutable" in file.headers["cache-control"]
        assert http.get("/dev/mails/").status_code == 404
    plain = httpx2.get(f"http://localhost:{production.port + 1}/tokens/", follow_redirects=False, timeout=30)
    assert plain.status_code in (301, 308)
    assert urlsplit(plain.headers["location"]).scheme == "https"


def test_secrets_are_for_their_owner_alone(production: Production) -> None:
    for name in ("SECRET_KEY", "BILLING_SECRET"):
        file = production.directory / "secrets" / name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(file.read_text()) >= 50
    assert production.secret("SECRET_KEY") != production.secret("BILLING_SECRET")


def test_restart_that_cannot_succeed_changes_nothing(production: Production) -> None:
    """New settings are looked over before anything is stopped."""
    file, before = production.directory / "secrets" / "BILLING_SECRET", production.processes()
    secret = file.read_text()
    try:
        file.write_text("weak")
        refused = production.run("restart")
    finally:
        file.write_text(secret)
    assert refused.returncode == 1
    assert "Nothing was restarted" in refused.stderr
    assert production.processes() == before
    with production.http() as http:
        assert http.get("/").status_code == 200


def test_it_runs_once_on_one_data_directory(production: Production) -> None:
    again = production.run(env=production.environment | {"PORT": str(production.port + 20)})
    assert again.returncode == 1
    assert f"{production.url}  (process " in again.stderr
    nowhere = production.run(
        "restart", env=production.environment | {"POSTMATE_DATA_DIR": str(production.directory / "x")}
    )
    assert nowhere.returncode == 1
    assert "Nothing runs" in nowhere.stderr
