"""From a request to the sequences to generate: prompts as ids, settings over the model's defaults, all limits."""

import dataclasses
import secrets
from typing import Any

from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.generate.batching import Request, check_text
from tinystories.generate.logit_adjustment import LogitAdjustment
from tinystories.serve.errors import ApiError, invalid
from tinystories.serve.jobs import Generation
from tinystories.serve.model import ServedModel
from tinystories.serve.requests import MAX_PROMPTS, ChatRequest, CompletionRequest, Message, SamplingFields, check_model

DEFAULT_MAX_TOKENS = 400  # as `tinystories generate`
MAX_REQUEST_TOKENS = 262_144  # prompts and max_tokens of all sequences of a request


@dataclasses.dataclass(kw_only=True)
class Plan:
    """What a request asks for."""

    generations: list[Generation]  # best_of (or n) for each prompt, in order
    n: int  # choices returned for each prompt
    best_of: int
    n_prompt_tokens: int
    with_logprobs: bool
    is_stream: bool
    with_usage: bool  # a chunk with the usage at the end of the stream
    with_running_usage: bool  # in every chunk


@dataclasses.dataclass(kw_only=True)
class Prompt:
    """A prompt: its text if it was given as text, the ids to continue, and the index of the first id of its own."""

    text: str | None
    context: list[int]
    first: int


def plan_completion(request: CompletionRequest, model: ServedModel) -> Plan:
    """Return the plan of a completion. `ApiError` (400, 404) for what is wrong or not supported."""
    check_model(request.model, model.name)
    n = request.n or 1
    best_of = request.best_of or n
    if best_of < n:
        raise invalid(f"best_of={best_of} must be at least n={n}", "best_of")
    if best_of > n and request.stream:
        raise invalid("best_of > n cannot stream: which are the best is known at the end", "best_of")
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise invalid("max_tokens must be at least 1, or 0 with echo", "max_tokens")
    score_only = request.max_tokens == 0
    prompts = read_prompts(request.prompt, model, n_ctx=model.n_ctx + score_only)
    n_top = request.logprobs
    generations = build_generations(request, model, prompts, best_of, request.max_tokens)
    for generation, prompt in zip(generations, [p for p in prompts for _ in range(best_of)], strict=True):
        generation.n_top = 0 if n_top is None and best_of > n else n_top
        generation.score_only = score_only
        if echo and n_top is not None:
            generation.echo_from = prompt.first
        elif echo:
            generation.echo = model.plain_text(prompt.context) if prompt.text is None else prompt.text
    return build_plan(request, generations, prompts, n=n, best_of=best_of, with_logprobs=n_top is not None)


def plan_chat(request: ChatRequest, model: ServedModel) -> Plan:
    """Return the plan of a chat. `ApiError` (400, 404) for what is wrong or not supported."""
    check_model(request.model, model.name)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise invalid("max_tokens and max_completion_tokens differ; leave one out", "max_tokens")
    max_tokens = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    if max_tokens == 0:
        raise invalid("max_tokens must be at least 1", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    prompt = encode_text(join_messages(request.messages), model, model.n_ctx, "messages")
    n = request.n or 1
    generations = build_generations(request, model, [prompt], n, max_tokens)
    for generation in generations:
        generation.n_top = (request.top_logprobs or 0) if request.logprobs else None
    return build_plan(request, generations, [prompt], n=n, best_of=n, with_logprobs=bool(request.logprobs))


def build_plan(
    request: SamplingFields,
    generations: list[Generation],
    prompts: list[Prompt],
    *,
    n: int,
    best_of: int,
    with_logprobs: bool,
) -> Plan:
    """Return the plan; `ApiError` if it is more work than one request may ask for."""
    n_tokens = sum(generation.n_tokens for generation in generations)
    if n_tokens > MAX_REQUEST_TOKENS:
        raise invalid(
            f"this request may cost {n_tokens:,} tokens (prompts and max_tokens of all choices), more than"
            f" {MAX_REQUEST_TOKENS:,}; send fewer prompts, or smaller n or max_tokens",
            "max_tokens",
        )
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    return Plan(
        generations=generations,
        n=n,
        best_of=best_of,
        n_prompt_tokens=sum(len(prompt.context) for prompt in prompts),
        with_logprobs=with_logprobs,
        is_stream=bool(request.stream),
        with_usage=bool(options and options.include_usage),
        with_running_usage=bool(options and options.continuous_usage_stats),
    )


def build_generations(
    request: SamplingFields, model: ServedModel, prompts: list[Prompt], n: int, max_tokens: int | None
) -> list[Generation]:
    """Return n sequences for each prompt. Sequence j of a prompt has number j, like story j of the command line."""
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    bias = read_bias(request.logit_bias or {}, model.vocab_size)
    presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
    try:
        overrides = request.overrides()
        settings = dataclasses.replace(model.sampling, **overrides) if overrides else model.sampling
        for text in stop:
            check_text(text, "a stop string")
    except UserError as error:
        raise invalid(str(error)) from None
    generations: list[Generation] = []
    for prompt in prompts:
        seed = secrets.randbits(32) if request.seed is None else request.seed
        for number in range(n):
            story = Request(
                prompt=prompt.text or "",
                settings=settings,
                max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max(1, max_tokens),
                seed=seed,
                number=number,
                stop=stop,
                ignore_end=bool(request.ignore_eos),
            )
            adjustment = None
            if bias or presence or frequency:
                adjustment = LogitAdjustment(model.vocab_size, bias, presence, frequency)
            generations.append(
                Generation(index=len(generations), request=story, context=prompt.context, adjustment=adjustment)
            )
    return generations


def read_bias(logit_bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    """Return the biases by id; `ApiError` for a key that is not an id of the vocabulary."""
    bias: dict[int, float] = {}
    for key, value in logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(f"logit_bias: {key[:20]!r} is not a token id from 0 to {vocab_size - 1}", "logit_bias")
        bias[int(key)] = value
    return bias


def read_prompts(value: Any, model: ServedModel, n_ctx: int) -> list[Prompt]:
    """Return the prompts in any of the four forms; null is an empty text, from which the model begins a story."""
    if value is None or isinstance(value, str):
        return [encode_text(value or "", model, n_ctx, "prompt")]
    if not isinstance(value, list):
        raise invalid("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", "prompt")
    if not value:
        raise invalid("prompt is an empty list", "prompt")
    if is_id(value[0]):
        return [check_ids(value, model, n_ctx, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise invalid(f"{len(value)} prompts are more than {MAX_PROMPTS}", "prompt")
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(encode_text(item, model, n_ctx, f"prompt[{i}]"))
        elif isinstance(item, list):
            prompts.append(check_ids(item, model, n_ctx, f"prompt[{i}]"))
        else:
            raise invalid(f"prompt[{i}] must be a text or a list of token ids", "prompt")
    return prompts


def is_id(value: object) -> bool:
    """Whether a JSON value is an integer (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def encode_text(text: str, model: ServedModel, n_ctx: int, name: str) -> Prompt:
    """Return a text as END and its ids. Special tokens that are spelled out in it are ordinary text."""
    try:
        check_text(text, name)
    except UserError as error:
        raise invalid(str(error), "prompt") from None
    prompt = Prompt(text=text, context=[model.tokenizer.end_id, *model.tokenizer.encode(text)], first=1)
    check_length(prompt, n_ctx, name, f" ({END} and the text)")
    return prompt


def check_ids(ids: list[Any], model: ServedModel, n_ctx: int, name: str) -> Prompt:
    """Return a prompt of ids, which is taken exactly."""
    if not ids:
        raise invalid(
            f"{name} is empty; a prompt of ids needs at least one, such as {model.tokenizer.end_id} ({END})", "prompt"
        )
    prompt = Prompt(text=None, context=ids, first=0)
    check_length(prompt, n_ctx, name, "")
    for i, token in enumerate(ids):
        if not is_id(token) or not 0 <= token < model.vocab_size:
            raise invalid(f"{name}[{i}] is not a token id from 0 to {model.vocab_size - 1}", "prompt")
    return prompt


def check_length(prompt: Prompt, n_ctx: int, name: str, what: str) -> None:
    """Raise `ApiError` for a prompt that is longer than the context."""
    if len(prompt.context) > n_ctx:
        raise ApiError(
            400,
            f"{name} has {len(prompt.context):,} tokens{what}, more than the {n_ctx:,} of the context; shorten it",
            param=name.partition("[")[0],
            code="context_length_exceeded",
        )


def join_messages(messages: list[Message]) -> str:
    """Return the text that a chat continues: the last user message begins the story, after the turns before it.

    The model has no chat template. An answer continues its message, so the two are joined as they are; a message after
    an answer begins a new line. System messages are instructions, which a model of stories cannot follow: left out.
    """
    turns = [(message.role, read_content(message, i)) for i, message in enumerate(messages)]
    turns = [(role, text) for role, text in turns if role in ("user", "assistant")]
    if not turns or turns[-1][0] != "user":
        raise invalid("the last message must be the user's: it is the beginning of the story", "messages")
    return "".join(f"\n{text}" if i and role == "user" else text for i, (role, text) in enumerate(turns))


def read_content(message: Message, index: int) -> str:
    """Return the text of a message."""
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise invalid(f"messages[{index}].content must be a text or a list of text parts", "messages")
