"""What clients may send: every field with its type and its range, checked before any work begins."""

import dataclasses
import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from tinystories.config import SamplingConfig
from tinystories.serve.errors import ApiError, invalid

MAX_PROMPTS = 256
MAX_CHOICES = 32  # n and best_of
MAX_TOKENS = 32_768
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 256
MAX_IDS = 262_144  # of /detokenize
SUGGESTION_CUTOFF = 0.85  # similarity from which a name counts as misspelled (difflib)

Count = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
TokenLimit = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, kw_only=True):
    """Which usage a stream reports."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingNumbers(msgspec.Struct, kw_only=True):
    """The settings of `SamplingConfig`."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repetition_window: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    penalize_names: bool | None = None

    def overrides(self) -> dict[str, Any]:
        """Return the settings that the request has."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingConfig)}
        if values["top_k"] == -1:  # vLLM's way to switch it off
            values["top_k"] = 0
        return {name: value for name, value in values.items() if value is not None}


class SamplingFields(SamplingNumbers, kw_only=True):
    """What completions and chats have in common. A field that is missing or null has its default."""

    model: Annotated[str, Meta(max_length=256)] | None = None
    n: Count | None = None
    max_tokens: TokenLimit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions. `prompt` is a text, a list of texts, a list of ids, or a list of lists of ids."""

    prompt: Any = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None


class Message(msgspec.Struct, kw_only=True):
    """A turn of a chat. `content` is a text, or a list of {"type": "text", "text": ...}."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: vLLM's `prompt` or llama.cpp's `content`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None  # vLLM's: END in front, as in completions; true by default with `prompt`
    add_special: bool | None = None  # llama.cpp's
    parse_special: bool | None = None  # read <|endoftext|> as END; true by default
    with_pieces: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_IDS)]


# Fields of OpenAI, vLLM and llama.cpp that change the result and are not supported: values that mean "off".
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_predict": (),
    "n_probs": (0,),
    "prediction": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}

MISSING_FIELD = re.compile("Object missing required field `(.*)`")  # msgspec's message
RequestType = TypeVar("RequestType", bound=msgspec.Struct)


def decode_request(body: bytes, request_type: type[RequestType]) -> RequestType:
    """Return the request in a JSON body. `ApiError` (400) that names the field if it is not one.

    Unknown fields are ignored, except those that ask for something that is not supported, and misspelled ones.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid("the body is not valid JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    if issubclass(request_type, SamplingFields):
        check_unsupported(fields, request_type)
    try:
        return msgspec.convert(fields, request_type)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        missing = MISSING_FIELD.fullmatch(message)
        param = path.removesuffix("`") or (missing[1] if missing else None)
        raise invalid(f"{param}: {message}" if param else message, param) from None
    except (RecursionError, OverflowError):
        raise invalid("the body is nested too deeply, or a number in it is too large") from None


def check_unsupported(fields: dict[str, Any], request_type: type[SamplingFields]) -> None:
    """Raise `ApiError` for a field that would change the result and is not supported, or looks misspelled."""
    known = request_type.__struct_fields__
    for name, value in fields.items():
        if name in known or value is None:
            continue
        if name in NEUTRAL_VALUES:
            if value not in NEUTRAL_VALUES[name]:
                raise invalid(f"{name} is not supported; leave it out", name, "unsupported_parameter")
        elif matches := difflib.get_close_matches(name[:64], known, n=1, cutoff=SUGGESTION_CUTOFF):
            raise invalid(f"unknown field {name[:64]!r}; did you mean {matches[0]}?", name[:64], "unknown_parameter")


def check_model(requested: str | None, name: str) -> None:
    """Raise `ApiError` (404) if a request names another model than the one that is served."""
    if requested is not None and requested != name:
        raise ApiError(
            404, f"this server has the model {name!r} only; see /v1/models", param="model", code="model_not_found"
        )
