"""A client that a generator makes of the OpenAPI document has every call, and they work."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from accounts import api_keys
from accounts.models import ApiKey, User
from billing import ledger
from tests.environment import BILLING_SECRET
from tests.servers import PROJECT, Server

PACKAGE = "generated_postmate_client"


@pytest.fixture
def client_package(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Made of the document as the server gives it, in the way of docs/API.md. A warning, which is how the generator
    says that it leaves something out, is an error."""
    (tmp_path / "config.yml").write_text("post_hooks: []\n")  # which would only format the files
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", f"{web.url}/api/v1/openapi.json"]
    command += ["--meta", "none", "--output-path", str(tmp_path / PACKAGE), "--config", str(tmp_path / "config.yml")]
    made = subprocess.run([*command, "--fail-on-warning"], cwd=PROJECT, env=os.environ, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(tmp_path)
    return PACKAGE


def test_a_generated_client_has_every_call_and_holds_settles_and_releases(
    client_package: str, web: Server, alice: User
) -> None:
    document = httpx2.get(f"{web.url}/api/v1/openapi.json").json()
    calls = {
        operation["operationId"]: operation["tags"][0].lower()
        for methods in document["paths"].values()
        for operation in methods.values()
    }
    assert len(calls) > 10

    def call(name: str, *path: Any, client: Any, **arguments: Any) -> Any:
        module = importlib.import_module(f"{client_package}.api.{calls[name]}.{name}")
        answer = module.sync_detailed(*path, client=client, **arguments)
        assert answer.status_code in (200, 201), answer.content
        return answer.parsed

    for name, tag in calls.items():
        importlib.import_module(f"{client_package}.api.{tag}.{name}")

    client_module = importlib.import_module(client_package)
    models = importlib.import_module(f"{client_package}.models")
    service = client_module.AuthenticatedClient(web.url, BILLING_SECRET)
    about = {
        "user_id": alice.pk,
        "provider": models.Provider.OPENAI,
        "model": "gpt-6-luna",
        "input_tokens": 400,
        "max_output_tokens": 600,
    }

    assert call("make_quote", client=service, body=models.QuoteRequest(**about)).max_billable_tokens == 1_500
    held = []
    account_id = ledger.get_account(user_id=alice.pk).pk
    assert call("get_account_balance", account_id, client=service).user_id == alice.pk
    for number in range(3):
        body = models.ReservationRequest(operation_type=models.OperationType.CHAT, **about)
        outcome = call("reserve", client=service, body=body, idempotency_key=f"hold-{number}")
        held.append(outcome.usage.usage_id)
    assert call("get_balance", alice.pk, client=service).reserved_tokens == 4_500

    used = models.SettleRequest(input_tokens=400, output_tokens=250)
    assert call("settle", held[0], client=service, body=used).usage.billable_tokens == 975
    assert call("release", held[1], client=service).usage.status == "failed"
    why = models.ReleaseRequest(error_message="The provider did not answer.")
    assert call("release", held[2], client=service, body=why).usage.error_message == why.error_message
    assert call("get_balance", alice.pk, client=service).to_dict() == {
        "account_id": account_id,
        "user_id": alice.pk,
        "balance_tokens": 9_025,
        "reserved_tokens": 0,
        "available_tokens": 9_025,
        "status": "active",
        "lots": [],
    }
    assert len(call("list_usage", alice.pk, client=service, limit=2).items) == 2

    _, key = api_keys.make_key(user_id=alice.pk, name="Generated", scopes=ApiKey.Scope.values)
    person = client_module.AuthenticatedClient(web.url, key)
    assert call("get_own_balance", client=person).available_tokens == 9_025
    [debit, *_] = call("list_own_transactions", client=person).items
    assert debit.amount_tokens == -975
