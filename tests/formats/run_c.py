"""llama2.c's tokenizer, as its run.c does it: a table of pieces with scores, `encode` and `decode`."""

import struct
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[3] / "shared" / "peers"


def peer(name: str) -> Path:
    """A file of another program's model; the test is skipped where it is not."""
    if not (PEERS / name).exists():
        pytest.skip(f"needs ../shared/peers/{name}")
    return PEERS / name


def read_table(data: bytes) -> tuple[list[bytes], list[float]]:
    pieces, scores, offset = [], [], 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def encode(pieces: list[bytes], scores: list[float], text: str) -> list[int]:
    """Ids without BOS. Characters first, or else their bytes; then the best pair, the leftmost of equals, is merged."""
    id_of = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    ids = [id_of[b" "]] if text else []
    for character in text:
        known = id_of.get(character.encode())
        ids += [byte + 3 for byte in character.encode()] if known is None else [known]
    while True:
        best, place, merged = -1e10, -1, -1
        for i in range(len(ids) - 1):
            whole = id_of.get(pieces[ids[i]] + pieces[ids[i + 1]], -1)
            if whole >= 0 and scores[whole] > best:
                best, place, merged = scores[whole], i, whole
        if place < 0:
            return ids
        ids[place : place + 2] = [merged]


def decode(pieces: list[bytes], ids: list[int]) -> bytes:
    """Of ids that follow BOS (1): the first one loses its leading space."""
    out, before = b"", 1
    for i in ids:
        piece = pieces[i][1:] if before == 1 and pieces[i].startswith(b" ") else pieces[i]
        byte = len(piece) == 6 and piece.startswith(b"<0x") and piece.endswith(b">")
        out += bytes([int(piece[3:5], 16)]) if byte else piece
        before = i
    return out
