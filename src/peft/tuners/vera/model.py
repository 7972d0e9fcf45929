"""`VeraModel`: VeRA layers in a model, and the matrices that they share."""

from __future__ import annotations

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from ...utils.placement import home_device
from ..base import BaseTuner
from ..ops import MATRIX_KINDS, make_op
from .layer import Linear, VeraLayer


def draw_projections(config, inputs: int, outputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared matrices `A (r, inputs)` and `B (outputs, r)`: Kaiming-uniform, both of one generator.

    Files without them rely on it that these are always the same.
    """
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    with torch.device("cpu"):
        A, B = (torch.empty(shape, dtype=torch.float32) for shape in ((config.r, inputs), (outputs, config.r)))
    return tuple(nn.init.kaiming_uniform_(matrix, generator=generator).to(device) for matrix in (A, B))


class VeraModel(BaseTuner):
    """A model with VeRA adapters (arXiv 2310.11454); see `BaseTuner`."""

    prefix = "vera_lambda_"
    adapter_layer_names = ("vera_A", "vera_B")
    tuner_layer_cls = VeraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    layer_classes = {**dict.fromkeys(MATRIX_KINDS, VeraLayer), "Linear": Linear}

    def shared_state(self, config, targets, adapter_name):
        """Draw the shared matrices. Adapters that have the same ones hold the same memory: see `BufferDict`."""
        if not targets:
            return
        outputs, inputs = map(max, zip(*(make_op(module).matrix_shape for module in targets.values())))
        matrices = draw_projections(config, inputs, outputs, home_device(next(iter(targets.values()))))
        for shared, matrix in zip((self.vera_A, self.vera_B), matrices):
            shared.add(adapter_name, matrix, config.save_projection)
