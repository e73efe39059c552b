"""The JSON of completions and chats, whole and streamed, as OpenAI's clients read it."""

import dataclasses
import secrets
import time
from typing import Any

import msgspec

from tinystories.generate.batching import StopReason
from tinystories.serve.jobs import Piece
from tinystories.serve.model import ServedModel
from tinystories.serve.planning import Plan
from tinystories.serve.scoring import TokenLogprob

FINISH_REASONS: dict[StopReason, str] = {"end": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


def encode_event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class ResponseFormat:
    """The objects of /v1/completions; those of chats differ in a few methods."""

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, model: ServedModel, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.id = self.id_prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.n_generated = [0] * len(plan.generations)

    def usage(self) -> dict[str, int]:
        """Return the tokens used so far."""
        n_completion = sum(self.n_generated)
        return {
            "prompt_tokens": self.plan.n_prompt_tokens,
            "completion_tokens": n_completion,
            "total_tokens": self.plan.n_prompt_tokens + n_completion,
        }

    def envelope(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an object with these choices."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "choices": choices,
        }

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the answer; `pieces` holds the whole of each sequence. Of best_of the n likeliest are returned."""
        for piece in pieces:
            self.n_generated[piece.index] = piece.n_generated
        n, best_of = self.plan.n, self.plan.best_of
        chosen: list[Piece] = []
        for start in range(0, len(pieces), best_of):
            group = pieces[start : start + best_of]
            chosen += sorted(group, key=lambda piece: -piece.mean_logprob)[:n] if best_of > n else group
        choices = [self.choice(dataclasses.replace(piece, index=i)) for i, piece in enumerate(chosen)]
        return self.envelope(self.object_name, choices) | {"usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a stream for a piece."""
        self.n_generated[piece.index] = max(piece.n_generated, self.n_generated[piece.index])
        return self.with_usage(self.envelope(self.chunk_name, [self.chunk_choice(piece)]))

    def with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Add the usage to a chunk: null, unless the client wants it in every chunk."""
        if self.plan.with_running_usage:
            return chunk | {"usage": self.usage()}
        return chunk | {"usage": None} if self.plan.with_usage else chunk

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk with the usage, the last one of a stream."""
        return self.envelope(self.chunk_name, []) | {"usage": self.usage()}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a choice."""
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self.logprobs(piece.tokens) if self.plan.with_logprobs else None,
            "finish_reason": FINISH_REASONS[piece.stop_reason] if piece.stop_reason else None,
        }

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        """Return a choice of a chunk."""
        return self.choice(piece)

    def logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probabilities in the form of completions. The texts of `tokens` join to the choice's text."""
        return {
            "tokens": [entry.text for entry in tokens],
            "token_logprobs": [entry.logprob for entry in tokens],
            "top_logprobs": [None if entry.top is None else self.top_dict(entry.top) for entry in tokens],
            "text_offset": [entry.offset for entry in tokens],
        }

    def top_dict(self, top: list[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by token name; where two names are equal, the second is token_id:N."""
        result: dict[str, float] = {}
        for token, logprob in top:
            name = self.model.token_name(token)
            result[f"token_id:{token}" if name in result else name] = logprob
        return result


class ChatFormat(ResponseFormat):
    """The objects of /v1/chat/completions."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first_chunks(self) -> list[dict[str, Any]]:
        choices = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for i in range(self.plan.n)
        ]
        return [self.with_usage(self.envelope(self.chunk_name, [choice])) for choice in choices]

    def choice(self, piece: Piece) -> dict[str, Any]:
        choice = super().choice(piece)
        return choice | {"message": {"role": "assistant", "content": choice.pop("text"), "refusal": None}}

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        choice = super().choice(piece)
        text = choice.pop("text")
        return choice | {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probabilities in the form of chats."""
        n_top = self.plan.generations[0].n_top or 0
        return {
            "content": [
                self.token_dict(entry.token, entry.logprob)
                | {"top_logprobs": [self.token_dict(token, logprob) for token, logprob in (entry.top or [])[:n_top]]}
                for entry in tokens
            ],
            "refusal": None,
        }

    def token_dict(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Return a token with its bytes."""
        name, data = self.model.token_name(token), self.model.token_bytes(token)
        return {"token": name, "logprob": logprob, "bytes": list(data)}
