"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): a factor for every input channel moves its range into the weights.

Dividing the inputs by s, in whatever makes them, and multiplying the columns of the weights by s changes no output.
"""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-5


def smoothing_factors(largest_inputs: Tensor, largest_weights: Tensor, alpha: float) -> Tensor:
    """s_j = a_j^alpha / w_j^(1 - alpha), [I].

    Args:
        largest_inputs: a, [I], the largest |x_j| over the calibration tokens.
        largest_weights: w, [I], the largest |W_ij| of all rows that read the inputs.
    """
    smallest = largest_weights.clamp(min=_LEAST)
    return (largest_inputs.pow(alpha) / smallest.pow(1 - alpha)).clamp_(min=_LEAST)
