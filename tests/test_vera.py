"""VeRA: the shared matrices (who holds them, how they are drawn, saved, loaded), sizes, dropout, names."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import gpt2, llama, logits, opt, tokens
from torch import nn
from torch.testing import assert_close

from peft import (
    PeftModel,
    PeftWarning,
    VeraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.vera.layer import Linear, VeraLayer


def vera(base: nn.Module, *names: str, **kw) -> PeftModel:
    """A model whose adapters all change it; the first is active."""
    configs = [VeraConfig(**{"r": 4, "target_modules": "all-linear", **kw}) for _ in names or ("default",)]
    model = get_peft_model(base, configs[0], (names or ("default",))[0])
    for name, config in zip(names[1:], configs[1:]):
        model.add_adapter(name, config)
    for layer in model.base_model.layers():
        for name in names or ("default",):
            nn.init.normal_(layer.vera_lambda_b[name])
    return model.eval()


def test_layers_of_all_sizes_share_two_matrices():
    model = vera(llama())
    tuner = model.base_model
    assert tuner.vera_A["default"].shape == (4, 24) and tuner.vera_B["default"].shape == (24, 4)
    layers = list(tuner.layers())
    assert len(layers) == 14 and all(layer.vera_A is tuner.vera_A and layer.vera_B is tuner.vera_B for layer in layers)
    for layer in layers:
        b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        O, I = layer.weight.shape  # noqa: E741
        A, B = tuner.vera_A["default"][:, :I], tuner.vera_B["default"][:O]
        assert_close(layer.get_delta_weight("default"), (b[:, None] * B) @ (d[:, None] * A))
    assert model.get_nb_trainable_parameters()[0] == sum(layer.weight.shape[0] + 4 for layer in layers)
    assert {status.module_type for status in model.get_layer_status()} == {"vera.Linear"}
    assert all(isinstance(layer, Linear) and issubclass(Linear, VeraLayer) for layer in layers)


def test_matrices_move_and_copy_with_the_model():
    model = copy.deepcopy(vera(llama())).double()
    tuner = model.base_model
    assert tuner.vera_A["default"].dtype == torch.float64
    assert all(layer.vera_A is tuner.vera_A for layer in tuner.layers())


def test_adapters_that_are_injected_one_by_one_share_too():
    """Every injection has a tuner of its own; transformers' `add_adapter` is one."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9)), torch.randn(2, 6)
    config = VeraConfig(r=4, target_modules=["0", "1"], init_weights=False)
    inject_adapter_in_model(config, model, "a")
    expected = model(x)
    inject_adapter_in_model(config, model, "b")
    for layer in model:
        assert layer.vera_A["a"] is layer.vera_A["b"]
        layer.set_adapter("a")
    assert torch.equal(model(x), expected)


def test_seed_and_rank_decide_what_is_shared():
    model = vera(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9)), "a", "b", target_modules=["0"])
    model.add_adapter("other seed", VeraConfig(r=4, projection_prng_key=1, target_modules=["0"]))
    model.add_adapter("larger", VeraConfig(r=4, target_modules=["0", "1"]))
    A = model.base_model.vera_A
    assert A["a"] is A["b"] and list(A) == ["a", "b", "other seed", "larger"] and len(A) == 4
    assert A["other seed"].shape == (4, 6) and not torch.equal(A["other seed"], A["a"])
    model.delete_adapter("a")
    assert "a" not in A and "b" in A and "a" not in model.base_model.vera_B


def test_files(tmp_path):
    """With the matrices or without them, the same adapter."""
    base, ids = llama(), tokens()
    for save in (True, False):
        model = vera(copy.deepcopy(base), save_projection=save)
        model.save_pretrained(tmp_path / str(save))
        tensors = load_file(tmp_path / str(save) / "adapter_model.safetensors")
        assert ({"base_model.vera_A", "base_model.vera_B"} <= tensors.keys()) == save
        assert len(tensors) == 2 * 14 + 2 * save and not any("vera_A" in k and "layers" in k for k in tensors)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(save), low_cpu_mem_usage=True)
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_matrices_of_a_file_count(tmp_path):
    base, ids = llama(), tokens()
    model = vera(copy.deepcopy(base), "default", "second")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.vera_A"] = torch.randn_like(tensors["base_model.vera_A"])  # by another version of torch
    save_file(tensors, path)
    model.set_adapter("second")
    before = logits(model, ids)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, ids), before)  # what the two shared is shared no more
    assert torch.equal(model.base_model.vera_A["default"], tensors["base_model.vera_A"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_file_that_lacks_its_matrices_is_reported(tmp_path):
    base, ids = llama(), tokens()
    model = vera(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "lambda" in key}, path)
    with pytest.warns(PeftWarning, match="does not have 2 tensors .*vera_A"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))  # drawn by the seed


def test_injected_adapters(tmp_path):
    base, ids = llama(), tokens()
    model = vera(copy.deepcopy(base))
    tensors = get_peft_model_state_dict(model)
    injected = inject_adapter_in_model(VeraConfig(r=4, target_modules="all-linear"), copy.deepcopy(base))
    result = set_peft_model_state_dict(injected, {k.removeprefix("base_model.model."): t for k, t in tensors.items()})
    assert result.missing_keys == [] and result.unexpected_keys == ["base_model.vera_A", "base_model.vera_B"]
    assert torch.equal(logits(injected, ids), logits(model, ids))


def test_the_base_model_has_no_part_of_it():
    base = llama()
    plain = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    assert get_base_model_state_dict(vera(base)).keys() == plain.keys()


def test_config_file_has_upstreams_keys(tmp_path):
    VeraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert "exclude_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())
    VeraConfig(target_modules=["q_proj"], exclude_modules=["0.q_proj"]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"] == ["0.q_proj"]


def test_start():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), VeraConfig(r=3, d_initial=0.3, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert_close(layer.vera_lambda_d["default"].data, torch.full((3,), 0.3))
    assert not layer.vera_lambda_b["default"].any()
    config = VeraConfig(r=3, init_weights=False, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).base_model.model[0]
    assert layer.get_delta_weight("default").abs().min() > 0


def test_dropout_is_on_the_input_of_the_delta():
    model = vera(nn.Sequential(nn.Linear(50, 5)), target_modules=["0"], vera_dropout=0.5).double()
    layer, x = model.base_model.model[0], torch.eye(50, dtype=torch.float64)
    delta = model(x) - layer.base_layer(x)
    model.train()
    share = (model(x) - layer.base_layer(x)) / delta
    dropped = share.abs().amax(1) < 0.5
    assert 3 < dropped.sum() < 47  # outside by chance once in 10**10 runs
    assert_close(share[~dropped], torch.full_like(share[~dropped], 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "targets"), [(gpt2, {"c_attn"}), (opt, {"q_proj", "v_proj"})])
def test_default_targets_and_biases(make, targets):
    model = get_peft_model(make(), VeraConfig(r=4, bias="vera_only"))
    assert {key.rpartition(".")[2] for key in model.base_model.targeted_module_names} == targets
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == len(model.base_model.targeted_module_names)
