"""GET /openapi.json: the schema of the API, from the types of the requests."""

import importlib.metadata
from typing import Any

import msgspec

from tinystories.serve.requests import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

REF = "#/components/schemas/{name}"
ERROR_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
INTEGER, STRING, NUMBER = {"type": "integer"}, {"type": "string"}, {"type": "number"}
NULL = {"type": "null"}


def build_schema() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    _, components = msgspec.json.schema_components(
        [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest], ref_template=REF
    )
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    components["CompletionRequest"]["properties"]["prompt"] = {
        "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
        "default": None,
        "anyOf": [
            STRING,
            {"type": "array", "items": STRING, "minItems": 1, "maxItems": MAX_PROMPTS},
            ids,
            {"type": "array", "items": ids, "minItems": 1, "maxItems": MAX_PROMPTS},
            NULL,
        ],
    }
    text_part = object_schema({"type": {"const": "text"}, "text": STRING})
    components["Message"]["properties"]["content"] = {
        "anyOf": [STRING, {"type": "array", "items": text_part}, NULL],
        "default": None,
    }
    components |= response_schemas()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tinystories serve",
            "description": "Stories over HTTP, as OpenAI's clients ask for them.",
            "version": importlib.metadata.version("tinystories-gpt"),
        },
        "paths": build_paths(),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def build_paths() -> dict[str, Any]:
    """Return the operations."""
    name = {"name": "name", "in": "path", "required": True, "schema": STRING}
    return {
        "/v1/completions": {"post": operation("Continue a prompt", "Completion", "CompletionRequest", streams=True)},
        "/v1/chat/completions": {"post": operation("Continue a chat", "ChatCompletion", "ChatRequest", streams=True)},
        "/v1/models": {"get": operation("List the model", "ModelList")},
        "/v1/models/{name}": {"get": operation("Describe a model", "Model") | {"parameters": [name]}},
        "/tokenize": {"post": operation("Encode a text", "Tokens", "TokenizeRequest")},
        "/detokenize": {"post": operation("Decode token ids", "Text", "DetokenizeRequest")},
        "/tokenizer_info": {"get": operation("Name the special tokens", "TokenizerInfo")},
        "/health": {"get": operation("Say whether the server works", "Health") | {"security": []}},
        "/healthz": {"get": operation("Say whether the server works", "Health") | {"security": []}},
        "/metrics": {"get": {"summary": "Report metrics", "responses": metrics_responses()}},
        "/openapi.json": {
            "get": {"summary": "Return this document", "responses": {"200": json_body({"type": "object"}, "")}}
        },
    }


def operation(summary: str, response: str, request: str | None = None, *, streams: bool = False) -> dict[str, Any]:
    """Return an operation with its bodies."""
    success = json_body(reference(response), "Success")
    if streams:
        success["content"]["text/event-stream"] = {"schema": object_schema({"data": STRING})}  # of an event
    responses = {"200": success} | {str(status): json_body(reference("Error"), "Error") for status in ERROR_STATUSES}
    if response == "Health":
        responses["503"] = json_body(reference("Health"), "The server does not work, or is shutting down")
    result: dict[str, Any] = {"summary": summary, "responses": responses}
    if request is not None:
        result["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference(request)}}}
    return result


def reference(name: str) -> dict[str, str]:
    """Return a reference to a component."""
    return {"$ref": REF.format(name=name)}


def json_body(schema: dict[str, Any], description: str) -> dict[str, Any]:
    """Return a JSON response."""
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def metrics_responses() -> dict[str, Any]:
    """Return the responses of /metrics."""
    text = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": STRING}}}
    return {"200": text, "401": json_body(reference("Error"), "Error"), "403": json_body(reference("Error"), "Error")}


def object_schema(properties: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the schema of an object, all of whose properties are required."""
    return {"type": "object", "properties": properties, "required": list(properties), **options}


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that also allows null."""
    return {"anyOf": [schema, NULL]}


def array(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def response_schemas() -> dict[str, Any]:
    """Return the schemas of all answers."""
    finish_reason = {"enum": ["stop", "length"]}
    usage = object_schema({"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER})
    logprobs = object_schema(
        {
            "tokens": array(STRING),
            "token_logprobs": array(nullable(NUMBER)),
            "top_logprobs": array(nullable({"type": "object", "additionalProperties": NUMBER})),
            "text_offset": array(INTEGER),
        }
    )
    choice = {"index": INTEGER, "finish_reason": finish_reason}
    message = object_schema({"role": {"const": "assistant"}, "content": STRING})
    envelope = {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING, "usage": usage}
    model = {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING}
    error = {"message": STRING, "type": STRING, "param": nullable(STRING), "code": nullable(STRING)}
    counts = {"slots": INTEGER, "busy": INTEGER, "queued": INTEGER}
    completion_choice = object_schema(choice | {"text": STRING, "logprobs": nullable(logprobs)})
    chat_choice = object_schema(choice | {"message": message, "logprobs": nullable({"type": "object"})})
    return {
        "Completion": object_schema(envelope | {"choices": array(completion_choice)}),
        "ChatCompletion": object_schema(envelope | {"choices": array(chat_choice)}),
        "Model": object_schema(model),
        "ModelList": object_schema({"object": {"const": "list"}, "data": array(reference("Model"))}),
        "Tokens": object_schema({"tokens": {"type": "array"}, "count": INTEGER, "max_model_len": INTEGER}),
        "Text": object_schema({"prompt": STRING, "content": STRING}),
        "TokenizerInfo": object_schema({"bos_token": STRING, "eos_token": STRING, "pad_token": STRING}),
        "Health": object_schema({"status": STRING} | counts),
        "Error": object_schema({"error": object_schema(error)}),
    }
