"""What must not be ignored in silence: names that match nothing, frozen adapters, biases, two views of one model."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, adapted, bert, gpt2, llama, logits, methods, tokens, trained
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    SftConfig,
    functional,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.warning import PeftWarning

QV = ["q_proj", "v_proj"]


def roberta() -> RobertaForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, intermediate_size=24)).eval()


def ours(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Without what Python says of files of other tests that nobody closed: it comes whenever memory is tidied up."""
    return [warning for warning in caught if not issubclass(warning.category, ResourceWarning)]


def adapter_layers(model: nn.Module) -> set[str]:
    return {key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


# Names that match nothing


@methods
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": [*QV, "query", "k_prj"]}, "target_modules ['k_prj', 'query']"),
        ({"target_modules": QV, "exclude_modules": ["lm_head", "o_prj"]}, "exclude_modules ['o_prj']"),
        ({"target_modules": QV, "exclude_modules": r".*\.mpl\..*"}, r"exclude_modules ['.*\\.mpl\\..*']"),
        ({"target_modules": QV, "layers_to_transform": [1, 7]}, "layers_to_transform [7]"),
        (
            {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": ["layers", "h"]},
            "layers_pattern ['h']",
        ),
    ],
)
def test_names_that_match_nothing_are_warned_of(method, fields, named):
    with pytest.warns(PeftWarning) as caught:
        model = get_peft_model(llama(), CONFIGS[method](**fields))
    (warning,) = ours(caught)
    assert f"names what the model does not have, so that it has no effect: {named}. The" in str(warning.message)
    assert warning.filename == __file__  # it points at the user's line
    with pytest.warns(PeftWarning, match="has no effect"):  # for every adapter anew
        model.add_adapter("b", CONFIGS[method](**fields))


def test_patterns_of_single_layers_that_match_no_target():
    fields = {"rank_pattern": {"q_proj": 4, "k_proj": 4}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 2, "x": 3}}
    with pytest.warns(PeftWarning, match=r"rank_pattern \['k_proj'\]; alpha_pattern \['x'\]"):
        model = get_peft_model(llama(), LoraConfig(target_modules=QV, **fields))
    attention = model.get_base_model().model.layers[1].self_attn
    assert attention.q_proj.r["default"] == 4 and attention.v_proj.scaling["default"] == 2 / 8


@methods
@pytest.mark.parametrize("make", [llama, gpt2, bert, roberta])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_defaults_and_good_names_do_not_warn(method, make, targets):
    config = CONFIGS[method](target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        get_peft_model(make(), config)
        get_peft_model(make(), config)  # the targets have been filled in


def test_a_default_that_lists_what_a_model_lacks_does_not_warn(monkeypatch):
    from peft import LoraModel

    monkeypatch.setattr(LoraModel, "target_module_mapping", {"llama": ["q_proj", "query"]})
    config = LoraConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        get_peft_model(llama(), config)
        get_peft_model(llama(), config)


@methods
def test_a_saved_configuration_does_not_warn(method, tmp_path):
    """It says what was adapted once; what the model lacks of it shows in the tensors, which are reported."""
    base = llama()
    with pytest.warns(PeftWarning, match="has no effect"):
        adapted(copy.deepcopy(base), method=method, target_modules=[*QV, "query"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        model.load_adapter(tmp_path, "b")
        base.load_adapter(str(tmp_path))


# Targets inside modules that are trained whole


@methods
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["gate_proj", "q_proj"], "modules_to_save": ["mlp"]}, "mlp.gate_proj is a target.*means"),
        ({"target_modules": r".*proj", "modules_to_save": ["layers.1"]}, "layers.1.self_attn.q_proj is a target"),
    ],
)
def test_targets_inside_modules_to_save_are_refused(method, fields, message):
    base = llama()
    before = {key: id(module) for key, module in base.named_modules()}
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, CONFIGS[method](**fields))
    assert {key: id(module) for key, module in base.named_modules()} == before
    assert [p.requires_grad for p in base.parameters()] == flags and not hasattr(base, "peft_config")


def test_layers_of_another_adapter_inside_modules_to_save_are_refused():
    model = adapted(llama(), "a", target_modules=["gate_proj"])
    with pytest.raises(ValueError, match="mlp.gate_proj is a target of the adapter and cannot be in modules_to_save"):
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert list(model.peft_config) == ["a"] and all("gate_proj" in key for key in adapter_layers(model))


@methods
@pytest.mark.parametrize("targets", [["query", "dense"], "all-linear"])
def test_linear_layers_inside_a_task_head_are_trained_whole(method, targets, tmp_path):
    base, ids = roberta(), tokens()
    fresh = copy.deepcopy(base)
    model = adapted(base, method=method, target_modules=targets, task_type="SEQ_CLS")
    assert adapter_layers(model) and not any("classifier" in key for key in adapter_layers(model))
    model.base_model.model.classifier.modules_to_save["default"].dense.bias.data.add_(1)
    model.save_pretrained(tmp_path)
    head = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "classifier" in key}
    assert head == {f"base_model.model.classifier.{n}.{t}" for n in ("dense", "out_proj") for t in ("weight", "bias")}
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids))


def test_a_file_may_target_what_it_trains_whole(tmp_path):
    """Upstream writes such files: the module is trained whole, without an adapter."""
    base = llama()
    model = adapted(copy.deepcopy(base), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": [*QV, "lm_head"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, ids := tokens()), logits(model, ids))


# Frozen adapters


@methods
@pytest.mark.parametrize("call", ["model", "functional"])
def test_activating_what_the_user_froze_warns(method, call):
    model = adapted(llama(), "a", "b", method=method)
    activate = model.set_adapter if call == "model" else lambda *a, **kw: functional.set_adapter(model, *a, **kw)
    model.requires_grad_(False)
    with pytest.warns(
        PeftWarning, match=r"\['a'\] are active now, but nothing of them.*set_requires_grad\(\['a'\], True"
    ):
        activate("a")
    assert trained(model) == set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        activate("a", inference_mode=True)
        with torch.no_grad():
            activate("a")
        functional.set_requires_grad(model, "b", False)
        model.set_requires_grad("a", True)
        activate(["a", "b"])  # one of them frozen beside one that trains is nothing unusual
        assert trained(model) == {"a"}
        model.set_requires_grad("a", False)
        model.set_requires_grad("b", True)
        activate("b")  # was not training when everything was frozen, so nobody froze it
        assert trained(model) == {"b"}
        model.set_requires_grad("a", True)
        activate("a")
    assert trained(model) == {"a"}


# Biases of the base model


def biases(model: nn.Module) -> dict[str, bool]:
    return {key: p.requires_grad for key, p in model.named_parameters() if key.endswith("bias")}


@pytest.mark.parametrize(("mode", "count"), [("all", 13), ("lora_only", 2)])
def test_biases_train_with_their_adapter_and_only_then(mode, count):
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], bias=mode), "a")
    assert sum(biases(model).values()) == count
    model.add_adapter("b", LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
    assert sum(biases(model).values()) == count
    model.set_adapter("b")
    assert sum(biases(model).values()) == 0
    model.set_adapter(["b", "a"])
    assert sum(biases(model).values()) == count  # those of c_fc are not a's
    assert sum("bias" in key for key in get_peft_model_state_dict(model, adapter_name="a")) == count
    model.set_adapter("a", inference_mode=True)
    assert sum(biases(model).values()) == 0
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone.set_adapter("a")
        assert sum(biases(clone).values()) == count and sum(biases(model).values()) == 0
    functional.set_adapter(model, "a")
    first = next(key for key, flag in biases(model).items() if flag)
    model.get_parameter(first).requires_grad_(False)
    model.set_adapter("b")
    model.set_adapter("a")
    assert not biases(model)[first] and sum(biases(model).values()) == count - 1  # one frozen by hand
    model.set_requires_grad("a", True)
    assert sum(biases(model).values()) == count
    with pytest.warns(PeftWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert sum(biases(model).values()) == 0 and trained(model) == {"b"}


@pytest.mark.parametrize("mode", ["all", "lora_only"])
@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_biases_are_frozen_when_the_adapter_is_gone(mode, leave):
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], bias=mode))
    plain = getattr(model, leave)()
    assert not any(biases(plain).values())
    again = get_peft_model(plain, LoraConfig(r=2, target_modules=["c_attn"]))
    assert not any(biases(again).values())


def test_biases_of_an_adapter_for_inference_do_not_train(tmp_path):
    get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], bias="all")).save_pretrained(tmp_path)
    assert not any(biases(PeftModel.from_pretrained(gpt2(), tmp_path)).values())
    assert any(biases(PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True)).values())


# Several tuners on one model


@methods
def test_two_peft_models_on_one_base_agree(method):
    base = llama()
    first = adapted(base, "a", method=method)
    with pytest.warns(PeftWarning, match="has adapter layers already"):
        second = get_peft_model(base, CONFIGS[method](target_modules=["q_proj"]), "b")
    assert first.active_adapters == second.active_adapters == ["b"] and list(first.peft_config) == ["a", "b"]
    first.set_adapter("a")
    assert second.active_adapters == ["a"] and second.active_adapter == "a" and trained(second) == {"a"}
    second.add_adapter("c", CONFIGS[method](target_modules=["k_proj"]))
    first.set_adapter(["a", "c"])
    assert second.active_adapters == ["a", "c"]
    with first.disable_adapter():
        assert not second.has_active_enabled_adapter
        with second.disable_adapter():
            pass
        assert not first.has_active_enabled_adapter  # the inner context does not end the outer one
    assert second.has_active_enabled_adapter
    second.delete_adapter("a")
    assert first.active_adapters == ["c"] and list(first.peft_config) == ["b", "c"]
    functional.set_adapter(base, "b")
    assert first.active_adapters == second.active_adapters == ["b"]


@methods
def test_a_failed_second_model_leaves_the_first_alone(method):
    base = llama()
    first = adapted(base, "a", method=method)
    for fields in ({"target_modules": ["nothing"]}, {"target_modules": ["q_proj"], "modules_to_save": ["nothing"]}):
        with pytest.raises(ValueError), pytest.warns(PeftWarning, match="has adapter layers already"):
            get_peft_model(base, CONFIGS[method](**fields), "b")
        assert list(first.peft_config) == ["a"] and first.active_adapters == ["a"] and trained(first) == {"a"}


@methods
def test_injecting_twice(method):
    base = llama()
    for name in ("a", "b"):
        inject_adapter_in_model(CONFIGS[method](target_modules=QV), base, name)
    assert list(base.peft_config) == ["a", "b"] and trained(base) == {"b"}
    functional.set_adapter(base, ["a", "b"])
    assert trained(base) == {"a", "b"}


# functional


@methods
def test_functional_names_unknown_adapters(method):
    base = inject_adapter_in_model(CONFIGS[method](target_modules=QV), llama(), "a")
    for use in (functional.set_adapter, functional.delete_adapter, functional.set_requires_grad):
        with pytest.raises(ValueError, match=r"There is no adapter \['x'\]; the model has \['a'\]"):
            use(base, "x")
    assert trained(base) == {"a"}


@methods
def test_functional_delete_checks_the_prefix(method):
    base = inject_adapter_in_model(CONFIGS[method](target_modules=QV), llama(), "a")
    for wrong in ("ia3_", {"lora": "ssf_"}.get(method, "lora_")):
        with pytest.raises(ValueError, match=f"'a' is not of the method with the prefix '{wrong}'"):
            functional.delete_adapter(base, "a", prefix=wrong)
    assert trained(base) == {"a"}
    assert functional.delete_adapter(base, "a", prefix=f"{method}_") == []
    assert not adapter_layers(base)


def test_functional_switches_layers_of_one_class_only():
    from peft.tuners.ssf import SsfLayer

    base = inject_adapter_in_model(LoraConfig(target_modules=QV), llama(), "a")
    inject_adapter_in_model(LoraConfig(target_modules=QV), base, "b")
    functional.set_adapter(base, "a", layer_cls=SsfLayer)
    assert trained(base) == {"b"}
    functional.set_adapter(base, "a", layer_cls=BaseTunerLayer)
    assert trained(base) == {"a"}


# Files of LoRA with initialisations that are not here


def saved_with(init: str, base: nn.Module, folder, **fields) -> PeftModel:
    """An adapter's folder as a library that has the initialisation writes it."""
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init, **fields}))
    return model


@pytest.mark.parametrize(("init", "fields"), [("eva", {"eva_config": {"rho": 2.0}}), ("mica", {})])
def test_files_of_other_initialisations_load(init, fields, tmp_path):
    base, ids = llama(), tokens()
    expected = logits(saved_with(init, base, tmp_path, **fields), ids)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(model, ids), expected)
        assert model.peft_config["default"].init_lora_weights == init
    model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), expected)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, ids), expected)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_files_for_other_base_weights_are_refused(init, tmp_path):
    base, ids = llama(), tokens()
    expected = logits(saved_with(init, base, tmp_path), ids)
    config = PeftConfig.from_pretrained(tmp_path)  # can be looked at
    assert config.init_lora_weights == init
    fresh = copy.deepcopy(base)
    with pytest.raises(ValueError, match=f"{init!r} takes a part out of the base weights"):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert not adapter_layers(fresh) and not hasattr(fresh, "peft_config")
    # The way out that the message names, for those who have the changed weights.
    config = PeftConfig.from_pretrained(tmp_path, init_lora_weights=True)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path, config=config), ids), expected)


def test_new_adapters_of_other_initialisations_are_refused():
    with pytest.raises(NotImplementedError, match="init_lora_weights='mica' is not in this version"):
        LoraConfig(init_lora_weights="mica")


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_x", "xavier", None, 3])
def test_unknown_initialisations_are_refused(init):
    for inference in (False, True):
        with pytest.raises((ValueError, TypeError), match="init_lora_weights must be (True|bool)"):
            LoraConfig(init_lora_weights=init, inference_mode=inference)


# Where a warning points


def test_warnings_point_at_the_users_line_by_every_way(tmp_path):
    model = adapted(llama(), "default")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    model.add_adapter("b", LoraConfig(target_modules=QV))
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    ways = (
        lambda: model.load_adapter(tmp_path, "c"),
        lambda: PeftModel.from_pretrained(llama(), tmp_path),
        lambda: model.base_model.unmerge_adapter(),
        lambda: layer.unmerge(),
        lambda: (model.merge_adapter(), model.set_adapter("b")),
        lambda: model.delete_adapter("b"),
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "nothing"]), llama()),
        lambda: PeftConfig.from_peft_type(peft_type="LORA", of_tomorrow=1),
    )
    for way in ways:
        with pytest.warns(PeftWarning) as caught:
            way()
        assert {warning.filename for warning in ours(caught)} == {__file__}, [str(w.message) for w in caught]


# What a configuration cannot hold


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: LoraConfig(r=2.5), TypeError, "r must be int, got 2.5"),
        (lambda: LoraConfig(lora_alpha="a"), TypeError, "lora_alpha must be float, got 'a'"),
        (lambda: LoraConfig(inference_mode="no"), TypeError, "inference_mode must be bool, got 'no'"),
        (lambda: LoraConfig(target_modules=3), TypeError, "target_modules must be list[str] | str | None, got 3"),
        (lambda: LoraConfig(target_modules=["q_proj", None]), TypeError, "got ['q_proj', None]"),
        (lambda: LoraConfig(modules_to_save="lm_head"), TypeError, "modules_to_save must be list[str] | None"),
        (lambda: LoraConfig(rank_pattern={"q": "2"}), TypeError, "rank_pattern must be dict[str, int] | None"),
        (lambda: LoraConfig(rank_pattern={"((": 2}), ValueError, "rank_pattern='((' is not a valid regular"),
        (lambda: LoraConfig(lora_alpha=0), ValueError, "finite and not 0, got 0"),
        (lambda: LoraConfig(alpha_pattern={"q": float("nan")}), ValueError, "alpha_pattern['q'] scales"),
        (lambda: SftConfig(num_tunable_weights=2.5), TypeError, "num_tunable_weights must be int | None, got 2.5"),
        (lambda: SftConfig(density="x"), TypeError, "density must be float, got 'x'"),
        (lambda: get_peft_model(llama(), {"r": 2}), TypeError, "must be the configuration of a method"),
        (lambda: get_peft_model(llama(), PeftConfig()), TypeError, "must be the configuration of a method"),
        (lambda: get_peft_config({"r": 2}), KeyError, "must say its 'peft_type'"),
    ],
)
def test_what_a_configuration_cannot_hold_is_refused_by_name(make, error, named):
    with pytest.raises(error) as refused:
        make()
    assert named in str(refused.value)


def test_what_means_the_same_is_taken():
    """As files and other programs have it: whole numbers for fractions, tuples for lists, dicts for objects."""
    config = LoraConfig(
        r=np.int64(4), lora_alpha=16.0, lora_dropout=0, target_modules=("q_proj",), exclude_modules={"lm_head"},
        layers_to_transform=range(2), runtime_config={"ephemeral_gpu_offload": False}, alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    assert adapter_layers(get_peft_model(llama(), config)) == {
        f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in range(2)
    }


def test_layers_that_do_not_exist_are_told_from_names_that_do_not():
    with pytest.raises(ValueError, match=r"without that there are some in the layers \[0, 1\]"):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]))


def test_training_biases_of_layers_without_any_is_warned_of():
    with pytest.warns(PeftWarning, match="bias='lora_only' has no effect"):
        get_peft_model(llama(), LoraConfig(target_modules=QV, bias="lora_only"))


# What would be lost, or have no effect


@methods
@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_an_adapter_that_is_gone_is_not_saved_empty(tmp_path, method, way):
    model = adapted(llama(), method=method)
    getattr(model, way)()
    with pytest.raises(ValueError, match="no tensors of adapter 'default' any more"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@methods
def test_adapters_inside_a_transformer_layer_of_torch_have_effect_in_evaluation(method):
    """There torch takes the weights of the layer's parts without calling them (its fast path)."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x, real = torch.randn(2, 3, 8).double(), torch.tensor([[True, True, False], [True, True, True]])
    model = adapted(base, method=method, target_modules=["linear1", "linear2"], **few(method)).double()
    expected = [model(x), model(x, src_key_padding_mask=~real)[real]]  # with gradients there is no fast path
    with torch.no_grad():
        assert torch.allclose(model(x), expected[0], atol=1e-10)
        assert torch.allclose(model(x, src_key_padding_mask=~real)[real], expected[1], atol=1e-10)
        merged = model.merge_and_unload()(x)
    assert torch.allclose(merged, expected[0], atol=1e-10)


def few(method: str) -> dict:
    """A budget that a model of a hundred weights can hold."""
    return {"num_tunable_weights": 20} if method == "sft" else {}


@pytest.mark.parametrize("name", ["a/b", "a\\b", "checkpoint\n", "../evil"])
def test_names_that_no_folder_can_have_are_refused(name):
    with pytest.raises(ValueError, match="without slashes and control characters"):
        get_peft_model(llama(), LoraConfig(target_modules=QV), adapter_name=name)


@pytest.mark.parametrize("method", ["lora", "ssf", "sft"])
def test_merging_into_an_embedding_with_max_norm_is_exact_or_refused(method):
    base = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5))
    model = adapted(base, method=method, target_modules=["0"], **few(method))
    expected = model(torch.arange(10))
    if method == "sft":  # its lookups shorten the rows with the delta in them
        assert torch.allclose(model.merge_and_unload()(torch.arange(10)), expected, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="max_norm=0.5 would shorten its merged rows"):
            model.merge_and_unload()
        assert torch.equal(model(torch.arange(10)), expected)
