"""OFT and BOFT: what rotates, how sizes are chosen, constraints and dropout. (The rest is in test_invariants.py.)"""

from __future__ import annotations

import pytest
import torch
from quantized_bases import BASES, WIDTH
from tiny_models import gpt2, llama, logits, tokens
from torch import nn
from torch.testing import assert_close

from peft import BOFTConfig, OFTConfig, PeftModel, PeftWarning, get_peft_model
from peft.tuners.boft.layer import butterfly
from peft.tuners.oft import OFTRotationModule
from peft.tuners.ops import Op

oft = {"oft_block_size": 4, "init_weights": False}
boft = {"boft_block_size": 4, "init_weights": False}
CONFIGS = {"oft": lambda **kw: OFTConfig(**{**oft, **kw}), "boft": lambda **kw: BOFTConfig(**{**boft, **kw})}
methods = pytest.mark.parametrize("method", list(CONFIGS))


def one_layer(config, features: int = 16) -> PeftModel:
    return get_peft_model(nn.Sequential(nn.Linear(features, 5)), config)


def is_rotation(R: torch.Tensor) -> bool:
    return torch.allclose(R @ R.mT, torch.eye(R.shape[-1], dtype=R.dtype).expand_as(R), atol=1e-5)


@methods
@pytest.mark.parametrize("make", [llama, gpt2])
def test_default_targets(method, make):
    model, ids = get_peft_model(make(), CONFIGS[method]()).eval(), tokens()
    assert model.peft_config["default"].target_modules == ({"q_proj", "v_proj"} if make is llama else {"c_attn"})
    expected = logits(model, ids)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, ids), expected, atol=1e-4)
    assert_close(logits(model.merge_and_unload(), ids), expected)


def test_oft_rotates_and_its_approximation_errs_by_the_rest_of_the_series():
    values = 0.1 * torch.randn(3, 10, dtype=torch.float64)
    exact = OFTRotationModule(3, 5, OFTConfig(use_cayley_neumann=False)).double()
    exact.weight.data.copy_(values)
    assert is_rotation(exact()) and not is_rotation(exact() + 1e-3)
    S = torch.zeros(3, 5, 5, dtype=torch.float64)
    rows, columns = torch.triu_indices(5, 5, 1)
    S[:, rows, columns] = values
    largest = torch.linalg.matrix_norm(S - S.mT, 2)  # of the eigenvalues i l of S; |(1 + i l) / (1 - i l)| is 1
    for terms in (2, 4, 6, 10):
        module = OFTRotationModule(3, 5, OFTConfig(num_cayley_neumann_terms=terms)).double()
        module.weight.data.copy_(values)
        error = torch.linalg.matrix_norm(module() - exact().mT, 2)  # upstream's convention: the inverse rotation
        rest = largest ** (terms - 1) if terms > 2 else 2 * largest**2 / (1 + largest**2).sqrt()
        assert_close(error, rest, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "config", "blocks", "size"),
    [
        (12, {"oft_block_size": 4}, 3, 4),
        (12, {"oft_block_size": 5}, 3, 4),
        (12, {"oft_block_size": 32}, 1, 12),
        (12, {"r": 5, "oft_block_size": 0}, 4, 3),
        (30, {"oft_block_size": 8}, 5, 6),
    ],
)
def test_oft_takes_the_nearest_block_size_that_divides(features, config, blocks, size, recwarn):
    model = one_layer(OFTConfig(**config, target_modules=["0"]), features)
    layer = model.base_model.model[0]
    assert (layer.r["default"], layer.oft_block_size["default"]) == (blocks, size)
    assert layer.oft_R["default"].weight.shape == (blocks, size * (size - 1) // 2)
    exact = blocks in config.values() or size in config.values()
    assert bool([w for w in recwarn if "does not divide" in str(w.message)]) != exact


def test_oft_without_anything_to_rotate_is_refused():
    with pytest.raises(ValueError, match="nothing to rotate in blocks of one of 7"):
        one_layer(OFTConfig(oft_block_size=2, target_modules=["0"]), 7)


def test_constrained_oft_keeps_its_parameters_in_the_ball_in_training_and_leaves_them_alone_otherwise():
    model = one_layer(OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=["0"]))
    rotation, x = model.base_model.model[0].oft_R["default"], torch.randn(3, 16)
    values = rotation.weight.data.normal_().clone()
    outputs = model.eval()(x)
    assert torch.equal(rotation.weight, values)
    assert_close(model.train()(x), outputs)
    # Both halves of the four skew-symmetric matrices together
    assert_close(2 * rotation.weight.square().sum(), torch.tensor(0.1**2))
    assert_close(rotation.weight / rotation.weight.norm(dim=1, keepdim=True), values / values.norm(dim=1, keepdim=True))
    with torch.no_grad():
        rotation.weight.mul_(0.5)
    inside = rotation.weight.clone()
    model(x)
    assert torch.equal(rotation.weight, inside)


def test_one_oft_rotation_for_all_blocks():
    model = one_layer(OFTConfig(**oft, block_share=True, target_modules=["0"]))
    rotation = model.base_model.model[0].oft_R["default"]
    assert rotation.weight.shape == (1, 6)
    assert torch.equal(rotation()[0], rotation()[3]) and rotation()[0, 0, 1] != 0
    x = torch.randn(3, 16)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected)


@methods
@pytest.mark.parametrize("layer", [nn.Linear(256, 5), nn.Conv2d(64, 5, 2)], ids=["linear", "conv"])
def test_dropout_leaves_some_blocks_alone_in_training(method, layer):
    name = "module_dropout" if method == "oft" else "boft_dropout"
    model = get_peft_model(nn.Sequential(layer), CONFIGS[method](target_modules=["0"], **{name: 0.5}))
    x = torch.randn(2, 256) if isinstance(layer, nn.Linear) else torch.randn(2, 64, 3, 3)
    assert not torch.equal(model.train()(x), model(x))  # other ones of 64 blocks
    whole = model.eval()(x)
    assert torch.equal(model(x), whole)
    model.train().merge_adapter()
    assert_close(model(x), whole)  # all of it is merged
    model.unmerge_adapter()
    if method == "oft":
        rotation = model.base_model.model[0].oft_R["default"]
        dropped = (rotation(True) == torch.eye(4)).all(-1).all(-1)
        assert_close(rotation(True)[~dropped].shape[1:], rotation().shape[1:])
        counts = [(rotation(True) == torch.eye(4)).all(-1).all(-1).sum().item() for _ in range(20)]
        assert 0 < sum(counts) < 20 * rotation.r


@methods
def test_grouped_convolutions_are_refused(method):
    with pytest.raises(ValueError, match=r"which a grouped convolution \(groups=2\) does not see together"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 2, groups=2)), CONFIGS[method](target_modules=["0"]))


def test_butterfly_factors_mix_all_features():
    """log2(2 r) factors of r blocks connect every feature with every other (arXiv 2311.06243, section 4)."""
    model = one_layer(
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, init_weights=False, target_modules=["0"]), 8
    )
    layer = model.base_model.model[0]
    layer.boft_R["default"].data.zero_()[..., 0, 1] = 0.2 + torch.rand(3, 4)
    R = layer._turned(torch.eye(8), layer.rotations("default"), inverse=False)
    assert is_rotation(R) and (R.abs() > 1e-7).all()
    assert_close(layer._turned(torch.eye(8), layer.rotations("default"), inverse=True), R.T)
    assert butterfly(torch.arange(8), 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly(torch.arange(16), 4, 2).tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert butterfly(butterfly(torch.arange(48), 6, 2), 6, 2, back=True).tolist() == list(range(48))
    x = torch.randn(3, 8)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"boft_block_size": 5}, "boft_block_size=5 must divide the layer's 16 input features"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "boft_block_num=3 must divide the layer's 16"),
        ({"boft_n_butterfly_factor": 4}, "boft_n_butterfly_factor=4 needs blocks of an even size and .* 4 blocks of 4"),
    ],
)
def test_boft_sizes_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        one_layer(BOFTConfig(**config, target_modules=["0"]))


def test_boft_takes_the_number_of_factors_from_the_file(tmp_path):
    """Upstream 0.21.2 makes one factor, whatever boft_n_butterfly_factor says."""
    model = one_layer(BOFTConfig(**boft, target_modules=["0"]))
    model.peft_config["default"].boft_n_butterfly_factor = 2
    model.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(16, 5))
    base.load_state_dict(
        {key: model.state_dict()[f"base_model.model.0.base_layer.{key[2:]}"] for key in base.state_dict()}
    )
    loaded, x = PeftModel.from_pretrained(base, tmp_path), torch.randn(3, 16)
    assert loaded.base_model.model[0].boft_R["default"].shape[0] == 1
    assert torch.equal(loaded(x), model(x))


@methods
def test_bias_of_the_method_trains(method):
    model = one_layer(CONFIGS[method](target_modules=["0"], bias=f"{method}_only"))
    model(torch.randn(3, 16)).sum().backward()
    assert_close(model.base_model.model[0].base_layer.bias.grad, torch.full((5,), 3.0))


@methods
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_packed_weights_are_trained_without_unpacking_them(method, base, monkeypatch):
    net, x = nn.Sequential(BASES[base].pack(nn.Linear(WIDTH, WIDTH))), torch.randn(4, WIDTH)
    model = get_peft_model(net, CONFIGS[method](target_modules=["0"])).train()
    expected = nn.functional.linear(x, *model.base_model.model[0].folded(["default"]))
    with monkeypatch.context() as patch:
        patch.setattr(Op, "load", None)
        y = model(x)
        y.square().sum().backward()
    assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.warns(PeftWarning, match="packed again"):
        model.merge_adapter()
    assert (model(x) - y).norm() < 0.4 * y.norm()  # 4 bits lose a tenth
