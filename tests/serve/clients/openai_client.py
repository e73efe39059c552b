"""What openai-python makes of a server: `openai_client.py CHECK URL` prints the facts of one check as JSON.

Runs in the environment of the clients, which has openai but not tinystories.
"""

import asyncio
import json
import sys
import time
from typing import Any

import openai

PROMPT = "The cat"


def connect(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **({"api_key": "none", "max_retries": 0} | options))


def stream_and_whole(url: str) -> dict[str, Any]:
    """The same story whole and streamed, with log-probabilities and usage."""
    client = connect(url)
    fields: dict[str, Any] = {"model": "test-model", "prompt": PROMPT, "seed": 7, "max_tokens": 20, "logprobs": 2}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    return {
        "model": whole.model,
        "object": whole.object,
        "text": whole.choices[0].text,
        "finish_reason": whole.choices[0].finish_reason,
        "logprobs": whole.choices[0].logprobs.model_dump(),
        "usage": whole.usage.model_dump(exclude_none=True),
        "streamed_text": "".join(choice.text for choice in choices),
        "streamed_reasons": [choice.finish_reason for choice in choices if choice.finish_reason],
        "streamed_tokens": [token for entry in logprobs for token in entry.tokens or []],
        "streamed_token_logprobs": [value for entry in logprobs for value in entry.token_logprobs or []],
        "streamed_offsets": [offset for entry in logprobs for offset in entry.text_offset or []],
        "usages": [chunk.usage.model_dump(exclude_none=True) if chunk.usage else None for chunk in chunks],
        "last_choices": chunks[-1].choices,
        "ids": sorted({chunk.id[:5] for chunk in chunks}),
        "n_ids": len({chunk.id for chunk in chunks}),
    }


def prompts(url: str) -> dict[str, Any]:
    """All four forms of prompts, several choices, and the model's list."""
    client = connect(url)
    fields: dict[str, Any] = {"model": "test-model", "max_tokens": 3, "seed": 1}
    forms: list[Any] = [PROMPT, [PROMPT, "A dog"], [5, 6, 7], [[5, 6, 7], [8]]]
    answers = [client.completions.create(prompt=prompt, n=2, **fields) for prompt in forms]
    return {
        "indices": [[choice.index for choice in answer.choices] for answer in answers],
        "models": [model.id for model in client.models.list()],
        "model": client.models.retrieve("test-model").id,
    }


def chat(url: str) -> dict[str, Any]:
    """A chat, whole and streamed."""
    client = connect(url)
    fields: dict[str, Any] = {"model": "test-model", "seed": 7, "max_completion_tokens": 12}
    fields |= {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields)
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    text = client.completions.create(model="test-model", prompt=PROMPT, seed=7, max_tokens=12)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    tokens = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    return {
        "role": whole.choices[0].message.role,
        "streamed_roles": [choice.delta.role for choice in choices if choice.delta.role],
        "content": whole.choices[0].message.content,
        "completion": text.choices[0].text,
        "streamed": "".join(choice.delta.content or "" for choice in choices),
        "finish_reasons": [whole.choices[0].finish_reason, choices[-1].finish_reason],
        "tokens": [entry.token for entry in logprobs.content or []],
        "streamed_tokens": [entry.token for entry in tokens],
        "top": [len(entry.top_logprobs) for entry in logprobs.content or []],
    }


def errors(url: str) -> dict[str, Any]:
    """The type of exception, status, code and param for mistakes."""
    client = connect(url, api_key="a-long-secret")
    fields: dict[str, Any] = {"model": "test-model", "prompt": PROMPT, "max_tokens": 3}
    return {
        "range": describe_error(lambda: client.completions.create(**fields | {"temperature": -1})),
        "unsupported": describe_error(lambda: client.completions.create(**fields, suffix="The end.")),
        "misspelled": describe_error(lambda: client.completions.create(**fields, extra_body={"temprature": 1})),
        "long": describe_error(lambda: client.completions.create(**fields | {"prompt": "cat " * 200})),
        "model": describe_error(lambda: client.completions.create(**fields | {"model": "gpt-4"})),
        "path": describe_error(lambda: client.embeddings.create(model="test-model", input="a")),
        "tools": describe_error(
            lambda: client.chat.completions.create(
                model="test-model",
                messages=[{"role": "user", "content": PROMPT}],
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            )
        ),
        "key": describe_error(lambda: connect(url).completions.create(**fields)),
        "origin": describe_error(
            lambda: client.completions.create(**fields, extra_headers={"Origin": "https://evil.example"})
        ),
    }


def describe_error(call: Any) -> list[Any]:
    """The class of exception that a call raises, with status, code and param."""
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]
    except openai.APIError as error:
        return [type(error).__name__, None, error.code, error.param]
    return ["none"]


def refused(url: str) -> dict[str, Any]:
    """A full server, without retries."""
    return {"error": describe_error(lambda: connect(url).completions.create(model="test-model", prompt=PROMPT))}


def retries(url: str) -> dict[str, Any]:
    """A full server, with the retries of the client."""
    started_at = time.monotonic()
    answer = connect(url, max_retries=5).completions.create(model="test-model", prompt=PROMPT, max_tokens=3)
    return {"finish_reason": answer.choices[0].finish_reason, "seconds": time.monotonic() - started_at}


def deadline(url: str) -> dict[str, Any]:
    """Requests that take too long, whole and streamed; retries are allowed but must not happen."""
    client = connect(url, max_retries=2)
    fields: dict[str, Any] = {"model": "test-model", "prompt": PROMPT}
    return {
        "whole": describe_error(lambda: client.completions.create(**fields)),
        "stream": describe_error(lambda: list(client.completions.create(**fields, stream=True))),
    }


def cancel(url: str) -> dict[str, Any]:
    """Three clients that leave: from a stream, from one in asyncio, and from a request that waits for its answer."""
    fields: dict[str, Any] = {"model": "test-model", "prompt": PROMPT, "max_tokens": 10_000, "ignore_eos": True}
    ignore_eos = {"extra_body": {"ignore_eos": fields.pop("ignore_eos")}}
    stream = connect(url).completions.create(**fields, **ignore_eos, stream=True)
    texts = [next(iter(stream)).choices[0].text]
    stream.close()

    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with await client.completions.create(**fields, **ignore_eos, stream=True) as chunks:
            async for chunk in chunks:
                texts.append(chunk.choices[0].text)
                break
        try:
            await asyncio.wait_for(client.completions.create(**fields, **ignore_eos), timeout=1)
        except TimeoutError:
            texts.append("timeout")

    asyncio.run(leave())
    return {"texts": texts}


CHECKS = {
    check.__name__: check for check in (stream_and_whole, prompts, chat, errors, refused, retries, deadline, cancel)
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(CHECKS[sys.argv[1]](sys.argv[2])))
