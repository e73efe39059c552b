"""How the threads of a call share its work: each phase is cut into pieces, and a thread that is free takes the next.

The queue is one 64-bit word, epoch | phase | next piece, and a count of the completed pieces of the phase. No thread
waits for another one that has lost its core, unless that one holds a piece: whoever is there computes the rest. Which
thread computes a piece changes nothing in its result.
"""

from tinystories.engine.cpu.kernels.layout import CLOSED, EPOCH_SHIFT, PHASE_SHIFT, WORK_QUEUE
from tinystories.engine.cpu.kernels.memory import njit
from tinystories.engine.cpu.kernels.simd import (
    atomic_increment,
    atomic_load,
    atomic_store,
    compare_and_swap,
    pause,
    yield_core,
)

SPINS_BEFORE_YIELD = 4096  # checks before a waiting thread starts to yield its core to other processes
PHASE_MASK, PIECE_MASK = (1 << (EPOCH_SHIFT - PHASE_SHIFT)) - 1, (1 << PHASE_SHIFT) - 1


@njit
def claim_piece(queue, epoch, n_pieces):
    """Take the next piece; return (phase, piece), or (CLOSED, -1) when the call of this epoch is complete.

    Waits while other threads still compute the last pieces of a phase. Their writes are then visible.
    """
    state = queue + 8 * WORK_QUEUE.state
    spins = 0
    while True:
        word = atomic_load(state)
        phase, piece = (word >> PHASE_SHIFT) & PHASE_MASK, word & PIECE_MASK
        if word >> EPOCH_SHIFT != epoch or phase == CLOSED:
            return CLOSED, -1
        if piece < n_pieces:
            if compare_and_swap(state, word, word + 1):
                return phase, piece
        else:
            spins += 1
            if spins < SPINS_BEFORE_YIELD:
                pause()
            else:
                yield_core()


@njit
def finish_piece(queue, epoch, phase, n_pieces, n_phases):
    """Count a completed piece; the last one of a phase opens the next phase, or closes the queue."""
    if atomic_increment(queue + 8 * WORK_QUEUE.n_done) == n_pieces:
        atomic_store(queue + 8 * WORK_QUEUE.n_done, 0)
        next_phase = phase + 1 if phase + 1 < n_phases else CLOSED
        atomic_store(queue + 8 * WORK_QUEUE.state, (epoch << EPOCH_SHIFT) | (next_phase << PHASE_SHIFT))
