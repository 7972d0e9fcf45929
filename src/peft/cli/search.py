"""`peft search`: which layers of a model should get an adapter, and of what size, found without training (DE-NAS).

It writes the structure, the history of the search and, where matplotlib is installed, pictures of both. The structure
is what `CompactLoraConfig(best_structure=DIR)`, `apply_structure` and `deltatuner.optimize` take.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.constants import STRUCTURE_NAME
from .arguments import SEARCH_METHOD_OPTIONS
from .common import CliError, first_line, format_table, need, notice
from .data import Collator, encode_rows, pad_id_of, read_rows
from .models import load_model, load_tokenizer, make_adapter_config, quiet_transformers, resolve_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..tuners.denas import DenasConfig, SearchResult

FIELDS = {
    "max_rank": "r_max", "rounds": "max_epochs", "population": "population_num", "length": "sequence_length",
    "study": "study_name",
}  # fmt: skip
"""Option -> the field of `DenasConfig` that it sets, where that is called otherwise."""


def run(args: argparse.Namespace) -> None:
    """`peft search`."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise CliError(f"--output {output} is a file; it must be a folder, or not exist")
    if (output / STRUCTURE_NAME).exists() and not args.overwrite:
        raise CliError(f"--output {output} already holds a structure; --overwrite replaces it")
    try:
        search = make_search(args)
    except ValueError as error:
        raise CliError(first_line(error)) from error
    config = make_adapter_config(args, SEARCH_METHOD_OPTIONS)
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

    options = {FIELDS.get(name, name): value for name, value in vars(args).items() if value is not None}
    given = {field.name: options[field.name] for field in dataclasses.fields(DenasConfig) if field.name in options}
    if args.population is not None:  # the other numbers of a round in deltatuner's proportions
        given |= {"select_num": args.population, "crossover_num": args.population // 2}
        given |= {"mutation_num": args.population // 2}
    if args.latency_objective:
        given["objectives"] = ["score", "params", "latency"]
    return DenasConfig(**given)


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
