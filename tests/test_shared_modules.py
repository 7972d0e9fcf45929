"""A module that a model holds in several places is adapted, and given back, in all of them."""

from __future__ import annotations

import torch
from tiny_models import CONFIGS, methods
from torch import nn

from peft import get_peft_model


class Twice(nn.Module):
    """Holds one layer under two names, and calls it by the second."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.stack = nn.Sequential(self.first, nn.Tanh())

    def forward(self, x):
        return self.stack(x)


@methods
def test_module_in_two_places(method):
    base, x = Twice(), torch.randn(3, 16)
    held = base.first
    with torch.no_grad():
        before = base(x)
    model = get_peft_model(base, CONFIGS[method](target_modules=["first"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    assert base.stack[0] is base.first is not held
    with torch.no_grad():
        assert not torch.allclose(model(x), before, atol=1e-4)
        unloaded = model.unload()
        assert unloaded.stack[0] is unloaded.first is held
        assert torch.equal(unloaded(x), before)
