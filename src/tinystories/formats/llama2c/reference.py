"""Reference implementation of llama2.c in NumPy: the forward passes of run.c and runq.c, for all positions at once.

It verifies exports, so it deliberately shares no code with the writer. The file is trusted.
"""

import struct
from pathlib import Path

import numpy as np

from tinystories.formats.bundle import Array

LAYER_TENSORS = ("rms_att", "rms_ffn", "wq", "wk", "wv", "wo", "w1", "w2", "w3")


class Weights:
    """The weights of a checkpoint, read front to back like `memory_map_weights` in run.c.

    Version 2 (`quantized`) has the norms first and int8 matrices; version 0 is fp32. `tensors` has run.c's names, each
    with a list of one tensor per layer.
    """

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.quantized = self.data[:4] == b"24ka"
        header = struct.unpack_from("<7i", self.data, 8 if self.quantized else 0)
        dim, hidden, self.n_layers, self.n_heads, self.n_kv_heads, vocab_size, seq_len = header
        shared_classifier = bool(self.data[36]) if self.quantized else vocab_size > 0
        self.group_size = struct.unpack_from("<i", self.data, 37)[0] if self.quantized else 0
        self.offset = 256 if self.quantized else 28
        self.head_size = dim // self.n_heads
        square, narrow, wide = (dim, dim), (self.n_kv_heads * self.head_size, dim), (hidden, dim)
        shapes: dict[str, tuple[int, ...]] = {"wq": square, "wk": narrow, "wv": narrow, "wo": square}
        shapes |= {"w1": wide, "w2": wide[::-1], "w3": wide, "classifier": (abs(vocab_size), dim)}
        shapes |= {"embedding": (abs(vocab_size), dim), "rope": (seq_len * self.head_size,)}
        norms, attention, mlp = ["rms_att", "rms_ffn", "rms_final"], ["wq", "wk", "wv", "wo"], ["w1", "w2", "w3"]
        order = [*norms, "embedding", *attention, *mlp]
        if not self.quantized:
            order = ["embedding", "rms_att", *attention, "rms_ffn", *mlp, "rms_final", "rope"]
        self.tensors: dict[str, list[Array]] = {}
        for name in order if shared_classifier else [*order, "classifier"]:
            is_single = name in ("embedding", "rms_final", "rope", "classifier")
            shape = shapes.get(name, (dim,))
            self.tensors[name] = [self.read_tensor(shape) for _ in range(1 if is_single else self.n_layers)]
        self.tensors.setdefault("classifier", self.tensors["embedding"])

    def read_floats(self, *shape: int) -> Array:
        """Read the next fp32 tensor."""
        count = int(np.prod(shape))
        self.offset += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.offset - 4 * count).reshape(shape)

    def read_tensor(self, shape: tuple[int, ...]) -> Array:
        """Read the next tensor; in version 2, dequantize it if it is a matrix."""
        if not self.quantized or len(shape) == 1:
            return self.read_floats(*shape)
        count = int(np.prod(shape))
        quantized_values = np.frombuffer(self.data, np.int8, count, self.offset).reshape(-1, self.group_size)
        self.offset += count
        return (quantized_values * self.read_floats(len(quantized_values), 1)).reshape(shape)

    def matmul(self, x: Array, matrix: Array) -> Array:
        """Multiply x (T, in) by the transpose of matrix (out, in).

        In version 2, x is first quantized to int8 in groups, as runq.c does.
        """
        if self.quantized:
            groups = x.reshape(-1, self.group_size)
            scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
            x = (np.rint(groups / np.where(scales > 0, scales, 1)) * scales).reshape(x.shape)
        return x @ matrix.T


def logits(path: Path, ids: list[int]) -> Array:
    """Return (T, V) logits for `ids`, which are ids of the file."""
    w, T = Weights(path), len(ids)
    x = w.tensors["embedding"][0][ids]
    for layer in range(w.n_layers):
        rms_att, rms_ffn, wq, wk, wv, wo, w1, w2, w3 = (w.tensors[name][layer] for name in LAYER_TENSORS)
        y = rmsnorm(x, rms_att)
        q = apply_rope(w.matmul(y, wq).reshape(T, w.n_heads, w.head_size))
        k = apply_rope(w.matmul(y, wk).reshape(T, w.n_kv_heads, w.head_size))
        v = w.matmul(y, wv).reshape(T, w.n_kv_heads, w.head_size)
        out = np.empty_like(q)
        for head in range(w.n_heads):
            kv_head = head // (w.n_heads // w.n_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / np.float32(np.sqrt(w.head_size))
            scores[np.triu_indices(T, 1)] = -np.inf
            out[:, head] = softmax(scores) @ v[:, kv_head]
        x = x + w.matmul(out.reshape(T, -1), wo)
        y = rmsnorm(x, rms_ffn)
        gate = w.matmul(y, w1)
        x = x + w.matmul(gate / (1 + np.exp(-gate)) * w.matmul(y, w3), w2)
    return w.matmul(rmsnorm(x, w.tensors["rms_final"][0]), w.tensors["classifier"][0]).astype(np.float32)


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
