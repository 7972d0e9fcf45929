"""The supernet: one adapter of largest size, in which every candidate is a view of the parameters.

Setting a candidate copies next to nothing and rebuilds nothing: a layer that is off is switched off, and a LoRA of rank
r is the first r rows of A and the first r columns of B. B is scaled by `sqrt(r_max / r)`, since a Kaiming draw depends
on the number of its inputs, so that the candidate is distributed as if it had been made anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ...utils.peft_types import PeftType
from ..tuners_utils import BaseTunerLayer
from .score import Terms, complexity, diversity, expressivity, saliency
from .space import SearchSpace

ADAPTER = "denas_supernet"
LATENCY_RUNS = 3
"""Forward passes of which the fastest is the latency."""


class Supernet:
    """A model whose adapter can be any candidate of a space. Made by `supernet`, which also takes it out again."""

    def __init__(self, model: nn.Module, space: SearchSpace, batch: Mapping[str, Any], seed: int):
        self.model, self.space, self.batch, self.seed = model, space, batch, seed
        modules = dict(model.named_modules())
        self.layers: list[list[BaseTunerLayer]] = [[modules[key] for key in unit.keys] for unit in space.units]
        self.factors = {
            layer: tuple(t.detach().clone() for t in layer.factors(ADAPTER))
            for layers in self.layers
            for layer in layers
            if space.method == PeftType.LORA
        }
        self.active: list[BaseTunerLayer] = []
        self._base_logits: Tensor | None = None

    def apply(self, codes: np.ndarray) -> None:
        """Let the adapter be the candidate `codes` (U, 1 + D)."""
        self.active = []
        for layers, row in zip(self.layers, codes):
            for layer in layers:
                layer.enable_adapters(bool(row[0]))
                for _, parameter in layer.adapter_tensors(ADAPTER):
                    parameter.grad = None
                if row[0]:
                    self.active.append(layer)
                    if self.space.method == PeftType.LORA:
                        r, alpha = (values[i] for values, i in zip(self.space.values, row[1:]))
                        self._slice(layer, r, alpha)

    def _slice(self, layer: BaseTunerLayer, r: int, alpha: float) -> None:
        A, B = layer.factors(ADAPTER)
        whole_A, whole_B = self.factors[layer]
        A.data = whole_A[:r]
        B.data = whole_B[:, :r] * math.sqrt(whole_B.shape[1] / r)
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = r, alpha * r
        layer.set_scale(ADAPTER, 1.0)

    def terms(self, codes: np.ndarray) -> Terms:
        """The terms of a candidate's score: one forward and one backward pass."""
        if self._base_logits is None:
            self._base_logits = self._base()
        self.apply(codes)
        torch.manual_seed(self.seed)  # dropout is the same for every candidate
        self.model.train()
        logits = logits_of(self.model, self.batch)
        logits.float().sum().backward()
        parameters = [p for layer in self.active for _, p in layer.adapter_tensors(ADAPTER)]
        pairs = [(p.detach(), p.grad) for p in parameters if p.grad is not None]
        sizes = [size for layer in self.active for size in self._sizes(layer)]
        return Terms(expressivity(logits, self._base_logits), complexity(sizes), diversity(pairs), saliency(pairs))

    @torch.no_grad()
    def _base(self) -> Tensor:
        for layers in self.layers:
            for layer in layers:
                layer.enable_adapters(False)
        torch.manual_seed(self.seed)
        self.model.train()
        return logits_of(self.model, self.batch)

    def _sizes(self, layer: BaseTunerLayer) -> list[tuple[int, ...]]:
        if self.space.method == PeftType.LORA:
            A, B = layer.factors(ADAPTER)
            return [(B.shape[0], A.flatten(1).shape[1], A.shape[0])]
        return [(p.numel(),) for _, p in layer.adapter_tensors(ADAPTER)]

    @torch.no_grad()
    def latency(self) -> float:
        """Seconds of a forward pass of the current candidate, the fastest of a few."""
        self.model.eval()
        times = []
        for _ in range(LATENCY_RUNS):
            _synchronize(self.batch)
            start = time.perf_counter()
            self.model(**self.batch)
            _synchronize(self.batch)
            times.append(time.perf_counter() - start)
        return min(times)


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the model puts out: its logits, or else the first of its outputs (hidden states)."""
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def _synchronize(batch: Mapping[str, Any]) -> None:
    if any(torch.is_tensor(value) and value.is_cuda for value in batch.values()):
        torch.cuda.synchronize()


@contextlib.contextmanager
def supernet(model: nn.Module, space: SearchSpace, batch: Mapping[str, Any], seed: int) -> Iterator[Supernet]:
    """Within this context the model carries the supernet; afterwards it is as it was.

    Raises:
        ValueError: SFT, whose deltas start at zero and so have no scores of this kind.
    """
    if space.method == PeftType.SFT:
        raise ValueError(
            "SFT's deltas start at zero, where deltatuner's score is zero, and cost the same time wherever they are: "
            "search with score='gradient_coherence', and without latency"
        )
    fields = {"target_modules": set(space.layout.places), "exclude_modules": None, "modules_to_save": None}
    fields |= {"layers_to_transform": None, "layers_pattern": None, "inference_mode": False, "bias": "none"}
    if space.method == PeftType.LORA:
        fields |= {"r": max(space.values[0]), "lora_alpha": max(space.values[0]), "init_lora_weights": False}
        fields |= {"rank_pattern": {}, "alpha_pattern": {}}
    else:
        fields |= {"init_ssf_weights": "normal"}
    torch.manual_seed(seed)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[space.method](model, dataclasses.replace(space.config, **fields), ADAPTER)
    try:
        yield Supernet(model, space, batch, seed)
    finally:
        tuner.unload()
