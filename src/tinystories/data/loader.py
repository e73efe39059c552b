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

from tinystories.data.prepared import open_split, read_meta
from tinystories.errors import UserError

IGNORE = -100  # target of a padded place; costs nothing
SMALLEST_HEAD = 8  # room smaller than this is padded

Ints = npt.NDArray[np.int64]


class PackedRows:
    """Windows of one split of a prepared folder.

    `n_rows` is the number of windows in an epoch. `rows(g)` gives windows by global index: the run's first epoch is
    0..n_rows-1, its second n_rows..2 n_rows-1, and so on without end.
    """

    def __init__(self, folder: Path, split: str, n_ctx: int, seed: int) -> None:
        self.meta = read_meta(folder)
        self.tokens, index = open_split(folder, split)
        self.starts: Ints = index[:-1, 0].astype(np.int64)
        lengths: Ints = np.diff(index[:, 0]).astype(np.int64)
        if len(lengths) == 0:
            raise UserError(f"{folder}: the {split} split holds no story; prepare it again from more text")
        self.n_ctx, self.seed, self.end_id = n_ctx, seed, self.meta.end_id
        self.by_length: Ints = np.argsort(lengths, kind="stable")
        self.lengths = lengths
        self.first, self.story, self.offset, self.size = pack(lengths[self.by_length], n_ctx)
        self.n_rows = len(self.first) - 1
        self.epoch = -1

    def rows(self, indices: Ints) -> tuple[Ints, Ints]:
        """Inputs and targets, each (len(indices), n_ctx), of the windows with these global indices."""
        inputs = np.full((len(indices), self.n_ctx), self.end_id, dtype=np.int64)
        targets = np.full((len(indices), self.n_ctx), IGNORE, dtype=np.int64)
        for i, index in enumerate(indices):
            epoch, within = divmod(int(index), self.n_rows)
            self.shuffle(epoch)
            row = self.order[within]
            place = 0
            for piece in range(self.first[row], self.first[row + 1]):
                size = self.size[piece]
                start = self.starts[self.place_of[self.story[piece]]] + self.offset[piece]
                inputs[i, place : place + size] = self.tokens[start : start + size]
                targets[i, place : place + size] = self.tokens[start + 1 : start + size + 1]
                place += size
        return inputs, targets

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> tuple[Ints, Ints]:
        """The rows of an optimizer step, over all micro-batches; each of several ranks takes its part of them."""
        share = batch_size // ranks
        return self.rows(step * batch_size + rank * share + np.arange(share))

    def n_targets(self, step: int, batch_size: int) -> int:
        """Targets in the whole batch of an optimizer step, over all ranks."""
        total = 0
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, within = divmod(index, self.n_rows)
            self.shuffle(epoch)
            row = self.order[within]
            total += int(self.size[self.first[row] : self.first[row + 1]].sum())
        return total

    def shuffle(self, epoch: int) -> None:
        """Make `order` (rows) and `place_of` (which story stands in a place of the plan) those of an epoch."""
        if epoch == self.epoch:
            return
        rng = np.random.default_rng([self.seed, epoch])
        self.order = rng.permutation(self.n_rows)
        shuffled = rng.permutation(len(self.lengths))
        self.place_of = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        self.epoch = epoch


@numba.njit(cache=True)
def pack(lengths: Ints, n_ctx: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Fill rows of n_ctx places with stories of the given lengths, largest first (best-fit decreasing).

    Returns `first` (n_rows + 1: the pieces of row r are first[r]..first[r+1]-1) and for each piece its story (an index
    into `lengths`), its offset in that story and its size.
    """
    n_most = 2 * (len(lengths) + lengths.sum() // n_ctx + 1)
    # Pieces to place, in a stack for each (kind, size): kind 0 is a story start, kind 1 the rest of a long story.
    piece_of, offset_of, below = np.empty(n_most, np.int64), np.empty(n_most, np.int64), np.empty(n_most, np.int64)
    top = np.full((2, n_ctx + 1), -1)
    n_pieces = 0
    for i in range(len(lengths)):
        for at in range(0, lengths[i], n_ctx):
            kind, taken = min(at, 1), min(n_ctx, lengths[i] - at)
            piece_of[n_pieces], offset_of[n_pieces] = i, at
            below[n_pieces], top[kind, taken] = top[kind, taken], n_pieces
            n_pieces += 1
    first, story = np.empty(n_pieces + 1, np.int64), np.empty(n_most, np.int64)
    offset, size = np.empty(n_most, np.int64), np.empty(n_most, np.int64)
    n_rows, n_placed, n_left, next_head = 0, 0, n_pieces, 0
    while n_left > 0:
        first[n_rows] = n_placed
        n_rows += 1
        room = n_ctx
        while room > 0:
            # The largest piece that fits; a start before a rest, so that the row begins with one where it can.
            kind, fits = largest(top, room, first[n_rows - 1] == n_placed)
            if fits == 0:
                break
            piece = top[kind, fits]
            top[kind, fits] = below[piece]
            story[n_placed], offset[n_placed], size[n_placed] = piece_of[piece], offset_of[piece], fits
            n_placed, n_left, room = n_placed + 1, n_left - 1, room - fits
        if room >= SMALLEST_HEAD:
            for _ in range(len(lengths)):
                next_head = (next_head + 1) % len(lengths)
                if lengths[next_head] > room:
                    story[n_placed], offset[n_placed], size[n_placed] = next_head, 0, room
                    n_placed += 1
                    break
    first[n_rows] = n_placed
    return first[: n_rows + 1], story[:n_placed], offset[:n_placed], size[:n_placed]


@numba.njit(cache=True)
def largest(top: Ints, room: int, begins: bool) -> tuple[int, int]:
    """Kind and size of the largest piece that fits (0: none does). Where a row begins, starts come before rests."""
    best_kind, best = 0, 0
    for kind in range(2):
        if begins and best > 0:
            break
        for fits in range(room, best, -1):
            if top[kind, fits] >= 0:
                best_kind, best = kind, fits
                break
    return best_kind, best
