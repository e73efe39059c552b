"""Ids to text that may leave: whole characters only, and nothing that a stop string may yet claim."""

import codecs
from collections.abc import Sequence

CONTINUATION_SEPARATOR = "\n\n"  # stands between stories where generation goes on after the end of one


class StreamingDetokenizer:
    """Text of one story, id by id. `stopped` turns true when a stop string is complete; it is cut from the text.

    Stop strings are looked for in the generated text alone, not across the end of the prompt. Bytes that are not UTF-8
    become U+FFFD.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], stop_strings: Sequence[str] = (), *, has_prompt: bool = False
    ) -> None:
        """`bytes_of` is the tokenizer's table; `begun`: some text (a prompt) stands before what is generated."""
        self.stopped = False
        self.text = ""  # all that has left
        self._token_bytes = token_bytes
        self._stop_strings = tuple(stop_strings)
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""  # may be the beginning of a stop string
        self._has_text = has_prompt
        self._needs_separator = False

    def add_token(self, token: int) -> str:
        """The text that may leave now that this id has come; often empty."""
        assert not self.stopped, "nothing follows a stop string"
        return self._release(self._utf8_decoder.decode(self._token_bytes[token]))

    def begin_story(self) -> str:
        """One story has ended: text that still comes is set off by SEPARATOR."""
        piece = self._release(self._utf8_decoder.decode(b"", final=True))
        self._needs_separator = self._has_text
        return piece

    def finalize(self) -> str:
        """The rest: there is no more to come."""
        if self.stopped:
            return ""
        piece = self._release(self._utf8_decoder.decode(b"", final=True))
        rest, self._buffer = self._buffer, ""
        self.text += rest
        return piece + rest

    def _release(self, new_text: str) -> str:
        if not new_text:
            return ""
        self._buffer += CONTINUATION_SEPARATOR + new_text if self._needs_separator else new_text
        self._has_text, self._needs_separator = True, False
        match_positions = [position for stop in self._stop_strings if (position := self._buffer.find(stop)) >= 0]
        self.stopped = bool(match_positions)
        n_released = min(match_positions) if match_positions else len(self._buffer) - self._partial_stop_length()
        piece, self._buffer = self._buffer[:n_released], "" if match_positions else self._buffer[n_released:]
        self.text += piece
        return piece

    def _partial_stop_length(self) -> int:
        """How many characters at the end of the held text are the beginning of a stop string."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if self._buffer.endswith(stop[:n])),
            default=0,
        )
