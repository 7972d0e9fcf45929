"""`PeftModel` as its users see it: targets, names, several adapters, what trains, merging, copies, generation."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, adapted, bert, gpt2, llama, logits, methods, opt, tokens, trained
from torch import nn
from transformers import GPT2LMHeadModel

from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper, walk
from peft.utils.warning import PeftWarning


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
        ({"target_modules": "ALL-LINEAR", "exclude_modules": r".*\.mlp\..*"}, EVERY_LINEAR - MLP),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}, attention(1)),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, attention(1)),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]}, attention(0, 1)),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, attention(0)),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, None),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, {key for key in EVERY_LINEAR if ".0." in key}),
    ],
)  # fmt: skip
def test_targets(method, fields, expected):
    base = llama()
    if expected is None:
        with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model.*names end in: .*q_proj"):
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
    with pytest.raises(ValueError, match="an adapter 'a' already"), pytest.warns(PeftWarning):
        get_peft_model(base, CONFIGS["lora"](), "a")
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
    model.set_adapter("b")
    with pytest.warns(PeftWarning, match="'a' is active now"):
        model.delete_adapter("b")
    assert trained(model) == set()  # a was loaded for inference, and deleting another adapter does not change that


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
    with pytest.warns(PeftWarning, match="nothing of them will train"):
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
    base = make().double()  # so that no choice hangs on rounding
    for parameter in base.parameters():
        parameter.data.mul_(4)
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


# What is not there, and many modules


def test_methods_of_upstream_that_are_not_here_say_so():
    model = adapted(llama(), "a")
    assert not hasattr(model, "subtract_mutated_init")
    with pytest.raises(AttributeError, match="Initialisations of LoRA that change the base model .* not part of peft"):
        model.subtract_mutated_init({}, "a")
    with pytest.raises(AttributeError, match="'LlamaForCausalLM' object has no attribute 'nonsense'"):
        model.nonsense  # noqa: B018


def test_a_model_without_adapters_says_so(tmp_path):
    model = adapted(llama(), "a")
    model.delete_adapter("a")
    with pytest.raises(ValueError, match="The model has no adapter: make one with"):
        model.active_peft_config  # noqa: B018
    with pytest.raises(ValueError, match="There is no adapter to save"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_without_an_active_adapter_the_others_are_saved(tmp_path):
    model = adapted(llama(), "a")
    model.set_adapter([])
    with pytest.raises(ValueError, match=r"No adapter is active; the model has \['a'\]"):
        model.active_peft_config  # noqa: B018
    model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / "adapter_model.safetensors").exists() and "LORA" in (tmp_path / "README.md").read_text()


@methods
def test_the_number_of_walks_over_the_model_does_not_grow_with_its_layers(method, monkeypatch, tmp_path):
    """A walk per layer made large models take minutes."""

    def walks(layers: int) -> list[int]:
        counts = []
        base = llama(num_hidden_layers=layers)

        def counted(method):
            def counting(module, *args, **kwargs):
                if module is base:
                    counts[-1] += 1
                return method(module, *args, **kwargs)

            return counting

        folder = tmp_path / str(layers)
        adapted(llama(num_hidden_layers=layers), "default", method=method).save_pretrained(folder)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted(nn.Module.named_modules))
            for module in ("tuners.base", "tuners.parts", "utils.other", "utils.save_and_load"):
                patch.setattr(f"peft.{module}.walk", counted(walk))
            counts.append(0)
            model = adapted(base, "a", method=method)
            for change in (
                lambda: model.load_adapter(folder, "b"),
                lambda: model.set_adapter("b"),
                lambda: model.delete_adapter("a"),
                lambda: model.merge_and_unload(),
            ):
                counts.append(0)
                change()
        return counts

    assert walks(2) == walks(5)
    assert min(walks(2)) > 0
