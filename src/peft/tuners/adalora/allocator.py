"""Which ranks of an AdaLoRA adapter stay: a budget that shrinks, given to the ranks that matter most.

How much a number matters is |p dL/dp|, smoothed over the steps, times how much that varies; a rank's score is that of
its number in E plus the means over its row of A and its column of B (arXiv 2303.10512, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .config import AdaLoraConfig
    from .layer import AdaLoraLayer


class RankAllocator:
    """The budget and the scores of one adapter.

    Args:
        model: with the adapter in it.
        peft_config: of the adapter.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str):
        self.peft_config = peft_config
        self.adapter_name = adapter_name
        self.ranks = [layer.r[adapter_name] for layer in self._layers(model)]
        self.init_bgt = sum(self.ranks)
        self.target_bgt = peft_config.target_r * len(self.ranks)
        self.reset_ipt()

    def set_total_step(self, total_step: int) -> None:
        """Change the number of steps of the whole training."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget the scores."""
        self.exp_avg_ipt: dict[tuple[str, str], torch.Tensor] = {}  # (layer's key in rank_pattern, factor)
        self.exp_avg_unc: dict[tuple[str, str], torch.Tensor] = {}

    def _layers(self, model: nn.Module) -> list[AdaLoraLayer]:
        return [m for m in model.modules() if self.adapter_name in getattr(m, "lora_E", ())]

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """`(ranks in all, whether they are allocated at this step)`: cubic between tinit and tfinal (section 3.3)."""
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > config.total_step - config.tfinal:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    def update_ipt(self, model: nn.Module) -> None:
        """Take the gradients of one step into the scores.

        Raises:
            RuntimeError: there are no gradients.
        """
        beta1, beta2 = self.peft_config.beta1, self.peft_config.beta2
        for layer in self._layers(model):
            for attribute, factor in layer.adapter_tensors(self.adapter_name):
                if factor.grad is None:
                    raise RuntimeError(
                        f"{layer.pattern_key} has no gradient: update_and_allocate() comes after loss.backward() and "
                        "optimizer.step(), and before optimizer.zero_grad()"
                    )
                key = (layer.pattern_key, attribute)
                ipt = (factor * factor.grad).abs().detach()
                mean = self.exp_avg_ipt.get(key, torch.zeros_like(ipt)) * beta1 + ipt * (1 - beta1)
                spread = (ipt - mean).abs()
                self.exp_avg_ipt[key] = mean
                self.exp_avg_unc[key] = self.exp_avg_unc.get(key, torch.zeros_like(ipt)) * beta2 + spread * (1 - beta2)

    def _scores(self, layer: AdaLoraLayer) -> torch.Tensor:
        """One number per rank of a layer, (r,)."""
        A, B, E = (
            self.exp_avg_ipt[layer.pattern_key, factor] * self.exp_avg_unc[layer.pattern_key, factor]
            for factor in ("lora_A", "lora_B", "lora_E")
        )
        return E.flatten() + A.mean(1) + B.mean(0)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Take ranks away until `budget` are left; which are, by layer."""
        layers = self._layers(model)
        scores = [self._scores(layer).float().cpu() for layer in layers]
        lost = self.init_bgt - budget
        threshold = torch.cat(scores).kthvalue(lost).values.item() if lost > 0 else float("-inf")
        pattern = {layer.pattern_key: (score > threshold).tolist() for layer, score in zip(layers, scores)}
        self.mask_using_rank_pattern(model, pattern)
        return pattern

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool]]) -> None:
        """Set E to zero where a rank is not to stay."""
        for layer in self._layers(model):
            E = layer.lora_E[self.adapter_name]
            stays = rank_pattern.get(layer.pattern_key, ())
            if len(stays) == len(E):  # else the ranks that do not are not there
                E.masked_fill_(~torch.tensor(stays, dtype=torch.bool, device=E.device)[:, None], 0.0)

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Take one step's gradients in and allocate the ranks if it is time, or with `force_mask`.

        Returns:
            The budget, and which ranks stay; None: nothing was allocated.
        """
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, is_time = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if is_time or force_mask else None
