"""Of MLflow: one request to a server with its own credentials, and with a time limit of our own."""

from __future__ import annotations

from typing import Any

from passes.private.part import part


def post(uri: str, endpoint: str, timeout_s: float, json: dict[str, Any]) -> Any:
    """The answer of the server at ``uri``, a ``requests.Response`` of any status; raises ``MlflowException`` where none
    comes within ``timeout_s``.  MLflow's client would try again for minutes."""
    credentials = part("mlflow.utils.credentials:get_default_host_creds")(uri)
    ask = part("mlflow.utils.rest_utils:http_request")
    return ask(credentials, endpoint, "POST", max_retries=0, timeout=timeout_s, raise_on_status=False, json=json)
