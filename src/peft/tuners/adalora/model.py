"""`AdaLoraModel`: AdaLoRA layers in a model, the regularisation in its loss, and the allocation of the ranks."""

from __future__ import annotations

import torch

from ...utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from ..lora.model import LoraModel
from ..ops import MATRIX_KINDS
from .allocator import RankAllocator
from .layer import AdaLoraLayer, SVDConv2d, SVDLinear


class AdaLoraModel(LoraModel):
    """A model with AdaLoRA adapters (arXiv 2303.10512); see `BaseTuner`.

    In a training loop `update_and_allocate(step)` is to be called after every step of the optimiser.
    """

    tuner_layer_cls = AdaLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    layer_classes = {**dict.fromkeys(MATRIX_KINDS, AdaLoraLayer), "Linear": SVDLinear, "Conv2d": SVDConv2d}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._allocators: dict[str, RankAllocator] = {}

    def layer_kwargs(self, config, key):
        """The rank of this layer: what training has left of it, or that of the start."""
        pattern = (config.rank_pattern or {}).get(f"{key}.lora_E")
        return {"key": key, "r": config.init_r if pattern is None else sum(pattern)}

    def before_loading(self, adapter_name, saved):
        """Take over which ranks are left in the file."""
        if saved.get("peft_type") == self.peft_config[adapter_name].peft_type:
            self.peft_config[adapter_name].rank_pattern = saved.get("rank_pattern")

    def forward(self, *args, **kwargs):
        """The base model's forward. A loss that it returns includes the regularisation of the adapters that train."""
        output = super().forward(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor) and not self._adapters_disabled:
            output.loss = loss + sum(self._regularisation(name).to(loss) for name in self._trained())
        return output

    def _trained(self) -> list[str]:
        return [name for name in self.active_adapters if not self.peft_config[name].inference_mode]

    def _regularisation(self, name: str) -> torch.Tensor:
        """The mean of `|A A^T - I|` and `|B^T B - I|` (Frobenius, section 3.1) over the layers, weighted."""
        weight = self.peft_config[name].orth_reg_weight
        layers = [layer for layer in self.layers() if name in layer.lora_E]
        if not weight or not layers:
            return torch.zeros(())
        matrices = [M for layer in layers for M in (layer.lora_A[name], layer.lora_B[name].T)]  # (r, ...)
        distances = [torch.linalg.norm(M @ M.T - torch.eye(len(M), device=M.device, dtype=M.dtype)) for M in matrices]
        return weight * torch.stack([distance.to(distances[0]) for distance in distances]).mean()

    @property
    def trainable_adapter_name(self) -> str | None:
        """The (first) adapter that trains."""
        return next(iter(self._trained()), None)

    @property
    def rankallocator(self) -> RankAllocator:
        """The allocator of the (first) adapter that trains."""
        return self._allocator(self.trainable_adapter_name)

    def _allocator(self, name: str) -> RankAllocator:
        """The adapter's allocator; a new one for a new adapter, or where loading has changed its sizes."""
        fresh, known = RankAllocator(self.model, self.peft_config[name], name), self._allocators.get(name)
        if known is None or known.peft_config is not fresh.peft_config or known.ranks != fresh.ranks:
            self._allocators[name] = fresh
        return self._allocators[name]

    def update_and_allocate(self, global_step: int) -> None:
        """Score the ranks by their gradients, and take away those that are over the budget of this step.

        After `total_step - tfinal` the ranks are final: those that were lost are kept at zero.

        Raises:
            RuntimeError: there are no gradients; call this after the optimiser's step and before `zero_grad()`.
        """
        for name in self._trained():
            config, allocator = self.peft_config[name], self._allocator(name)
            last = config.total_step - config.tfinal
            if global_step > last:
                allocator.mask_using_rank_pattern(self.model, config.rank_pattern or {})
                continue
            _, pattern = allocator.update_and_allocate(self.model, global_step, force_mask=global_step == last)
            config.rank_pattern = config.rank_pattern if pattern is None else pattern
            if global_step == last:
                allocator.reset_ipt()
