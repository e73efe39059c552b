"""The forward pass of the CPU engine: everything that Numba compiles, and the layout of the tables that it reads.

`forward.forward` runs B rows (new tokens) through the whole model. Every thread of the pool makes one call to it.

Decoding is memory-bound: each weight is read once per token, so threads must rarely wait. Each thread computes its own
output rows of every matrix, and all threads meet at a barrier only where one needs the results of the others. Cheap
work (norms, quantizing activations) is repeated by every thread instead of shared. Each sum is computed by one thread
in a fixed order, so results depend neither on the number of threads nor on the other rows of the batch.

Except for `layout`, only `jit.compile_object` imports these modules, because Numba takes half a second to import. Their
inputs are two tables of 64-bit integers, some of them addresses: `m` describes the model, `c` describes this call.
`layout` names their fields, `runtime` fills them. `ctx` is the `ThreadContext` of the thread.

Notation: B = rows (new tokens of any slots), C = n_embd, D = head_dim, S = n_ctx. Matrices are (out_features,
in_features), and out_features is padded to a multiple of BLOCK_ROWS (`padded_out`), which is also the row stride of the
outputs. `base` is the index in `m` where the fields of a matrix begin, `layer_base` that of a layer. `lo` and `hi`
bound the part of one thread.
"""
