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
        self.n_emitted = 0  # characters of `text`
        self._pieces: list[str] = []
        self._token_bytes = token_bytes
        self._stop_strings = tuple(stop_strings)
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._mid_character = False  # whether the decoder holds the first bytes of a character
        self._buffer = ""  # held back: may be the beginning of a stop string
        self._has_text = has_prompt
        self._needs_separator = False

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return "".join(self._pieces)

    @property
    def n_decoded(self) -> int:
        """Characters of `text` and of what is held back, which a stop string may still cut off."""
        return self.n_emitted + len(self._buffer)

    def add_token(self, token: int) -> str:
        """Append an id and return the text that can now be emitted; often empty."""
        assert not self.stopped, "no token may follow a stop string"
        new_bytes = self._token_bytes[token]
        if self._mid_character or not new_bytes.isascii():
            new_text = self._utf8_decoder.decode(new_bytes)
            self._mid_character = bool(self._utf8_decoder.getstate()[0])
        else:
            new_text = new_bytes.decode("ascii")  # as above, but four times faster
        return self._release(new_text)

    def begin_story(self) -> str:
        """End the current story and return its last text; CONTINUATION_SEPARATOR precedes any text that follows."""
        piece = self._release(self._decode_rest())
        self._needs_separator = self._has_text
        return piece

    def finalize(self) -> str:
        """Return the remaining text, after the last id."""
        if self.stopped:
            return ""
        piece = self._release(self._decode_rest())
        rest, self._buffer = self._buffer, ""
        return piece + self._emit(rest)

    def _emit(self, text: str) -> str:
        self._pieces.append(text)
        self.n_emitted += len(text)
        return text

    def _decode_rest(self) -> str:
        """End the text of the decoder: U+FFFD if a character is incomplete."""
        self._mid_character = False
        return self._utf8_decoder.decode(b"", final=True)

    def _release(self, new_text: str) -> str:
        """Append decoded text to the buffer and return the part that cannot belong to a stop string anymore."""
        if not new_text:
            return ""
        if not (self._stop_strings or self._needs_separator):
            self._has_text = True
            return self._emit(new_text)
        self._buffer += CONTINUATION_SEPARATOR + new_text if self._needs_separator else new_text
        self._has_text, self._needs_separator = True, False
        match_positions = [position for stop in self._stop_strings if (position := self._buffer.find(stop)) >= 0]
        self.stopped = bool(match_positions)
        n_released = min(match_positions) if match_positions else len(self._buffer) - self._partial_stop_length()
        piece, self._buffer = self._buffer[:n_released], "" if match_positions else self._buffer[n_released:]
        return self._emit(piece)

    def _partial_stop_length(self) -> int:
        """Return how many characters at the end of the buffer may be the beginning of a stop string."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if self._buffer.endswith(stop[:n])),
            default=0,
        )
