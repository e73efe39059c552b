"""Pack stories into training rows of n_ctx tokens; a batch is a pure function of (seed, step).

A story of n tokens takes n + 1 positions: inputs END t1..tn, targets t1..tn END. Every epoch contains each story whole,
in one row, and every row starts at the beginning of a story. The exception is a story longer than n_ctx: it is split,
and the continuation may start a row. Rows are filled by best-fit decreasing; space that no remaining story fits is
filled with the head (the first tokens) of another story instead of padding. The packing depends only on the story
lengths and is the same in every epoch. Each epoch shuffles the rows, and permutes stories of equal length, so that
stories get different neighbors in their rows. See docs/decisions/0006-packing.md.
"""

from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

from tinystories.data.dataset import open_split, read_meta
from tinystories.errors import UserError

IGNORE_INDEX = -100  # target at padding positions; excluded from the loss
MIN_HEAD_TOKENS = 8  # smaller gaps at the end of a row are padded

Ints = npt.NDArray[np.int64]


class PackedRows:
    """Training rows of one split of a prepared folder.

    `n_rows` is the number of rows in an epoch. `get_rows` takes global row indices: the first epoch of a run is
    0..n_rows-1, the second n_rows..2*n_rows-1, and so on without limit.
    """

    def __init__(self, folder: Path, split: str, n_ctx: int, seed: int) -> None:
        self.meta = read_meta(folder)
        self.tokens, index = open_split(folder, split)
        self.story_starts: Ints = index[:-1, 0].astype(np.int64)
        lengths: Ints = np.diff(index[:, 0]).astype(np.int64)  # positions in a row: the tokens plus one END
        if len(lengths) == 0:
            raise UserError(f"{folder}: the {split} split contains no stories; prepare it again from more text")
        self.n_ctx, self.seed, self.end_id = n_ctx, seed, self.meta.end_id
        self.story_lengths = lengths
        self.row_starts, self.pieces = pack_rows(np.sort(lengths), n_ctx)
        self.n_rows = len(self.row_starts) - 1
        self.shuffled_epoch = -1

    def get_rows(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return inputs and targets, each (len(indices), n_ctx), of the rows with these global indices.

        Padding has END as input and IGNORE_INDEX as target. `UserError` for an id outside the vocabulary.
        """
        inputs = np.full((len(indices), self.n_ctx), self.end_id, dtype=np.int64)
        targets = np.full((len(indices), self.n_ctx), IGNORE_INDEX, dtype=np.int64)
        for i, index in enumerate(indices):
            column = 0
            for story, offset, size in self.get_pieces(int(index)):
                start = self.story_starts[self.story_at[story]] + offset
                inputs[i, column : column + size] = self.tokens[start : start + size]
                targets[i, column : column + size] = self.tokens[start + 1 : start + size + 1]
                column += size
        # On CUDA a larger id would end the process, without a word about the file.
        if (largest := max(inputs.max(), targets.max())) >= self.meta.vocab_size:
            raise UserError(
                f"{self.tokens.filename} is damaged: it has id {largest}, but the vocabulary has"
                f" {self.meta.vocab_size}; prepare the data again"
            )
        return inputs, targets

    def get_pieces(self, index: int) -> Ints:
        """Return the (story, offset, size) of each piece in the row with this global index; shape (pieces, 3).

        The stories are ranks in the order of lengths; `story_at` maps them to the epoch's stories of that length.
        """
        epoch, row_in_epoch = divmod(index, self.n_rows)
        self.shuffle_epoch(epoch)
        row = self.row_order[row_in_epoch]
        return self.pieces[self.row_starts[row] : self.row_starts[row + 1]]

    def get_batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints]:
        """Return inputs and targets of one optimizer step (all micro-batches), restricted to the share of `rank`.

        `batch_size` counts the rows of all ranks, so their union does not depend on `world_size`.
        """
        rows_per_rank = batch_size // world_size
        return self.get_rows(step * batch_size + rank * rows_per_rank + np.arange(rows_per_rank))

    def count_targets(self, step: int, batch_size: int) -> int:
        """Return the number of targets (without padding) in the batch of one optimizer step, over all ranks."""
        rows = range(step * batch_size, (step + 1) * batch_size)
        return sum(int(self.get_pieces(row)[:, 2].sum()) for row in rows)

    def shuffle_epoch(self, epoch: int) -> None:
        """Set `row_order` (row at each position of the epoch) and `story_at` (story at each rank of the lengths).

        Does nothing if `epoch` is already the current one.
        """
        if epoch == self.shuffled_epoch:
            return
        rng = np.random.default_rng([self.seed, epoch])
        self.row_order = rng.permutation(self.n_rows)
        # A stable sort by length of a random permutation: stories are exchanged only with others of equal length, so
        # that the packing remains valid.
        shuffled = rng.permutation(len(self.story_lengths))
        self.story_at = shuffled[np.argsort(self.story_lengths[shuffled], kind="stable")]
        self.shuffled_epoch = epoch


@numba.njit(cache=True)
def pack_rows(lengths: Ints, n_ctx: int) -> tuple[Ints, Ints]:
    """Pack stories of the given lengths into rows of n_ctx positions by best-fit decreasing.

    Stories are first split into pieces of at most n_ctx tokens; only stories longer than that yield more than one.
    Each row then takes the largest unplaced piece that fits, again and again, until none fits. If at least
    MIN_HEAD_TOKENS are left over, an extra copy of the head of some story, cut to size, fills them.

    Returns `row_starts` (n_rows + 1,) and `pieces` (n_pieces, 3): the pieces of row r are
    row_starts[r]..row_starts[r+1]-1, each with its story (an index into `lengths`), its offset in it and its size.
    Cf. Ding et al. 2024, arXiv 2404.10830.
    """
    unplaced, stack_top, stack_below = stack_pieces(lengths, n_ctx)
    n_unplaced = len(unplaced)
    # A row holds at least one piece and at most one extra head, so the heads at most double the number.
    row_starts, pieces = np.empty(n_unplaced + 1, np.int64), np.empty((2 * n_unplaced, 3), np.int64)
    n_rows, n_placed, next_head = 0, 0, 0
    while n_unplaced > 0:
        row_starts[n_rows] = n_placed
        n_rows += 1
        space_left = n_ctx
        while space_left > 0:
            # An empty row (nothing placed in it yet) prefers a story start, so that it begins with one if possible.
            kind, fit_size = find_largest_fit(stack_top, space_left, row_starts[n_rows - 1] == n_placed)
            if fit_size == 0:
                break
            # Pop the piece and append it to the row.
            piece = stack_top[kind, fit_size]
            stack_top[kind, fit_size] = stack_below[piece]
            pieces[n_placed] = unplaced[piece]
            n_placed, n_unplaced, space_left = n_placed + 1, n_unplaced - 1, space_left - fit_size
        # No unplaced piece fits any more: fill the gap with the head of a story, whether placed already or not. Heads
        # are taken round-robin from the stories that are longer than the gap.
        if space_left >= MIN_HEAD_TOKENS:
            for _ in range(len(lengths)):
                next_head = (next_head + 1) % len(lengths)
                if lengths[next_head] > space_left:
                    pieces[n_placed] = next_head, 0, space_left
                    n_placed += 1
                    break
    row_starts[n_rows] = n_placed
    return row_starts[: n_rows + 1], pieces[:n_placed]


@numba.njit(cache=True)
def stack_pieces(lengths: Ints, n_ctx: int) -> tuple[Ints, Ints, Ints]:
    """Split stories into pieces of at most n_ctx tokens, and put these on one stack per (kind, size).

    Kind 0 is the start of a story, kind 1 is a continuation of a story longer than n_ctx. Returns `pieces` (n, 3) as
    `pack_rows` does, and the stacks as linked lists in arrays: stack_top[kind, size] is the top piece (-1: empty), and
    stack_below[p] is the piece under p. Push and pop are O(1), and scanning the sizes downwards finds the largest piece
    that fits.
    """
    pieces = np.empty((((lengths + n_ctx - 1) // n_ctx).sum(), 3), np.int64)
    stack_top, stack_below = np.full((2, n_ctx + 1), -1), np.empty(len(pieces), np.int64)
    n_pieces = 0
    for story in range(len(lengths)):
        for offset in range(0, lengths[story], n_ctx):
            kind, size = min(offset, 1), min(n_ctx, lengths[story] - offset)
            pieces[n_pieces] = story, offset, size
            # Push: the new piece points to the former top, then becomes the top.
            stack_below[n_pieces], stack_top[kind, size] = stack_top[kind, size], n_pieces
            n_pieces += 1
    return pieces, stack_top, stack_below


@numba.njit(cache=True)
def find_largest_fit(stack_top: Ints, space_left: int, at_row_start: bool) -> tuple[int, int]:
    """Return kind and size of the largest unplaced piece of at most `space_left` tokens; size 0 if none fits.

    `stack_top` is (2, n_ctx + 1), see `stack_pieces`. With `at_row_start`, any story start (kind 0) that fits is
    preferred to a continuation (kind 1) however large; otherwise the start wins only a tie.
    """
    best_kind, best_size = 0, 0
    for kind in range(2):
        if at_row_start and best_size > 0:
            break
        for candidate_size in range(space_left, best_size, -1):
            if stack_top[kind, candidate_size] >= 0:
                best_kind, best_size = kind, candidate_size
                break
    return best_kind, best_size
