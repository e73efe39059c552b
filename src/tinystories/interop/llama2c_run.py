"""What llama2.c makes of a checkpoint: run.c's and runq.c's forward, in NumPy, for all positions at once.

Shares no line with the code that writes: it is what an export is compared with. The file must be whole.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Weights:
    """The file, read from front to back as `memory_map_weights` does."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.quantised = self.data[:4] == b"24ka"
        header = struct.unpack_from("<7i", self.data, 8 if self.quantised else 0)
        self.dim, self.hidden, self.n_layers, self.n_heads, self.n_kv, vocab, self.seq_len = header
        self.vocab = abs(vocab)
        self.shared = bool(self.data[36]) if self.quantised else vocab > 0
        self.group = struct.unpack_from("<i", self.data, 37)[0] if self.quantised else 0
        self.at = 256 if self.quantised else 28
        self.head = self.dim // self.n_heads
        kv, layers = self.n_kv * self.head, range(self.n_layers)
        square, narrow, wide = (self.dim, self.dim), (kv, self.dim), (self.hidden, self.dim)
        if self.quantised:
            self.rms_att, self.rms_ffn = self.floats(self.n_layers, self.dim), self.floats(self.n_layers, self.dim)
            self.rms_final = self.floats(self.dim)
        self.embedding = self.matrix(self.vocab, self.dim)
        if not self.quantised:
            self.rms_att = self.floats(self.n_layers, self.dim)
        self.wq, self.wk, self.wv, self.wo = (
            [self.matrix(*s) for _ in layers] for s in (square, narrow, narrow, square)
        )
        if not self.quantised:
            self.rms_ffn = self.floats(self.n_layers, self.dim)
        self.w1, self.w2, self.w3 = ([self.matrix(*s) for _ in layers] for s in (wide, wide[::-1], wide))
        if not self.quantised:
            self.rms_final = self.floats(self.dim)
            self.at += 4 * self.seq_len * self.head
        self.classifier = self.embedding if self.shared else self.matrix(self.vocab, self.dim)

    def floats(self, *shape: int) -> Array:
        count = int(np.prod(shape))
        self.at += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.at - 4 * count).reshape(shape)

    def matrix(self, rows: int, columns: int) -> Array:
        if not self.quantised:
            return self.floats(rows, columns)
        whole = np.frombuffer(self.data, np.int8, rows * columns, self.at).reshape(-1, self.group)
        self.at += rows * columns
        return (whole * self.floats(len(whole), 1)).reshape(rows, columns)

    def matmul(self, x: Array, matrix: Array) -> Array:
        """(T, in) x (out, in): runq.c rounds x to 8 bits too, in the same groups."""
        if self.quantised:
            groups = x.reshape(-1, self.group)
            scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
            x = (np.rint(groups / np.where(scales > 0, scales, 1)) * scales).reshape(x.shape)
        return x @ matrix.T


def logits(path: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """(T, V) after each of the ids, which are the file's."""
    w = Weights(path)
    T = len(ids)
    x = w.embedding[ids]
    for layer in range(w.n_layers):
        y = rmsnorm(x, w.rms_att[layer])
        q = turned(w.matmul(y, w.wq[layer]).reshape(T, w.n_heads, w.head))
        k = turned(w.matmul(y, w.wk[layer]).reshape(T, w.n_kv, w.head))
        v = w.matmul(y, w.wv[layer]).reshape(T, w.n_kv, w.head)
        out = np.empty_like(q)
        for head in range(w.n_heads):
            shared = head // (w.n_heads // w.n_kv)
            scores = q[:, head] @ k[:, shared].T / np.float32(np.sqrt(w.head))
            scores[np.triu_indices(T, 1)] = -np.inf
            out[:, head] = softmax(scores) @ v[:, shared]
        x = x + w.matmul(out.reshape(T, w.dim), w.wo[layer])
        y = rmsnorm(x, w.rms_ffn[layer])
        gate = w.matmul(y, w.w1[layer])
        x = x + w.matmul(gate / (1 + np.exp(-gate)) * w.matmul(y, w.w3[layer]), w.w2[layer])
    return w.matmul(rmsnorm(x, w.rms_final), w.classifier).astype(np.float32)


def rmsnorm(x: Array, weight: Array) -> Array:
    return weight * (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-5)))


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def turned(x: Array) -> Array:
    """(T, heads, D): each pair (2i, 2i + 1) turned by its position times 10000 ** (-2i / D)."""
    T, _, D = x.shape
    angles = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
