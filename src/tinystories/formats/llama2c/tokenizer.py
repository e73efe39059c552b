"""llama2c's tokenizer.bin (tokenizer.py of karpathy/llama2.c): pieces with scores, by id."""

import struct
from pathlib import Path

import numpy as np

from tinystories.data.tokenizer import Tokenizer, check_not_sentencepiece
from tinystories.errors import UserError
from tinystories.files import os_errors
from tinystories.formats.bundle import Array
from tinystories.formats.end_token import read_tokenizer_text, set_end_token
from tinystories.formats.tokenizer_conversion import (
    BYTE_PIECES,
    MAX_PIECE_CHARS,
    build_sentencepiece_bpe,
    extract_pieces,
    permute_ids,
)

BOS_ID = 1  # run.c begins with this token and stops at it
FIRST_BYTE_ID = 3  # id of the piece <0x00>; run.c hard-codes it


def write_tokenizer(tokenizer: Tokenizer, vocab_size: int, pieces_file: Path, tokenizer_file: Path) -> Array:
    """Write tokenizer.bin as `pieces_file`; also `tokenizer_file`, a tokenizer.json, if the former cannot express it.

    Return the id permutation, file id = permutation[our id]: run.c requires END to be 1 and bytes to be 3 to 258.
    """
    pieces, scores = extract_pieces(tokenizer)
    pieces += [b"<unk>"] * (vocab_size - len(pieces))
    scores += [0.0] * (vocab_size - len(scores))
    id_permutation = build_id_permutation(pieces, tokenizer.end_id)
    inverse_permutation = np.argsort(id_permutation)
    # As llama2.c's tokenizer.py writes them: BOS and EOS with newlines around them.
    file_pieces = [b"\n</s>\n" if pieces[i] == b"</s>" else pieces[i] for i in inverse_permutation]
    file_pieces[BOS_ID] = b"\n<s>\n"
    with pieces_file.open("wb") as file:
        file.write(struct.pack("<i", max(map(len, file_pieces))))
        for piece, our_id in zip(file_pieces, inverse_permutation, strict=True):
            file.write(struct.pack("<fi", scores[our_id], len(piece)) + piece)
    if tokenizer.is_lossless or (id_permutation != np.arange(len(id_permutation))).any():
        permute_ids(tokenizer, id_permutation.tolist()).save(tokenizer_file)
    return id_permutation


def build_id_permutation(pieces: list[bytes], end_id: int) -> Array:
    """Return the file id of each of our ids.

    END becomes BOS_ID and the piece of each byte gets its fixed id; the other ids fill the gaps in order.
    """
    piece_ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    fixed_ids = {BOS_ID: end_id}
    for byte, name in enumerate(BYTE_PIECES):
        our_id = piece_ids.get(name.encode(), piece_ids.get(bytes([byte])))
        if our_id is not None and FIRST_BYTE_ID + byte < len(pieces) and our_id not in fixed_ids.values():
            fixed_ids[FIRST_BYTE_ID + byte] = our_id
    used_ids = set(fixed_ids.values())
    remaining_ids = iter([i for i in range(len(pieces)) if i not in used_ids])
    inverse_permutation = [fixed_ids[i] if i in fixed_ids else next(remaining_ids) for i in range(len(pieces))]
    return np.argsort(inverse_permutation)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.bin with `vocab_size` pieces, or a tokenizer.json.

    BOS becomes END, because it separates stories in llama2.c's training data.
    """
    if str(path) == "gpt2":
        return set_end_token(read_tokenizer_text(path), BOS_ID, str(path))
    with os_errors(f"tokenizer {path}"):
        data = path.read_bytes()
    check_not_sentencepiece(path, data)
    if data[:1] == b"{":
        try:
            return set_end_token(data.decode(), BOS_ID, str(path))
        except UnicodeDecodeError:
            raise UserError(f"tokenizer {path} is not UTF-8 text") from None
    pieces, scores = parse_tokenizer_bin(data, vocab_size, path)
    return build_sentencepiece_bpe([piece.strip(b"\n") or piece for piece in pieces], scores, BOS_ID, where=str(path))


def parse_tokenizer_bin(data: bytes, vocab_size: int, path: Path) -> tuple[list[bytes], list[float]]:
    """Return pieces and scores; `UserError` unless there are exactly `vocab_size` pieces."""
    pieces: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data) and len(pieces) < vocab_size:
        if offset + 8 > len(data):
            raise UserError(f"tokenizer {path} ends inside piece {len(pieces)}; copy it again")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 < length <= 4 * MAX_PIECE_CHARS or offset + length > len(data):
            raise UserError(f"tokenizer {path} is damaged: piece {len(pieces)} has {length:,} bytes; copy it again")
        pieces.append(data[offset : offset + length])
        scores.append(score)
        offset += length
    if offset != len(data) or len(pieces) != vocab_size:
        more = "more" if len(pieces) == vocab_size else f"only {len(pieces):,}"
        raise UserError(f"tokenizer {path} has {more} pieces, the model {vocab_size:,}; pass the model's own tokenizer")
    return pieces, scores
