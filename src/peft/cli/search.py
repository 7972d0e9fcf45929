"""`peft search`: which layers of a model should get an adapter, and of what size, found without training (DE-NAS).

It writes the structure, the history of the search and, where matplotlib is installed, pictures of both. The structure
is what `CompactLoraConfig(best_structure=DIR)`, `apply_structure` and `deltatuner.optimize` take.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.constants import STRUCTURE_NAME
from .common import CliError, first_line, format_table, need, notice
from .data import Collator, encode_rows, pad_id_of, read_rows
from .models import load_model, load_tokenizer, quiet_transformers, resolve_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..tuners.denas import DenasConfig, SearchResult

SEARCH_OPTIONS = {
    "score": "score",
    "engine": "engine",
    "granularity": "granularity",
    "max_params": "max_params",
    "min_params": "min_params",
    "max_latency": "max_latency",
    "max_rank": "r_max",
    "rounds": "max_epochs",
    "population": "population_num",
    "seed": "seed",
    "batch_size": "batch_size",
    "length": "sequence_length",
    "storage": "storage",
    "study": "study_name",
}
"""Option -> the field of `DenasConfig` that it sets."""


def run(args: argparse.Namespace) -> None:
    """`peft search`."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise CliError(f"--output {output} is a file; it must be a folder, or not exist")
    if (output / STRUCTURE_NAME).exists() and not args.overwrite:
        raise CliError(f"--output {output} already holds a structure; --overwrite replaces it")
    try:
        search = make_search(args)
        config = make_adapter_config(args)
    except ValueError as error:
        raise CliError(first_line(error)) from error
    if search.engine in ("tpe", "nsga2") and importlib.util.find_spec("optuna") is None:
        raise need("optuna", f"--engine {search.engine}", "denas")

    from ..tuners.denas import search_structure

    quiet_transformers()
    tokenizer = load_tokenizer(args.model)
    batch = None if args.data is None else data_batch(args.data, tokenizer, search)
    model = load_model(args.model, resolve_dtype(args.dtype))
    start = time.perf_counter()
    try:
        result = search_structure(model, config, search, tokenizer, batch)
    except ValueError as error:
        raise CliError(first_line(error)) from error
    seconds = time.perf_counter() - start
    plots = importlib.util.find_spec("matplotlib") is not None
    result.save(output, plots)
    if not plots:
        notice("no pictures were drawn, since matplotlib is not installed")
    print(summary(result, seconds))
    notice(f"wrote {output}")


def make_search(args: argparse.Namespace) -> DenasConfig:
    """What the options say of the search; those that were not given keep the defaults."""
    from ..tuners.denas import DenasConfig

    given = {field: getattr(args, name) for name, field in SEARCH_OPTIONS.items() if getattr(args, name) is not None}
    if args.population is not None:  # the other numbers of a round in deltatuner's proportions
        given |= {"select_num": args.population, "crossover_num": args.population // 2}
        given |= {"mutation_num": args.population // 2}
    if args.latency_objective:
        given["objectives"] = ["score", "params", "latency"]
    return DenasConfig(**given)


def make_adapter_config(args: argparse.Namespace) -> Any:
    """The adapter whose structure is searched."""
    from peft import LoraConfig, SftConfig, SsfConfig, TaskType

    fields: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "target_modules": args.target_modules}
    if args.method == "lora":
        rank = args.rank or LoraConfig().r
        return LoraConfig(**fields, r=rank, lora_alpha=args.alpha or 2 * rank)
    if args.method == "ssf":
        return SsfConfig(**fields)
    return SftConfig(**fields) if args.density is None else SftConfig(**fields, density=args.density)


def data_batch(path: str, tokenizer: PreTrainedTokenizerBase, search: DenasConfig) -> dict[str, torch.Tensor]:
    """The first rows of a JSONL file, as `peft train` reads them, in one batch.

    Raises:
        CliError: the file has too few rows, or nothing to train on in their first tokens.
    """
    rows = read_rows(path)[: search.batch_size]
    if len(rows) < search.batch_size:
        raise CliError(f"{path} has {len(rows)} rows, fewer than --batch-size {search.batch_size}")
    examples, _, left_out = encode_rows(tokenizer, rows, search.sequence_length)
    if left_out:
        raise CliError(
            f"{left_out} of the first {len(rows)} rows of {path} have nothing to train on in their first "
            f"{search.sequence_length} tokens: raise --length"
        )
    return Collator(pad_id_of(tokenizer))(examples)


def summary(result: SearchResult, seconds: float) -> str:
    """What was found, as a table."""
    from ..tuners.denas.structure import LAYER_NAME, SIZES

    rows = [["score", f"{result.score:.6g}"], ["parameters", f"{result.params:,}"]]
    if result.latency is not None:
        rows.append(["latency", f"{result.latency:.1f} ms"])
    rows += [["structures scored", f"{len(result.history):,}"], ["seconds", f"{seconds:.1f}"]]
    on = result.structure[LAYER_NAME]
    kinds = on if isinstance(on, dict) else {"layers": on}
    name = SIZES[result.method][0] if SIZES[result.method] else None
    for kind, used in kinds.items():
        sizes = used if name is None else result.structure[name]
        sizes = sizes[kind] if isinstance(sizes, dict) else sizes
        rows.append([f"{kind}, {name or 'on'}", " ".join(str(size) if u else "-" for size, u in zip(sizes, used))])
    return format_table(rows)
