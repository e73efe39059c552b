"""Ids to text that may leave: whole characters only, and nothing that a stop string may yet claim."""

import codecs
from collections.abc import Sequence

SEPARATOR = "\n\n"  # stands between stories where generation goes on after the end of one


class TextStream:
    """Text of one story, id by id. `stopped` turns true when a stop string is complete; it is cut from the text.

    Stop strings are looked for in the generated text alone, not across the end of the prompt. Bytes that are not UTF-8
    become U+FFFD.
    """

    def __init__(self, bytes_of: Sequence[bytes], stop: Sequence[str] = (), *, begun: bool = False) -> None:
        """`bytes_of` is the tokenizer's table; `begun`: some text (a prompt) stands before what is generated."""
        self.stopped = False
        self.text = ""  # all that has left
        self._bytes_of = bytes_of
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self._begun = begun
        self._gap = False

    def push(self, token: int) -> str:
        """The text that may leave now that this id has come; often empty."""
        assert not self.stopped, "nothing follows a stop string"
        return self._release(self._decoder.decode(self._bytes_of[token]))

    def separate(self) -> str:
        """One story has ended: text that still comes is set off by SEPARATOR."""
        piece = self._release(self._decoder.decode(b"", final=True))
        self._gap = self._begun
        return piece

    def finish(self) -> str:
        """The rest: there is no more to come."""
        if self.stopped:
            return ""
        piece = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _release(self, new: str) -> str:
        if not new:
            return ""
        self._held += SEPARATOR + new if self._gap else new
        self._begun, self._gap = True, False
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        size = min(found) if found else len(self._held) - self._possible_stop()
        piece, self._held = self._held[:size], "" if found else self._held[size:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """How many characters at the end of the held text are the beginning of a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
