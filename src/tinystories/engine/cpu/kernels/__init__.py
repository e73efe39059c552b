"""The forward pass of the CPU engine, and sampling (`sampling.make_sampling_entry_point`, which is independent of it):
everything that Numba compiles, and the layout of the tables that it reads.

`forward.make_entry_point` runs B rows (new tokens) through the whole model. Every thread of the pool makes one call to
it.

Decoding is memory-bound: each weight is read once per token, so threads must rarely wait. The forward pass is a list of
phases, cut only where one needs the results of another. A piece of a phase is some output rows of its matrices, and
threads take pieces from a queue (`work_queue`). Cheap work (norms, quantizing activations) is repeated by every thread
instead of shared. Each sum is computed by one thread in a fixed order, so results depend neither on the number of
threads nor on the other rows of the batch.

Except for `layout`, only `compiler` imports these modules, because Numba takes half a second to import. Their
inputs are two tables of 64-bit integers, some of them addresses: `m` describes the model, `c` describes this call.
`layout` names their fields, `runtime` fills them. `ctx` is the `ThreadContext` of the thread and its piece.

Notation: B = rows (new tokens of any slots), C = n_embd, D = head_dim, S = n_ctx. Matrices are (out_features,
in_features), and out_features is padded to a multiple of the rows of a block (`padded_out`), which is also the row
stride of the outputs. `base` is the index in `m` where the fields of a matrix begin, `layer_base` that of a layer. `lo`
and `hi` bound the rows of one piece.
"""
