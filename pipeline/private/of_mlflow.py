"""Of MLflow: a request with a time limit of ours and the server's credentials; who checks what a model is asked."""

from __future__ import annotations

from typing import Any

from passes.private.part import attribute, part


def post(uri: str, endpoint: str, timeout_s: float, json: dict[str, Any]) -> Any:
    """The answer of the server at ``uri``, a ``requests.Response`` of any status; raises ``MlflowException`` where none
    comes within ``timeout_s``.  MLflow's client would try again for minutes."""
    credentials = part("mlflow.utils.credentials:get_default_host_creds")(uri)
    ask = part("mlflow.utils.rest_utils:http_request")
    return ask(credentials, endpoint, "POST", max_retries=0, timeout=timeout_s, raise_on_status=False, json=json)


def chat_signature() -> Any:
    """The signature of MLflow's chat models with ``seed`` beside it, marked as one that the model itself checks: MLflow
    would make a table of a request, drop what it does not know, and dump the whole signature where something is wrong.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
    from mlflow.types.schema import ColSpec, DataType, Schema

    seed = ColSpec(name="seed", type=DataType.long, required=False)
    signature = ModelSignature(Schema([*CHAT_MODEL_INPUT_SCHEMA.inputs, seed]), CHAT_MODEL_OUTPUT_SCHEMA)
    attribute(signature, "_is_signature_from_type_hint")
    signature._is_signature_from_type_hint = True
    return signature
