"""The HTTP API under /api/v1/ and its page at /api/docs."""

from functools import partial
from typing import Any, cast

from django.urls import URLPattern, path, re_path
from django.views.decorators.http import require_GET
from ninja import NinjaAPI, Swagger
from ninja.openapi.schema import OpenAPISchema
from ninja.openapi.views import openapi_view
from ninja.operation import Operation

from billing.api import people, services
from billing.api.access import View, api_view, not_found
from billing.api.problems import add_problem_handlers, complete_document
from billing.api.schemas import StrictJSONParser

DESCRIPTION = """
Balances, quotes, reservations and usage, for the platform's other servers; and for people's own programs, what they
have and what became of it.

Amounts are whole tokens. Every refusal is an `application/problem+json` document with a `code` for programs and a
`detail` for people, also for an unknown address (404) and for a method that an address does not take (405).
"""


class BillingAPI(NinjaAPI):
    def get_openapi_operation_id(self, operation: Operation) -> str:
        return operation.view_func.__name__  # what generated clients call their functions

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        document = super().get_openapi_schema(**options)
        complete_document(document)
        return document


api = BillingAPI(
    title="Postmate token billing",
    version="1",
    description=DESCRIPTION.strip(),
    docs=Swagger(settings={"validatorUrl": None}),  # else the page asks Swagger's own server for a badge
    docs_url=None,  # it stands at /api/docs, above the version
    docs_decorator=require_GET,
    parser=StrictJSONParser(),
)
add_problem_handlers(api)
api.add_router("", services.router)
api.add_router("/me", people.router)

patterns, app_name, namespace = api.urls
for pattern in patterns:
    pattern.callback = api_view(cast(View, pattern.callback))

# For `path("api/v1/", api_urls)` and, beside it, `path("api/", include(docs_urlpatterns))`.
api_urls = ([*patterns, re_path("", not_found)], app_name, namespace)
docs_urlpatterns: list[URLPattern] = [path("docs", partial(openapi_view, api=api), name="api-docs")]
