"""Field indices of the two int64 tables (model and call) that the machine code reads.

Imports nothing from the package, because both sides use it: `runtime` fills the tables, the kernels compile the indices
in as constants. The default of each field is its index.
"""

from typing import NamedTuple

FP32, INT8, INT4, INT8_ROWS = 0, 1, 2, 3  # MatrixLayout.kind; INT8_ROWS: an embedding, in plain row order
KINDS = {"fp32": FP32, "int8": INT8, "int4": INT4}
RELU, GELU_TANH, GELU_ERF = 0, 1, 2  # ModelLayout.activation, for the classic architecture
ACTIVATIONS = {"relu": RELU, "gelu_tanh": GELU_TANH, "gelu_erf": GELU_ERF}


class MatrixLayout(NamedTuple):
    """A matrix (out_features, in_features), relative to its base index. It takes 7 integers."""

    kind: int = 0  # FP32, INT8 or INT4; for the embedding also INT8_ROWS
    weights: int = 1  # address
    scales: int = 2  # address; 0 for FP32
    bias: int = 3  # address; 0 if there is none
    out_features: int = 4
    padded_out: int = 5  # out_features rounded up to a multiple of `weights.quantize.block_rows`
    in_features: int = 6


class LayerLayout(NamedTuple):
    """A transformer layer, relative to its base index: addresses of norms, and base indices of matrices.

    The offsets are written by hand: a matrix takes the 7 integers of `MatrixLayout`, so q = 6, k = 6 + 7 = 13, and so
    on. A field added to `MatrixLayout` moves every field after a matrix, here and in `ModelLayout`. The kernels rely
    on the bias of a norm following its weight, here and in `ModelLayout`.
    """

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
    window: int = 55  # sliding window: positions that a token attends to, itself included; n_ctx means all
    size: int = 56


class ModelLayout(NamedTuple):
    """The model. The layers follow from index `layers`, `LayerLayout.size` integers each."""

    n_layer: int = 0
    n_embd: int = 1
    n_head: int = 2
    n_kv_head: int = 3
    head_dim: int = 4
    n_ctx: int = 5
    modern: int = 6  # 1: RMSNorm, RoPE, SwiGLU; 0 (classic): LayerNorm, added position embeddings, plain MLP
    norm: int = 7  # address of the final norm's weight
    norm_bias: int = 8
    rope_cos: int = 9  # address of a (S, D/2) fp32 table
    rope_sin: int = 10
    lm_head: int = 11  # a matrix: 7 integers, hence the next is 18
    activation: int = 18  # RELU, GELU_TANH or GELU_ERF
    scale_scores: int = 19  # 1: attention scores are divided by sqrt(head_dim)
    embedding: int = 20  # a matrix: 7 integers; it may be the LM head's
    position_embedding: int = 27  # address of a (S, C) fp32 table; 0 if there is none
    exceeds_caches: int = 28  # 1: the matrices are larger than caches, so each call reads them from memory
    layers: int = 29


class CallLayout(NamedTuple):
    """One call with B rows (new tokens): sizes, and the addresses of its inputs, outputs and work buffers.

    Buffers are fp32 and have room for `max_rows` rows. Unless noted, a row is as wide as `padded_out` of the matrix
    that writes it.
    """

    n_rows: int = 0
    first_logits_row: int = 1  # logits are computed for this row and those after it
    x: int = 2  # (B, C): the embedded tokens, then the residual stream
    positions: int = 3  # (B,) int64
    slots: int = 4  # (B,) int64
    keys: int = 5  # KV cache, (layers, slots, KV heads, S, D) in fp32; in fp16 S is rounded up to whole blocks, and
    values: int = 6  # keys are (layers, slots, KV heads, S / KEY_BLOCK, D, KEY_BLOCK)
    n_slots: int = 7
    logits: int = 8  # (B, padded_out of the LM head)
    q: int = 9
    k: int = 10
    v: int = 11
    attn_out: int = 12  # output of attention, before the o projection: (B, n_head D)
    mlp_hidden: int = 13  # hidden layer of the MLP
    gate: int = 14  # gate projection of SwiGLU
    delta: int = 15  # output of the o or down projection, before it is added to the residual stream
    scratch: int = 16  # private memory of the threads; its memory map is at `memory.ThreadContext`
    scratch_stride: int = 17  # bytes from one thread's scratch to the next
    scratch_width: int = 18  # floats in a row of scratch: the widest input of any matrix, a multiple of GROUP_SIZE
    max_rows: int = 19  # capacity of all buffers, in rows
    ids: int = 20  # (B,) int64
    kv_is_f16: int = 21  # 1: keys and values are fp16
    size: int = 22


class WorkQueueLayout(NamedTuple):
    """What the threads of a pool share, two integers on cache lines of their own; see `kernels.work_queue`."""

    state: int = 0  # epoch, phase and next piece in one word
    n_done: int = 8  # completed pieces of the current phase
    size: int = 16


class SamplingLayout(NamedTuple):
    """Sampling settings of a slot, as float64; see `SamplingConfig`."""

    temperature: int = 0  # 0: greedy
    top_k: int = 1
    top_p: int = 2
    min_p: int = 3
    logit_gap: int = 4  # logits further below the largest one are never sampled (negative)
    repetition_penalty: int = 5
    size: int = 6


SAMPLING_BLOCK = 64  # ids that sampling passes over at once; rows of scratch and seen ids are whole blocks
# How much the bound of the logits that may be sampled is lowered, in parts of the largest: the bound itself is rounded.
LOGIT_MARGIN = 1e-5
PHASES_PER_LAYER = 6  # beside these, a call has a phase for the embedding and one for the logits
TILE_ROWS = 4  # adjacent positions of a slot whose attention uses keys and values while they are in registers
KEY_BLOCK = 16  # adjacent positions in a block of keys; the scores of a row are padded to whole blocks
# Bits of `WorkQueueLayout.state`: the next piece, the phase above it, the epoch above both.
PHASE_SHIFT, EPOCH_SHIFT = 16, 32
MAX_PIECES, MAX_PHASES, MAX_EPOCHS = 1 << 16, (1 << 16) - 1, 1 << 31
CLOSED = MAX_PHASES  # the phase of a queue whose call is complete
MATRIX, LAYER, MODEL, CALL, WORK_QUEUE = MatrixLayout(), LayerLayout(), ModelLayout(), CallLayout(), WorkQueueLayout()
SAMPLING = SamplingLayout()
