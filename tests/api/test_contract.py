"""The OpenAPI document and the API agree: schemathesis makes up requests from the one and sends them to the other."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import cast

import pytest
import schemathesis
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from hypothesis import HealthCheck, settings
from pytest_django.fixtures import Settings
from schemathesis import Case
from schemathesis.checks import CHECKS, CheckFunction
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.python._constants.orchestrator import make_constants_value_source

from accounts import api_keys
from accounts.models import ApiKey, User
from billing import ledger
from tests.environment import BILLING_SECRET

DOCUMENT = "/api/v1/openapi.json"


@dataclass(frozen=True, slots=True)
class Caller:
    user_id: int
    token: str
    usage_id: int
    account_id: int
    turns: Iterator[int] = field(default_factory=count)

    def credential_for(self, case: Case) -> str:
        return self.token if "/me/" in case.operation.path else BILLING_SECRET

    def aim(self, case: Case) -> None:
        """Made-up numbers name nobody: send what is sound for somebody who exists, and for a model on sale."""
        if case.meta is None or not case.meta.generation.mode.is_positive:
            return
        for name, value in (("user_id", self.user_id), ("account_id", self.account_id), ("usage_id", self.usage_id)):
            if name in case.path_parameters:
                case.path_parameters[name] = value
        body = case.body
        if isinstance(body, dict) and case.operation.path.endswith(("/quotes", "/reservations", "/usage")):
            body = case.body = body | {"user_id": self.user_id, "account_id": None}
            body |= {"actor_id": None} if "actor_id" in body else {}
            body |= {"provider": "openai", "model": "gpt-image-2" if body.get("image_count") else "gpt-6-luna"}
        if isinstance(body, dict) and next(self.turns) % 2:
            # Few made-up counts go together.
            if case.operation.path.endswith(("/usage", "/settle")):
                body |= {"input_tokens": 5, "output_tokens": 5, "reasoning_tokens": 0}
            if case.operation.path.endswith("/reservations"):
                body |= {"input_tokens": 5, "max_output_tokens": 5}
                body.pop("tokens", None)


# As WSGI servers call it.
schema = schemathesis.openapi.from_wsgi(DOCUMENT, get_wsgi_application())


@pytest.fixture(autouse=True)
def _api_within_the_tests_transaction(db: None, settings: Settings) -> Iterator[None]:
    settings.API_USER_CALLS_PER_MINUTE = 10**6
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    yield
    for signal in (request_started, request_finished):
        signal.connect(close_old_connections)


@pytest.fixture
def caller(alice: User) -> Caller:
    """Alice, with tokens to spend and a key, and her reservation."""
    ledger.add_tokens(user_id=alice.pk, tokens=10**9, type="bonus", description="Test", idempotency_key="contract")
    _, token = api_keys.make_key(user_id=alice.pk, name="Contract", scopes=ApiKey.Scope.values)
    held = ledger.reserve_tokens(
        user_id=alice.pk,
        tokens=100,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        idempotency_key="contract",
        lifetime_seconds=600,
    )
    assert held.usage_id is not None
    return Caller(alice.pk, token, held.usage_id, held.account_id)


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, set[int]]]:
    """The statuses that each call answered with. Every call must have accepted something, or nothing was tried."""
    answers: dict[str, set[int]] = defaultdict(set)
    yield answers
    assert {call for call, statuses in answers.items() if not statuses & {200, 201}} == set()


def send(case: Case, caller: Caller, answers: dict[str, set[int]]) -> None:
    """One request, and what the document says of its answer."""
    caller.aim(case)
    # Rules between two fields, such as reasoning ≤ output, are no part of a schema: what breaks them is a 400.
    excluded = ["positive_data_acceptance"]
    assert case.meta is not None
    headers = case.meta.components.get(ParameterLocation.HEADER)
    if headers is not None and headers.mode.is_negative:
        # The wrong credential that was made up is replaced by the right one, or nothing would get past the door.
        excluded.append("negative_data_rejection")
    response = case.call_and_validate(
        headers={"Authorization": f"Bearer {caller.credential_for(case)}"},
        excluded_checks=[cast(CheckFunction, CHECKS.get_one(name)) for name in excluded],
    )
    answers[f"{case.operation.method} {case.operation.path}"].add(response.status_code)


MANY = settings(
    derandomize=True,
    database=None,
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("call", [operation.label for calls in schema.values() for operation in calls.values()])
def test_document_and_api_agree(call: str, caller: Caller, answers: dict[str, set[int]]) -> None:
    """Rows 56 and 57, whatever is sent: no 5xx, and no status, content type, header or body beyond the document."""
    # What `@schema.parametrize()` does when it collects, which takes seconds, in every process. Nor do its cases have
    # ids of their own.
    operation = schema.find_operation_by_label(call)
    assert operation is not None
    constants = make_constants_value_source(schema)
    send_many = build_operation_test(
        config=schema.config,
        operation=operation,
        test_func=send,
        given_kwargs={},
        feedback=FeedbackSources(constants_value_source=constants),
        explicit_settings=MANY,
    )
    send_many(caller=caller, answers=answers)
