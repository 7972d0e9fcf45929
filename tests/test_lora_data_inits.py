"""Initialisations of LoRA that look at data: EVA, CorDA and LoRA-GA, against their papers and through files."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import llama, logits, tokens
from torch import nn

from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    PeftWarning,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling

PLAIN = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
QUIET = {"show_progress_bar": False}


class Net(nn.Module):
    """Three layers; `a` and `b` see the input, `c` something else. (N, 6) -> (N, 5)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, x):
        return self.b(x) + self.c(torch.tanh(self.a(x)))


def lora(init: str, *targets: str, **kw) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": init, "target_modules": list(targets), **kw})


def inputs(rows: int = 50) -> torch.Tensor:
    """Far from zero, and with very different directions, which no rounding can swap."""
    Q, _ = torch.linalg.qr(torch.randn(6, 6))
    return (torch.randn(rows, 6) * 3.0 ** -torch.arange(6)) @ Q + 5 * torch.randn(6)


def components(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of the variance, and directions (I, I) as rows, by the covariance in float64."""
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return values.flip(0) / values.sum(), vectors.T.flip(0)


def close_up_to_signs(A: torch.Tensor, B: torch.Tensor, **tolerance) -> None:
    """Rows."""
    A, B = A.detach().double(), B.detach().double()
    torch.testing.assert_close(A * (A * B).sum(1, keepdim=True).sign(), B, **tolerance)


# EVA


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("on_meta", [True, False])
def test_eva_takes_main_components_and_gives_ranks_where_they_explain_most(adjust, on_meta):
    net, x = Net().double(), inputs().double()
    y = net(x)
    seen = {"a": x, "b": x, "c": torch.tanh(net.a(x))}
    config = lora("eva", "a", "b", "c", eva_config=EvaConfig(rho=2, adjust_scaling_factors=adjust))
    model = get_peft_model(net, config, low_cpu_mem_usage=on_meta)
    initialize_lora_eva_weights(model, [{"x": x}], **PLAIN)
    found = {name: components(value.detach()) for name, value in seen.items()}
    # `a` and `b` have the same shares; of those the first comes first.
    shares = [(share, name) for name, (own, _) in found.items() for share in own[:4].tolist()]
    best = sorted(shares, key=lambda entry: -entry[0])[:6]
    config = model.peft_config["default"]
    kept = set()
    for name in "abc":
        rank = sum(own == name for _, own in best)
        layer = net.get_submodule(name)
        if rank == 0:
            assert type(layer) is nn.Linear
            continue
        kept.add(name)
        A, B = layer.factors("default")
        close_up_to_signs(A, found[name][1][:rank], atol=1e-6, rtol=0)
        assert not B.any() and B.shape == (layer.out_features, rank) and A.requires_grad
        alpha = 3 * rank if adjust else 6
        assert layer.r["default"] == rank and layer.lora_A["default"].out_features == rank
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
        assert config.rank_pattern.get(f"^{name}", 2) == rank and config.alpha_pattern.get(f"^{name}", 6) == alpha
    assert set(config.target_modules) == kept
    torch.testing.assert_close(model(x), y)


def test_components_of_batches_are_those_of_all_rows():
    x = inputs(60)
    config = lora("eva", "a", eva_config={"rho": 3.0, "tau": 0.99999}, r=2)
    found = get_eva_state_dict(Net(), [{"x": part} for part in x.split(20)], config, **PLAIN)
    assert list(found) == ["a"]
    close_up_to_signs(found["a"], components(x)[1][:2], atol=0.05, rtol=0)


def test_whitening_divides_by_the_roots_of_the_singular_values():
    net, batch = Net(), [{"x": inputs()}]
    config = lora("eva", "a", eva_config=EvaConfig(rho=1))
    plain = get_eva_state_dict(net, batch, config, **PLAIN)["a"]
    white = get_eva_state_dict(net, batch, replace(config, eva_config=EvaConfig(rho=1, whiten=True)), **PLAIN)["a"]
    x = batch[0]["x"].double()
    S = torch.linalg.svdvals(x - x.mean(0))[:2] * 2**0.5  # the batch was seen twice
    close_up_to_signs(white, plain.double() / S.sqrt()[:, None], atol=1e-4, rtol=1e-3)


def test_a_file_has_the_ranks_and_a_state_dict_can_be_used_again(tmp_path):
    base, ids = llama(), tokens(4, 12)
    fresh, again = copy.deepcopy(base), copy.deepcopy(base)
    config = lora("eva", "q_proj", "v_proj", "down_proj", r=3, eva_config=EvaConfig(rho=2), use_rslora=True)
    model = get_peft_model(base, config)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, :2] = -100
    state = get_eva_state_dict(model, [batch], **QUIET)
    initialize_lora_eva_weights(model, eva_state_dict=state)
    other = get_peft_model(again, replace(config, target_modules=["q_proj", "v_proj", "down_proj"]))
    initialize_lora_eva_weights(other, [batch], **QUIET)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == {name for name, p in other.named_parameters() if p.requires_grad}
    assert sum(len(A) for A in state.values()) == 3 * 3 * base.config.num_hidden_layers
    for name, parameter in own.items():
        assert torch.equal(parameter, other.get_parameter(name))
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits(loaded, ids), atol=1e-5, rtol=1e-4)


def test_padding_and_tokens_without_loss_are_left_out():
    base = llama()
    ids, mask, labels = tokens(), torch.ones_like(tokens()), tokens()
    mask[0, -2:], labels[1, :3] = 0, -100
    seen = []

    def spy(args, model_input, name):
        rows = prepare_layer_inputs_fn_language_modeling(args, model_input, name)
        seen.append(torch.equal(rows, args[0][(mask.bool() & (labels != -100))]))
        return rows

    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    path = "model.layers.0.self_attn.q_proj"
    get_eva_state_dict(base, [batch], lora("eva", path), prepare_layer_inputs_fn={path: spy}, **QUIET)
    assert seen and all(seen)
    seen.clear()
    config = lora("eva", path, eva_config=EvaConfig(use_label_mask=False))
    get_eva_state_dict(base, [batch], config, prepare_layer_inputs_fn={path: spy}, **QUIET)
    assert seen and not any(seen)


def test_what_eva_cannot_do_is_refused():
    model = get_peft_model(Net(), lora("eva", "a"))
    with pytest.raises(ValueError, match="needs a dataloader"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="for layers of adapter 'default', got others: \\['x'\\]"):
        initialize_lora_eva_weights(model, eva_state_dict={"x": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="is for a PeftModel"):
        initialize_lora_eva_weights(Net(), [])
    with pytest.raises(ValueError, match="got True"):
        initialize_lora_eva_weights(get_peft_model(Net(), lora(True, "a")), [])
    with pytest.raises(ValueError, match="peft_config is required"):
        get_eva_state_dict(Net(), [])
    with pytest.raises(ValueError, match="No batch of the dataloader reached"):
        get_eva_state_dict(model, [], **PLAIN)
    with pytest.warns(PeftWarning, match="still changed with the last batch"):
        get_eva_state_dict(model, iter([{"x": inputs()}]), **PLAIN)
    with pytest.raises(ValueError, match="EVA is for linear layers"):
        get_eva_state_dict(nn.Sequential(nn.Conv2d(1, 1, 1)), [], lora("eva", "0"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    for bad in ({"rho": 0.5}, {"tau": 1.0}, {"tau": -0.1}, {"ro": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LoraConfig(init_lora_weights="eva", eva_config=bad)
    with pytest.raises(ValueError, match="has no effect unless init_lora_weights is 'eva'"):
        LoraConfig(eva_config=EvaConfig())


# CorDA


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_out_a_part_of_the_weight_by_its_effect_on_the_data(method, tmp_path):
    net, batches = Net(), [inputs(), inputs(30)]
    fresh, y = copy.deepcopy(net), net(batches[0])
    W = net.b.weight.detach().double()
    config = lora("corda", "b", corda_config=CordaConfig(corda_method=method, cache_file=str(tmp_path / "cache")))
    preprocess_corda(net, config, run_model=lambda: [net(x) for x in batches])
    model = get_peft_model(net, config)
    A, B = (factor.detach().double() for factor in net.b.factors("default"))
    scaled = [x.double() / x.double().abs().max() for x in batches]
    C = sum(x.T @ x for x in scaled) / 2
    C = C + 0.01 * C.diagonal().mean() * torch.eye(6)  # which is enough here
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, 2) if method == "ipm" else slice(-2, None)
    s = net.b.scaling["default"]
    torch.testing.assert_close(s * B @ A, (U * S)[:, part] @ Vh[part] @ C.inverse(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(B.T @ B, torch.diag(S[part] / s), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(model(batches[0]), y, atol=1e-4, rtol=1e-4)
    assert not hasattr(net.b.base_layer, "lora_start")
    # A file is for the original model, from which the same is taken out again.
    net.b.lora_B["default"].weight.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Call preprocess_corda"):
        PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "adapter")
    preprocess_corda(fresh, config)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(loaded(batches[0]), model(batches[0]))


def test_covariances_can_be_kept_in_half_precision_and_used_for_other_ranks(tmp_path):
    nets, x = [Net()], inputs()
    nets += [copy.deepcopy(nets[0])]
    for net, r, run in zip(nets, (1, 3), (lambda: nets[0](x), None)):
        settings = CordaConfig(covariance_file=str(tmp_path / "c"), use_float16_for_covariance=True)
        config = lora("corda", "b", "a", r=r, corda_config=replace(settings, prune_temporary_fields=False))
        preprocess_corda(net, config, run_model=run)
        y = net(x)
        torch.testing.assert_close(get_peft_model(net, config)(x), y, atol=1e-4, rtol=1e-4)
        assert hasattr(net.b.base_layer, "lora_start")
    assert {t.dtype for t in torch.load(tmp_path / "c").values()} == {torch.float16}


def test_what_corda_cannot_do_is_refused(tmp_path):
    net = Net()
    with pytest.raises(ValueError, match="needs run_model"):
        preprocess_corda(net, lora("corda", "a"))
    with pytest.raises(ValueError, match="reached none of \\['a'\\]"):
        preprocess_corda(net, lora("corda", "a"), run_model=lambda: None)
    with pytest.raises(ValueError, match="must have init_lora_weights='corda', got True"):
        preprocess_corda(net, lora(True, "a"), run_model=lambda: None)
    with pytest.raises(ValueError, match="needs 5 singular vectors for r=5"):
        preprocess_corda(net, lora("corda", "a", r=5), run_model=lambda: None)
    with pytest.raises(ValueError, match="Call preprocess_corda"):
        get_peft_model(net, lora("corda", "a"))
    preprocess_corda(net, lora("corda", "a"), run_model=lambda: net(inputs()))
    with pytest.raises(ValueError, match="prepared for rank 2, and the adapter has 3"):
        get_peft_model(net, lora("corda", "a", r=3))
    torch.save({}, tmp_path / "other")
    with pytest.raises(ValueError, match="lacks 3 tensors"):
        preprocess_corda(net, lora("corda", "a", corda_config={"cache_file": str(tmp_path / "other")}))
    for bad in ({"corda_method": "x"}, {"method": "ipm"}):
        with pytest.raises(ValueError, match="method"):
            lora("corda", "a", corda_config=bad)


# LoRA-GA


def low_rank_step(net: Net):
    """A loss whose gradient with respect to the weight of `b` is (5, 6) and has well separated singular values."""
    U, _ = torch.linalg.qr(torch.randn(5, 5))
    V, _ = torch.linalg.qr(torch.randn(6, 6))
    G = (U * 2.0 ** -torch.arange(5)) @ V[:5]
    return G, lambda: (net.b.weight * G).sum().backward()


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_starts_along_the_gradient(direction, scale, tmp_path):
    net, x = Net(), inputs()
    fresh, y, W = copy.deepcopy(net), net(x), net.b.weight.detach().clone()
    G, step = low_rank_step(net)
    config = lora("lora_ga", "b", lora_ga_config=LoraGAConfig(direction=direction, scale=scale))
    preprocess_loraga(net, config, lambda: (step(), step()), cache_file=str(tmp_path / "gradients"))
    assert net.b.weight.grad is None and net.b.weight.requires_grad
    model = get_peft_model(net, config)
    A, B = (factor.detach() for factor in net.b.factors("default"))
    s = net.b.scaling["default"]
    length_A, length_B = {
        "stable": (5**0.25 / 4,) * 2,
        "weight_svd": (1.0, torch.linalg.svdvals(W)[0].item()),
        "gd_scale": (1 / s,) * 2,
        "unit": (1.0, 1.0),
    }[scale]
    U, _, Vh = torch.linalg.svd(G.double())
    if direction == "random":
        chosen = ((A.double() @ Vh.T).abs() / length_A).round().argmax(1)
        rest = ((U.T @ B.double()).abs() / length_B).round().argmax(0)
        assert sorted([*chosen.tolist(), *rest.tolist()]) == [0, 1, 2, 3]
    else:
        orders = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}
        chosen, rest = orders[direction]
    close_up_to_signs(A, Vh[chosen] * length_A, atol=1e-3, rtol=1e-3)
    close_up_to_signs(B.T, U.T[rest] * length_B, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(net.b.op.load()[0].detach() + s * B @ A, W)
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    net.b.lora_B["default"].weight.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    preprocess_loraga(fresh, config, lambda: 1 / 0, cache_file=str(tmp_path / "gradients"))
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path / "adapter")(x), model(x))


def test_a_language_model_by_its_own_gradients_and_as_a_plain_adapter(tmp_path):
    base, ids = llama(), tokens()
    fresh, expected = copy.deepcopy(base), logits(base, ids)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    config = lora("lora_ga", "q_proj", "down_proj")
    preprocess_loraga(base, config, lambda: base(input_ids=ids, labels=ids).loss.backward())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, config)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "start")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "plain")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=1e-4)


def test_what_lora_ga_cannot_do_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="gave no gradient to \\['a'\\]"):
        preprocess_loraga(net, lora("lora_ga", "a", "b"), low_rank_step(net)[1])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    with pytest.raises(ValueError, match="needs 6 singular vectors for r=3"):
        preprocess_loraga(net, lora("lora_ga", "a", r=3), lambda: None)
    with pytest.raises(ValueError, match="must have init_lora_weights='lora_ga'"):
        preprocess_loraga(net, lora("pissa", "a"), lambda: None)
    for bad in ({"direction": "x"}, {"scale": "x"}, {"stable_gamma": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LoraGAConfig(**bad)
