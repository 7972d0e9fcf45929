"""Training beside packed weights: bitsandbytes in 4 bits, on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, logits, make_tokenizer, methods, save_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from peft import LoraConfig, PeftModel, SftTrainer, get_peft_model, prepare_model_for_kbit_training

bnb = pytest.importorskip("bitsandbytes")


def packed_model() -> nn.Module:
    """Three 4-bit layers, of which only the first is adapted below: its gradient passes through the other two."""
    layers = [bnb.nn.Linear4bit(64, 64, bias=bias, quant_type="nf4") for bias in (True, False, True)]
    return nn.Sequential(*layers).requires_grad_(False).to("cpu")


@methods
@pytest.mark.parametrize("evaluated_before", [False, True], ids=["new", "evaluated"])
def test_training_goes_on_after_an_evaluation(method, evaluated_before):
    """In eval mode bitsandbytes would repack weights for a kernel without a backward pass, where the CPU has one."""
    base, x = packed_model(), torch.randn(5, 64)
    if evaluated_before:
        with torch.no_grad():
            base.eval()(x)
    model = get_peft_model(base, CONFIGS[method](target_modules=["0"]))
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    x = x.requires_grad_()
    model(x).square().sum().backward()

    layers = [model.get_base_model()[0].base_layer, *model.get_base_model()[1:]]
    y = x.detach().double().requires_grad_()
    weights = [bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double() for layer in layers]
    biases = [None if layer.bias is None else layer.bias.double() for layer in layers]
    with torch.no_grad():
        weights[0], biases[0] = model.get_base_model()[0].fold("default", weights[0], biases[0])
    z = y
    for weight, bias in zip(weights, biases):
        z = nn.functional.linear(z, weight, bias)
    z.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-3, atol=1e-3)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("evaluated_before", [False, True], ids=["new", "evaluated"])
@pytest.mark.parametrize("nested", [False, True])
def test_inference_and_state_dicts_leave_the_weights_alone(nested, evaluated_before):
    """bitsandbytes repacks in the one, and in the other loses the order of the scales."""
    layer = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    base, x = nn.Sequential(layer).requires_grad_(False).to("cpu").eval(), torch.randn(5, 256)
    expected = x @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    with torch.no_grad():
        if evaluated_before:
            base(x)
            base.state_dict()
        model = get_peft_model(base, LoraConfig(target_modules=["0"], inference_mode=True)).eval()
        y = model(x)
        model.state_dict()
        assert torch.equal(model(x), y)
    scales = 1e-2 if evaluated_before else 1e-5  # they were rounded then
    assert (y - expected).abs().max() <= scales * expected.abs().max()


@methods
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_on_four_bits(method, kind, tmp_path):
    """As users write it: a packed model is given to Trainer, or its name and `quantization_config` to TRL's trainer."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    name, tokenizer = save_llama(tmp_path / "base", make_tokenizer()), make_tokenizer()
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loading = {"quantization_config": packing, "dtype": "float32"}
    config = CONFIGS[method](task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    row = tokenizer("one two three")
    options = {
        "output_dir": tmp_path / "run", "max_steps": 4, "learning_rate": 0.02, "report_to": [], "logging_steps": 1,
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip

    def packed():
        return AutoModelForCausalLM.from_pretrained(name, **loading)

    if kind == "Trainer":
        base = prepare_model_for_kbit_training(packed(), gradient_checkpointing_kwargs={"use_reentrant": False})
        cls = SftTrainer(Trainer) if method == "sft" else Trainer
        trainer = cls(
            model=get_peft_model(base, config), args=TrainingArguments(**options),
            train_dataset=datasets.Dataset.from_list([{**row, "labels": row["input_ids"]}] * 8),
        )  # fmt: skip
    else:
        cls = SftTrainer(trl.SFTTrainer) if method == "sft" else trl.SFTTrainer
        trainer = cls(
            name, args=trl.SFTConfig(**options, model_init_kwargs=loading), peft_config=config,
            processing_class=tokenizer, train_dataset=datasets.Dataset.from_list([{"text": "one two three"}] * 8),
        )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(packed(), tmp_path / "adapter").eval()
    ids = torch.tensor([row["input_ids"]])
    trained, plain = logits(trainer.model.eval(), ids), logits(packed().train(), ids)
    assert {s.quantization_backend for s in loaded.get_layer_status()} == {"bitsandbytes 4-bit"}
    assert (logits(loaded, ids) - trained).norm() < 0.05 * (trained - plain).norm()
