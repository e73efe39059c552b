"""Reference implementation of llama2.c in NumPy: the forward passes of run.c and runq.c, for all positions at once.

It verifies exports, so it deliberately shares no code with the writer. The file is trusted.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Weights:
    """The weights of a checkpoint, read front to back like `memory_map_weights` in run.c.

    Version 2 (`quantized`) has the norms first and int8 matrices; version 0 is fp32. Attributes have run.c's names.
    """

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.quantized = self.data[:4] == b"24ka"
        header = struct.unpack_from("<7i", self.data, 8 if self.quantized else 0)
        self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads, signed_vocab_size, self.seq_len = (
            header
        )
        self.vocab_size = abs(signed_vocab_size)
        self.shared_classifier = bool(self.data[36]) if self.quantized else signed_vocab_size > 0
        self.group_size = struct.unpack_from("<i", self.data, 37)[0] if self.quantized else 0
        self.offset = 256 if self.quantized else 28
        self.head_size = self.dim // self.n_heads
        kv_dim, layers = self.n_kv_heads * self.head_size, range(self.n_layers)
        square, narrow, wide = (self.dim, self.dim), (kv_dim, self.dim), (self.hidden_dim, self.dim)
        if self.quantized:
            self.rms_att, self.rms_ffn = (
                self.read_floats(self.n_layers, self.dim),
                self.read_floats(self.n_layers, self.dim),
            )
            self.rms_final = self.read_floats(self.dim)
        self.embedding = self.read_matrix(self.vocab_size, self.dim)
        if not self.quantized:
            self.rms_att = self.read_floats(self.n_layers, self.dim)
        self.wq, self.wk, self.wv, self.wo = (
            [self.read_matrix(*s) for _ in layers] for s in (square, narrow, narrow, square)
        )
        if not self.quantized:
            self.rms_ffn = self.read_floats(self.n_layers, self.dim)
        self.w1, self.w2, self.w3 = ([self.read_matrix(*s) for _ in layers] for s in (wide, wide[::-1], wide))
        if not self.quantized:
            self.rms_final = self.read_floats(self.dim)
            self.offset += 4 * self.seq_len * self.head_size
        self.classifier = self.embedding if self.shared_classifier else self.read_matrix(self.vocab_size, self.dim)

    def read_floats(self, *shape: int) -> Array:
        """Read the next fp32 tensor."""
        count = int(np.prod(shape))
        self.offset += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.offset - 4 * count).reshape(shape)

    def read_matrix(self, rows: int, columns: int) -> Array:
        """Read the next matrix; in version 2, dequantize it."""
        if not self.quantized:
            return self.read_floats(rows, columns)
        quantized_values = np.frombuffer(self.data, np.int8, rows * columns, self.offset).reshape(-1, self.group_size)
        self.offset += rows * columns
        return (quantized_values * self.read_floats(len(quantized_values), 1)).reshape(rows, columns)

    def matmul(self, x: Array, matrix: Array) -> Array:
        """Multiply x (T, in) by the transpose of matrix (out, in).

        In version 2, x is first quantized to int8 in groups, as runq.c does.
        """
        if self.quantized:
            groups = x.reshape(-1, self.group_size)
            scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
            x = (np.rint(groups / np.where(scales > 0, scales, 1)) * scales).reshape(x.shape)
        return x @ matrix.T


def logits(path: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """Return (T, V) logits for `ids`, which are ids of the file."""
    w = Weights(path)
    T = len(ids)
    x = w.embedding[ids]
    for layer in range(w.n_layers):
        y = rmsnorm(x, w.rms_att[layer])
        q = apply_rope(w.matmul(y, w.wq[layer]).reshape(T, w.n_heads, w.head_size))
        k = apply_rope(w.matmul(y, w.wk[layer]).reshape(T, w.n_kv_heads, w.head_size))
        v = w.matmul(y, w.wv[layer]).reshape(T, w.n_kv_heads, w.head_size)
        out = np.empty_like(q)
        for head in range(w.n_heads):
            kv_head = head // (w.n_heads // w.n_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / np.float32(np.sqrt(w.head_size))
            scores[np.triu_indices(T, 1)] = -np.inf
            out[:, head] = softmax(scores) @ v[:, kv_head]
        x = x + w.matmul(out.reshape(T, w.dim), w.wo[layer])
        y = rmsnorm(x, w.rms_ffn[layer])
        gate = w.matmul(y, w.w1[layer])
        x = x + w.matmul(gate / (1 + np.exp(-gate)) * w.matmul(y, w.w3[layer]), w.w2[layer])
    return w.matmul(rmsnorm(x, w.rms_final), w.classifier).astype(np.float32)


def rmsnorm(x: Array, weight: Array) -> Array:
    return weight * (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-5)))


def softmax(scores: Array) -> Array:
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def apply_rope(x: Array) -> Array:
    """Rotate each pair (2i, 2i + 1) of x (T, heads, D) by the angle position * 10000 ** (-2i / D)."""
    T, _, D = x.shape
    angles = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
