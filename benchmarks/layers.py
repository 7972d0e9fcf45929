"""Time of one adapted linear layer, forward and backward, at the sizes of a large model (LLaMA-7B by default).

The unit is the frozen layer: its product forward and the product that gives the gradient of its input. Beside it are
LoRA, SFT, and SFT as it is written down in the paper (`W + D` as a dense copy, the dense gradient of it), all with as
many trained numbers as LoRA has at the given rank. All are measured in one process, in turn, round after round and each
round in another order.

    python benchmarks/layers.py --rounds 10 --output FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from train_step import DenseDelta

from peft import LoraConfig, SftConfig, get_peft_model

SHAPES = ((4096, 4096), (11008, 4096))  # (O, I) of LLaMA-7B's attention and MLP layers
TOKENS = (512, 2048)


def frozen(layer: nn.Linear, budget: int, rank: int) -> nn.Module:
    return layer


def lora(layer: nn.Linear, budget: int, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, target_modules=["0"])
    return get_peft_model(nn.Sequential(layer), config)


def reference(layer: nn.Linear, budget: int, rank: int) -> nn.Module:
    return DenseDelta(layer, budget)


def sft(layer: nn.Linear, budget: int, rank: int) -> nn.Module:
    return get_peft_model(nn.Sequential(layer), SftConfig(num_tunable_weights=budget, target_modules=["0"]))


CONTESTANTS: dict[str, Callable[[nn.Linear, int, int], nn.Module]] = {
    "frozen layer": frozen,
    "LoRA": lora,
    "SFT, dense formulation": reference,
    "SFT": sft,
}


def seconds(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None
    start = time.perf_counter()
    model(x).backward(gradient)
    return time.perf_counter() - start


def measure(shape: tuple[int, int], tokens: int, rounds: int, rank: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """`{contestant: [seconds, ...]}` for a layer `shape` (O, I)."""
    out_features, in_features = shape
    x = torch.randn(1, tokens, in_features, dtype=dtype, requires_grad=True)
    gradient = torch.randn(1, tokens, out_features, dtype=dtype)
    layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    budget = rank * (in_features + out_features)
    models = {name: make(layer, budget, rank) for name, make in CONTESTANTS.items()}  # all over one weight
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds(model, x, gradient)
    for _ in tqdm(range(rounds), desc=f"{out_features} x {in_features}, {tokens} tokens"):
        for name in random.sample(list(models), len(models)):
            times[name].append(seconds(models[name], x, gradient))
    return times


def table(results: list[dict]) -> str:
    names = list(CONTESTANTS)
    lines = [
        "| layer | tokens | " + " | ".join(f"{name}, ms" for name in names[:1]) + " | "
        + " | ".join(f"{name}, × frozen" for name in names[1:]) + " | dense formulation / SFT |",
        "|---|---:|" + "---:|" * (len(names) + 1),
    ]  # fmt: skip
    for result in results:
        low, mid = ({n: f(t) for n, t in result["seconds"].items()} for f in (min, statistics.median))
        floor = names[0]
        cells = [f"{1e3 * mid[floor]:.0f} ({1e3 * low[floor]:.0f})"]
        cells += [f"{mid[n] / mid[floor]:.2f} ({low[n] / low[floor]:.2f})" for n in names[1:]]
        ratios = [t["SFT, dense formulation"] / t["SFT"] for t in (mid, low)]
        cells.append(f"{ratios[0]:.2f} ({ratios[1]:.2f})")
        rows, columns = result["shape"]
        lines.append(f"| {rows} × {columns} | {result['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rank", type=int, default=32, help="of LoRA; it sets the number of trained values of all")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--output", type=Path, help="JSON with every measurement")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for shape in SHAPES:
        for tokens in TOKENS:
            times = measure(shape, tokens, args.rounds, args.rank, getattr(torch, args.dtype))
            results.append({"shape": shape, "tokens": tokens, "rank": args.rank, "dtype": args.dtype, "seconds": times})
            gc.collect()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds, {args.dtype}; medians, "
          "minima in brackets\n", file=sys.stderr)  # fmt: skip
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
