"""DE-NAS: structures and their files, what they cost, and the best choice within a budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import gpt2, llama, logits, tokens
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft import CompactLoraConfig, DenasConfig, LoraConfig, PeftModel, SftConfig, SsfConfig, get_peft_model
from peft.tuners.denas import apply_structure, read_structure, write_structure
from peft.tuners.denas.knapsack import best_choice
from peft.tuners.denas.space import Budget, SearchSpace
from peft.tuners.denas.structure import parse_structure

LORA = {"num_hidden_layers": [0, 1], "r": [3, 5], "alpha": [1, 2]}


def adapter_sizes(model) -> dict[str, int]:
    """{module: trained parameters}, without looking at what the adapter layers say."""
    sizes: dict[str, int] = {}
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad:
            for method in (".lora_", ".ssf_", ".sft_"):
                name = name.partition(method)[0]
            sizes[name] = sizes.get(name, 0) + parameter.numel()
    return sizes


# ---- From a structure to a model ----


@pytest.mark.parametrize("as_file", [False, True])
def test_lora_structure_gives_these_ranks_and_no_others(tmp_path, as_file):
    structure = LORA
    if as_file:
        structure = tmp_path / "tiny-best_structure.jsonl"
        structure.write_text(json.dumps(LORA) + "\n" + json.dumps({"other": 1}) + "\n")
    model = get_peft_model(llama(), CompactLoraConfig(best_structure=structure))
    # hidden size 16, key-value heads 1 of 2: q_proj 16 x 16, v_proj 8 x 16
    assert adapter_sizes(model) == {
        "model.layers.1.self_attn.q_proj": 5 * (16 + 16),
        "model.layers.1.self_attn.v_proj": 5 * (16 + 8),
    }
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    assert layer.r["default"] == 5 and layer.scaling["default"] == 2


@pytest.mark.parametrize(("name", "layers"), [("smollm2-135m", 30), ("all-minilm-l6-v2", 6)])
def test_structures_that_come_with_the_package(name, layers, tmp_path, monkeypatch):
    """By name, on models with as many layers; a folder of that name goes before them."""
    base = llama(num_hidden_layers=layers)
    model = get_peft_model(base, CompactLoraConfig(best_structure=name, target_modules="all-linear"))
    structure = model.peft_config["default"].structure
    assert structure == read_structure(name) and len(structure["r"]) == layers
    sizes = {layer.r["default"] for layer in model.base_model.layers()}
    assert sizes == {r for r, on in zip(structure["r"], structure["num_hidden_layers"]) if on}
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    write_structure(LORA, name)
    assert read_structure(name) == LORA
    with pytest.raises(ValueError, match=rf"give a file, or one of .*'{name}'"):
        read_structure("smollm3")


def test_structure_per_module_type():
    structure = {
        "num_hidden_layers": {"self_attn.q_proj": [1, 0], "self_attn.v_proj": [0, 1]},
        "r": {"self_attn.q_proj": [2, 1], "self_attn.v_proj": [1, 7]},
        "alpha": {"self_attn.q_proj": [1, 1], "self_attn.v_proj": [1, 3]},
    }
    model = get_peft_model(llama(), CompactLoraConfig(best_structure=structure))
    assert adapter_sizes(model) == {
        "model.layers.0.self_attn.q_proj": 2 * 32,
        "model.layers.1.self_attn.v_proj": 7 * 24,
    }
    assert model.get_base_model().model.layers[1].self_attn.v_proj.scaling["default"] == 3


def test_ssf_and_sft_structures():
    base = llama()
    ssf = apply_structure(SsfConfig(target_modules=["q_proj", "v_proj"]), base, {"num_hidden_layers": [1, 0]})
    assert adapter_sizes(get_peft_model(base, ssf)) == {
        "model.layers.0.self_attn.q_proj": 32,
        "model.layers.0.self_attn.v_proj": 16,
    }
    base = llama()
    sft = SftConfig(target_modules=["up_proj"], density=0.1)
    sft = apply_structure(sft, base, {"num_hidden_layers": [1, 1], "share": [2, 8]})  # half and twice the density
    sizes = adapter_sizes(get_peft_model(base, sft))
    assert sizes == {"model.layers.0.mlp.up_proj": int(0.05 * 384), "model.layers.1.mlp.up_proj": int(0.2 * 384)}


def test_structure_counts_the_layers_of_both_stacks():
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=40)
    base = T5ForConditionalGeneration(config)
    on = [0, 1, 1, 0, 0]  # encoder 1, decoder 0
    structure = {"num_hidden_layers": on, "r": [1, 2, 3, 1, 1], "alpha": [1] * 5}
    model = get_peft_model(base, CompactLoraConfig(target_modules=["q"], best_structure=structure))
    assert adapter_sizes(model) == {
        "encoder.block.1.layer.0.SelfAttention.q": 2 * 32,
        "decoder.block.0.layer.0.SelfAttention.q": 3 * 32,
        "decoder.block.0.layer.1.EncDecAttention.q": 3 * 32,
    }


def test_names_that_end_alike_are_told_apart():
    """`layers.0.q` is a module and the end of another one's name."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])

    def model(on, r):
        structure = {"num_hidden_layers": on, "r": r, "alpha": [1, 1]}
        return get_peft_model(Two(), CompactLoraConfig(target_modules=["q"], best_structure=structure))

    assert adapter_sizes(model([0, 1], [1, 3])) == {"layers.0.q": 24}
    assert adapter_sizes(model([1, 0], [2, 1])) == {"other.layers.0.q": 16}
    assert adapter_sizes(model([1, 1], [2, 3])) == {"other.layers.0.q": 16, "layers.0.q": 24}


def test_saved_as_an_ordinary_lora_with_the_structure_beside(tmp_path):
    base = llama()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, CompactLoraConfig(best_structure=LORA, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    ids = tokens()
    expected = logits(model, ids)
    assert read_structure(tmp_path) == LORA
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA"
    assert set(content) == set(LoraConfig().to_dict())  # nothing that upstream's LoraConfig does not have
    again = llama()
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(logits(loaded, ids), expected)
    loaded.save_pretrained(tmp_path / "again")  # as after more training: the structure stays with the adapter
    assert read_structure(tmp_path / "again") == LORA
    loaded.load_adapter(tmp_path, "second")  # an adapter like any other
    assert loaded.peft_config["second"].rank_pattern == model.peft_config["default"].rank_pattern


def test_compact_adapter_beside_another():
    model = get_peft_model(llama(), LoraConfig(r=2))
    model.add_adapter("compact", CompactLoraConfig(best_structure=LORA))
    assert set(model.get_base_model().model.layers[0].self_attn.q_proj.r) == {"default"}
    assert model.get_base_model().model.layers[1].self_attn.q_proj.r == {"default": 2, "compact": 5}


# ---- Files, and what is wrong in them ----


@pytest.mark.parametrize("text", [json.dumps(LORA), "\n  " + repr(LORA)])
def test_deltatuners_files(tmp_path, text):
    (tmp_path / "best_model_structure.txt").write_text(text)
    assert read_structure(tmp_path) == read_structure(tmp_path / "best_model_structure.txt") == LORA


def test_written_structure_is_one_line_and_reads_back(tmp_path):
    write_structure(LORA, tmp_path / "s.jsonl")
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 1
    assert read_structure(tmp_path / "s.jsonl") == LORA


def test_other_key_for_the_layers():
    structure = {"n_layer": [1, 0], "r": [1, 1], "alpha": [1, 1]}
    model = get_peft_model(gpt2(), CompactLoraConfig(best_structure=structure, layer_name="n_layer"))
    assert list(adapter_sizes(model)) == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": [1, 0, 1]}, "has 3 entries, but the model has 2 layers"),
        ({"r": [1]}, "r of the structure has 1 entries"),
        ({"num_hidden_layers": [0, 0]}, "leaves out every layer"),
        ({"num_hidden_layers": [0, 2]}, "must be 0 or 1"),
        ({"r": [1, 0]}, "r of a structure must be a positive whole number .* got 0"),
        ({"alpha": [1, "x"]}, "alpha of a structure must be a positive number .* got 'x'"),
        ({"share": [1, 1]}, r"has the keys \['num_hidden_layers', 'r', 'alpha'\], got"),
        ({"r": {"q": [1, 1]}}, "all lists, or all objects"),
    ],
)
def test_bad_structures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), CompactLoraConfig(best_structure=LORA | change))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot read the structure .*nowhere.txt"):
        read_structure(tmp_path / "nowhere.txt")
    (tmp_path / "list.txt").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        read_structure(tmp_path / "list.txt")


def test_targets_outside_layers():
    with pytest.raises(ValueError, match="none of the targets .*lm_head.* is in a numbered layer"):
        get_peft_model(llama(), CompactLoraConfig(target_modules=["lm_head"], best_structure=LORA))
    with pytest.warns(UserWarning, match="lm_head.* in no numbered layer"):
        get_peft_model(llama(), CompactLoraConfig(target_modules=["lm_head", "q_proj"], best_structure=LORA))


# ---- The space ----


def space_of(config, model=None, **search) -> SearchSpace:
    return SearchSpace(model or llama(), config, DenasConfig(**search), with_alpha=True)


@pytest.mark.parametrize("granularity", ["layer", "module"])
@pytest.mark.parametrize(
    "config",
    [LoraConfig(target_modules="all-linear", lora_bias=True), SsfConfig(), SftConfig(density=0.05)],
    ids=lambda c: c.peft_type.value,
)
def test_predicted_parameters_are_those_of_the_model(config, granularity, seed):
    base = llama()
    space = space_of(config, base, granularity=granularity)
    codes = space.draw(np.random.default_rng(seed))
    codes[0, 0] = 1
    structure = space.to_dict(codes)
    predicted = int(space.params(codes))
    assert np.array_equal(space.encode(parse_structure(structure, space.layout, config.peft_type)), codes)
    model = get_peft_model(base, apply_structure(config, base, structure))
    assert sum(adapter_sizes(model).values()) == predicted


def test_fit_meets_any_feasible_budget(seed):
    space = space_of(LoraConfig(target_modules="all-linear"), granularity="module")
    rng = np.random.default_rng(seed)
    smallest, largest = int(space.costs.min()), int(space.costs.max(axis=1).sum())
    for _ in range(50):
        high = int(rng.integers(smallest, largest + 1))
        budget = Budget(high, max(0, high - 60))  # wider than the steps of one rank, 32 to 40
        fitted = space.fit(space.draw(rng), budget, rng)
        assert fitted is not None and budget.min_params <= space.params(fitted) <= high
        assert np.array_equal(space.canonical(fitted), fitted)


def test_draws_mutations_and_crossings_stay_in_the_space(seed):
    space, rng = space_of(LoraConfig(), r_min=2, r_max=8, r_step=3), np.random.default_rng(seed)
    assert space.values == [[2, 5, 8], [1, 2, 3, 4, 5, 6]]
    a, b = space.draw(rng), space.draw(rng)
    for codes in (a, space.mutate(a, 1.0, 1.0, rng), space.cross(a, b, rng)):
        assert np.array_equal(space.encode(space.decode(codes)), codes)
    assert np.array_equal(space.mutate(a, 1.0, 1.0, rng)[:, 0], 1 - a[:, 0])  # every switch flips
    assert np.array_equal(space.mutate(a, 0.0, 0.0, rng), a)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"max_params": 1e-5}, "less than the smallest structure needs"),
        ({"min_params": 5}, "more than the largest structure has"),
        ({"min_params": 0.00125}, "more than max_params = .* as it is configured"),
    ],
)
def test_budgets_that_nothing_can_meet(search, message):
    config = LoraConfig()  # rank 8 of at most 12
    with pytest.raises(ValueError, match=message):
        space_of(config).budget(DenasConfig(**search))


# ---- The knapsack ----


@pytest.mark.parametrize("kind", ["any", "concave", "equal costs"])
def test_best_choice_is_that_of_trying_all(kind, seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        groups = int(rng.integers(1, 6))
        costs, values = [], []
        for _ in range(groups):
            n = int(rng.integers(1, 5))
            cost = rng.integers(0, 12, n) if kind != "equal costs" else np.full(n, 3)
            value = rng.normal(size=n)
            if kind == "concave":
                cost, value = np.arange(n) * rng.integers(1, 5), np.sort(rng.random(n))[::-1].cumsum()
            costs.append(cost)
            values.append(value)
        maximum = int(rng.integers(0, 40))
        minimum = int(rng.integers(0, maximum + 1)) if rng.random() < 0.5 else 0
        best = max(
            (
                sum(v[i] for v, i in zip(values, choice))
                for choice in itertools.product(*map(range, map(len, costs)))
                if minimum <= sum(c[i] for c, i in zip(costs, choice)) <= maximum
            ),
            default=None,
        )
        choice = best_choice(costs, values, maximum, minimum)
        assert (choice is None) == (best is None)
        if choice is not None:
            assert minimum <= sum(c[i] for c, i in zip(costs, choice)) <= maximum
            assert sum(v[i] for v, i in zip(values, choice)) == pytest.approx(best, abs=1e-9)


def test_best_choice_of_a_large_model_is_quick_to_find(seed):
    """100 modules, ranks to 32, odd costs: a table over costs would have billions of cells."""
    rng = np.random.default_rng(seed)
    costs = [np.arange(33) * int(rng.integers(1000, 9000)) for _ in range(100)]
    values = [np.concatenate([[0], np.sort(rng.exponential(size=32))[::-1].cumsum()]) for _ in costs]
    choice = best_choice(costs, values, 5_000_000)
    spent = sum(int(c[i]) for c, i in zip(costs, choice))
    assert 5_000_000 - 9000 < spent <= 5_000_000
