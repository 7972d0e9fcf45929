"""Mixed batches of modules that are trained whole: rows go through their own adapter's copy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.utils import ModelOutput

from peft.utils.mixed_batch import run_by_row
from peft.utils.other import ModulesToSaveWrapper

NAMES = ["b", "a", "__base__", "b"]


@dataclass
class Output(ModelOutput):
    hidden: torch.Tensor | None = None
    attention: torch.Tensor | None = None


class Head(nn.Module):
    """Takes a mask beside its input; `form` says what it returns."""

    def __init__(self, form):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.form = form

    def forward(self, hidden, mask=None, factor=1.0):
        return self.form(self.layer(hidden) * (1 if mask is None else mask) * factor)


def wrapper(form=lambda y: y) -> ModulesToSaveWrapper:
    module = ModulesToSaveWrapper(Head(form), "a")
    module.update("b")
    for copy in module.modules_to_save.values():
        for parameter in copy.parameters():
            nn.init.normal_(parameter)
    return module


def one_by_one(module, hidden, mask):
    copies = {**module.modules_to_save, "__base__": module.original_module}
    return torch.cat([
        copies[name].layer(hidden[i : i + 1]) * mask[i : i + 1] * 0.5 for i, name in enumerate(NAMES)
    ])  # fmt: skip


@pytest.mark.parametrize("how", ["positional", "keywords", "both"])
def test_arguments(how):
    module, hidden, mask = wrapper(), torch.randn(4, 3), torch.randn(4, 1)
    args, kwargs = {
        "positional": ((hidden, mask, 0.5), {}),
        "keywords": ((), {"hidden": hidden, "mask": mask, "factor": 0.5}),
        "both": ((hidden,), {"factor": 0.5, "mask": mask}),
    }[how]
    found = module(*args, adapter_names=NAMES, **kwargs)
    assert_close(found, one_by_one(module, hidden, mask))
    assert_close(module(hidden, adapter_names=["a"] * 4), module.modules_to_save["a"](hidden))


@pytest.mark.parametrize("form", [lambda y: (y, None), lambda y: {"y": y}, lambda y: Output(hidden=y)])
def test_results(form):
    module, hidden, mask = wrapper(form), torch.randn(4, 3), torch.randn(4, 1)
    found = module(hidden, mask, 0.5, adapter_names=NAMES)
    expected = one_by_one(module, hidden, mask)
    assert type(found) is type(form(expected))
    assert_close(next(iter(found.values())) if hasattr(found, "values") else found[0], expected)


def test_gradients_reach_the_adapters_of_their_rows():
    module, hidden = wrapper(), torch.randn(4, 3)
    module(hidden, adapter_names=["a", "a", "b", "b"])[:2].sum().backward()
    assert module.modules_to_save["a"].layer.weight.grad.abs().sum() > 0
    assert not module.modules_to_save["b"].layer.weight.grad.any()


@pytest.mark.parametrize(
    "form, names, error, message",
    [
        (lambda y: y.mean(), NAMES, TypeError, r"expected tensors with \[2, 1, 1\] rows"),
        (lambda y: (y, 3), NAMES, TypeError, "cannot be put together"),
        (lambda y: y, NAMES[:3], ValueError, "got 3 names for 4 rows"),
    ],
)
def test_refused(form, names, error, message):
    with pytest.raises(error, match=message):
        wrapper(form)(torch.randn(4, 3), adapter_names=names)


def test_refused_without_a_batch():
    with pytest.raises(TypeError, match="one row per name"):
        run_by_row(lambda name, x: x, ["a"], (1,), {})
    with pytest.raises(TypeError, match="must have one form"):
        run_by_row(lambda name, x: x if name == "a" else (x,), ["a", "b"], (torch.ones(2),), {})
