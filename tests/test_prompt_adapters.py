"""Adapters of the prompt methods as objects: what trains, switching, files, initialisations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from prompt_models import (
    COMPUTED,
    METHODS,
    PREFIX,
    T,
    methods,
    prompted,
    t5,
    tasks,
)
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, llama, make_tokenizer, tokens
from torch.testing import assert_close
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft import (
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils.warning import PeftWarning


@methods
def test_switching_freezing_and_deleting(method):
    model = prompted(llama(), method, "a", "b")

    def trained() -> set[str]:
        return {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}

    assert model.active_adapter == "a" and trained() == {"a"}
    assert model.active_peft_config.is_prompt_learning and model.peft_config.keys() == {"a", "b"}
    model.set_adapter("b")
    assert model.active_adapters == ["b"] and trained() == {"b"}
    model.set_requires_grad("b", False)
    assert trained() == set()
    model.set_adapter("a")
    with pytest.raises(ValueError, match=r"One prompt can be active at a time, got \['a', 'b'\]"):
        model.set_adapter(["a", "b"])
    with pytest.warns(PeftWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and list(model.prompt_encoder) == ["b"] and trained() == set()
    model.add_adapter("a", METHODS[method](task_type="CAUSAL_LM"))
    model.set_adapter("a")
    assert trained() == {"a"}
    twin = copy.deepcopy(model)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.zero_()
    assert any(parameter.any() for parameter in twin._tuner.prompt_encoder["a"].parameters())
    assert twin._tuner.prompt_encoder is twin.prompt_encoder and twin._tuner.model is twin.base_model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@methods
@torch.no_grad()
def test_files(method, low_cpu_mem_usage, tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, method, "default", "second").float()
    ids, extra = tokens(), tasks(method, 2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {"prefix_task_cols", "prefix_task_rows"} if method == "multitask" else set()
    assert tensors.keys() == {"prompt_embeddings"} | kept
    assert torch.equal(model.get_prompt_embedding_to_save("default"), tensors["prompt_embeddings"])
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        for each in (model, loaded):
            each.set_adapter(name)
        assert_close(loaded(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)
    assert get_peft_model_state_dict(loaded)["prompt_embeddings"].equal(tensors["prompt_embeddings"])
    wide = METHODS[method](task_type="CAUSAL_LM", **(
        {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 1]} if method == "cpt" else {"num_virtual_tokens": 9}
    ))  # fmt: skip
    other = get_peft_model(llama(), wide)
    with pytest.raises(RuntimeError, match="size mismatch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # of encoders with a head
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("method", "network"),
    [*((method, "kept") for method in METHODS)]
    + [(method, network) for method in COMPUTED for network in ("lost", "of another prompt")],
)
def test_training_goes_on_from_a_file(method, network, low_cpu_mem_usage, tmp_path, recwarn):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, method).float()
    ids, extra = tokens(), tasks(method, 2)
    model.save_pretrained(tmp_path)
    file, computed = tmp_path / "prompt_network.safetensors", method in COMPUTED
    assert file.exists() == computed
    if network != "kept":
        changed = {key: tensor + 1 for key, tensor in load_file(file).items()}
        file.unlink()
        if network == "of another prompt":
            save_file(changed, file)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    warned = [str(w.message) for w in recwarn if "holds the finished prompt" in str(w.message)]
    assert len(warned) == (computed and network != "kept")
    assert_close(loaded(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)
    trained = {key: p for key, p in loaded.named_parameters() if p.requires_grad}
    if network == "kept" and method != "cpt":  # the very same parameters
        theirs = dict(model.named_parameters())
        assert trained.keys() == {key for key, p in theirs.items() if p.requires_grad}
        assert all(torch.equal(p, theirs[key]) for key, p in trained.items())
    loaded(input_ids=ids, labels=ids, **extra).loss.backward()
    assert trained and all(p.grad.any() for p in trained.values())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / file.name).exists() == (computed and network == "kept")
    loaded.save_pretrained(tmp_path)
    assert file.exists() == (computed and network == "kept")  # what does not make this prompt is taken away


def test_cpt_training_goes_on_within_the_bounds(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, "cpt", opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.8).float()
    model.get_prompt(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    encoder, own = loaded.prompt_encoder["default"], model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, base.get_input_embeddings().weight[7:11])
    assert_close(encoder.delta_embedding.weight[:3], own.delta_embedding.weight[:3], atol=1e-6, rtol=1e-5)


@methods
def test_sizes_are_those_of_the_model(method):
    model = prompted(
        Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=12, intermediate_size=24)), method
    )
    config = model.peft_config["default"]
    heads, width = (1, 12) if method in PREFIX else (2, 16)
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (2, heads, width)
    assert (
        config.num_transformer_submodules == 1 and model(input_ids=tokens(), **tasks(method, 2)).logits.isfinite().all()
    )


def test_prefixes_go_into_the_decoder():
    """Its layers, its heads and their size, which need not be the width of the model."""
    model = prompted(t5(num_decoder_layers=3), "prefix", task_type="SEQ_2_SEQ_LM")
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (3, 2, 16)
    assert model(input_ids=tokens(), labels=tokens()).loss.isfinite()


def test_initialisations(tmp_path):
    base = llama(vocab_size=300)
    words = base.get_input_embeddings().weight
    make_tokenizer().save_pretrained(tmp_path)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abcde", "tokenizer_name_or_path": str(tmp_path)}
    ids = make_tokenizer()("abcde")["input_ids"]
    for number in (3, 12):
        for method in ("prompt", "multitask"):
            model = get_peft_model(copy.deepcopy(base), METHODS[method](num_virtual_tokens=number, **text))
            expected = words[torch.tensor((ids * 5)[:number])]
            assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)
    model = get_peft_model(copy.deepcopy(base), METHODS["prompt"](prompt_tuning_init="sample_vocab"))
    start = model.prompt_encoder["default"].embedding.weight
    assert all((row == words).all(1).any() for row in start) and len({tuple(row.tolist()) for row in start}) > 1
    for projection in (False, True):
        config = PrefixTuningConfig(num_virtual_tokens=T, init_weights="zero", prefix_projection=projection)
        assert not get_peft_model(llama(), config).get_prompt(1).layers[0].keys.any()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_multitask_starts_from_source_tasks(form, tmp_path):
    source = get_peft_model(llama(), METHODS["multitask"](num_ranks=2))
    tensors = {key: torch.randn_like(tensor) for key, tensor in get_peft_model_state_dict(source).items()}
    path = str(tmp_path / f"source.{form}")
    save_file(tensors, path) if form == "safetensors" else torch.save(tensors, path)
    cols = tensors["prefix_task_cols"]
    for init, expected in (
        ("AVERAGE_SOURCE_TASKS", cols.mean(0)),
        ("EXACT_SOURCE_TASK", cols[2]),
        ("ONLY_SOURCE_SHARED", None),
    ):
        config = METHODS["multitask"](prompt_tuning_init=init, prompt_tuning_init_state_dict_path=path,
                                      prompt_tuning_init_task=2, num_tasks=2, num_ranks=2)  # fmt: skip
        encoder = get_peft_model(llama(), config).prompt_encoder["default"]
        assert torch.equal(encoder.embedding.weight, tensors["prompt_embeddings"])
        for task in (0, 1):
            assert expected is None or torch.equal(encoder.prefix_task_cols[task], expected)
    config.num_virtual_tokens = 5
    with pytest.raises(
        ValueError, match=r"prompt_embeddings of .* has the shape \(4, 16\), the configuration wants \(5, 16\)"
    ):
        get_peft_model(llama(), config)
