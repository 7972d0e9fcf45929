"""`PeftModel` as its users see it: targets, several adapters, what trains, files, generation, errors and warnings."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    SftConfig,
    SsfConfig,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import METHODS, register_peft_method
from peft.tuners.ssf import SsfLayer, SsfModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
CONFIGS = {
    "lora": lambda **kw: LoraConfig(**{"r": 2, "init_lora_weights": False, **kw}),
    "sft": lambda **kw: SftConfig(**{"num_tunable_weights": 60, **kw}),
    "ssf": lambda **kw: SsfConfig(**{"init_ssf_weights": "normal", **kw}),
}
methods = pytest.mark.parametrize("method", list(CONFIGS))


def llama(**kw) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, **kw)).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)).eval()


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=24, num_labels=3)).eval()


def tokens(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length))


def logits(model: nn.Module, ids: torch.Tensor, **kw) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kw).logits


def adapted(base: nn.Module, *names: str, method: str = "lora", **kw) -> PeftModel:
    """A model whose adapters all change it; the first is active."""
    names = names or ("default",)
    config = {"target_modules": ["q_proj", "v_proj"], **kw}
    model = get_peft_model(base, CONFIGS[method](**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[method](**config))
    for layer in model.base_model.layers():
        for name in names:
            for _, parameter in layer.adapter_tensors(name):
                if parameter.is_floating_point():
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def trained(model: nn.Module) -> set[str]:
    """Which adapters train; "base" stands for the base model."""
    found = set()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = set(key.split("."))
            own = {name for name in model.peft_config if name in parts}
            found |= own or {"base"}
    return found


def targets_of(model: PeftModel) -> set[str]:
    layers = model.get_base_model().named_modules()
    return {key for key, module in layers if isinstance(module, BaseTunerLayer)}


def attention(*numbers: int, names=("q_proj", "v_proj")) -> set[str]:
    return {f"model.layers.{n}.self_attn.{name}" for n in numbers for name in names}


# Targets


MLP = {f"model.layers.{n}.mlp.{name}" for n in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")}
EVERY_LINEAR = attention(0, 1, names=("q_proj", "k_proj", "v_proj", "o_proj")) | MLP


@methods
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, attention(0, 1)),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, attention(1, names=["q_proj"])),
        ({"target_modules": ["_proj"]}, None),  # the end of a name, but not a whole part of it
        ({"target_modules": r".*\.1\..*[qv]_proj"}, attention(1)),
        ({"target_modules": r"q_proj"}, None),  # an expression is for the whole name
        ({"target_modules": "all-linear"}, EVERY_LINEAR),
        ({"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj", "up_proj", "gate_proj"]}, EVERY_LINEAR - MLP),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}, attention(1)),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, attention(1)),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 7]}, attention(0, 1)),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, attention(0, names=["q_proj"])),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, None),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, {key for key in EVERY_LINEAR if ".0." in key}),
    ],
)  # fmt: skip
def test_targets(method, fields, expected):
    base = llama()
    if expected is None:
        with pytest.raises(
            NoMatchingPeftModuleError, match="not found in the base model.*module names end in: .*q_proj"
        ):
            get_peft_model(base, CONFIGS[method](**fields))
        assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    else:
        assert targets_of(get_peft_model(base, CONFIGS[method](**fields))) == expected


@pytest.mark.parametrize(
    ("make", "method", "names"),
    [
        (llama, "lora", {"q_proj", "v_proj"}),
        (gpt2, "lora", {"c_attn"}),
        (opt, "lora", {"q_proj", "v_proj"}),
        (bert, "lora", {"query", "value"}),
        (llama, "sft", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (gpt2, "sft", {"c_attn", "c_proj", "c_fc"}),
        (bert, "sft", {"query", "key", "value", "dense"}),  # and not the classifier
        (gpt2, "ssf", {"c_attn", "c_proj", "c_fc"}),
        (opt, "ssf", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_default_targets(make, method, names):
    model = get_peft_model(make(), CONFIGS[method]())
    assert {key.rpartition(".")[2] for key in targets_of(model)} == names


def test_no_default_targets_for_an_unknown_model():
    with pytest.raises(ValueError, match="No default target_modules for model type 'custom'"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig())


# Adapter names


@pytest.mark.parametrize("name", ["values", "keys", "type", "a.b", "__base__", "", "forward", "training", None])
def test_names_that_nothing_can_carry(name):
    base = llama()
    with pytest.raises(ValueError, match="[Aa]dapter"):
        get_peft_model(base, CONFIGS["lora"](), name)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    model = adapted(base, "a")
    for add in (lambda: model.add_adapter(name, CONFIGS["lora"]()), lambda: model.load_adapter("nowhere", name)):
        with pytest.raises(ValueError):
            add()
    assert list(model.peft_config) == ["a"]


def test_names_that_are_taken_or_unknown():
    model = adapted(llama(), "a", "b")
    with pytest.raises(ValueError, match="There is an adapter 'b' already"):
        model.add_adapter("b", CONFIGS["lora"]())
    for use in (
        model.set_adapter,
        model.delete_adapter,
        model.set_requires_grad,
        lambda name: model.merge_adapter([name]),
        lambda name: model.merge_and_unload(adapter_names=[name]),
    ):
        with pytest.raises(ValueError, match=r"There is no adapter \['c'\]; the model has \['a', 'b'\]"):
            use("c")
    ids = tokens()
    with pytest.raises(ValueError, match=r"adapter_names holds unknown adapters \['c', 'd'\].*'__base__' stands for"):
        model(input_ids=ids, adapter_names=["d", "c"])
    with pytest.raises(ValueError, match="one adapter per row of the layer's input: got 3 names for 2 rows"):
        model(input_ids=ids, adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match="needs the plain base weights"):
        model.merge_adapter()
        model(input_ids=ids, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="of one method"):
        model.add_adapter("c", CONFIGS["ssf"]())


def test_second_get_peft_model():
    base = llama()
    model = adapted(base, "a")
    with pytest.raises(ValueError, match="PeftModel already.*add_adapter"):
        get_peft_model(model, CONFIGS["lora"]())
    with pytest.warns(PeftWarning, match="has adapter layers already"):
        again = get_peft_model(base, CONFIGS["lora"](target_modules=["q_proj"]), "b")
    assert again.active_adapters == ["b"] and list(again.peft_config) == ["a", "b"]


# Several adapters: what is active, what trains


@methods
def test_set_adapter(method):
    model = adapted(llama(), "a", "b", "c", method=method)
    ids = tokens()
    assert model.active_adapters == ["a"] and model.active_adapter == "a" and trained(model) == {"a"}
    outputs = {}
    for names in ("a", "b", ["a", "b"], ["b", "a"]):
        model.set_adapter(names)
        wanted = [names] if isinstance(names, str) else names
        assert model.active_adapters == wanted and trained(model) == set(wanted)
        outputs[str(names)] = logits(model, ids)
    assert len({output.sum().item() for output in outputs.values()}) >= 3
    model.set_adapter("c", inference_mode=True)
    assert trained(model) == set()


@methods
def test_adding_and_loading_never_thaws(method, tmp_path):
    adapted(llama(), method=method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, "a")
    assert trained(model) == set()
    model.add_adapter("b", CONFIGS[method](target_modules=["q_proj"]))
    assert model.active_adapters == ["a"] and trained(model) == set()
    model.load_adapter(tmp_path, "c", is_trainable=True)
    assert model.active_adapters == ["a"] and trained(model) == set()
    model.set_adapter("c")
    assert trained(model) == {"c"}
    model.load_adapter(tmp_path, "d")
    assert model.active_adapters == ["c"] and trained(model) == {"c"}
    model.delete_adapter("d")
    assert trained(model) == {"c"}
    model.set_adapter(["a", "c"], inference_mode=True)
    model.delete_adapter("c")
    assert model.active_adapters == ["a"] and trained(model) == set()


def test_deleting_the_active_adapter_activates_the_first_left():
    model = adapted(llama(), "a", "b", "c")
    with pytest.warns(PeftWarning, match="deleted; 'b' is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and trained(model) == {"b"}
    model.set_adapter(["c", "b"])
    model.delete_adapter("c")
    assert model.active_adapters == ["b"] and trained(model) == {"b"}
    model.delete_adapter("b")
    assert model.active_adapters == [] and trained(model) == set()
    fresh = logits(model, ids := tokens())
    assert torch.equal(fresh, logits(model.unload(), ids))


def test_a_merged_adapter_is_not_deleted():
    model = adapted(llama(), "a", "b")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'a' is merged: call unmerge_adapter"):
        model.delete_adapter("a")
    assert list(model.peft_config) == ["a", "b"]


@methods
@pytest.mark.parametrize("how", ["set_requires_grad", "parameters"])
def test_what_the_user_froze_stays_frozen(method, how):
    model = adapted(llama(), "a", "b", method=method, modules_to_save=["lm_head"])

    def freeze():
        if how == "set_requires_grad":
            model.set_requires_grad("a", False)
        else:
            for key, parameter in model.named_parameters():
                if "a" in key.split("."):
                    parameter.requires_grad_(False)

    freeze()
    assert trained(model) == set()
    model.set_adapter("b")
    model.set_adapter("a")
    model.add_adapter("c", CONFIGS[method](target_modules=["k_proj"]))
    with model.disable_adapter():
        pass
    assert trained(model) == set()
    assert set(model.get_model_status().requires_grad.values()) == {False}
    model.set_requires_grad("a")
    assert trained(model) == {"a"}
    model.set_requires_grad(["b", "c"])  # active or not
    assert trained(model) == {"a", "b", "c"}


# modules_to_save


def test_modules_to_save_is_trained_saved_and_mixed(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = adapted(base, "a", "b", modules_to_save=["lm_head"])
    head = base.lm_head
    assert isinstance(head, ModulesToSaveWrapper) and not head.original_module.weight.requires_grad
    for name in ("a", "b"):
        head.modules_to_save[name].weight.data.add_(torch.randn_like(head.original_module.weight))
    assert head.modules_to_save["a"].weight.requires_grad and not head.modules_to_save["b"].weight.requires_grad
    ids = tokens(rows=4)
    single = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        single[name] = logits(model, ids)
    with model.disable_adapter():
        single["__base__"] = logits(model, ids)
    assert torch.equal(single["__base__"], logits(fresh, ids))
    rows = ["b", "__base__", "a", "b"]
    for row, (name, output) in enumerate(zip(rows, logits(model, ids, adapter_names=rows))):
        torch.testing.assert_close(output, single[name][row], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"Only one adapter can replace a module as a whole, but \['a', 'b'\]"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["b"] and trained(model) == {"b"}  # nothing was switched half-way
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in keys and not any("modules_to_save" in key for key in keys)
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "a")
    assert torch.equal(logits(loaded, ids), single["a"])
    model.set_adapter("a")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), single["a"], atol=1e-4, rtol=1e-4)
    assert type(merged.lm_head) is nn.Linear
    assert torch.equal(logits(loaded.unload(), ids), single["__base__"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["lm_hat"]}, r"modules_to_save names \['lm_hat'\], which are no modules"),
        ({"modules_to_save": ["q_proj"]}, "q_proj is a target of the adapter and cannot be in modules_to_save as well"),
    ],
)
def test_bad_modules_to_save(fields, message):
    base = llama()
    before = [key for key, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapted(base, **fields)
    assert [key for key, _ in base.named_modules()] == before


def test_module_that_is_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(input=self.body(x))

    model = adapted(Net(), "a", "b", target_modules=["body"], modules_to_save=["head"])
    x = torch.randn(3, 4)
    assert model(x).shape == (3, 2)


@methods
def test_classification_head_is_trained_along(method, tmp_path):
    base = bert()
    fresh, ids = copy.deepcopy(base), tokens()
    model = adapted(base, method=method, task_type="SEQ_CLS", target_modules=["query"])
    assert isinstance(base.classifier, ModulesToSaveWrapper)
    base.classifier.modules_to_save["default"].bias.data.add_(3)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert type(loaded) is type(model) and torch.equal(logits(loaded, ids), expected)


# Tied weights


@methods
@pytest.mark.parametrize("make", [gpt2, lambda: llama(tie_word_embeddings=True)], ids=["gpt2", "llama"])
def test_merging_an_adapted_embedding_leaves_the_tied_head_alone(method, make):
    base = make()
    table = base.get_input_embeddings().weight
    assert base.lm_head.weight is table
    name = "wte" if isinstance(base, GPT2LMHeadModel) else "embed_tokens"
    model = adapted(base, method=method, target_modules=[name])
    before, ids = table.detach().clone(), tokens()
    expected = logits(model, ids)
    for _ in range(2):
        model.merge_adapter()
        assert base.lm_head.weight is table and torch.equal(table, before)
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        assert base.get_input_embeddings().weight is table and torch.equal(table, before)
    with pytest.warns(PeftWarning, match="tie_word_embeddings is now False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.lm_head.weight, before)


@methods
def test_saving_an_adapted_embedding_with_the_base_embeddings(method, tmp_path):
    base = llama(tie_word_embeddings=True)
    fresh, ids = copy.deepcopy(base), tokens()
    model = adapted(base, method=method, target_modules=["embed_tokens"])
    expected = logits(model, ids)
    with pytest.warns(PeftWarning, match="embeddings are saved with the adapter"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), expected)
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight  # loading has not parted them
    model.save_pretrained(tmp_path / "small", save_embedding_layers=False)
    assert all(".weight" not in key for key in load_peft_weights(tmp_path / "small"))


@methods
def test_adding_an_adapter_while_merged_keeps_the_tie(method):
    base = llama(tie_word_embeddings=True)
    model = adapted(base, "a", method=method, target_modules=["embed_tokens"])
    table, before = base.lm_head.weight, base.lm_head.weight.detach().clone()
    model.merge_adapter()
    model.add_adapter("b", CONFIGS[method](target_modules=["embed_tokens"]))
    for _ in range(2):
        model.unmerge_adapter()
        assert base.get_input_embeddings().weight is table
        model.merge_adapter()
    assert torch.equal(base.lm_head.weight, before)


def test_embeddings_go_only_with_the_adapter_that_targets_them():
    model = adapted(llama(), "a", target_modules=["embed_tokens"])
    model.add_adapter("b", CONFIGS["lora"](target_modules=["q_proj"]))
    with pytest.warns(PeftWarning, match="embeddings are saved"):
        assert any("embed_tokens.base_layer" in key for key in get_peft_model_state_dict(model, adapter_name="a"))
    assert not any("embed_tokens" in key for key in get_peft_model_state_dict(model, adapter_name="b"))


# Files


@methods
def test_state_dict_of_a_compiled_model(method):
    model = adapted(llama(), method=method, modules_to_save=["lm_head"])
    compiled = torch.compile(model, backend="eager")
    plain = get_peft_model_state_dict(model)
    assert get_peft_model_state_dict(compiled).keys() == plain.keys()
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == plain.keys()
    changed = {key: t + 1 if t.is_floating_point() else t for key, t in plain.items()}
    assert set_peft_model_state_dict(compiled, changed) == ([], [])
    for key, t in get_peft_model_state_dict(model).items():
        assert torch.equal(t, changed[key])


@methods
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "subfolder", "low_cpu_mem_usage"])
def test_forms_of_files(method, form, tmp_path):
    base = llama()
    fresh, ids = copy.deepcopy(base), tokens()
    model = adapted(base, method=method)
    expected = logits(model, ids)
    folder = tmp_path / "sub" if form == "subfolder" else tmp_path
    model.save_pretrained(folder, safe_serialization=form != "bin")
    options = {"subfolder": {"subfolder": "sub"}, "low_cpu_mem_usage": {"low_cpu_mem_usage": True}}.get(form, {})
    if form == "sharded":
        shard(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "README.md"} <= names
    assert ("adapter_model.safetensors" in names) is (form not in ("bin", "sharded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        loaded = PeftModel.from_pretrained(fresh, tmp_path, **options)
        loaded.load_adapter(tmp_path, "second", is_trainable=True, **options)
    assert torch.equal(logits(loaded, ids), expected)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, ids), expected) and trained(loaded) == {"second"}


def shard(folder):
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    files = {key: f"adapter_model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == file}, folder / file)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole.unlink()


def test_a_missing_shard_is_named(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    shard(tmp_path)
    (tmp_path / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shards that are not there: \['adapter_model-00002-of-00002.safetensors'\]"):
        load_peft_weights(tmp_path)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code from the adapter's file was run",))


def test_code_in_a_bin_file_is_not_run(tmp_path):
    adapted(llama()).save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"base_model.model.x": Malicious()}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_adapters_that_are_not_called_default_go_into_subfolders(tmp_path):
    model = adapted(llama(), "default", "other", "third")
    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    assert sorted(path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")) == ["other", tmp_path.name]
    with pytest.raises(ValueError, match=r"selected_adapters holds unknown adapters \['fourth'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["fourth"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(llama(), tmp_path / "third")
    (tmp_path / "other" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="Can't find adapter weights"):
        PeftModel.from_pretrained(llama(), tmp_path / "other")


@methods
def test_missing_and_unexpected_keys_are_reported(method, tmp_path):
    adapted(llama(), method=method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[:2]
    strange = {f"base_model.model.model.layers.{n}.strange.{CONFIGS[method]().peft_type.value.lower()}_x": torch.ones(1) for n in range(5)}  # fmt: skip
    save_file({**{key: t for key, t in tensors.items() if key not in gone}, **strange}, path)
    model = adapted(llama(), method=method)
    with pytest.warns(PeftWarning) as caught:
        missing, unexpected = model.load_adapter(tmp_path, "second")
    assert sorted(missing) == gone and sorted(unexpected) == sorted(strange)
    texts = [str(warning.message) for warning in caught]
    assert any("does not have 2 tensors of adapter 'second'" in text and gone[0] in text for text in texts)
    assert any("has 5 tensors that adapter 'second' has no place for" in text for text in texts)


def test_tensors_of_another_shape(tmp_path):
    adapted(llama(), r=4).save_pretrained(tmp_path)
    model = adapted(llama(), r=2)
    tensors = load_peft_weights(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"8 tensors have another shape.*\(4, 16\) in the file, \(2, 16\) in the model"
    ):
        set_peft_model_state_dict(model, tensors)
    with pytest.warns(PeftWarning, match="they are skipped"):
        set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)


@methods
@pytest.mark.parametrize("trouble", ["no weights", "other shapes", "missing, low_cpu_mem_usage"])
def test_a_failed_load_leaves_the_model_as_it_was(method, trouble, tmp_path):
    adapted(llama(), method=method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if trouble == "other shapes":
        save_file({key: t[..., :-1].contiguous() for key, t in tensors.items()}, path)
    elif trouble != "no weights":
        save_file({key: t for n, (key, t) in enumerate(tensors.items()) if n}, path)
    low = trouble == "missing, low_cpu_mem_usage"
    message = {"no weights": "Can't find adapter weights", "other shapes": "size mismatch"}.get(
        trouble, "it lacks 1, such as"
    )
    base = llama()
    modules = [key for key, _ in base.named_modules()]
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    assert [key for key, _ in base.named_modules()] == modules and not hasattr(base, "peft_config")
    model = adapted(base, method=method, target_modules=["o_proj"])
    keys = list(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]


@methods
def test_loading_into_a_merged_adapter_is_refused(method, tmp_path):
    base = llama()
    model = adapted(base, "a", method=method)
    model.save_pretrained(tmp_path)
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="'a' is merged, and with other tensors"):
        model.load_adapter(tmp_path / "a", "a")
    model.load_adapter(tmp_path / "a", "b")
    model.unmerge_adapter()
    torch.testing.assert_close(base.model.layers[0].self_attn.q_proj.weight, before)


def test_key_mapping(tmp_path):
    base = llama()
    fresh, ids = copy.deepcopy(base), tokens()
    model = adapted(base)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace(".model.layers.", ".decoder.blocks."): t for key, t in load_file(path).items()}, path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, key_mapping={r"\.decoder\.blocks\.": ".model.layers."})
    assert torch.equal(logits(loaded, ids), expected)


@methods
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_adapter_dtype_on_a_half_precision_model(method, autocast_adapter_dtype, low_cpu_mem_usage, tmp_path):
    wide = autocast_adapter_dtype or method == "sft"  # SftConfig.dtype says what its values are: float32
    model = get_peft_model(
        llama().bfloat16(), CONFIGS[method](target_modules=["q_proj"]), autocast_adapter_dtype=autocast_adapter_dtype
    )
    expected = {torch.float32 if wide else torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama().bfloat16(),
        tmp_path,
        is_trainable=True,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == expected
    assert {p.dtype for p in loaded.get_base_model().model.norm.parameters()} == {torch.bfloat16}
    loaded(input_ids=tokens()).logits.sum().backward()


def test_model_card(tmp_path):
    base = llama()
    base.name_or_path = "someone/some-model"
    model = adapted(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("library_name: peft", "base_model: someone/some-model", "pipeline_tag: text-generation", "- lora"):
        assert line in card
    assert "AutoPeftModelForCausalLM" in card
    (tmp_path / "README.md").write_text(card + "\nWhat its author wrote.\n")
    model.save_pretrained(tmp_path)
    assert "What its author wrote." in (tmp_path / "README.md").read_text()


# Auto classes


@methods
def test_auto_classes(method, tmp_path):
    base, ids = llama(), tokens()
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, method=method, task_type="CAUSAL_LM")
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoPeftModelForCausalLM, AutoPeftModel):
        loaded = auto.from_pretrained(tmp_path / "adapter", is_trainable=auto is AutoPeftModel)
        assert type(loaded).__name__ == "PeftModelForCausalLM" and torch.equal(logits(loaded, ids), expected)
        assert trained(loaded) == ({"default"} if auto is AutoPeftModel else set())
    with pytest.raises(ValueError, match="expects adapters for SEQ_CLS, this one is for CAUSAL_LM"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(EnvironmentError, match="from_pretrained"):
        AutoPeftModelForCausalLM()


def test_auto_class_without_a_task_takes_transformers_classes_only(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    assert isinstance(AutoPeftModel.from_pretrained(tmp_path / "adapter").get_base_model(), LlamaForCausalLM)
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["auto_mapping"] = {"base_model_class": "Popen", "parent_library": "subprocess"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names no class of transformers"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


# Configurations


LORA_KEYS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
"""The keys of a LoRA `adapter_config.json`, as peft 0.21.2 writes it."""


def test_lora_file_has_the_known_keys(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content.keys() == LORA_KEYS
    assert content["target_modules"] == ["q_proj", "v_proj"] and content["peft_type"] == "LORA"
    assert content["inference_mode"] is True and content["loftq_config"] == {}


@methods
def test_config_round_trip_and_unknown_keys(method, tmp_path):
    config = CONFIGS[method](target_modules=["a", "b"], modules_to_save=["c"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config == type(config).from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1, "peft_version": "99.0"}))
    with pytest.warns(PeftWarning, match=r"does not know the keys \['from_the_future'\].*written by peft 99.0"):
        again = PeftConfig.from_pretrained(tmp_path)
    assert again.target_modules == {"a", "b"} and type(again) is type(config)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"peft_type": "LORA"', ValueError, "not valid JSON"),
        ("[1]", ValueError, "must hold a JSON object, got list"),
        ('{"peft_type": "LOHA"}', KeyError, "a method that this version of peft does not have"),
        ('{"peft_type": "OLOR"}', KeyError, "no method of peft"),
    ],
)
def test_config_files_that_cannot_be_read(content, error, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(error, match=message):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"megatron_config": {"a": 1}},
        {"trainable_token_indices": [1]},
        {"loftq_config": {"loftq_bits": 4}},
        {"layer_replication": [(0, 1)]},
        {"target_parameters": ["w"]},
        {"alora_invocation_tokens": [1]},
        {"eva_config": {"rho": 2.0}},
    ],
)
def test_switches_of_methods_that_are_not_here(fields):
    with pytest.raises(NotImplementedError, match=f"{next(iter(fields))}=.* is not in this version of peft"):
        LoraConfig(**fields)


# Methods of one's own


class ToyLayer(SsfLayer):
    adapter_layer_names = ("toy_scale", "toy_shift")
    toy_scale = property(lambda self: self.ssf_scale)
    toy_shift = property(lambda self: self.ssf_shift)


class ToyConfig(SsfConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "TOY"


class ToyModel(SsfModel):
    prefix = "toy_"
    tuner_layer_cls = ToyLayer


@pytest.fixture
def toy():
    register_peft_method(name="toy", config_cls=ToyConfig, model_cls=ToyModel)
    yield
    del METHODS["TOY"]


def test_a_method_of_ones_own(toy, tmp_path):
    base = llama()
    fresh, ids = copy.deepcopy(base), tokens()
    model = get_peft_model(base, ToyConfig(target_modules=["q_proj"], init_ssf_weights="normal"))
    assert (
        model.get_layer_status()[0].module_type == f"{__name__}.ToyLayer"
        or model.get_layer_status()[0].module_type == "ToyLayer"
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids))
    with pytest.raises(ValueError, match="'toy' exists already"):
        register_peft_method(name="toy", config_cls=ToyConfig, model_cls=ToyModel)
    with pytest.raises(ValueError, match="lower case, got 'Toy'"):
        register_peft_method(name="Toy", config_cls=ToyConfig, model_cls=ToyModel)


# Status


def test_status():
    model = adapted(llama(), "a", "b", target_modules=["q_proj"])
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == "LoraModel"
    assert status.peft_types == {"a": "LORA", "b": "LORA"} and status.available_adapters == ["a", "b"]
    assert status.active_adapters == ["a"] and status.merged_adapters == [] and status.enabled is True
    assert status.requires_grad == {"a": True, "b": False} and status.num_adapter_layers == 2
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.devices == {"a": ["cpu"], "b": ["cpu"]}
    first, second = model.get_layer_status()
    assert first.name == "model.model.layers.0.self_attn.q_proj" and first.module_type == "lora.Linear"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.set_requires_grad("b", True)
    layer.merge()
    layer.enable_adapters(False)
    status = get_model_status(model)
    assert status.requires_grad == {"a": True, "b": "irregular"}
    assert status.merged_adapters == "irregular" and status.enabled == "irregular"
    layer.lora_A["a"].weight.requires_grad_(False)
    assert get_model_status(model).requires_grad["a"] == "irregular"
    with pytest.raises(ValueError, match="has no adapter layers"):
        get_model_status(llama())


@methods
def test_trainable_parameters(method, capsys):
    model = adapted(llama(), method=method, target_modules=["q_proj"])
    expected = {"lora": 2 * 2 * (16 + 16), "sft": 60, "ssf": 2 * 2 * 16}[method]
    base = sum(p.numel() for p in llama().parameters())
    assert model.get_nb_trainable_parameters() == (expected, base + expected)
    model.print_trainable_parameters()
    share = 100 * expected / (base + expected)
    assert capsys.readouterr().out == (
        f"trainable params: {expected:,d} || all params: {base + expected:,d} || trainable%: {share:.4f}\n"
    )


# Copies


@methods
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(method, how):
    model = adapted(llama(tie_word_embeddings=True), "a", "b", method=method, target_modules=["q_proj", "embed_tokens"])
    ids = tokens()
    model.set_adapter(["a", "b"])
    expected = logits(model, ids)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, ids), expected) and trained(twin) == {"a", "b"}
    twin.merge_adapter()
    twin.unmerge_adapter()
    assert twin.lm_head.weight is twin.get_input_embeddings().get_base_layer().weight
    twin.delete_adapter("b")
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, ids), expected)


# Generation


@methods
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_with_a_mixed_batch(method, beams, make):
    base = make()
    for parameter in base.parameters():
        parameter.data.mul_(4)  # far apart, so that no choice hangs on rounding
    target = ["c_attn"] if isinstance(base, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    model = adapted(base, "a", "b", method=method, target_modules=target, task_type="CAUSAL_LM")
    ids = tokens(rows=3, length=4)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    rows = ["b", "__base__", "a"]
    mixed = model.generate(input_ids=ids, adapter_names=rows, **options)
    with pytest.raises(ValueError, match="got 0 names for"):
        model.generate(input_ids=ids, adapter_names=[], **options)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[row : row + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row], alone[0])


def test_a_mixed_batch_is_not_trained_with_checkpoints():
    base = llama()
    base.gradient_checkpointing_enable()
    model = adapted(base, "a", "b").train()
    with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
        model(input_ids=tokens(), adapter_names=["a", "b"])
    model.eval()
    model(input_ids=tokens(), adapter_names=["a", "b"])


# Merging


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_failed_merge_leaves_everything_as_it_was(method, bad):
    base = llama()
    model = adapted(base, "a", "b", method=method)
    model.merge_adapter(["a"])
    last = base.model.layers[1].self_attn.v_proj
    tensor = next(t for _, t in last.adapter_tensors("b") if t.is_floating_point())
    tensor.data.flatten()[0] = bad
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'b' would give values that are not finite; nothing was merged"):
            merge(adapter_names=["b"], safe_merge=True)
        assert {layer.merged_adapters[0] for layer in model.base_model.layers()} == {"a"}
        assert {len(layer.merged_adapters) for layer in model.base_model.layers()} == {1}
        for key, t in model.state_dict().items():
            assert torch.equal(t.nan_to_num(), before[key].nan_to_num()), key
    model.merge_adapter(["b"])  # unsafe, as asked
    assert not last.get_base_layer().weight.isfinite().all()


def test_safe_merge_sees_what_only_rounding_makes_infinite():
    base = nn.Sequential(nn.Linear(4, 4)).half()
    model = adapted(base, target_modules=["0"])
    base[0].lora_A["default"].weight.data.fill_(300)
    base[0].lora_B["default"].weight.data.fill_(300)  # 300 * 300 * r fits into float32, not into float16
    before = base[0].weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(base[0].weight, before)


@methods
def test_merging_what_is_merged_and_unmerging_what_is_not(method):
    model = adapted(llama(), "a", "b", method=method)
    ids = tokens()
    with pytest.warns(PeftWarning, match="Nothing is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    expected = logits(model, ids)
    with pytest.warns(PeftWarning, match="'a' is merged already"):
        model.merge_adapter()
    assert torch.equal(logits(model, ids), expected)
    with pytest.warns(PeftWarning, match="they are unmerged before switching"):
        model.set_adapter("b")
    assert not any(layer.merged for layer in model.base_model.layers())
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.merge_adapter(["b"])
        model.add_adapter("c", CONFIGS[method](target_modules=["q_proj"]))
    assert {tuple(layer.merged_adapters) for layer in model.base_model.layers()} == {("b",)}


def test_disabling_around_trained_biases_is_warned_about():
    model = adapted(opt(), bias="all")
    with pytest.warns(PeftWarning, match="does not give the old biases back"), model.disable_adapter():
        pass
