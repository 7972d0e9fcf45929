"""Memory of several fine-tuned models over one base model in 8 bits: the table of docs/source/finetuna.md.

A model of OPT-125m's shape with random weights in float32. Counted are the bytes of all tensors, those that models
share once; beside them stands what the process holds (Linux only), as a check that nothing else takes memory.

    python benchmarks/finetuna_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from pathlib import Path

from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import peft.finetuna as ft

WAYS = {  # name of the column: what quantize_base_model and new_finetuned get
    "head trained": ({}, {}),
    "head in 8 bits": ({"modules_not_to_quantize": set()}, {"plain_layers": set()}),
}


def tensor_bytes(*models: nn.Module) -> int:
    """Bytes of the models' parameters and buffers; memory that several tensors share counts once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int | None:
    """Memory that the process holds, after what it has freed was given back."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


def measure(config: OPTConfig, counts: list[int], quantize: dict, new: dict) -> dict[str, tuple[int, int | None]]:
    """`{what is held: (bytes of tensors, bytes that the process has taken for it)}`."""
    empty = resident_bytes()

    def taken() -> int | None:
        now = resident_bytes()
        return None if now is None else now - empty

    base = OPTForCausalLM(config)
    rows = {"base model, float32": (tensor_bytes(base), taken())}
    ft.quantize_base_model(base, **quantize)
    rows["base model, 8 bits"] = (tensor_bytes(base), taken())
    models: list[nn.Module] = []
    for count in counts:
        models += [ft.new_finetuned(base, **new) for _ in range(count - len(models))]
        rows[f"with {count} fine-tuned"] = (tensor_bytes(base, *models), taken())
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, nargs="+", default=[1, 2, 4], help="how many models, increasing")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=50272)
    args = parser.parse_args(arguments)
    config = OPTConfig(
        hidden_size=args.hidden_size, word_embed_proj_dim=args.hidden_size, ffn_dim=4 * args.hidden_size,
        num_hidden_layers=args.layers, vocab_size=args.vocab_size,
    )  # fmt: skip
    columns = {name: measure(config, args.models, *options) for name, options in WAYS.items()}
    print("| MB: tensors (process) |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for row in next(iter(columns.values())):
        cells = (
            f"{megabytes(tensors)} ({megabytes(process)})" for tensors, process in (c[row] for c in columns.values())
        )
        print(f"| {row} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
