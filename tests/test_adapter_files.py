"""Adapters as files: their forms, what may be wrong with them, configurations, model cards, auto classes."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, adapted, llama, logits, methods, tokens, trained
from torch import nn
from transformers import LlamaForCausalLM

import peft
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    mapping,
    set_peft_model_state_dict,
)
from peft.mapping import register_peft_method
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.warning import PeftWarning

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


@methods
def test_adapters_that_are_there_do_not_slow_down_loading_and_saving(method, tmp_path, monkeypatch):
    """Nothing may go through all of them: that is seen in the number of function calls."""
    # Where some model was sharded, as another test's may have been, every model's modules are searched for FSDP's.
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    model = adapted(llama(), method=method)
    model.save_pretrained(tmp_path)

    def work(name):
        model.load_adapter(tmp_path, name)
        model.save_pretrained(tmp_path / "new", selected_adapters=[name])

    work("warm")
    few = calls_of(lambda: work("few"))
    for number in range(10):
        model.load_adapter(tmp_path, f"number-{number}")
    assert calls_of(lambda: work("many")) < 1.03 * few


def calls_of(run):
    """How many functions our code and torch.nn's call: what others call depends on the state of their caches."""
    ours = (os.path.dirname(peft.__file__) + os.sep, os.path.dirname(nn.__file__) + os.sep)
    count, before = 0, sys.getprofile()

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename.startswith(ours)

    gc.disable()  # what collecting calls is not the run's
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def test_a_new_adapter_is_in_its_layers_mode(tmp_path):
    model = adapted(llama(), method="lora").eval()
    model.add_adapter("new", LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    model.set_adapter(["default", "new"])
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


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
    with pytest.raises(ValueError, match="Can't find a shard .*'adapter_model-00002-of-00002.safetensors'"):
        load_peft_weights(tmp_path)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code from the adapter's file was run",))


def test_code_in_a_bin_file_is_not_run(tmp_path):
    adapted(llama()).save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"base_model.model.x": Malicious()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin' is damaged, or no file of tensors: [Ww]eights.only"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_a_damaged_file_is_named(form, tmp_path):
    """Cut short at any place, as a copy that was broken off leaves it."""
    adapted(llama()).save_pretrained(tmp_path, safe_serialization=form != "bin")
    if form == "sharded":
        shard(tmp_path)
    damaged = sorted(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
    whole = damaged.read_bytes()
    for length in (0, 3, random.randrange(8, len(whole)), len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{damaged.name}' is damaged"):
            PeftModel.from_pretrained(llama(), tmp_path)
    damaged.write_bytes(whole)
    PeftModel.from_pretrained(llama(), tmp_path)


def test_an_index_of_shards_is_checked(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    shard(tmp_path)
    index = tmp_path / "adapter_model.safetensors.index.json"
    for content, expected in (("{", "is not valid JSON"), ("{}", "must hold an object weight_map")):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"index.json' {expected}"):
            load_peft_weights(tmp_path)


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
    strange = {f"base_model.model.model.layers.{n}.strange.{method}_x": torch.ones(1) for n in range(5)}
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


def test_overwriting_fields_of_a_file(tmp_path):
    LoraConfig(r=3, target_modules=["a"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        read = PeftConfig.from_pretrained(tmp_path, lora_alpha=5, trust_remote_code=True, num_labels=2)
    assert (read.r, read.lora_alpha) == (3, 5)
    with pytest.warns(PeftWarning, match="passes lora_alfa over: it is no field. Is lora_alpha meant"):
        PeftConfig.from_pretrained(tmp_path, lora_alfa=5)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"peft_type": "LORA"', ValueError, "not valid JSON"),
        ("[1]", ValueError, "must hold a JSON object, got list"),
        ('{"peft_type": "XLORA"}', KeyError, "a method that this version of peft does not have"),
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
        {"use_qalora": True},
        {"megatron_config": {"a": 1}},
        {"alora_invocation_tokens": [1]},
    ],
)
def test_switches_of_methods_that_are_not_here(fields):
    with pytest.raises(NotImplementedError, match=f"{next(iter(fields))}=.* is not in this version of peft"):
        LoraConfig(**fields)


# Methods of one's own


class ToyLayer(BaseTunerLayer, nn.Module):
    """One number that the layer's output is multiplied by."""

    adapter_layer_names = ("toy_gain",)

    def __init__(self, base_layer):
        nn.Module.__init__(self)
        BaseTunerLayer.__init__(self, base_layer)
        self.toy_gain = nn.ParameterDict()

    def update_layer(self, name, config):
        self.toy_gain[name] = nn.Parameter(torch.ones(()))

    def post(self, name, x, y, before=()):
        return y * self.toy_gain[name]

    def fold(self, name, W, b):
        return W * self.toy_gain[name], None if b is None else b * self.toy_gain[name]


@dataclass
class ToyConfig(PeftConfig):
    target_modules: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "TOY"


class ToyModel(BaseTuner):
    prefix = "toy_"
    tuner_layer_cls = ToyLayer


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(mapping, "METHODS", dict(mapping.METHODS))
    register_peft_method(name="toy", config_cls=ToyConfig, model_cls=ToyModel)


def test_a_method_of_ones_own(toy, tmp_path):
    base = llama()
    fresh, ids = copy.deepcopy(base), tokens()
    model = get_peft_model(base, ToyConfig(target_modules=["q_proj"]))
    assert model.get_layer_status()[0].module_type == "ToyLayer"
    assert trained(model) == {"default"}
    for layer in model.base_model.layers():
        layer.toy_gain["default"].data.fill_(3.0)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded, ids), expected) and trained(loaded) == set()
    torch.testing.assert_close(logits(loaded.merge_and_unload(), ids), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="'toy' exists already"):
        register_peft_method(name="toy", config_cls=ToyConfig, model_cls=ToyModel)
    with pytest.raises(ValueError, match="lower case, got 'Toy'"):
        register_peft_method(name="Toy", config_cls=ToyConfig, model_cls=ToyModel)
