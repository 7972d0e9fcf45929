"""Every classic method in a language model, as it is used: checkpointing, autocast, compilation, generation, rows with
adapters of their own, deletion, and the trainers of transformers and TRL.
"""

from __future__ import annotations

import copy

import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import llama, make_tokenizer, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    BottleneckConfig,
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
LAYERS = {
    "adalora": lambda: AdaLoraConfig(total_step=10, init_r=4, target_r=2, **TARGETS),
    "boft": lambda: BOFTConfig(boft_block_size=4, **TARGETS),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=3),
    "bottleneck, blocks": lambda: BottleneckConfig(
        bottleneck_size=3, target_modules=["mlp", "self_attn"], placement="parallel"
    ),
    "ia3": IA3Config,
    "llama-adapter": lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    "ln_tuning": LNTuningConfig,
    "loha": lambda: LoHaConfig(r=2, **TARGETS),
    "lokr": lambda: LoKrConfig(r=2, **TARGETS),
    "lora, tokens": lambda: LoraConfig(r=2, trainable_token_indices=[*range(3, 30)], **TARGETS),
    "oft": lambda: OFTConfig(oft_block_size=4, **TARGETS),
    "trainable_tokens": lambda: TrainableTokensConfig(token_indices=[*range(3, 30)]),
    "vera": lambda: VeraConfig(r=4, **TARGETS),
}
PROMPTS = {
    "cpt": lambda: CPTConfig(cpt_token_ids=[7, 8, 9, 10], cpt_tokens_type_mask=[1, 2, 3, 4]),
    "multitask": lambda: MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3),
    "p_lstm": lambda: PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"
    ),
    "p_mlp": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=6),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4),
    "prefix, projection": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4),
}
METHODS = {**LAYERS, **PROMPTS}
methods = pytest.mark.parametrize("method", METHODS)
layers = pytest.mark.parametrize("method", LAYERS)  # of prompts test_prompts.py has the same


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def config(method: str):
    made = METHODS[method]()
    made.task_type = "CAUSAL_LM"
    return made


def shake(model: PeftModel) -> None:
    """Change all that trains, as if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))


def changed(method: str, base=None) -> PeftModel:
    model = get_peft_model(llama() if base is None else base, config(method))
    shake(model)
    return model


def inputs(method: str, rows: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    own = {"task_ids": torch.arange(rows) % 3} if method == "multitask" else {}
    return {"input_ids": tokens(rows, length), **own}


def step(model, batch, run=None):
    """`(output, gradients by name)`."""
    model.zero_grad()
    output = (model if run is None else run)(**batch, labels=batch["input_ids"])
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
@methods
def test_gradient_checkpointing(method, use_reentrant):
    base, batch = llama(), inputs(method)
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = changed(method, base).train()
    if method.startswith("prefix"):
        with pytest.raises(ValueError, match="needs the cache, which models drop with gradient checkpointing"):
            step(model, batch)
        return
    _, found = step(model, batch)
    base.gradient_checkpointing_disable()
    _, expected = step(model, batch)
    assert_close(found, expected)
    assert any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@methods
def test_autocast(method, dtype):
    """The adapter's gradients are float32; those of tuned norms are of the base model's type, as their copies are."""
    model, batch = changed(method, llama().to(dtype)).train(), inputs(method)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = step(model, batch)
    assert {gradient.dtype for gradient in gradients.values()} == {dtype if method == "ln_tuning" else torch.float32}
    expected, _ = step(copy.deepcopy(model).float(), batch)
    assert_close(output.loss, expected.loss, rtol=0.03, atol=0.03, check_dtype=False)


@pytest.mark.parametrize("method", [name for name in (*LAYERS, "prompt") if name not in ("bottleneck", "lora, tokens")])
def test_compiled(method):
    """Layers in one graph; where prompts are put in, the graph breaks."""
    torch.compiler.reset()
    model, batch = changed(method, llama(num_hidden_layers=1)).double().train(), inputs(method)
    output, expected = step(model, batch)
    again, found = step(model, batch, torch.compile(model, backend="eager", fullgraph=method in LAYERS))
    assert_close(again.logits, output.logits)
    assert_close(found, expected)


GREEDY = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@layers
def test_generation(method):
    """With padding on the left as alone, with and without the cache."""
    model, batch = changed(method).double().eval(), inputs(method, rows=3)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far apart: no choice hangs on rounding
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    together = {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}
    found = model.generate(**together, **GREEDY)
    assert torch.equal(model.generate(**together, **GREEDY, use_cache=False), found)
    for row in range(3):
        alone = model.generate(input_ids=batch["input_ids"][row : row + 1, mask[row].bool()], **GREEDY)
        assert torch.equal(alone[0, -4:], found[row, -4:])


@layers
def test_rows_with_adapters_of_their_own_and_deletion(method):
    model = changed(method)
    model.add_adapter("other", config(method))
    model.set_adapter("other")
    shake(model)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    ids, names = tokens(4, 6), ["other", "__base__", "default", "other"]
    logits = model(input_ids=ids, adapter_names=names).logits
    text = model.generate(input_ids=ids, adapter_names=names, **GREEDY)

    def check(name):
        for row in [row for row in range(4) if names[row] == name]:
            assert_close(model(input_ids=ids[row : row + 1]).logits[0], logits[row])
            assert torch.equal(model.generate(input_ids=ids[row : row + 1], **GREEDY)[0], text[row])

    with model.disable_adapter():
        check("__base__")
    model.set_adapter("default")
    check("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and list(model.peft_config) == ["other"]
    check("other")


# ---- Trainers ----


def trainer(model, path, data, **kw) -> Trainer:
    options = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **kw}
    fixed = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "eval_steps": 1}
    args = TrainingArguments(str(path), remove_unused_columns=False, **options, **fixed)
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:4])


@methods
def test_trainer_resumes_and_loads_the_best(method, tmp_path, seed):
    base = llama()
    batch = inputs(method, rows=8)
    data = [
        {**{key: value[row] for key, value in batch.items()}, "labels": batch["input_ids"][row]} for row in range(8)
    ]

    def fresh() -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), config(method))

    start = get_peft_model_state_dict(fresh())
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "eval_loss"}
    whole = trainer(fresh(), tmp_path / "whole", data, **best, greater_is_better=True)
    whole.train()
    checkpoint = whole.state.best_model_checkpoint
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint)
    assert_close(whole.model.eval()(**batch).logits, loaded(**batch).logits)

    straight = trainer(fresh(), tmp_path / "straight", data)
    straight.train()
    resumed = trainer(fresh(), tmp_path / "resumed", data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    ours, theirs = (get_peft_model_state_dict(each.model) for each in (resumed, straight))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, start[key]) for key, tensor in theirs.items())


TEXTS = ["hello world how are you", "good morning to you all", "what a day", "tell me more about it"]


@pytest.mark.parametrize("method", ["prompt", "p_mlp", "prefix", "llama-adapter", "oft"])
def test_trls_sft_trainer(method, tmp_path):
    torch.manual_seed(0)  # a few prompts before a random model change its loss by little: by luck, by nothing
    tokenizer = make_tokenizer()
    base = llama(vocab_size=len(tokenizer), pad_token_id=0)
    fresh = copy.deepcopy(base)
    options = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4, "max_length": 16}
    fixed = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    args = trl.SFTConfig(str(tmp_path), gradient_checkpointing=method != "prefix", bf16=False, **options, **fixed)
    data = Dataset.from_dict({"text": TEXTS})
    run = trl.SFTTrainer(base, args, train_dataset=data, processing_class=tokenizer, peft_config=config(method))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    run.model.save_pretrained(tmp_path / "adapter")
    loaded, ids = PeftModel.from_pretrained(fresh, tmp_path / "adapter"), tokens()
    assert_close(loaded(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_packed_texts_cannot_share_a_prompt(tmp_path):
    tokenizer = make_tokenizer()
    base = llama(vocab_size=len(tokenizer), pad_token_id=0)
    args = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=64, bf16=False, use_cpu=True, report_to=[], max_steps=1
    )
    data = Dataset.from_dict({"text": TEXTS})
    run = trl.SFTTrainer(base, args, train_dataset=data, processing_class=tokenizer, peft_config=config("prompt"))
    with pytest.raises(ValueError, match="Several texts are packed into a row"):
        run.train()
