"""Several LoRA adapters combined into one (`LoraModel.add_weighted_adapter`).

Two families: those that form the weighted change of the weight and factorise it (`svd` and `<name>_svd`, and exactly
`cat`), and those that combine the factors A and B one by one, each with the root of the weight (`linear`, `ties`, ...),
which is cheap, keeps the rank, and is an approximation: products of different adapters' factors come in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from .layer import LoraLayer

_MERGES = {
    "linear": task_arithmetic,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
COMBINATIONS = ("svd", "cat", *_MERGES, *(f"{name}_svd" for name in _MERGES if name != "linear"))


@dataclass
class Combination:
    """How to combine; the arguments of `add_weighted_adapter`.

    Raises:
        ValueError: an unknown name, or a value outside its range.
    """

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self):
        if self.kind not in COMBINATIONS:
            raise ValueError(f"combination_type must be one of {COMBINATIONS}, got {self.kind!r}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank must be positive, got {self.svd_rank!r}")
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp is a quantile, in (0, 1], got {self.svd_clamp!r}")
        thins = self.kind not in ("svd", "cat", "linear")
        if thins and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(f"combination_type={self.kind!r} needs a density in (0, 1], got {self.density!r}")

    @property
    def factorises(self) -> bool:
        """Whether the change of the weight is formed."""
        return self.kind.endswith("svd")

    @property
    def merge(self) -> Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]:
        """Of tensors and their weights (n,)."""
        name = "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")
        given = {} if name == "linear" else {"density": self.density}
        if name.endswith("ties"):
            given["majority_sign_method"] = self.majority_sign_method
        return partial(_MERGES[name], **given)

    def rank(self, ranks: Sequence[int]) -> int:
        """Of the combination of adapters of these ranks.

        Raises:
            ValueError: they have to be equal, and are not.
        """
        if self.factorises:
            return self.svd_rank or max(ranks)
        if self.kind == "cat":
            return sum(ranks)
        if len(set(ranks)) > 1:
            raise ValueError(
                f"combination_type={self.kind!r} combines the factors number by number, so that the adapters must have "
                f"one rank, got {list(ranks)}: use 'cat', 'svd' or a name that ends in '_svd'"
            )
        return ranks[0]

    def factors(self, layer: LoraLayer, weights: dict[str, float], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (r, ...)` and `B (O, r, ...)` of the combination in one layer; `weights` of those that it has."""
        scaled = [float(weight * layer.scaling[name]) for name, weight in weights.items()]
        pairs = [tuple(_wide(t) for t in layer.factors(name)) for name in weights]
        if self.factorises:
            deltas = [_wide(layer.delta_weight(name)) for name in weights]
            own = deltas[0].new_tensor(list(weights.values()))
            return self._factorise(self.merge(deltas, own), rank, *pairs[0])
        if self.kind == "cat":
            return torch.cat([A * s for s, (A, _) in zip(scaled, pairs)]), torch.cat([B for _, B in pairs], dim=1)
        # The root on each side; the sign of a negative weight on one side only, or it would be lost in the product.
        roots = pairs[0][0].new_tensor([math.sqrt(abs(s)) for s in scaled])
        signs = pairs[0][0].new_tensor([math.copysign(1, s) for s in scaled])
        As, Bs = zip(*pairs)
        return self.merge(list(As), roots * signs), self.merge(list(Bs), roots)

    def _factorise(self, delta: torch.Tensor, rank: int, A: torch.Tensor, B: torch.Tensor):
        """The closest product of this rank, in the shapes of the factors `A` and `B`."""
        driver = {"driver": self.svd_driver} if self.svd_driver is not None else {}
        U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=self.svd_full_matrices, **driver)
        rank = min(rank, len(S))
        U, Vh = U[:, :rank] * S[:rank], Vh[:rank]
        if self.svd_clamp is not None:
            highest = torch.quantile(torch.cat([U.flatten(), Vh.flatten()]), self.svd_clamp)
            U, Vh = U.clamp(-highest, highest), Vh.clamp(-highest, highest)
        return Vh.reshape(rank, *A.shape[1:]), U.reshape(len(U), rank, *B.shape[2:])


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def combined_config(configs: Sequence, rank: int):
    """The configuration of a combination: like the first, with all targets, and scaled by 1.

    Raises:
        ValueError: what the adapters have cannot be combined.
    """
    for config in configs:
        if config.use_dora:
            raise ValueError(
                "use_dora=True: what a DoRA does is no sum of weighted changes, so it cannot be combined; merge it"
            )
        if config.target_parameters:
            raise ValueError(
                f"target_parameters={config.target_parameters}: LoRAs of bare parameters cannot be combined; merge them"
            )
        if config.modules_to_save:
            raise ValueError(
                f"modules_to_save={sorted(config.modules_to_save)}: modules that are trained whole cannot be combined"
            )
    if len({config.lora_bias for config in configs}) > 1:
        raise ValueError("lora_bias must be the same for all adapters that are combined")
    targets = [config.target_modules for config in configs]
    if len({isinstance(target, str) for target in targets}) > 1:
        raise ValueError(
            f"target_modules are a regular expression for some adapters and lists for others, got {targets}: they "
            "cannot be joined"
        )
    if isinstance(targets[0], str):
        joined = "|".join(f"({target})" for target in dict.fromkeys(targets))
        re.compile(joined)
    else:
        joined = set().union(*targets)
    return replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        target_modules=joined,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
        loftq_config={},
    )


@torch.no_grad()
def fill(layer: LoraLayer, name: str, weights: dict[str, float], combination: Combination) -> None:
    """Give the new adapter `name` of one layer the combination of those that it has; without any, a delta of 0."""
    weights = {other: weight for other, weight in weights.items() if other in layer._available_adapters}
    A, B = layer.factors(name)
    A.data.zero_(), B.data.zero_()
    if not weights:
        return
    new_A, new_B = combination.factors(layer, weights, len(A))
    A.data[: len(new_A)] = new_A.to(A)
    B.data[:, : new_B.shape[1]] = (new_B / layer.scaling[name]).to(B)  # 1, but for an attention's out_proj
    if layer.lora_bias[name]:
        bias = layer.lora_B[name].bias
        bias.data = sum(layer._delta_bias(other) * weight for other, weight in weights.items()).to(bias)
