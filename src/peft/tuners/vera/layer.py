"""VeRA layers: `W + diag(b) B diag(d) A`, with A and B common to all layers (arXiv 2310.11454, eq. 2).

The shared matrices are as large as the largest layer needs; each takes the first of their columns and rows.
"""

from __future__ import annotations

import torch
from torch import nn

from ..tuners_utils import LowRankLayer


class VeraLayer(LowRankLayer, nn.Module):
    """VeRA on a layer of any kind that has a matrix or a kernel as its weight."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    dropout = "vera_dropout"
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")
    module_dicts = ("vera_dropout",)

    def update_layer(self, name, config):
        self.r[name] = config.r
        self.vera_dropout[name] = nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity()
        d, b = torch.full((config.r,), config.d_initial), torch.zeros(self.op.matrix_shape[0])
        self.vera_lambda_d[name] = nn.Parameter(d if config.init_weights else torch.randn_like(d))
        self.vera_lambda_b[name] = nn.Parameter(b if config.init_weights else torch.ones_like(b))

    def factors(self, name):
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        outputs, inputs = self.op.matrix_shape
        return self.vera_A[name][:, :inputs].to(d) * d[:, None], b[:, None] * self.vera_B[name][:outputs].to(b)


class Linear(VeraLayer):
    pass
