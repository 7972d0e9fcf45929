"""The LN-tuning layer: the base layer with weights of its own for each adapter (arXiv 2312.11420, section 3).

Merging writes the adapter's weights over the base layer's, unmerging puts those back. Since each adapter replaces the
layer, one can be active at a time.
"""

from __future__ import annotations

from torch import nn

from ...utils.placement import independent_copy
from ...utils.quantization_utils import is_quantized
from ..tuners_utils import BaseTunerLayer


class LNTuningLayer(BaseTunerLayer, nn.Module):
    """Meant for norms; works on every layer whose weight is not packed."""

    adapter_layer_names = module_dicts = ("ln_tuning_layers",)
    widens_parameters = False  # the copies compute as the base layer does, in its type
    replaces_module = True

    def update_layer(self, name, config):
        base = self.get_base_layer()
        if is_quantized(base):
            raise ValueError(f"LN tuning trains a layer's own weights, and those of {type(base).__name__} are packed")
        if isinstance(base, nn.MultiheadAttention):
            raise ValueError("LN tuning trains a layer's own weights, and an attention's are more than one layer's")
        if self.merged:
            raise ValueError("A new adapter starts from the base weights: call unmerge_adapter() first")
        self.ln_tuning_layers[name] = independent_copy(base)

    def _apply_adapters(self, names, x, *args, **kwargs):
        return self.ln_tuning_layers[names[0]](x, *args, **kwargs)

    def fold(self, name, W, b):
        own = self.ln_tuning_layers[name]
        return self.op.to_view(own.weight).to(W), None if b is None else own.bias.to(b)
