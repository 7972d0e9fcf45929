"""The bottleneck adapter: `y' = y + s W_up f(W_down h + b_down) + b_up` with h = y, or, in parallel, h = x.

arXiv 1902.00751 (section 2.1) and 2005.00247 put it behind a module, arXiv 2110.04366 (section 3) beside one. Because
of the non-linearity f it is no change of a weight: it cannot be merged, and needs no access to the target's weight.

Targets are layers of any kind, or whole blocks (an MLP, an attention): a block has the input width of the first layer
in it and the output width of the last, and the adapter takes the first of its inputs and of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.mixed_batch import run_by_row
from ..ops import make_op
from ..tuners_utils import BASE_ADAPTER, BaseTunerLayer


def is_block(module: nn.Module) -> bool:
    """Whether the module holds layers that tell its input and output width."""
    is_one = make_op(module) is None or isinstance(module, nn.MultiheadAttention)
    return is_one and any(make_op(part) is not None for part in module.modules() if part is not module)


class BottleneckLayer(BaseTunerLayer, nn.Module):
    """A bottleneck adapter at a layer or a block."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_scale")
    other_param_names = ("placement", "residual", "scaling", "non_linearity", "dropout")
    module_dicts = ("bottleneck_down", "bottleneck_up")
    not_merged_because = (
        "A bottleneck adapter is not linear, so that it cannot be merged into a weight: keep it beside the base model, "
        "or take it off with unload()"
    )

    def update_layer(self, name, config):
        is_parallel = config.placement == "parallel"
        channels_first = self.op.channel_dim == 1  # some norms are run to find it: now, not while torch.compile traces
        if is_parallel and (self.op.kind == "Embedding" or channels_first):
            raise ValueError(
                "placement='parallel' needs an input with as many positions as the output: use 'sequential', or other "
                "targets"
            )
        width = self.in_features if is_parallel else self.out_features
        size = config.bottleneck_size or max(1, round(width / config.reduction_factor))
        self.bottleneck_down[name] = nn.Linear(width, size)
        self.bottleneck_up[name] = up = nn.Linear(size, self.out_features)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        if config.scaling == "learned":
            self.bottleneck_scale[name] = nn.Parameter(torch.ones(1))
        self.placement[name], self.residual[name] = config.placement, config.residual
        self.scaling[name] = 1.0 if config.scaling == "learned" else config.scaling
        self.non_linearity[name], self.dropout[name] = config.non_linearity, config.dropout

    def post(self, name, x, y, before=()):
        h = y if self.placement[name] == "sequential" else x
        h = h.movedim(self.op.channel_dim, -1)
        h = F.dropout(h, self.dropout[name], self.training)
        h = getattr(F, self.non_linearity[name])(_product(self.bottleneck_down[name], h))
        h = _product(self.bottleneck_up[name], h) * self.scaling[name]
        if name in self.bottleneck_scale:
            h = h * self.bottleneck_scale[name]
        h = h.movedim(-1, self.op.channel_dim).to(y.dtype)
        return y + h if self.residual[name] else h

    def _apply_adapters(self, names, *args, **kwargs):
        def change(x, y):
            for name in names:
                y = self.post(name, x, y)
            return y

        return self._behind(change, args, kwargs)

    def _mixed_forward(self, adapter_names, *args, **kwargs):
        # The target itself runs once for all rows: an attention's cache could not be split.
        ways = [name if name in self._available_adapters else BASE_ADAPTER for name in adapter_names]

        def change_row(name, x, y):
            return y if name == BASE_ADAPTER else self.post(name, x, y)

        return self._behind(lambda x, y: run_by_row(change_row, ways, (x, y), {}), args, kwargs)

    def _behind(self, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], args: tuple, kwargs: dict):
        """The target's result, changed by its input and itself."""
        x = args[0] if args else next(iter(kwargs.values()))
        results = self.base_layer(*args, **kwargs)
        if isinstance(results, tuple):
            return change(x, results[0]), *results[1:]
        return change(x, results)


def _product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's product, in the type of `x`."""
    if linear.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return linear(x)
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
