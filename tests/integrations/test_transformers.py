"""transformers and accelerate on this package: their adapter API, Trainer, pipelines, off-loading, FSDP's policy."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict
from accelerate.utils.modeling import is_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, adapted, llama, logits, methods, tokens, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import check_peft_version
from transformers.utils.import_utils import is_peft_greater_or_equal

from peft import LoraConfig, PeftConfig, PeftModel, SftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, fsdp_auto_wrap_policy
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
from peft.utils.warning import PeftWarning

TARGETS = ["q_proj", "v_proj"]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved base model."""
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return str(path)


@pytest.fixture
def base(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def config(method: str, **kw) -> PeftConfig:
    return CONFIGS[method](**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **kw})


def shake(model: nn.Module, name: str) -> None:
    """Change every number of adapter `name`, as if it had been trained."""
    for key, parameter in model.named_parameters():
        if name in key.split(".") and parameter.is_floating_point():
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def with_adapter(model: PreTrainedModel, method: str, name: str = "default", **kw) -> PreTrainedModel:
    model.add_adapter(config(method, **kw), name)
    shake(model, name)
    return model.eval()


def saved(folder: str, path: Path, method: str = "lora", **kw) -> tuple[str, PeftModel]:
    """An adapter's folder as `PeftModel` writes it, and the model."""
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), method=method, **kw)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            shake(module, "default")
    model.save_pretrained(path, save_embedding_layers=False)
    return str(path), model


# What they import


def imports_of(package: str) -> set[tuple[str, str]]:
    """`(module, name)` of every `from peft... import name` in a library, the models of transformers left out."""
    root = Path(importlib.util.find_spec(package).origin).parent
    found = set()
    for path in root.rglob("*.py"):
        is_model = package == "transformers" and "models" in path.relative_to(root).parts
        text = "" if is_model else path.read_text(encoding="utf-8")
        if "from peft" in text:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level]
            found |= {(n.module, a.name) for n in nodes if n.module.split(".")[0] == "peft" for a in n.names}
    return found


@pytest.mark.parametrize("package", ["transformers", "accelerate", "trl", "diffusers", "sentence_transformers"])
def test_every_name_that_they_import_is_there(package):
    names = imports_of(package)
    assert names
    missing = {(m, n) for m, n in names if not hasattr(importlib.import_module(m), n)}
    assert not missing


def test_version_is_recent_enough_for_transformers():
    assert importlib.metadata.version("peft").startswith("0.21.2+sft")
    check_peft_version("0.20.0")
    assert is_peft_greater_or_equal("0.21.0")


def test_trainer_imports_little_of_peft_and_quietly():
    code = "import sys; from transformers import Trainer; print(*(n for n in sys.modules if n.split('.')[0] == 'peft'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "peft" not in done.stderr.lower(), done.stderr
    loaded = done.stdout.split()
    methods_and_commands = ("peft.tuners.lora", "peft.tuners.sft", "peft.tuners.ssf", "peft.tuners.denas", "peft.cli")
    assert "peft" in loaded and not [name for name in loaded if name.startswith(methods_and_commands)]


# PeftAdapterMixin


@methods
def test_add_adapter_trains_saves_and_loads(method, base, folder, tmp_path):
    ids = tokens()
    before = logits(base, ids)
    base.add_adapter(config(method, **({"init_lora_weights": True} if method == "lora" else {})))
    if method != "ssf":  # CONFIGS has SSF start at random
        assert torch.equal(logits(base, ids), before)
    assert trained(base) == {"default"} and base.active_adapters() == ["default"]
    base(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    optimizer.zero_grad()
    base(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = logits(base, ids)
    assert not torch.allclose(after, before, atol=1e-4)

    base.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys.keys() == {f"base_model.model.{key}" for key in base.get_adapter_state_dict()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # the configuration names the base model
    assert torch.equal(logits(again, ids), after) and trained(again) == set() and not again.training
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(logits(wrapped, ids), after)


@methods
@pytest.mark.parametrize("source", ["folder", "state dict"])
def test_load_adapter_saved_by_peft_model(method, source, base, folder, tmp_path):
    extra = {} if method == "ssf" else {"modules_to_save": ["lm_head"]}
    path, reference = saved(folder, tmp_path, method, **extra)
    if source == "folder":
        info = base.load_adapter(path, "other")
    else:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        info = base.load_adapter(
            adapter_name="other", adapter_state_dict=tensors, peft_config=PeftConfig.from_pretrained(path)
        )
    ids = tokens()
    assert not info.unexpected_keys and not {key for key in info.missing_keys if ".other" in key}
    torch.testing.assert_close(logits(base, ids), logits(reference, ids))
    assert base.active_adapters() == ["other"] and base.peft_config["other"].inference_mode
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


@methods
def test_load_adapter_to_train_on(method, base, folder, tmp_path):
    path, _ = saved(folder, tmp_path, method)
    base.load_adapter(path, is_trainable=True)
    assert trained(base) == {"default"}
    frozen = {key for key, p in base.named_parameters() if ".default" in key and not p.requires_grad}
    assert all(key.endswith(".indices") for key in frozen)
    with pytest.raises(ValueError, match="already exists"):
        base.load_adapter(path)


def test_loading_for_inference_does_not_stop_another_adapter_for_good(base, folder, tmp_path):
    path, _ = saved(folder, tmp_path)
    base.add_adapter(config("lora"), "mine")
    base.load_adapter(path, "theirs")  # transformers freezes all adapters here
    base.set_adapter("mine")
    assert trained(base) == {"mine"}


def test_load_adapter_names_tensors_without_a_place(base, folder, tmp_path):
    path, _ = saved(folder, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors["base_model.model.nowhere.lora_A.weight"] = tensors.pop(key)
    info = base.load_adapter(adapter_state_dict=tensors, peft_config=PeftConfig.from_pretrained(path))
    assert info.unexpected_keys == {"nowhere.lora_A.default.weight"}
    lacking = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
    assert {name for name in info.missing_keys if ".default" in name} == {lacking}


def test_several_adapters_add_up(base, folder, tmp_path):
    base = base.double()
    ids = tokens()
    reference = AutoModelForCausalLM.from_pretrained(folder).double()
    for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["q_proj", "up_proj"])):
        with_adapter(base, "lora", name, target_modules=targets, lora_alpha=7)
        base.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            module = reference.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 7 / 2 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    assert base.active_adapters() == ["b"] and trained(base) == {"b"}
    base.set_adapter(["a", "b"])
    assert base.active_adapters() == ["a", "b"] and trained(base) == {"a", "b"}
    torch.testing.assert_close(logits(base, ids), logits(reference, ids), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="multiple active adapters"):
        base.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="could not be found"):
        base.set_adapter(["a", "c"])


@methods
def test_disable_enable_and_delete(method, base, tmp_path):
    ids = tokens()
    plain, keys = logits(base, ids), set(base.state_dict())
    with_adapter(base, method, "a", **({} if method == "ssf" else {"modules_to_save": ["lm_head"]}))
    one = logits(base, ids)
    base.disable_adapters()
    assert torch.equal(logits(base, ids), plain)
    base.enable_adapters()
    if method == "ssf":  # transformers forgets modules_to_save here
        assert torch.equal(logits(base, ids), one)
    with_adapter(base, method, "b")
    with pytest.warns(PeftWarning, match="'a' is active now"):
        base.delete_adapter("b")
    assert sorted(base.peft_config) == ["a"] and base.active_adapters() == ["a"]
    base.delete_adapter(["a"])
    assert not base._hf_peft_config_loaded and set(base.state_dict()) == keys
    assert torch.equal(logits(base, ids), plain)
    with pytest.raises(ValueError, match="No adapter loaded"):
        base.set_adapter("a")
    with_adapter(base, method, "a")
    assert base.active_adapters() == ["a"] and not torch.equal(logits(base, ids), plain)


def test_a_loaded_and_deleted_adapter_leaves_the_models_files_alone(base, folder, tmp_path):
    path, _ = saved(folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    base.load_adapter(path)
    base.delete_adapter("default")
    base.save_pretrained(tmp_path / "base")
    before, after = (load_file(Path(p) / "model.safetensors") for p in (folder, tmp_path / "base"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_hotswap(base, folder, tmp_path):
    first, _ = saved(folder, tmp_path / "1")
    second, reference = saved(folder, tmp_path / "2")
    base.load_adapter(first, "a")
    base.load_adapter(second, "a", hotswap=True)
    ids = tokens()
    assert torch.equal(logits(base, ids), logits(reference, ids))
    larger, _ = saved(folder, tmp_path / "3", r=5)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        base.load_adapter(larger, "a", hotswap=True)


def test_hotswap_is_for_lora_alone(base, folder, tmp_path):
    path, _ = saved(folder, tmp_path, "sft")
    base.load_adapter(path, "a")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        base.load_adapter(path, "a", hotswap=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_injected_adapters_keep_the_models_dtype(dtype):
    for inject in (lambda m: m.add_adapter(config("lora")), lambda m: inject_adapter_in_model(config("lora"), m)):
        model = llama().to(dtype)
        inject(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
    wide = {
        p.dtype for key, p in get_peft_model(llama().to(dtype), config("lora")).named_parameters() if "lora_" in key
    }
    assert wide == {torch.float32}


@methods
def test_adapter_on_a_model_without_memory(method):
    with torch.device("meta"):
        model = llama()
    model.add_adapter(config(method))
    assert all(parameter.is_meta for parameter in model.parameters()) and trained(model) == {"default"}


@methods
def test_generate_and_pipeline(method, base, tmp_path):
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(tmp_path)
    with_adapter(base, method).save_pretrained(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False}
    made = base.generate(torch.tensor([[3, 4]]), **options)[0, 2:]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), tmp_path)
    for model in (str(tmp_path), base, wrapped):
        texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(
            "w3 w4", return_full_text=False, **options
        )
        assert texts[0]["generated_text"].strip() == expected.strip()


# Keys


def renamed(key: str, mapping) -> str:
    # transformers applies all renamings, then at most one converter
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    return rename_source_key(key, renamings, [t for t in mapping if t not in renamings])[0]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.x.weight"),
        ("base_model.model.q.lora_B.bias", "q.lora_B.x.bias"),
        ("base_model.model.wte.lora_embedding_A", "wte.lora_embedding_A.x"),
        ("base_model.model.lora_tower.q.lora_A.weight", "lora_tower.q.lora_A.x.weight"),
        ("base_model.model.base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.x.weight"),
        ("model.q.lora_A.weight", "model.q.lora_A.x.weight"),  # a state dict without the file's prefix
        ("model.q.lora_A.x.weight", "model.q.lora_A.x.weight"),  # as in the model
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.q.sft_delta.values", "q.sft_delta.x.values"),
        ("base_model.model.norm.ssf_scale", "norm.ssf_scale.x"),
        ("base_model.model.layers.3.block_sparse_moe.gate.lora_A.weight", "layers.3.mlp.gate.lora_A.x.weight"),
    ],
)
def test_keys_of_files_become_keys_of_the_model(key, expected):
    mapping = build_peft_weight_mapping(get_checkpoint_conversion_mapping("mixtral"), "x")
    assert renamed(key, mapping) == expected
    assert not any(transform.was_used() for transform in build_peft_weight_mapping(None, "x"))


@pytest.mark.parametrize("trainable", [False, True])
def test_unsorted_sparse_deltas_are_sorted(trainable, base, folder, tmp_path):
    path, reference = saved(folder, tmp_path, "sft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".indices")]:
        order = torch.randperm(tensors[key].numel())
        for name in (key, key.replace("indices", "values")):
            tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base.load_adapter(path, is_trainable=trainable)
    ids = tokens()
    assert torch.equal(logits(base, ids), logits(reference, ids))
    indices = [parameter for key, parameter in base.named_parameters() if key.endswith(".indices")]
    assert indices and all((i[1:] > i[:-1]).all() and i.dtype == torch.int32 for i in indices)


# Experts


def mixtral() -> MixtralForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_model_with_merged_experts(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "lora")
    model.save_pretrained(tmp_path / "adapter")
    ids = tokens()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids))


@methods
def test_adapter_of_single_experts_is_refused(method):
    tensor = {"lora": "lora_A.weight", "sft": "sft_delta.values", "ssf": "ssf_scale"}[method]
    tensors = {f"base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.{tensor}": torch.ones(2, 16)}
    with pytest.raises(NotImplementedError, match=r"experts\.1\.w1.* one parameter \(experts\.gate_up_proj\)"):
        mixtral().load_adapter(adapter_state_dict=tensors, peft_config=config(method))


def test_targets_among_merged_experts_are_named():
    with pytest.warns(PeftWarning, match="experts' w1, w2 are not adapted.*experts.down_proj, experts.gate_up_proj"):
        mixtral().add_adapter(config("lora", target_modules=["q_proj", "w1", "w2"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        mixtral().add_adapter(config("lora"))
        llama().add_adapter(config("lora", target_modules=["q_proj", "down_proj"]))


# Trainer


def examples(n: int) -> list[dict]:
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(n, 6)]


def trainer(model: nn.Module, path: Path, data: list[dict], **kw) -> Trainer:
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **kw}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    return Trainer(model, TrainingArguments(str(path), **options, **quiet), train_dataset=data, eval_dataset=data[:4])


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@methods
def test_trainer_resumes_where_it_was(method, folder, tmp_path):
    data = examples(8)
    extra = {} if method == "ssf" else {"modules_to_save": ["lm_head"]}
    torch.manual_seed(seed := int(torch.randint(2**31, ())))

    def fresh() -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config(method, **extra))

    first = trainer(start := fresh(), tmp_path, data)
    untouched = numbers(start)
    assert first.label_names == ["labels"] and first.model_accepts_loss_kwargs
    first.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not {"model.safetensors", "config.json"} & names

    second = trainer(fresh(), tmp_path, data)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == 4 and trained(second.model) == {"default"}
    a, b = numbers(first.model), numbers(second.model)
    assert all(torch.equal(a[key], b[key]) for key in a)
    changed = {key for key in a if not torch.equal(a[key], untouched[key])}
    assert changed == {key for key, p in first.model.named_parameters() if p.requires_grad}


def test_trainer_loads_the_best_model(folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config("lora", modules_to_save=["lm_head"]))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": False}
    run = trainer(model, tmp_path, examples(8), metric_for_best_model="eval_count", **best)
    count = itertools.count()
    run.compute_metrics = lambda prediction: {"count": next(count)}  # the first checkpoint is the best, not the last
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    tensors = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    now = model.state_dict()
    for key, tensor in tensors.items():
        name = key.replace("lm_head.", "lm_head.modules_to_save.default.").replace("_A.", "_A.default.")
        assert torch.equal(now[name.replace("_B.", "_B.default.")], tensor)
    assert trained(model) == {"default"}


def test_trainer_resumes_with_a_second_adapter_beside(folder, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), "default", "second")
    trainer(model, tmp_path, examples(8)).train()
    after = numbers(model)
    assert (tmp_path / "checkpoint-4" / "second" / "adapter_model.safetensors").is_file()
    other = adapted(AutoModelForCausalLM.from_pretrained(folder), "default", "second")
    trainer(other, tmp_path, examples(8)).train(resume_from_checkpoint=True)  # all steps are done
    assert all(torch.equal(after[key], tensor) for key, tensor in other.state_dict().items())
    assert other.active_adapters == ["default"] and trained(other) == {"default"}


def test_trainer_on_a_model_with_an_injected_adapter(base, tmp_path):
    base.add_adapter(config("lora"))
    trainer(base, tmp_path, examples(8)).train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    ids = tokens()
    torch.testing.assert_close(logits(again, ids), logits(base.eval(), ids))


@methods
def test_trainer_with_activation_checkpointing_and_neftune(method, folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config(method))
    before = numbers(model)
    options = {"activation_checkpointing": True, "neftune_noise_alpha": 5.0, "save_strategy": "no", "max_steps": 1}
    trainer(model, tmp_path, examples(4), **options).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all(".default" in key for key in changed)


# accelerate


@methods
def test_accelerate_prepares_saves_and_restores(method, folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config(method))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(list(tokens(4)), batch_size=2)
    before = numbers(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert is_peft_model(model)
    after = numbers(model)
    accelerator.save_state(tmp_path / "state")
    model.load_state_dict(before)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(after[key], tensor) for key, tensor in model.state_dict().items())

    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(tmp_path / "adapter", state_dict=accelerator.get_state_dict(model))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    ids = tokens()
    assert torch.equal(logits(again, ids), logits(plain.eval(), ids))
    tensors = _get_model_state_dict(model, adapter_only=True)
    assert tensors.keys() == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert _set_model_state_dict(model, tensors, adapter_only=True) == ([], [])


def test_fsdp_policy_wraps_blocks_and_what_trains(folder):
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    policy = fsdp_auto_wrap_policy(model)
    wrapped = {key for key, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
    blocks = {f"base_model.model.model.layers.{i}" for i in (0, 1)}
    factors = {f".self_attn.{target}.lora_{x}.default" for target in TARGETS for x in "AB"}
    assert wrapped == blocks | {block + factor for block in blocks for factor in factors}


@methods
def test_adapter_on_a_model_that_is_off_loaded(method, folder, tmp_path):
    path, reference = saved(folder, tmp_path / "adapter", method)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in base.parameters())
    ids = tokens()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, path), ids), logits(reference, ids))


def test_off_loading_a_model_that_has_an_adapter(base):
    model, ids = adapted(base), tokens()
    expected = logits(model, ids)
    model = cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model, ids), expected)


def test_num_deltas_resolved_at_injection_are_saved(base, tmp_path):
    base.add_adapter(SftConfig(num_tunable_weights=40, target_modules=TARGETS))
    base.save_pretrained(tmp_path)
    deltas = PeftConfig.from_pretrained(tmp_path).num_deltas
    assert deltas == base.peft_config["default"].num_deltas and 0 < sum(deltas.values()) <= 40


def test_lora_config_is_complete_in_a_file_written_by_transformers(base, folder, tmp_path):
    base.add_adapter(LoraConfig(r=3, target_modules=TARGETS, rank_pattern={"q_proj": 5}))
    base.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert (read.r, read.rank_pattern, read.base_model_name_or_path) == (3, {"q_proj": 5}, folder)
