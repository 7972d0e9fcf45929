"""TRL's SFTTrainer, RewardTrainer and GRPOTrainer with adapters. (DPOTrainer: test_trl_dpo.py.)

What a run reports before its first step is compared with a plain copy of the base model: a new adapter changes nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from tiny_models import CONFIGS, adapted, logits, make_tokenizer, methods, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peft import LoraConfig, PeftConfig, PeftModel, SftTrainer

TARGETS = ["q_proj", "v_proj", "down_proj"]
# What an assistant says, and the end of it, is marked; byte-level tokens let every text be counted in tokens.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def base(tokenizer, cls=LlamaForCausalLM, **kw) -> nn.Module:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, initializer_range=0.2, **kw,
    )  # fmt: skip
    return cls(config).eval()


def config(method: str, task: str = "CAUSAL_LM") -> PeftConfig:
    untrained = {"lora": {"init_lora_weights": True}, "ssf": {"init_ssf_weights": True}, "sft": {}}[method]
    return CONFIGS[method](target_modules=TARGETS, task_type=task, **untrained)


def arguments(cls, folder, **kw):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, **kw}
    return cls(output_dir=str(folder), save_strategy="steps", save_steps=3, **QUIET, **settings)


def words(n: int) -> str:
    return "".join("abcdefgh "[i] for i in torch.randint(9, (n,)))


def check(model: PeftModel, plain: nn.Module, folder, again: nn.Module) -> None:
    """Adapters alone have changed, and the checkpoint holds all that has."""
    assert all(".default" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    frozen = {name: p for name, p in model.get_base_model().named_parameters() if ".default" not in name}
    for name, parameter in plain.named_parameters():
        wrapped = [name, *(f"{a}.{inner}.{b}" for inner in ("base_layer", "original_module")
                           for a, b in [name.rsplit(".", 1)])]  # fmt: skip
        assert torch.equal(next(frozen[key] for key in wrapped if key in frozen), parameter), name
    ids = tokens()
    again = PeftModel.from_pretrained(again, folder / "checkpoint-3")
    assert not torch.allclose(logits(plain, ids), logits(model.eval(), ids), atol=1e-4)
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


@methods
@pytest.mark.parametrize("assistant_only", [False, True])
def test_sft_trainer(method, assistant_only, tokenizer, tmp_path):
    model = base(tokenizer)
    plain = copy.deepcopy(model)
    talk = [[{"role": "user", "content": words(5)}, {"role": "assistant", "content": words(4)}] for _ in range(4)]
    cls = SftTrainer(trl.SFTTrainer) if method == "sft" else trl.SFTTrainer
    trainer = cls(
        model,
        arguments(trl.SFTConfig, tmp_path, assistant_only_loss=assistant_only, max_length=None),
        train_dataset=Dataset.from_dict({"messages": talk}),
        processing_class=tokenizer,
        peft_config=config(method),
    )
    trainer.train()
    encoded = tokenizer.apply_chat_template(
        talk, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ids, counted = encoded["input_ids"], encoded["assistant_masks"].bool()
    if not assistant_only:
        counted = torch.ones_like(counted)
    assert counted[:, 1:].sum() == (4 * 5 if assistant_only else 4 * (ids.shape[1] - 1))
    with torch.no_grad():
        expected = F.cross_entropy(logits(plain, ids)[:, :-1][counted[:, 1:]], ids[:, 1:][counted[:, 1:]])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3) and losses[-1] < losses[0]
    check(trainer.model, plain, tmp_path, copy.deepcopy(plain))


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_reward_trainer(method, tokenizer, tmp_path):
    model = base(tokenizer, LlamaForSequenceClassification, num_labels=1)
    plain = copy.deepcopy(model)
    rows = [{"chosen": words(6), "rejected": words(6)} for _ in range(4)]
    trainer = trl.RewardTrainer(
        model,
        arguments(trl.RewardConfig, tmp_path, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config(method, "SEQ_CLS"),
    )
    encoded = {key: torch.tensor(trainer.train_dataset[f"{key}_ids"][:]) for key in ("chosen", "rejected")}
    expected = -F.logsigmoid(logits(plain, encoded["chosen"]) - logits(plain, encoded["rejected"])).mean()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3) and losses[-1] < losses[0]
    assert trainer.model.modules_to_save == {"classifier", "score"}
    check(trainer.model, plain, tmp_path, copy.deepcopy(plain))


@pytest.mark.parametrize("method", ["lora", "sft"])  # TRL copies what has `.default.` in its name, not SSF's
@pytest.mark.parametrize("reference", ["disabled", "copy"])
def test_grpo_trainer(method, reference, tokenizer, tmp_path):
    """The KL to the reference: the base model for a new adapter, a frozen copy "ref" for one that was there."""
    model = base(tokenizer)
    plain = copy.deepcopy(model)
    if reference == "copy":
        model = adapted(model, method=method, target_modules=TARGETS, task_type="CAUSAL_LM")
        start = {name: p.clone() for name, p in model.named_parameters() if ".default" in name}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) + torch.rand(()).item() for text in completions],
        args=arguments(
            trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=5, beta=0.1, learning_rate=0.05
        ),
        train_dataset=Dataset.from_dict({"prompt": [words(4) for _ in range(4)]}),
        processing_class=tokenizer,
        peft_config=config(method) if reference == "disabled" else None,
    )
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 1e-5
    assert sorted(trainer.model.peft_config) == (["default", "ref"] if reference == "copy" else ["default"])
    assert trainer.model.active_adapters == ["default"]
    if reference == "copy":
        parameters = dict(trainer.model.named_parameters())
        assert start and all(torch.equal(parameters[key.replace(".default", ".ref")], t) for key, t in start.items())
        assert any(not torch.equal(parameters[key], tensor) for key, tensor in start.items())
        trainer.model.delete_adapter("ref")
    check(trainer.model, plain, tmp_path, copy.deepcopy(plain))


def test_an_adapter_of_the_head_is_refused_where_it_would_not_train(tokenizer, tmp_path):
    """TRL multiplies with the head's weight itself; it knows an adapted head by `get_output_embeddings`."""
    with pytest.raises(ValueError, match="`lm_head` is not supported"):
        trl.GRPOTrainer(
            base(tokenizer),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments(trl.GRPOConfig, tmp_path, num_generations=4),
            train_dataset=Dataset.from_dict({"prompt": [words(4)]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        )
