"""Training windows: stories packed into rows of n_ctx tokens; a batch is a pure function of (seed, step).

A story of n tokens takes n + 1 places: inputs END t1..tn, targets t1..tn END. Every story stands whole in one row of
each epoch, and every row begins with a story's start; only a story longer than n_ctx is cut, and its rest may begin a
row. Rows are filled largest-first; room that no whole story fits is filled with the head of one more story, so that no
work goes into padding. The plan depends on the lengths alone and is the same in every epoch: an epoch shuffles the
rows, and shuffles stories of equal length among their places, so that neighbours change.
"""

from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

from tinystories.data.dataset import open_split, read_meta
from tinystories.errors import UserError

IGNORE_INDEX = -100  # target of a padded place; costs nothing
MIN_HEAD_TOKENS = 8  # room smaller than this is padded

Ints = npt.NDArray[np.int64]


class PackedRows:
    """Windows of one split of a prepared folder.

    `n_rows` is the number of windows in an epoch. `rows(g)` gives windows by global index: the run's first epoch is
    0..n_rows-1, its second n_rows..2 n_rows-1, and so on without end.
    """

    def __init__(self, folder: Path, split: str, n_ctx: int, seed: int) -> None:
        self.meta = read_meta(folder)
        self.tokens, index = open_split(folder, split)
        self.story_starts: Ints = index[:-1, 0].astype(np.int64)
        lengths: Ints = np.diff(index[:, 0]).astype(np.int64)
        if len(lengths) == 0:
            raise UserError(f"{folder}: the {split} split holds no story; prepare it again from more text")
        self.n_ctx, self.seed, self.end_id = n_ctx, seed, self.meta.end_id
        self.length_order: Ints = np.argsort(lengths, kind="stable")
        self.story_lengths = lengths
        self.row_starts, self.piece_story, self.piece_offset, self.piece_size = pack_rows(
            lengths[self.length_order], n_ctx
        )
        self.n_rows = len(self.row_starts) - 1
        self.shuffled_epoch = -1

    def get_rows(self, indices: Ints) -> tuple[Ints, Ints]:
        """Inputs and targets, each (len(indices), n_ctx), of the windows with these global indices."""
        inputs = np.full((len(indices), self.n_ctx), self.end_id, dtype=np.int64)
        targets = np.full((len(indices), self.n_ctx), IGNORE_INDEX, dtype=np.int64)
        for i, index in enumerate(indices):
            epoch, row_in_epoch = divmod(int(index), self.n_rows)
            self.shuffle_epoch(epoch)
            row = self.row_order[row_in_epoch]
            column = 0
            for piece in range(self.row_starts[row], self.row_starts[row + 1]):
                size = self.piece_size[piece]
                start = self.story_starts[self.story_at[self.piece_story[piece]]] + self.piece_offset[piece]
                inputs[i, column : column + size] = self.tokens[start : start + size]
                targets[i, column : column + size] = self.tokens[start + 1 : start + size + 1]
                column += size
        return inputs, targets

    def get_batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints]:
        """The rows of an optimizer step, over all micro-batches; each of several ranks takes its part of them."""
        rows_per_rank = batch_size // world_size
        return self.get_rows(step * batch_size + rank * rows_per_rank + np.arange(rows_per_rank))

    def count_targets(self, step: int, batch_size: int) -> int:
        """Targets in the whole batch of an optimizer step, over all ranks."""
        total = 0
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, row_in_epoch = divmod(index, self.n_rows)
            self.shuffle_epoch(epoch)
            row = self.row_order[row_in_epoch]
            total += int(self.piece_size[self.row_starts[row] : self.row_starts[row + 1]].sum())
        return total

    def shuffle_epoch(self, epoch: int) -> None:
        """Make `order` (rows) and `place_of` (which story stands in a place of the plan) those of an epoch."""
        if epoch == self.shuffled_epoch:
            return
        rng = np.random.default_rng([self.seed, epoch])
        self.row_order = rng.permutation(self.n_rows)
        shuffled = rng.permutation(len(self.story_lengths))
        self.story_at = shuffled[np.argsort(self.story_lengths[shuffled], kind="stable")]
        self.shuffled_epoch = epoch


@numba.njit(cache=True)
def pack_rows(lengths: Ints, n_ctx: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Fill rows of n_ctx places with stories of the given lengths, largest first (best-fit decreasing).

    Returns `first` (n_rows + 1: the pieces of row r are first[r]..first[r+1]-1) and for each piece its story (an index
    into `lengths`), its offset in that story and its size.
    """
    max_pieces = 2 * (len(lengths) + lengths.sum() // n_ctx + 1)
    # Pieces to place, in a stack for each (kind, size): kind 0 is a story start, kind 1 the rest of a long story.
    unplaced_story, unplaced_offset, stack_below = (
        np.empty(max_pieces, np.int64),
        np.empty(max_pieces, np.int64),
        np.empty(max_pieces, np.int64),
    )
    stack_top = np.full((2, n_ctx + 1), -1)
    n_pieces = 0
    for i in range(len(lengths)):
        for start in range(0, lengths[i], n_ctx):
            kind, n_tokens = min(start, 1), min(n_ctx, lengths[i] - start)
            unplaced_story[n_pieces], unplaced_offset[n_pieces] = i, start
            stack_below[n_pieces], stack_top[kind, n_tokens] = stack_top[kind, n_tokens], n_pieces
            n_pieces += 1
    row_starts, piece_story = np.empty(n_pieces + 1, np.int64), np.empty(max_pieces, np.int64)
    piece_offset, piece_size = np.empty(max_pieces, np.int64), np.empty(max_pieces, np.int64)
    n_rows, n_placed, n_unplaced, next_head = 0, 0, n_pieces, 0
    while n_unplaced > 0:
        row_starts[n_rows] = n_placed
        n_rows += 1
        space_left = n_ctx
        while space_left > 0:
            # The largest piece that fits; a start before a rest, so that the row begins with one where it can.
            kind, fit_size = find_largest_fit(stack_top, space_left, row_starts[n_rows - 1] == n_placed)
            if fit_size == 0:
                break
            piece = stack_top[kind, fit_size]
            stack_top[kind, fit_size] = stack_below[piece]
            piece_story[n_placed], piece_offset[n_placed], piece_size[n_placed] = (
                unplaced_story[piece],
                unplaced_offset[piece],
                fit_size,
            )
            n_placed, n_unplaced, space_left = n_placed + 1, n_unplaced - 1, space_left - fit_size
        if space_left >= MIN_HEAD_TOKENS:
            for _ in range(len(lengths)):
                next_head = (next_head + 1) % len(lengths)
                if lengths[next_head] > space_left:
                    piece_story[n_placed], piece_offset[n_placed], piece_size[n_placed] = next_head, 0, space_left
                    n_placed += 1
                    break
    row_starts[n_rows] = n_placed
    return row_starts[: n_rows + 1], piece_story[:n_placed], piece_offset[:n_placed], piece_size[:n_placed]


@numba.njit(cache=True)
def find_largest_fit(stack_top: Ints, space_left: int, at_row_start: bool) -> tuple[int, int]:
    """Kind and size of the largest piece that fits (0: none does). Where a row begins, starts come before rests."""
    best_kind, best_size = 0, 0
    for kind in range(2):
        if at_row_start and best_size > 0:
            break
        for candidate_size in range(space_left, best_size, -1):
            if stack_top[kind, candidate_size] >= 0:
                best_kind, best_size = kind, candidate_size
                break
    return best_kind, best_size
