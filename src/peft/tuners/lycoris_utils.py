"""What LoHa and LoKr share (LyCORIS, arXiv 2309.14859): their configuration, scaling, and ways to drop the delta."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import nn

from ..config import documented_dataclass
from .base import BaseTuner
from .common_config import TargetedConfig, check_probability, check_rank_and_alpha
from .targeting import for_module
from .tuners_utils import ScaledLayer


@documented_dataclass
class LycorisConfig(TargetedConfig):
    """A delta of rank `r`, scaled by alpha / r.

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

    r: int = 8
    """Rank of the factors."""
    alpha: float = 8
    """The delta is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability, in training, of dropping an output channel of the delta."""
    module_dropout: float = 0.0
    """Probability, in training, of leaving the delta of a whole layer out of one forward pass."""
    use_effective_conv2d: bool = False
    """Give convolutions whose kernel is larger than 1 factors of its own for the kernel (a CP decomposition)."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """Ranks of single layers: {regular expression for the end of a module's name: rank}."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """alpha of single layers, like rank_pattern."""

    def __post_init__(self):
        super().__post_init__()
        check_rank_and_alpha(self, "alpha")
        check_probability(self, "rank_dropout", "module_dropout")


class LycorisLayer(ScaledLayer, nn.Module):
    """A scaled delta that training may drop, channel by channel or as a whole; factors are bare parameters."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def update_layer(self, name, config, *, r: int, alpha: float) -> None:
        self.r[name], self.alpha[name] = r, alpha
        self.scaling[name] = self._initial_scaling(name)
        self.rank_dropout[name] = config.rank_dropout
        self.rank_dropout_scale[name] = getattr(config, "rank_dropout_scale", True)  # LoHa has no choice
        self.module_dropout[name] = config.module_dropout
        for attribute, shape in self.shapes(r, config).items():
            factor = nn.Parameter(torch.empty(shape))
            nn.init.kaiming_uniform_(factor, a=5**0.5)  # as nn.Linear draws its weight
            getattr(self, attribute)[name] = factor
        for attribute in self.zero_factors(config) if config.init_weights else ():
            if name in getattr(self, attribute):
                nn.init.zeros_(getattr(self, attribute)[name])

    def shapes(self, r: int, config) -> dict[str, tuple[int, ...]]:
        """`{attribute: shape}` of the factors."""
        raise NotImplementedError

    def zero_factors(self, config) -> tuple[str, ...]:
        """The attributes of factors that start at zero, where they are there."""
        raise NotImplementedError

    def kernel_shape(self, r: int, config) -> tuple[int, ...] | None:
        """Shape (r, r, *K) of the factor of its own that a kernel gets, in one dimension (r, r, K, 1); None: none."""
        kernel = self.op.kernel
        if not config.use_effective_conv2d or all(size == 1 for size in kernel):
            return None
        return (r, r, *kernel, *[1] * (len(kernel) == 1))

    def _initial_scaling(self, name):
        return self.alpha[name] / self.r[name]

    def post(self, name, x, y, before=()):
        if not self.training:
            return super().post(name, x, y, before)
        if self.module_dropout[name] and torch.rand(()) < self.module_dropout[name]:
            return y
        delta = self.delta(name, x)
        if self.rank_dropout[name]:
            keep = (torch.rand(self.out_features, device=y.device) >= self.rank_dropout[name]).to(delta)
            if self.rank_dropout_scale[name]:
                keep = keep / keep.mean().clamp(min=1 / len(keep))
            delta = delta * self.op.channels(keep, delta)
        return y + delta.to(y.dtype)


def kernel_factors(t: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A convolution's weight (O, I, *K) as `sum_ij t[i, j, *K] b[j, I] a[i, O]`."""
    return torch.einsum("ij...,jc,io->oc...", t, b, a)


class LycorisTuner(BaseTuner):
    """A model with LoHa or LoKr adapters; see `BaseTuner`."""

    def layer_kwargs(self, config, key):
        return {
            "r": for_module(key, config.rank_pattern, config.r),
            "alpha": for_module(key, config.alpha_pattern, config.alpha),
        }
