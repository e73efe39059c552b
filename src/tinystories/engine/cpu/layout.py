"""Where each number stands in the two tables of integers that the machine code reads. No imports: both sides use it."""

from typing import NamedTuple

GROUP_SIZE = 32  # columns that share a scale in 4-bit matrices; rows of x are padded to a multiple of it
BLOCK_ROWS = (
    8  # rows of a packed matrix that stand together; the outer size of every matrix is padded to a multiple of it
)
FP32, INT8, INT4 = 0, 1, 2  # kinds of matrices
RELU, GELU_TANH, GELU_ERF = 0, 1, 2  # activations of the classic feed-forward


class MatrixLayout(NamedTuple):
    """A matrix: its kind, addresses, and sizes. `rows` are the real ones, `outer` is padded."""

    kind: int = 0
    weights: int = 1
    scales: int = 2
    bias: int = 3
    out_features: int = 4
    padded_out: int = 5
    in_features: int = 6


class LayerLayout(NamedTuple):
    """A block: addresses of norms (a bias follows its weight), and where its matrices begin within the block."""

    input_norm: int = 0
    input_norm_bias: int = 1
    post_norm: int = 2
    post_norm_bias: int = 3
    q_norm: int = 4
    k_norm: int = 5
    q: int = 6
    k: int = 13
    v: int = 20
    o: int = 27
    gate: int = 34
    up: int = 41
    down: int = 48
    window: int = 55  # tokens that it sees; n_ctx: all
    size: int = 56


class ModelLayout(NamedTuple):
    """The model; `layers` is where the first block begins."""

    n_layer: int = 0
    n_embd: int = 1
    n_head: int = 2
    n_kv_head: int = 3
    head_dim: int = 4
    n_ctx: int = 5
    modern: int = 6
    norm: int = 7
    norm_bias: int = 8
    rope_cos: int = 9
    rope_sin: int = 10
    lm_head: int = 11
    activation: int = 18
    scale_scores: int = 19  # whether scores are divided by the root of head_dim
    layers: int = 20


class CallLayout(NamedTuple):
    """One call: B rows of tokens, the addresses of what they need, and of memory to work in."""

    n_rows: int = 0
    first_logits_row: int = 1  # row from which on logits are wanted
    x: int = 2  # (B, C) fp32, embedded tokens; overwritten
    positions: int = 3  # (B,) int64
    slots: int = 4  # (B,) int64
    keys: int = 5  # (layers, slots, heads, S, D) fp32
    values: int = 6
    n_slots: int = 7
    logits: int = 8  # (B, outer of the head) fp32
    barrier_counter: int = 9  # of the barrier, int64
    q: int = 10
    k: int = 11
    v: int = 12
    attn_out: int = 13  # what attention makes
    mlp_hidden: int = 14  # of the feed-forward, (B, outer of `up`)
    gate: int = 15
    delta: int = 16  # what goes onto the residual stream
    scratch: int = 17  # memory of the first thread alone
    scratch_stride: int = 18  # bytes from thread to thread
    scratch_width: int = 19  # floats in a row of `own`: the widest input of any matrix, a multiple of GROUP
    max_rows: int = 20  # rows there is room for
    barrier_start: int = 21  # value of the counter before the call
    size: int = 22


MATRIX, LAYER, MODEL, CALL = MatrixLayout(), LayerLayout(), ModelLayout(), CallLayout()
