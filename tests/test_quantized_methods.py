"""Further methods on packed base weights, one of 4 and one of 8 bits; every backend is in test_quantized_bases.py."""

from __future__ import annotations

import pytest
import torch
from invariant_cases import METHODS, OPS
from quantized_bases import BASES, WIDTH, Net, weight_of

from peft import PeftWarning, get_peft_model


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["loha", "lokr", "vera", "adalora"])
def test_forward_gradients_and_merging(method, base):
    net, x = Net(base, bias=False), torch.randn(8, 3, WIDTH)
    W = weight_of(net.first, x.dtype)
    before = {key: tensor.clone() for key, tensor in net.first.state_dict().items() if torch.is_tensor(tensor)}
    model = get_peft_model(net, METHODS[method].config(target_modules=["first"])).train()
    layer, leaves = net.first, {}
    for path, parameter in layer.adapter_tensors("default"):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        leaves[path] = parameter.detach().double().requires_grad_()
    expected = METHODS[method].formula(OPS["linear_no_bias"], W, None, leaves, x.double())
    y = layer(x)

    def close(ours, theirs, tolerance=1e-5):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()

    close(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient.double())
    for path, parameter in layer.adapter_tensors("default"):
        close(parameter.grad, leaves[path].grad, 5e-5)
    with pytest.warns(PeftWarning, match="1 merged weights were packed again"):
        model.merge_adapter()
    merged = METHODS[method].formula(OPS["linear_no_bias"], W, None, leaves, torch.eye(WIDTH).double())
    assert (weight_of(layer, x.dtype).T - merged).norm() <= BASES[base].error * merged.norm()
    model.unmerge_adapter()
    after = layer.base_layer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
