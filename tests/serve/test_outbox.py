"""Text goes to clients seldom and merged: the first and the last of an answer at once, nothing is lost or reordered."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
from serve_helpers import PATIENCE_S, GatedEngine, Running, wait_until

from tinystories.data.tokenizer import Tokenizer
from tinystories.serve import outbox as outbox_module
from tinystories.serve.errors import ApiError
from tinystories.serve.jobs import Inbox, Piece
from tinystories.serve.outbox import MAX_EVENTS_PER_S, MAX_PACE_S, Outbox

Serve = Callable[..., contextlib.AbstractContextManager[Running]]
NEVER_S = 3600.0


class ManualLoop:
    """Runs what it is asked to run only when a test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.n_wakes = 0

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self.n_wakes += 1
        self.soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        self.later.append((seconds, callback))
        return object()

    def run_soon(self) -> None:
        while self.soon:
            self.soon.pop(0)()

    def run_timer(self) -> float:
        """Run the only timer; return after how many seconds it is due."""
        ((seconds, callback),) = self.later
        self.later = []
        callback()
        return seconds


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def outbox(loop: ManualLoop) -> Outbox:
    result = Outbox(pace_s=0.02)
    result.loop = loop  # type: ignore[assignment]
    return result


def say(outbox: Outbox, inbox: Inbox, text: str, *, is_urgent: bool = False, **fields: Any) -> None:
    outbox.add(inbox, Piece(index=0, text=text, **fields), is_urgent=is_urgent)
    outbox.flush()


def texts_of(inbox: Inbox) -> list[str] | None:
    """What `take` would return now; None if it would wait."""

    if not inbox._changed.is_set():
        return None
    return [piece.text for piece in asyncio.run(inbox.take())]


def test_the_first_piece_goes_at_once_and_later_ones_together(loop: ManualLoop, outbox: Outbox) -> None:
    inbox = Inbox()
    say(outbox, inbox, "a")
    loop.run_soon()
    assert texts_of(inbox) == ["a"]
    for text in "bcd":
        say(outbox, inbox, text)
    assert loop.n_wakes == 1  # it looks again by itself
    assert texts_of(inbox) is None
    assert loop.run_timer() == 0.02
    assert texts_of(inbox) == ["bcd"]
    loop.run_timer()  # nothing has come
    assert not loop.later
    say(outbox, inbox, "e")
    assert loop.n_wakes == 2
    loop.run_soon()
    assert texts_of(inbox) == ["e"]


def test_what_is_urgent_wakes_its_own_client_only(loop: ManualLoop, outbox: Outbox) -> None:
    one, other = Inbox(), Inbox()
    say(outbox, one, "a", is_urgent=True)
    loop.run_soon()
    assert texts_of(one) == ["a"]
    say(outbox, one, "b")
    say(outbox, other, "x", is_urgent=True)
    loop.run_soon()
    assert (texts_of(one), texts_of(other)) == (None, ["x"])
    say(outbox, one, "c", is_urgent=True, stop_reason="length")
    loop.run_soon()
    assert texts_of(one) == ["bc"]
    outbox.add(other, ApiError(500, "it failed"), is_urgent=True)
    outbox.flush()
    loop.run_soon()
    with pytest.raises(ApiError, match="it failed"):
        texts_of(other)


def test_many_streams_take_longer_turns(loop: ManualLoop, outbox: Outbox) -> None:
    inboxes = [Inbox() for _ in range(64)]
    say(outbox, inboxes[0], "a")
    loop.run_soon()
    paces = ((1, 0.02), (16, 16 / MAX_EVENTS_PER_S), (32, 32 / MAX_EVENTS_PER_S), (64, MAX_PACE_S), (1, 0.02))
    for n_streams, pace_s in paces:
        for inbox in inboxes[:n_streams]:
            say(outbox, inbox, "a")
        loop.run_timer()
        assert [seconds for seconds, _ in loop.later] == [pace_s]


def test_a_piece_that_comes_while_the_loop_looks_is_not_forgotten(loop: ManualLoop, outbox: Outbox) -> None:
    inbox = Inbox()
    say(outbox, inbox, "a")
    loop.run_soon()
    texts_of(inbox)

    class InTheMiddle(type(outbox._events)):  # type: ignore[misc]
        """The scheduler's thread gets its turn just after the loop has found nothing more."""

        def __bool__(self) -> bool:
            if not len(self) and not has_come:
                has_come.append(True)
                say(outbox, inbox, "b")
                return False
            return len(self) > 0

    has_come: list[bool] = []
    outbox._events = InTheMiddle()
    loop.run_timer()
    assert has_come
    loop.run_soon()
    texts = texts_of(inbox)
    if texts is None:
        loop.run_timer()
        texts = texts_of(inbox)
    assert texts == ["b"]


def test_threads_lose_nothing_and_keep_the_order() -> None:
    n_pieces = 3000

    async def read() -> list[str]:
        outbox = Outbox(pace_s=0)
        outbox.start()
        inboxes = [Inbox() for _ in range(3)]

        def write() -> None:
            for number in range(n_pieces):
                for inbox in inboxes:
                    is_last = number == n_pieces - 1
                    piece = Piece(index=0, text=f"{number} ", stop_reason="length" if is_last else None)
                    outbox.add(inbox, piece, is_urgent=is_last or number % 100 == 0)
                outbox.flush()

        async def collect(inbox: Inbox) -> str:
            parts: list[Piece] = []
            while not (parts and parts[-1].stop_reason):
                parts += await inbox.take()
            return "".join(piece.text for piece in parts)

        thread = threading.Thread(target=write)
        thread.start()
        async with asyncio.timeout(PATIENCE_S):
            texts = await asyncio.gather(*map(collect, inboxes))
        thread.join()
        return texts

    assert asyncio.run(read()) == ["".join(f"{number} " for number in range(n_pieces))] * 3


def test_an_answer_that_is_not_a_stream_waits_for_all_ends() -> None:
    inbox = Inbox(n_ends=2)
    for index, stop_reason in ((0, None), (0, "length"), (1, None)):
        inbox.add(Piece(index=index, text="a", stop_reason=stop_reason))  # type: ignore[arg-type]
        inbox.wake()
        assert texts_of(inbox) is None
    inbox.add(Piece(index=1, text="b", stop_reason="end"))
    inbox.wake()
    assert texts_of(inbox) == ["aa", "ab"]


def test_an_outbox_whose_loop_has_ended_is_quiet() -> None:
    async def start() -> Outbox:
        outbox = Outbox(pace_s=0)
        outbox.start()
        return outbox

    say(asyncio.run(start()), object.__new__(Inbox), "a")


def test_a_stream_gets_its_first_text_at_once_and_the_rest_merged(
    serve_script: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pace that never comes, only the beginning and the end are sent, and nothing is lost between them."""
    monkeypatch.setattr(outbox_module, "MAX_PACE_S", NEVER_S)
    text = "The cat sat on a mat and was happy."
    with serve_script(text, pace_s=NEVER_S) as running:
        engine = running.engine
        assert isinstance(engine, GatedEngine)
        engine.close_gate()
        fields: dict[str, Any] = {"prompt": "Once", "logprobs": 2, "stream_options": {"include_usage": True}}
        with running.client.open_stream(**fields) as stream, running.client.open_stream(prompt="Two") as other:
            events, others = stream.events(), other.events()
            wait_until(lambda: running.scheduler.n_open == 2)
            engine.allow(3)  # both prompts, and a step of the first before or after the second one
            first, other_first = next(events), next(others)
            engine.open_gate()
            last, usage = list(events)
            (other_last,) = others
        whole = running.client.complete(**fields | {"stream_options": None})
    assert whole["text"] == text
    assert other_first["choices"][0]["text"] + other_last["choices"][0]["text"] == text
    one, rest = first["choices"][0], last["choices"][0]
    assert one["text"].startswith(tokenizer.decode(tokenizer.encode(text)[:1]))
    assert (one["text"] + rest["text"], one["finish_reason"], rest["finish_reason"]) == (text, None, "stop")
    assert usage["usage"]["completion_tokens"] == len(tokenizer.encode(text)) + 1
    for name, values in rest["logprobs"].items():
        assert one["logprobs"][name] + values == whole["logprobs"][name]
    assert "".join(rest["logprobs"]["tokens"]) == rest["text"]


def test_a_story_that_is_not_streamed_wakes_its_answer_once(serve_script: Serve) -> None:
    with serve_script("The cat sat on a mat.") as running:
        n_wakes = 0
        take = Inbox.take

        async def count(inbox: Inbox) -> list[Piece]:
            nonlocal n_wakes
            n_wakes += 1
            return await take(inbox)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Inbox, "take", count)
            answer = running.client.ask(prompt="Once", n=2)
        assert [choice["text"] for choice in answer["choices"]] == ["The cat sat on a mat."] * 2
        assert n_wakes == 1
