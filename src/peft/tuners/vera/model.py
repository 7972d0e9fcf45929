"""`VeraModel`: VeRA layers in a model, and the matrices that they share."""

from __future__ import annotations

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from ...utils.placement import home_device
from .._buffer_dict import BufferDict
from ..base import BaseTuner
from ..ops import MATRIX_KINDS, make_op
from .layer import Linear, VeraLayer


def draw_projections(
    r: int, inputs: int, outputs: int, key: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared matrices `A (r, inputs)` and `B (outputs, r)`: Kaiming-uniform, both of one generator.

    Files without them rely on it that these are always the same.
    """
    generator = torch.Generator().manual_seed(key)
    with torch.device("cpu"):
        return tuple(
            nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32), generator=generator).to(device)
            for shape in ((r, inputs), (outputs, r))
        )


class VeraModel(BaseTuner):
    """A model with VeRA adapters (arXiv 2310.11454); see `BaseTuner`."""

    prefix = "vera_lambda_"
    adapter_layer_names = ("vera_A", "vera_B")
    tuner_layer_cls = VeraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    layer_classes = {**dict.fromkeys(MATRIX_KINDS, VeraLayer), "Linear": Linear}

    def shared_state(self, config, targets, adapter_name):
        """Draw the shared matrices. Adapters that are to have the same ones hold the same memory."""
        if not hasattr(self, "vera_A"):
            self.vera_A, self.vera_B = BufferDict(), BufferDict()
        if not targets:
            return
        shapes = [make_op(module).weight_shape for module in targets.values()]
        outputs, inputs = (max(sizes) for sizes in zip(*((s[0], s[1:].numel()) for s in shapes)))
        A, B = self._existing(config, inputs, outputs) or draw_projections(
            config.r, inputs, outputs, config.projection_prng_key, home_device(next(iter(targets.values())))
        )
        self.vera_A.add(adapter_name, A, config.save_projection)
        self.vera_B.add(adapter_name, B, config.save_projection)

    def _existing(self, config, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        for name, other in self.peft_config.items():
            if name in self.vera_A and other.projection_prng_key == config.projection_prng_key:
                A, B = self.vera_A[name], self.vera_B[name]
                if (*A.shape, len(B)) == (config.r, inputs, outputs):
                    return A, B
        return None

    def layer_kwargs(self, config, key):
        return {"vera_A": self.vera_A, "vera_B": self.vera_B}
