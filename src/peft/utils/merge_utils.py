"""Combining tensors of several adapters into one: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), pruning, sums.

All functions take tensors of one shape and one weight for each; `density` is the share of the numbers that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

SignMethod = Literal["total", "frequency"]


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the `int(density * size)` numbers of the largest magnitude, the others become 0."""
    kept = torch.zeros_like(tensor).flatten()
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    kept[largest] = tensor.flatten()[largest]
    return kept.view(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep every number with the probability `density`, divided by it if `rescale` (the expectation stays)."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """Set all but a share `density` of the numbers to 0.

    Raises:
        ValueError: a density outside (0, 1], or an unknown method.
    """
    if density is None or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if density == 1:
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ValueError(f"method must be 'magnitude' or 'random', got {method!r}")


def calculate_majority_sign_mask(tensor: torch.Tensor, method: SignMethod = "total") -> torch.Tensor:
    """Where each of n stacked tensors (n, ...) has the sign that most of them have.

    "total": the sign of the sum. "frequency": the sign that occurs more often.

    Raises:
        ValueError: an unknown method.
    """
    if method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {method!r}")
    signs = tensor.sign()
    majority = (tensor if method == "total" else signs).sum(dim=0)
    return signs == torch.where(majority >= 0, 1, -1)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over those of n stacked tensors (n, ...) that the mask admits, number by number; 0 where it is none."""
    count = majority_sign_mask.sum(dim=0)
    return (task_tensors * majority_sign_mask).sum(dim=0) / count.clamp(min=1)


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights (n,) in a shape to multiply stacked tensors (n, ...)."""
    return weights.view(-1, *[1] * (task_tensors.dim() - 1))


def _weighted(tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    stacked = torch.stack(list(tensors))
    return stacked * reshape_weight_task_tensors(stacked, weights)


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum."""
    return _weighted(task_tensors, weights).sum(dim=0)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """The weighted sum of what is large in each."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> torch.Tensor:
    """TIES (arXiv 2306.01708, algorithm 1): trim, elect a sign, average what agrees with it."""
    return _elect([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE (arXiv 2311.03099, section 3.2): the weighted sum of randomly thinned tensors."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> torch.Tensor:
    """TIES of randomly thinned tensors."""
    return _elect([prune(t, density, "random", rescale=True) for t in task_tensors], weights, majority_sign_method)


def _elect(tensors: list[torch.Tensor], weights: torch.Tensor, majority_sign_method: SignMethod) -> torch.Tensor:
    mask = calculate_majority_sign_mask(torch.stack(tensors), majority_sign_method)
    return disjoint_merge(_weighted(tensors, weights), mask)
