"""AdaLoRA layers: `W + scaling / ranknum * B diag(E) A` (arXiv 2303.10512, section 3.1).

A (r, I K), B (O, r) and E (r, 1) are bare parameters. A rank is taken away by setting its number in E to zero, so that
it may come back; files leave out the ranks that are lost according to the configuration's `rank_pattern`.
"""

from __future__ import annotations

import torch
from torch import nn

from ...utils.placement import home_device
from ..lora.layer import LoraLayer
from ..tuners_utils import LowRankLayer
from .allocator import RankAllocator

RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # where a factor has its ranks

__all__ = ["AdaLoraLayer", "RankAllocator", "SVDConv2d", "SVDLinear"]


class AdaLoraLayer(LowRankLayer, LoraLayer, nn.Module):
    """AdaLoRA on a layer of any kind that has a matrix or a kernel as its weight."""

    adapter_layer_names = tuple(RANK_DIM)
    # configs: the adapters' configurations, which hold what is left of their ranks.
    other_param_names = (*LoraLayer.other_param_names, "ranknum", "configs")
    module_dicts = ("lora_magnitude_vector", "lora_dropout")
    dropout = "lora_dropout"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.ranknum = nn.ParameterDict()  # the rank at the start, by which the delta is divided whatever is left of it

    def update_layer(self, name, config, *, key: str, r: int):
        self.pattern_key = f"{key}.lora_E"
        self.configs[name] = config
        self.lora_alpha[name], self.use_rslora[name], self.lora_bias[name] = config.lora_alpha, False, False
        self.scaling[name] = self._initial_scaling(name)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        device = home_device(self.get_base_layer())  # never empty, and no tensor of a file
        self.ranknum[name] = nn.Parameter(torch.full((1,), float(config.init_r), device=device), requires_grad=False)
        outputs, inputs = self.op.matrix_shape
        self.r[name] = r
        starts = {"lora_A": ((r, inputs), 0.02), "lora_B": ((outputs, r), 0.02), "lora_E": ((r, 1), 0.0)}
        for attribute, (shape, scale) in starts.items():
            scale = 1.0 if config.init_lora_weights is False else scale
            getattr(self, attribute)[name] = nn.Parameter(torch.randn(shape) * scale)

    def _initial_scaling(self, name):
        return self.lora_alpha[name]

    def factors(self, name):
        E = self.lora_E[name]
        scaling = self.scaling[name] / (self.ranknum[name].to(E) + 1e-5)
        return self.lora_A[name] * (E * scaling), self.lora_B[name]

    def before_load(self, name, path, tensors):
        """Put the file's ranks where `rank_pattern` says, or else first; others are lost. Make room for more.

        The parameters of a layer that has lost ranks keep their sizes, so that an optimiser's state goes on to fit.
        """
        ranks, r = len(tensors.get(f"{path}.lora_E.{name}", ())), self.r[name]
        if f"{path}.lora_E.{name}" not in tensors or (ranks == r and self._left(name) is None):
            return
        config, self.r[name] = self.configs[name], max(r, ranks)
        pattern = (config.rank_pattern or {}).get(self.pattern_key, ())
        if len(pattern) != self.r[name] or sum(pattern) != ranks:
            pattern = [i < ranks for i in range(self.r[name])]
        config.rank_pattern = {**(config.rank_pattern or {}), self.pattern_key: pattern}
        places = torch.tensor(pattern, dtype=torch.bool).nonzero().squeeze(1)
        for attribute, own in list(self.adapter_tensors(name)):
            key, dim, shape = f"{path}.{attribute}.{name}", RANK_DIM[attribute], list(own.shape)
            shape[dim] = ranks
            if ranks > r:
                getattr(self, attribute)[name] = nn.Parameter(own.new_zeros(shape), own.requires_grad)
            elif key in tensors and list(tensors[key].shape) == shape:
                new, is_zero = tensors[key], own.is_meta or attribute == "lora_E"
                whole = new.new_zeros(own.shape) if is_zero else own.detach().to(new, copy=True)
                tensors[key] = whole.index_copy_(dim, places.to(new.device), new)

    def _left(self, name: str) -> list[bool] | None:
        """Which of the layer's ranks are left; None: all. (A pattern of another length is what it was made by.)"""
        pattern = (self.configs[name].rank_pattern or {}).get(self.pattern_key, ())
        return None if len(pattern) != self.r[name] or all(pattern) else pattern

    def before_save(self, name, path, tensors):
        """Leave out the ranks that are lost."""
        pattern = self._left(name)
        if pattern is not None:
            keep = torch.tensor(pattern).nonzero().squeeze(1)
            for attribute, dim in RANK_DIM.items():
                key = f"{path}.{attribute}.{name}"
                tensors[key] = tensors[key].index_select(dim, keep.to(tensors[key].device))


class SVDLinear(AdaLoraLayer):
    pass


class SVDConv2d(AdaLoraLayer):
    pass
