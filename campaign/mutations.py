"""Damage to files: bytes, numbers in headers, JSON values, and things on disk that are not files.

Each mutation takes the bytes of a file and a random generator and returns other bytes; the same generator state gives
the same bytes. `MUTATIONS` lists those that fit a kind of file.
"""

import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**64 - 1)
JSON_VALUES = (
    "null true false 0 -1 1 2 16.0 0.5 -0.0 1e308 -1e999 NaN Infinity -Infinity 4294967296 18446744073709551616"
    ' 1e400 "" "16" "true" [] {} [[]] [null] {"a":1} "\\u0000" "\\ud800" "\\u001b[31m" "../../etc/passwd" "a\\nb"'
).split(" ")
TOML_VALUES = (
    'true -1 0 1e308 nan inf "" "x" [] {} [1] ["a","b"] 99999999999999999999999999 0x10 1979-05-27 "\\u001b[31m" 1.5'
    ' "bpe:99999999999" "../x" [[[[1]]]] "auto" 2147483648 1_000'
).split(" ")
BAD_UTF8 = (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\x80")


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, len(data) - 1, len(data) // 2, rng.randrange(len(data) + 1)])]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    limit = len(result) if rng.random() < 0.5 else min(len(result), 512)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if limit else 0):
        result[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    return bytes(result)


def grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", b"\n", data, rng.randbytes(rng.randrange(1, 5000)), bytes(1 << 20)])


def splice(data: bytes, rng: random.Random) -> bytes:
    """Move, repeat or delete a piece."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    piece = data[start:end]
    return rng.choice(
        [data[:at] + piece + data[at:], data[:start] + data[end:], data[:at] + piece + data[at + len(piece) :]]
    )


def insert_text(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    pieces = [*BAD_UTF8, b"\0", b"\r", b"\xef\xbb\xbf", b'"', b"<|endoftext|>", b"A" * 300_000, b"\x1b[2J", b"\n" * 999]
    return data[:at] + rng.choice(pieces) + data[at:]


def forge_number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite an aligned 4- or 8-byte integer, most often near the beginning."""
    size = rng.choice([4, 8])
    limit = min(len(data), rng.choice([32, 64, 512, 4096, len(data)]))
    if limit < size:
        return data
    at = rng.randrange(limit - size + 1) // 4 * 4
    return put_number(data, at, size, rng.choice(NUMBERS))


def forge_last_number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite an integer near the end, such as an index's last row or an archive's directory."""
    size = rng.choice([4, 8])
    if len(data) < 64:
        return data
    return put_number(data, len(data) - rng.randrange(size, 64), size, rng.choice(NUMBERS))


def put_number(data: bytes, at: int, size: int, number: int) -> bytes:
    return data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def nonfinite_floats(data: bytes, rng: random.Random) -> bytes:
    """Overwrite floats by NaN, infinity or the largest values."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 4])):
        if len(result) >= 4:
            at = rng.randrange(len(result) // 4) * 4
            struct.pack_into("<f", result, at, rng.choice([float("nan"), float("inf"), 3e38, -3e38, 1e-45]))
    return bytes(result)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or nest a value of a JSON document; bytes that are not JSON stay as they are."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(walk(document))
    if not places:
        return rng.choice(JSON_VALUES).encode()
    container, key = rng.choice(places[:40] if rng.random() < 0.3 else places)
    action = rng.randrange(10)
    marker = f"@{rng.getrandbits(64)}@"
    if action < 6:
        container[key] = marker
        return dump_json(document).replace(f'"{marker}"', choose_value(rng)).encode("utf-8", "surrogatepass")
    if action == 6:
        del container[key]
    elif action == 7 and isinstance(container, dict):
        container[rng.choice(["", "unknown", str(key) + "x", "x" * 10_000, "\u001b[31m\n", "__class__"])] = container[
            key
        ]
    elif action == 8 and isinstance(container, dict):  # the same key twice
        container[marker] = rng.choice([0, None, "x"])
        return dump_json(document).replace(f'"{marker}"', json.dumps(key)).encode("utf-8", "surrogatepass")
    else:
        container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
    return dump_json(document).encode("utf-8", "surrogatepass")


def dump_json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False)


def choose_value(rng: random.Random) -> str:
    """Return the text of a JSON value that nobody expects."""
    depth = rng.choice([900, 100_000])
    rare = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "1" * 5000, '"' + "x" * 1_000_000 + '"']
    return rng.choice(rare) if rng.random() < 0.1 else rng.choice(JSON_VALUES)


def walk(value: object) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from walk(item)


def mutate_json_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """Mutate the JSON header, with or without a correct length before it; or forge offsets, shapes or a dtype."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= len(data) - 8:
        return data
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.4:
        header = mutate_json(header, rng)
    else:
        try:
            entries = json.loads(header)
            entry = entries[rng.choice([name for name in entries if name != "__metadata__"])]
            field = rng.choice(["data_offsets", "shape", "dtype"])
            if field == "dtype":
                entry[field] = rng.choice(["F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "X", "U16"])
            else:
                position = rng.randrange(len(entry[field]))
                entry[field][position] = rng.choice([*NUMBERS, -1, -(2**63), 10**40, entry[field][position] + 4])
            header = json.dumps(entries).encode()
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return data
    length = len(header) if rng.random() < 0.8 else rng.choice([*NUMBERS, len(header) + 1, len(header) - 1])
    return (length % 2**64).to_bytes(8, "little") + header + body


def forge_gguf(data: bytes, rng: random.Random) -> bytes:
    """Forge a count, a length or a type in the metadata or in the tensor table of a GGUF file."""
    places = [(4, 4), (8, 8), (16, 8), *gguf_numbers(data)]
    at, size = rng.choice(places[:3] if rng.random() < 0.2 else places)
    return put_number(data, at, size, rng.choice([*NUMBERS, *range(15)]))


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Return (offset, size) of the numbers before the tensors, as far as the file can be parsed."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    places: list[tuple[int, int]] = []
    at = 24

    def number(size: int) -> int:
        nonlocal at
        places.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)  # moves `at`
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            item_kind, count = number(4), number(8)
            for _ in range(min(count, 5000)):
                value(item_kind)
        else:
            number(sizes[kind])

    try:
        n_tensors, n_values = struct.unpack_from("<QQ", data, 8)
        for _ in range(min(n_values, 200)):
            text()
            value(number(4))
        for _ in range(min(n_tensors, 200)):
            text()
            for _ in range(min(number(4), 8)):
                number(8)
            number(4)
            number(8)
    except (KeyError, struct.error):
        pass
    # Of long arrays only some, so that the other fields are not lost among them.
    head, tail = places[:200], places[200:][-200:]
    return [place for place in head + tail if place[0] + place[1] <= len(data)]


def forge_zip(data: bytes, rng: random.Random) -> bytes:
    """Forge a field of an entry of an archive's directory, or mutate a member and write the archive again."""
    if rng.random() < 0.5:
        heads = [m.start() for m in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06|PK\x06\x06", data)]
        if not heads:
            return data
        return put_number(data, rng.choice(heads) + rng.randrange(4, 46), rng.choice([2, 4]), rng.choice(NUMBERS))
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged by an earlier mutation
        return data
    name = rng.choice([n for n in members if n.endswith("data.pkl")] if rng.random() < 0.7 else list(members))
    mutation = rng.choice([cut, flip_bits, splice, forge_number, insert_text])
    members[name] = mutation(members[name], rng)
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode(errors="replace").split("\n")
    settings = [i for i, line in enumerate(lines) if "=" in line]
    if not settings:
        return data
    at = rng.choice(settings)
    name = lines[at].partition("=")[0]
    value = (
        rng.choice(TOML_VALUES) if rng.random() < 0.9 else rng.choice(["[" * 5000, "1" * 5000, '"' + "x" * 10**6 + '"'])
    )
    lines[at] = rng.choice([f"{name}= {value}"] * 6 + ["", lines[at] * 2, f"{name}x = 1", f"[{name.strip()}]"])
    return "\n".join(lines).encode()


BYTES: list[Mutation] = [cut, flip_bits, grow, splice]
TEXT: list[Mutation] = [*BYTES, insert_text]
MUTATIONS: dict[str, list[Mutation]] = {
    ".json": [*TEXT, *[mutate_json] * 12],
    ".jsonl": [*TEXT, *[mutate_json_line] * 6],
    ".toml": [*TEXT, *[mutate_toml] * 10],
    ".safetensors": [*BYTES, forge_number, nonfinite_floats, *[mutate_safetensors_header] * 8],
    ".gguf": [*BYTES, nonfinite_floats, *[forge_gguf] * 10],
    ".pt": [*BYTES, forge_last_number, *[forge_zip] * 6],
    ".bin": [*BYTES, nonfinite_floats, *[forge_number] * 6],
    ".idx": [*BYTES, *[forge_number] * 3, *[forge_last_number] * 3],
    ".parquet": [*BYTES, forge_number, *[forge_last_number] * 2, *[flip_bits] * 4],
    ".arrow": [*BYTES, forge_number, forge_last_number],
    ".db": [*BYTES, *[forge_number] * 2, *[flip_bits] * 4],
    ".txt": TEXT,
    ".csv": [*TEXT, insert_text, insert_text],
}
