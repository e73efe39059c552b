"""Numba kernels of Muon on a CPU: what comes before and after the matmuls, each in one pass over a matrix or two."""

import math

from tinystories.training_kernels import ONE, ZERO, f32, narrow, njit, widen


@njit
def update_momentum(gradient, momentum_buffer, momentum, shrinking, epsilon, x):  # type: ignore[no-untyped-def]
    """Update the momentum buffer; write Nesterov's direction to x (bf16), divided by shrinking * its norm + epsilon.

    gradient, momentum_buffer and x are (outer, inner).
    """
    n_rows, n_columns = gradient.shape
    squares = ZERO
    for r in range(n_rows):
        gradient_row, momentum_row = gradient[r], momentum_buffer[r]
        for i in range(n_columns):
            g = gradient_row[i]
            m = g + momentum * (momentum_row[i] - g)
            momentum_row[i] = m
            direction = g + momentum * (m - g)
            squares += direction * direction
    scale = ONE / (math.sqrt(squares) * shrinking + epsilon)
    for r in range(n_rows):
        gradient_row, momentum_row, x_row = gradient[r], momentum_buffer[r], x[r]
        for i in range(n_columns):
            g = gradient_row[i]
            x_row[i] = narrow((g + momentum * (momentum_row[i] - g)) * scale, x)


@njit
def apply_update(update, row_squares, beta2, epsilon, decay, lr, weight):  # type: ignore[no-untyped-def]
    """Set weight to decay * weight - lr * update, whose rows are normalized first, as by `normalize_rows`.

    update (bf16) and weight are (outer, inner). row_squares (outer) is the running mean of the mean squares of the rows
    of the update, which moves by 1 - beta2 towards this one's. With beta2 = 0 the update is applied as it is.
    """
    n_rows, n_columns = update.shape
    factor = ONE
    if beta2 > ZERO:
        squares, normalized_squares = ZERO, ZERO
        for r in range(n_rows):
            update_row, row_sum = update[r], ZERO
            for i in range(n_columns):
                row_sum += widen(update_row[i]) * widen(update_row[i])
            row_squares[r] += (ONE - beta2) * (row_sum / f32(n_columns) - row_squares[r])
            inverse = ONE / (math.sqrt(row_squares[r]) + epsilon)
            squares += row_sum
            normalized_squares += row_sum * inverse * inverse
        factor = math.sqrt(squares) / max(math.sqrt(normalized_squares), epsilon)
    for r in range(n_rows):
        update_row, weight_row = update[r], weight[r]
        inverse = ONE / (math.sqrt(row_squares[r]) + epsilon) if beta2 > ZERO else ONE
        step = lr * factor * inverse
        for i in range(n_columns):
            weight_row[i] = decay * weight_row[i] - step * widen(update_row[i])
