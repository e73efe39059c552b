"""Streaming detokenizer: emits whole characters only and holds back text that may become a stop string."""

import codecs
from collections.abc import Sequence

CONTINUATION_SEPARATOR = "\n\n"  # between stories when generation continues after END


class StreamingDetokenizer:
    """Convert token ids to text one id at a time.

    `text` is all text emitted so far. `stopped` becomes true when a stop string is complete; the text ends before it.
    Stop strings are matched in the generated text only, not across the end of the prompt. Bytes that are not valid
    UTF-8 become U+FFFD.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], stop_strings: Sequence[str] = (), *, has_prompt: bool = False
    ) -> None:
        """`token_bytes` holds the bytes of each id; `has_prompt` says whether a nonempty prompt precedes the text."""
        self.stopped = False
        self.text = ""
        self._token_bytes = token_bytes
        self._stop_strings = tuple(stop_strings)
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""  # held back: may be the beginning of a stop string
        self._has_text = has_prompt
        self._needs_separator = False

    def add_token(self, token: int) -> str:
        """Append an id and return the text that can now be emitted; often empty."""
        assert not self.stopped, "no token may follow a stop string"
        return self._release(self._utf8_decoder.decode(self._token_bytes[token]))

    def begin_story(self) -> str:
        """End the current story and return its last text; CONTINUATION_SEPARATOR precedes any text that follows."""
        piece = self._release(self._utf8_decoder.decode(b"", final=True))
        self._needs_separator = self._has_text
        return piece

    def finalize(self) -> str:
        """Return the remaining text, after the last id."""
        if self.stopped:
            return ""
        piece = self._release(self._utf8_decoder.decode(b"", final=True))
        rest, self._buffer = self._buffer, ""
        self.text += rest
        return piece + rest

    def _release(self, new_text: str) -> str:
        """Append decoded text to the buffer and return the part that cannot belong to a stop string anymore."""
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
        """Return how many characters at the end of the buffer may be the beginning of a stop string."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if self._buffer.endswith(stop[:n])),
            default=0,
        )
