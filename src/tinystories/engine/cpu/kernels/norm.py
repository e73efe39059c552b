"""LayerNorm and RMSNorm."""

import math

import numpy as np

from tinystories.engine.cpu.kernels.elementwise import scale_and_shift, scale_by_weight, sum_f32, sum_squares
from tinystories.engine.cpu.kernels.memory import njit


@njit
def layer_or_rms_norm(x, n, weight, bias, modern, eps, y):
    """Write the RMSNorm (`modern`, which ignores `bias`) or LayerNorm (otherwise) of n floats x to y, which may be x.

    All arguments are addresses of fp32 numbers, except n, `modern` and `eps`.
    """
    mean = np.float32(0)
    if not modern:
        mean = sum_f32(x, n, ()) / np.float32(n)
    scale = np.float32(1 / math.sqrt(sum_squares(x, n, (mean,)) / np.float32(n) + eps))
    if modern:
        scale_by_weight((y,), (x, weight), n, (scale,))
    else:
        scale_and_shift((y,), (x, weight, bias), n, (mean, scale))
