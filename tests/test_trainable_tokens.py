"""Trainable tokens: alone and beside LoRA, tied heads, files, and what is refused. (More is in test_invariants.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from quantized_bases import WIDTH
from tiny_models import llama, logits, opt
from torch import nn
from torch.testing import assert_close

from peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.blockwise import quantize_
from peft.utils.other import TrainableTokensWrapper

TOKENS = [7, 3, 20]
IDS = torch.tensor([[3, 4, 20, 7, 9], [5, 6, 8, 9, 10]])  # the second row has none of the tokens
KINDS = {
    "alone": lambda **kw: TrainableTokensConfig(**{"token_indices": TOKENS, **kw}),
    "lora": lambda **kw: LoraConfig(**{"trainable_token_indices": TOKENS, "target_modules": ["q_proj"], **kw}),
    "lora, by name": lambda **kw: LoraConfig(
        **{"trainable_token_indices": {"embed_tokens": TOKENS}, "target_modules": ["q_proj"], **kw}
    ),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def token_layers(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    return {key: m for key, m in model.named_modules() if isinstance(m, TrainableTokensLayer)}


def train(model: PeftModel, name: str = "default") -> torch.Tensor:
    """Other values for the tokens; they are returned."""
    rows = next(iter(token_layers(model).values())).trainable_tokens_delta[name]
    rows.data.normal_()
    return rows.data


@kinds
@ties
def test_forward_merging_and_back(kind, tied):
    """The reference is the model with the rows written into its table, and into its head where that is the same."""
    base = llama(tie_word_embeddings=tied)
    reference, expected = copy.deepcopy(base), logits(base, IDS)
    model = get_peft_model(base, KINDS[kind]())
    assert torch.equal(logits(model, IDS), expected)
    rows = train(model)
    with torch.no_grad():
        reference.model.embed_tokens.weight[TOKENS] = rows
    adapted = logits(model, IDS)
    assert_close(adapted, logits(reference, IDS))
    assert tied or torch.equal(adapted[1], expected[1])
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), expected)
    rows_of_both = logits(model, IDS, adapter_names=["__base__", "default"])
    assert_close(rows_of_both, torch.stack([expected[0], adapted[1]]))
    model.merge_adapter()
    assert_close(logits(model, IDS), adapted)
    model.unmerge_adapter()
    assert_close(logits(model, IDS), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged, IDS), adapted)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == merged.config.tie_word_embeddings == tied
    assert type(merged.model.embed_tokens) is nn.Embedding and type(merged.lm_head) is nn.Linear


@kinds
@ties
def test_only_the_tokens_train_and_both_ends_count(kind, tied):
    model = get_peft_model(llama(tie_word_embeddings=tied), KINDS[kind]())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert len(trained) == 1 and len(token_layers(model)) == 1 + tied
    rows = next(iter(token_layers(model).values())).trainable_tokens_delta["default"]
    model(input_ids=IDS).logits[1].logsumexp(-1).sum().backward()  # of this row the tokens are outputs alone
    assert bool(rows.grad.any()) == tied
    model.set_requires_grad("default", False)
    model.set_requires_grad("default", True)
    model.set_adapter("default")
    assert rows.requires_grad
    assert model.get_model_status().requires_grad == {"default": True}


@kinds
@ties
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files(kind, tied, low_cpu_mem_usage, tmp_path):
    base = llama(tie_word_embeddings=tied)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, KINDS[kind]())
    rows, expected = train(model), logits(model, IDS)
    model.save_pretrained(tmp_path)
    names = [key for key in load_peft_weights(tmp_path) if "lora" not in key]
    assert len(names) == 1 + (tied and kind == "alone")  # upstream writes both there
    inner = "" if kind == "alone" else ".token_adapter"
    assert f"base_model.model.model.embed_tokens{inner}.trainable_tokens_delta" in names
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, IDS), expected)
    layers = list(token_layers(loaded).values())
    assert torch.equal(layers[0].trainable_tokens_delta["default"], rows)
    assert layers[-1].trainable_tokens_delta["default"] is layers[0].trainable_tokens_delta["default"]


@kinds
@ties
def test_two_adapters(kind, tied):
    base = llama(tie_word_embeddings=tied)
    plain = {name: type(m) for name, m in base.named_modules()}
    model = get_peft_model(base, KINDS[kind](), "a")
    other = [4, 9]
    changed = other if kind != "lora, by name" else {"embed_tokens": other}
    field = "token_indices" if kind == "alone" else "trainable_token_indices"
    model.add_adapter("b", KINDS[kind](**{field: changed}))
    train(model, "a"), train(model, "b")
    single = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        single[name] = logits(model, IDS)
    assert_close(logits(model, IDS, adapter_names=["b", "a"]), torch.stack([single["b"][0], single["a"][1]]))
    model.set_adapter(["a", "b"])
    both = logits(model, IDS)
    model.merge_adapter()
    assert_close(logits(model, IDS), both)
    model.unmerge_adapter()
    model.set_adapter("a")
    model.delete_adapter("b")
    assert_close(logits(model, IDS), single["a"])
    model.delete_adapter("a")
    assert {name: type(m) for name, m in base.named_modules()} == plain


def test_adapters_that_share_tokens_cannot_be_active_together():
    model = get_peft_model(llama(), KINDS["lora"](), "a")
    model.add_adapter("b", KINDS["lora"](trainable_token_indices=[1, 20, 3]))
    with pytest.raises(ValueError, match=r"a token's embedding, but \['a', 'b'\] share the tokens \[3, 20\]"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]


def test_tied_modules_that_are_both_named_have_tokens_of_their_own():
    base = llama(tie_word_embeddings=True)
    indices = {"embed_tokens": [3, 4], "lm_head": [8]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))
    for layer in token_layers(model).values():
        layer.trainable_tokens_delta["default"].data.normal_()
    assert len({tuple(layer.token_indices["default"]) for layer in token_layers(model).values()}) == 2
    expected = logits(model, IDS)
    with pytest.warns(PeftWarning, match="tie_word_embeddings is now False"):
        merged = model.merge_and_unload()
    assert_close(logits(merged, IDS), expected)


@pytest.mark.parametrize("disabled", [False, True])
def test_tokens_of_a_new_adapter_wait_to_be_activated(disabled):
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"]), "a")
    if disabled:
        model.base_model.disable_adapter_layers()
    model.add_adapter("b", KINDS["lora"]())
    parts = [m for m in model.modules() if isinstance(m, (TrainableTokensLayer, TrainableTokensWrapper))]
    assert len(parts) == 4 and {tuple(part.active_adapters) for part in parts} == {("a",)}
    assert {part.disable_adapters for part in parts} == {disabled}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".b" in name)
    model.set_adapter("b")
    assert {tuple(part.active_adapters) for part in parts} == {("b",)}
    assert model.get_model_status().requires_grad == {"a": False, "b": True}


@pytest.mark.parametrize("order", [0, 1])
def test_tied_modules_are_named_alike_in_all_adapters(order):
    indices = [[3, 4], {"embed_tokens": [5], "lm_head": [8]}]
    first, second = (
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices[i]) for i in (order, 1 - order)
    )
    model = get_peft_model(llama(tie_word_embeddings=True), first)
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="lm_head is tied to another module .* name the same modules"):
        model.add_adapter("b", second)
    assert set(model.state_dict()) == keys


def test_tied_modules_that_are_both_targets_share_the_rows():
    base = llama(tie_word_embeddings=True)
    model = get_peft_model(base, KINDS["alone"](target_modules=["embed_tokens", "lm_head"]))
    embedding, head = token_layers(model).values()
    assert head.tied_to is embedding
    train(model)
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, IDS), expected)


@kinds
def test_off_loaded_models(kind):
    base = llama(tie_word_embeddings=True)
    away = cpu_offload(copy.deepcopy(base), execution_device="cpu")
    model, away = get_peft_model(base, KINDS[kind]()), get_peft_model(away, KINDS[kind]())
    rows = train(model)
    set_peft_model_state_dict(away, get_peft_model_state_dict(model))
    assert torch.equal(next(iter(token_layers(away).values())).trainable_tokens_delta["default"], rows)
    assert_close(logits(away, IDS), logits(model, IDS))
    with pytest.raises(RuntimeError, match="tied weights that are off-loaded cannot be merged"):
        away.merge_adapter()
    assert_close(logits(away, IDS), logits(model, IDS))


def test_tables_that_look_up_in_a_way_of_their_own():
    """OPT's table of positions has two rows before the first position."""
    base, ids = opt(), IDS
    reference = copy.deepcopy(base)
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[4], target_modules=["embed_positions"]))
    rows = train(model)
    with torch.no_grad():
        reference.model.decoder.embed_positions.weight[4] = rows[0]
    assert_close(logits(model, ids), logits(reference, ids))


def test_the_padding_token_has_no_gradient():
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=2))
    model = get_peft_model(net, TrainableTokensConfig(token_indices=[2, 5], target_modules=["0"]))
    model(torch.tensor([2, 5, 1])).sum().backward()
    assert net[0].trainable_tokens_delta["default"].grad.tolist() == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["alone", "lora"])
def test_packed_tables(bits, kind):
    bnb = pytest.importorskip("bitsandbytes")
    table = torch.randn(20, WIDTH)
    packed = (bnb.nn.EmbeddingNF4 if bits == 4 else bnb.nn.Embedding8bit)(20, WIDTH)
    packed.load_state_dict({"weight": table})
    net, x = nn.ModuleDict({"table": packed.to("cpu"), "q": nn.Linear(2, 2)}), torch.tensor([1, 3, 4])
    before = packed(x)
    indices = {"token_indices": [3], "target_modules": ["table"]} if kind == "alone" else {
        "trainable_token_indices": {"table": [3]}, "target_modules": ["q"]
    }  # fmt: skip
    model = get_peft_model(net, KINDS[kind](**indices))
    assert_close(net["table"](x), before)
    rows = train(model)
    expected = torch.stack([before[0], rows[0], before[2]])
    assert_close(net["table"](x), expected)
    with pytest.warns(PeftWarning, match="packed again"):
        model.merge_adapter()
    assert (net["table"](x) - expected).norm() < (0.3 if bits == 4 else 0.02) * expected.norm()


@pytest.mark.parametrize("first", ["embed_tokens", "lm_head"])
def test_tied_packed_tables_stay_tied(first):
    net = llama(tie_word_embeddings=True)
    quantize_({"tokens": net.model.embed_tokens, "head": net.lm_head})
    model = get_peft_model(net, KINDS["lora"](trainable_token_indices={first: TOKENS}))
    assert len(token_layers(model)) == 2
    for layer in token_layers(model).values():
        layer.trainable_tokens_delta["default"].data.normal_()
    expected = logits(model, IDS)
    with pytest.warns(PeftWarning, match="packed again"):
        model.merge_adapter()
    assert (logits(model, IDS) - expected).norm() < 0.2 * expected.norm()  # 0.02 to 0.04 in 150 draws
    model.unmerge_adapter()
    assert_close(logits(model, IDS), expected)
    merged = model.merge_and_unload(dequantize=True)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, IDS), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainableTokensConfig(), r"token_indices must name tokens of the 50 that Embedding has, got \[\]"),
        (TrainableTokensConfig(token_indices=[50]), r"of the 50 that Embedding has, got \[50\]"),
        (TrainableTokensConfig(token_indices=[1], target_modules=["norm"]), "norm .LlamaRMSNorm. is not supported"),
        (LoraConfig(trainable_token_indices={"nothing": [1]}), "names 'nothing', which is no module"),
        (LoraConfig(trainable_token_indices={"norm": [1]}), "names model.norm .LlamaRMSNorm., which is no plain"),
        (LoraConfig(trainable_token_indices=[99]), "of the 50 that Embedding has"),
        (LoraConfig(trainable_token_indices=[1], target_modules=["embed_tokens"]), "names model.embed_tokens"),
        (LoraConfig(trainable_token_indices=[1], modules_to_save=["embed_tokens"]), "names model.embed_tokens"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(config, message):
    base = llama()
    modules = {name: type(m) for name, m in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert {name: type(m) for name, m in base.named_modules()} == modules
    with pytest.raises(ValueError, match=r"trainable_token_indices .* different tokens, .* got \[2, 2\]"):
        LoraConfig(trainable_token_indices=[2, 2])


@pytest.mark.parametrize("kw", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_head_that_is_adapted_otherwise_is_refused(kw):
    base = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the trained tokens' embeddings, and has an"):
        get_peft_model(base, LoraConfig(trainable_token_indices=[1], **kw))
    assert type(base.lm_head) is nn.Linear


def test_names_and_attributes():
    model = get_peft_model(llama(), KINDS["lora"]())
    wrapper = model.base_model.model.model.embed_tokens
    assert isinstance(wrapper, TrainableTokensWrapper) and wrapper.original_module is None
    assert wrapper.weight.shape == (50, 16) and wrapper.embedding_dim == 16
    assert {s.name for s in model.get_layer_status() if "embed" in s.name} == {"model.model.embed_tokens.token_adapter"}
    assert len(get_peft_model_state_dict(model)) == 5
    random = get_peft_model(llama(), TrainableTokensConfig(token_indices=TOKENS, init_weights=False))
    rows = token_layers(random).popitem()[1]
    assert (rows.trainable_tokens_delta["default"] - rows.base_rows(TOKENS)).abs().mean() > 0.3
