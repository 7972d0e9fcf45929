"""`add_weighted_adapter`: every combination against its formula in float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, llama, logits, tokens
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.combine import COMBINATIONS
from peft.utils import merge_utils

WEIGHTS = [(0.7, 0.3), (1.0, -0.5), (-1.0, -2.0)]
weights_given = pytest.mark.parametrize("weights", WEIGHTS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.table = nn.Linear(6, 5), nn.Conv2d(4, 6, 3), nn.Embedding(11, 6)


def two(*targets: str, ranks=(4, 4), others=None, **kw) -> PeftModel:
    """Adapters a and b, both with random factors in float64."""
    targets = targets or ("linear", "conv", "table")
    configs = [
        LoraConfig(r=r, lora_alpha=alpha, target_modules=list(names), **kw)
        for r, alpha, names in zip(ranks, (8, 6), (targets, others or targets))
    ]
    model = get_peft_model(Net().double(), configs[0], "a")
    model.add_adapter("b", configs[1])
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def layers(model: PeftModel) -> list:
    return list(model.base_model.layers())


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of this rank."""
    U, S, Vh = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).view(matrix.shape)


def largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Only the largest numbers, found by sorting."""
    count = int(density * tensor.numel())
    threshold = tensor.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(tensor.abs() >= threshold, tensor, 0.0)


def elected_mean(tensors, weights, method="total") -> torch.Tensor:
    """TIES, steps 2 and 3, number by number."""
    result = torch.zeros_like(tensors[0])
    for place in torch.cartesian_prod(*[torch.arange(n) for n in result.shape]).tolist():
        values = [t[tuple(place)].item() for t in tensors]
        votes = sum(values) if method == "total" else sum((v > 0) - (v < 0) for v in values)
        sign = 1 if votes >= 0 else -1
        kept = [w * v for w, v in zip(weights, values) if v * sign > 0]
        result[tuple(place)] = sum(kept) / len(kept) if kept else 0.0
    return result


@weights_given
def test_cat_is_the_exact_sum(weights):
    model = two(ranks=(4, 2))
    model.add_weighted_adapter(["a", "b"], list(weights), "n", combination_type="cat")
    assert model.peft_config["n"].r == 6 and model.active_adapters == ["a"]
    for layer in layers(model):
        expected = sum(w * layer.delta_weight(name) for w, name in zip(weights, "ab"))
        torch.testing.assert_close(layer.delta_weight("n"), expected)


@weights_given
@pytest.mark.parametrize("rank", [None, 3])
def test_svd_is_the_best_approximation_of_the_sum(weights, rank):
    model = two(ranks=(4, 2))
    model.add_weighted_adapter(["a", "b"], list(weights), "n", svd_rank=rank)
    for layer in layers(model):
        expected = sum(w * layer.delta_weight(name) for w, name in zip(weights, "ab"))
        torch.testing.assert_close(layer.delta_weight("n"), cut(expected, rank or 4))


@weights_given
def test_linear_combines_the_factors_with_the_roots_of_the_weights(weights):
    model = two("linear")
    model.add_weighted_adapter(["a", "b"], list(weights), "n", combination_type="linear")
    (layer,) = layers(model)
    (A1, B1), (A2, B2) = layer.factors("a"), layer.factors("b")
    w1, w2 = weights[0] * 2.0, weights[1] * 1.5  # alpha / r
    signs = [1 if w > 0 else -1 for w in (w1, w2)]
    A = signs[0] * abs(w1) ** 0.5 * A1 + signs[1] * abs(w2) ** 0.5 * A2
    torch.testing.assert_close(layer.delta_weight("n"), (abs(w1) ** 0.5 * B1 + abs(w2) ** 0.5 * B2) @ A)


@weights_given
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_and_pruning_of_the_changes(weights, method):
    model = two("linear")
    common = {"density": 0.5, "svd_rank": 5}  # all of the rank: nothing is lost in the factors
    model.add_weighted_adapter(["a", "b"], list(weights), "p", "magnitude_prune_svd", **common)
    model.add_weighted_adapter(["a", "b"], list(weights), "t", "ties_svd", majority_sign_method=method, **common)
    (layer,) = layers(model)
    pruned = [largest(layer.delta_weight(name), 0.5) for name in "ab"]
    torch.testing.assert_close(layer.delta_weight("p"), sum(w * t for w, t in zip(weights, pruned)))
    torch.testing.assert_close(layer.delta_weight("t"), elected_mean(pruned, weights, method))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "ties", "magnitude_prune"])
def test_factors_are_thinned_too(kind):
    model = two("linear")
    model.add_weighted_adapter(["a"], [2.0], "n", combination_type=kind, density=0.5)
    (layer,) = layers(model)
    for own, side in zip(layer.factors("n"), layer.factors("a")):
        kept = own != 0
        rescaled = 2.0 if kind.startswith("dare") else 1.0
        torch.testing.assert_close(own[kept], rescaled * 2.0 * side[kept])  # sqrt(weight 2 x scaling 2)
        assert not kept.all()  # of 20 numbers or more: once in a million draws
        if rescaled == 1.0:
            torch.testing.assert_close(own, 2.0 * largest(side, 0.5))


def test_random_pruning_keeps_the_expectation():
    tensor = torch.randn(50, dtype=torch.float64)
    mean = sum(merge_utils.random_pruning(tensor, 0.4, rescale=True) for _ in range(4000)) / 4000
    assert (mean - tensor).norm() < 0.1 * tensor.norm()
    kept = merge_utils.random_pruning(tensor, 0.4, rescale=False)
    assert torch.equal(kept[kept != 0], tensor[kept != 0])


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_one_adapter_combined_with_all_of_its_numbers_is_itself(kind):
    model = two()
    model.add_weighted_adapter(["a"], [1.0], "n", combination_type=kind, density=1.0)
    for layer in layers(model):
        torch.testing.assert_close(layer.delta_weight("n"), layer.delta_weight("a"))


def test_layers_that_an_adapter_lacks_count_as_unchanged():
    model = two("linear", others=("conv",), use_rslora=True)
    model.add_weighted_adapter(["a", "b"], [2.0, 3.0], "n", combination_type="cat")
    linear, conv, _ = model.get_base_model().children()
    torch.testing.assert_close(linear.delta_weight("n"), 2 * linear.delta_weight("a"))
    torch.testing.assert_close(conv.delta_weight("n"), 3 * conv.delta_weight("b"))
    assert model.peft_config["n"].target_modules == {"linear", "conv"}


def test_patterns_of_ranks_and_biases():
    model = two("linear", "conv", rank_pattern={"conv": 2}, alpha_pattern={"linear": 3}, lora_bias=True)
    model.add_weighted_adapter(["a", "b"], [2.0, -1.0], "n", combination_type="cat")
    for layer in layers(model):
        torch.testing.assert_close(layer.delta_weight("n"), 2 * layer.delta_weight("a") - layer.delta_weight("b"))
        torch.testing.assert_close(layer._delta_bias("n"), 2 * layer._delta_bias("a") - layer._delta_bias("b"))


def test_a_clamped_svd_has_no_larger_numbers_than_the_quantile():
    model = two("linear")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "free")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", svd_clamp=0.9)
    (layer,) = layers(model)
    numbers = torch.cat([factor.flatten() for factor in layer.factors("free")])
    highest = numbers.quantile(0.9)
    for ours, free in zip(layer.factors("n"), layer.factors("free")):
        torch.testing.assert_close(ours, free.clamp(-highest, highest))


def test_a_combination_is_saved_and_loaded(tmp_path):
    base, ids = llama(), tokens()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "a", "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "n", combination_type="cat")
    model.set_adapter("n")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path, selected_adapters=["n"])
    fresh = llama()
    fresh.load_state_dict(state)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "n"), ids), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "x"], [1.0, 1.0], "n"), r"no adapter \['x'\]"),
        ((["a", "a"], [1.0, 1.0], "n"), "named once only"),
        ((["a", "b"], [1.0], "n"), r"one weight per adapter, .* got \['a', 'b'\] and \[1.0\]"),
        (([], [], "n"), "one at least"),
        ((["a"], [1.0], "b"), "There is an adapter 'b' already"),
        ((["a"], [1.0], "n", "best"), "combination_type must be one of .* got 'best'"),
        ((["a"], [1.0], "n", "ties"), r"'ties' needs a density in \(0, 1\], got None"),
        ((["a"], [1.0], "n", "svd", 0), "svd_rank must be positive, got 0"),
        ((["a"], [1.0], "n", "svd", 2, 1.5), "svd_clamp is a quantile, in .* got 1.5"),
        ((["a"], [1.0], "n", "ties", None, None, True, None, 0.5, "most"), "'total' or 'frequency', got 'most'"),
        ((["a", "b"], [1.0, 1.0], "n", "linear"), r"must have one rank, got \[4, 2\]"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments, message):
    model = two(ranks=(4, 2))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b"] and all("n" not in layer.lora_A for layer in layers(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"use_dora": True}, "use_dora=True: .* cannot be combined"), ({"modules_to_save": ["conv"]}, "trained whole")],
)
def test_adapters_that_are_no_sums_are_refused(fields, message):
    model = two("linear", **fields)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n")


def test_lists_and_regular_expressions_as_targets():
    model = two("linear")
    for name, targets in (("a", "linear"), ("b", ".*near")):
        model.peft_config[name].target_modules = targets
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n")
    assert model.peft_config["n"].target_modules == "(linear)|(.*near)"
    model.peft_config["b"].target_modules = {"linear"}
    with pytest.raises(ValueError, match="cannot be joined"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m")
