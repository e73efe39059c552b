"""What litellm makes of a server: `litellm_client.py URL` prints the facts as JSON."""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is downloaded

import litellm

litellm.suppress_debug_info = True


def main(url: str) -> dict[str, Any]:
    server: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    text: dict[str, Any] = server | {"model": "text-completion-openai/test-model", "prompt": "The cat", "seed": 7}
    messages = [{"role": "user", "content": "The cat"}]
    chat: dict[str, Any] = server | {"model": "openai/test-model", "messages": messages, "seed": 7}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = litellm.text_completion(**text, max_tokens=12)
    chunks = list(litellm.text_completion(**text, max_tokens=12, **usage))
    reply = litellm.completion(**chat, max_tokens=12)
    parts = list(litellm.completion(**chat, max_tokens=12, **usage))
    rebuilt = litellm.stream_chunk_builder(parts, messages=messages)
    return {
        "text": whole.choices[0].text,
        "streamed_text": "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices),
        "usage": whole.usage.completion_tokens,
        "chat": reply.choices[0].message.content,
        "streamed_chat": rebuilt.choices[0].message.content,
        "chat_usage": [reply.usage.completion_tokens, rebuilt.usage.completion_tokens],
        "finish_reasons": [reply.choices[0].finish_reason, rebuilt.choices[0].finish_reason],
        "range": error_name(lambda: litellm.text_completion(**text, max_tokens=12, temperature=-1)),
        "model": error_name(lambda: litellm.completion(**chat | {"model": "openai/gpt-4"})),
    }


def error_name(call: Any) -> str:
    """The class of exception that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))
