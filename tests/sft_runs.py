"""What a run of sparse fine-tuning leaves behind, and that two runs left the same, for the tests of its parts."""

from __future__ import annotations

import torch


def snapshot(model, optimizer=None) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name."""
    result = {}
    for _, name, delta in model.active_deltas():
        result[f"{name}.indices"], result[f"{name}.values"] = delta.indices.clone(), delta.values.detach().clone()
        if optimizer is not None:
            for key, value in optimizer.state[delta.values].items():
                result[f"{name}.{key}"] = value.clone()
    return result


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
