"""TRL's DPO: the policy's adapter beside a frozen copy of itself, or beside the base model, as the reference.

TRL runs the reference between the policy's forward and its backward, on the same model. The plain formulation here is
two models without adapters, whose weights are the merged ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from tiny_models import adapted, llama, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft
from peft import LoraConfig, SftConfig, SftTrainer

BETA = 0.3
TARGETS = ["q_proj", "v_proj", "down_proj"]
methods = pytest.mark.parametrize("method", ["sft", "lora"])
references = pytest.mark.parametrize("reference", ["copy", "disabled"])


def copy_as_trl_does(model: peft.PeftModel) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def log_probabilities(model, ids: torch.Tensor) -> torch.Tensor:
    """(rows,) log-probability of each row's tokens from the second on."""
    logits = model(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Equation 7 of arXiv 2305.18290, rows in the order [chosen, rejected]."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def merged(model: peft.PeftModel):
    return copy.deepcopy(model).merge_and_unload().requires_grad_(True)


def values_and_weight_gradients(model, plain):
    """For each trained tensor of the policy: its gradient, and what it must be by the dense gradient of `plain`."""
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "sft_delta"):
            dense = plain.get_submodule(name).weight.grad
            delta = layer.sft_delta["default"]
            yield delta.values.grad, dense.flatten()[delta.indices.long()]
        elif hasattr(layer, "lora_A"):
            dense, scaling = plain.get_submodule(name).weight.grad, layer.scaling["default"]
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield A.grad, scaling * B.detach().T @ dense
            yield B.grad, scaling * dense @ A.detach().T


@methods
@references
def test_gradients_are_those_of_two_plain_models(method, reference):
    kw = {"dtype": "auto"} if method == "sft" else {}
    model = adapted(llama().double(), method=method, target_modules=TARGETS, **kw).double()
    ids = tokens(4, 7)
    with model.disable_adapter(), torch.no_grad():
        expected_reference = log_probabilities(model, ids)
    if reference == "copy":
        copy_as_trl_does(model)
        expected_reference = log_probabilities(model, ids).detach()
        with torch.no_grad():  # the policy has been trained since
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    plain = merged(model)
    expected = log_probabilities(plain, ids)
    dpo_loss(expected, expected_reference).backward()

    policy = log_probabilities(model, ids)
    with torch.no_grad():
        if reference == "copy":
            model.set_adapter("ref")
            observed = log_probabilities(model, ids)
            model.set_adapter("default")
        else:
            with model.disable_adapter():
                observed = log_probabilities(model, ids)
    torch.testing.assert_close(observed, expected_reference, rtol=1e-10, atol=0)
    torch.testing.assert_close(policy, expected, rtol=1e-10, atol=0)
    dpo_loss(policy, observed).backward()
    pairs = list(values_and_weight_gradients(model, plain))
    assert len(pairs) == 2 * len(TARGETS) * (1 if method == "sft" else 2)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert not any(p.grad is not None for name, p in model.named_parameters() if ".ref." in name)


@pytest.fixture
def tokenizer():
    words = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(47))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def preferences(rows: int = 24) -> Dataset:
    write = lambda n: " ".join(str(int(i)) for i in torch.randint(47, (n,)))  # noqa: E731
    return Dataset.from_list([{"prompt": write(4), "chosen": write(3), "rejected": write(3)} for _ in range(rows)])


def arguments(folder, **kw):
    settings = {"save_strategy": "no", "learning_rate": 0.02, **kw}
    return trl.DPOConfig(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        beta=BETA,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )


def policy(method: str) -> peft.PeftModel:
    kw = {"reselection_steps": 4, "selection_accumulation_steps": 2} if method == "sft" else {}
    return adapted(llama(), method=method, task_type="CAUSAL_LM", target_modules=TARGETS, **kw)


def adapter_tensors(model, name: str) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters()
    return {key.replace(f".{name}.", "."): p.detach().clone() for key, p in parameters if f".{name}." in key}


@methods
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_the_trainer_with_a_copy_as_reference(method, checkpointing, tokenizer, tmp_path):
    model = policy(method)
    start = adapter_tensors(model, "default")
    base = {name: p.clone() for name, p in model.get_base_model().named_parameters() if "default" not in name}
    ids = tokens(3, 6)
    expected_reference = log_probabilities(model, ids).detach()
    cls = SftTrainer(trl.DPOTrainer) if method == "sft" else trl.DPOTrainer
    settings = {"gradient_checkpointing": False}
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    trainer = cls(
        model=model,
        args=arguments(tmp_path, **settings),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Before the first step policy and reference are one: every margin is 0 and the loss is log 2.
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert any(abs(entry["rewards/margins"]) > 1e-3 for entry in logs[2:])
    assert all(torch.equal(start[key], tensor) for key, tensor in adapter_tensors(model, "ref").items())
    after = adapter_tensors(model, "default")
    assert after.keys() == start.keys()
    assert all(not torch.equal(start[key], after[key]) for key in after if not key.endswith("indices"))
    if method == "sft":
        assert [entry["step"] for entry in trainer.sft_selector.history] == [2, 6]
        assert trainer.sft_selector.history[0]["moved"] > 0
        assert any(not torch.equal(start[key], after[key]) for key in after if key.endswith("indices"))
    for name, parameter in model.get_base_model().named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    model.set_adapter("ref")
    torch.testing.assert_close(log_probabilities(model.eval(), ids).detach(), expected_reference)


@methods
def test_the_trainer_with_the_base_model_as_reference(method, tokenizer, tmp_path):
    """The loss of every micro-batch equals the one of the merged policy and of the base model, two plain models."""
    base = llama()
    plain = copy.deepcopy(base)
    if method == "sft":
        schedule = {"reselection_steps": 4, "selection_accumulation_steps": 2}
        config = SftConfig(num_tunable_weights=200, task_type="CAUSAL_LM", target_modules=TARGETS, **schedule)
    else:
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=TARGETS)
    losses = []

    class Watched(trl.DPOTrainer):
        """A user's trainer with a `compute_loss` of its own."""

        def compute_loss(self, model, inputs, *args, **kw):
            loss = super().compute_loss(model, inputs, *args, **kw)
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]

            def completion(model) -> torch.Tensor:
                logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
                return (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)

            with torch.no_grad():
                expected = dpo_loss(completion(merged(self.model).eval()), completion(plain))
            losses.append((loss.detach(), expected))
            return loss

    cls = SftTrainer(Watched) if method == "sft" else Watched
    args = arguments(tmp_path, gradient_checkpointing=False)
    trainer = cls(model=base, args=args, peft_config=config, train_dataset=preferences(), processing_class=tokenizer)
    trainer.train()
    assert "ref" not in trainer.model.peft_config
    assert len(losses) == 16 and max(abs(theirs - 0.6931) for _, theirs in losses) > 1e-3  # the policy has moved
    for ours, theirs in losses:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_with_a_reference_adapter_resumes(tokenizer, tmp_path):
    model, data = policy("sft"), preferences()
    other = copy.deepcopy(model)
    train = {"train_dataset": data, "processing_class": tokenizer}
    args = arguments(tmp_path, gradient_checkpointing=False, save_strategy="steps", save_steps=5)
    SftTrainer(trl.DPOTrainer)(model=model, args=args, **train).train()
    resumed = SftTrainer(trl.DPOTrainer)(model=other, args=args, **train)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name in ("default", "ref"):
        expected, found = adapter_tensors(model, name), adapter_tensors(other, name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}: {key}"
