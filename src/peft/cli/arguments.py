"""Arguments of all commands, and the rules between them. Imports nothing heavy: no torch, no transformers.

An option that would have no effect (because it belongs to another method or another kind of data) is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

METHODS = ("sft", "lora", "ssf")
METHOD_OPTIONS = {
    "sft": (
        "density", "num_tunable_weights", "granularity", "block_size", "selection_algorithm", "static_criterion",
        "budget", "reselection_steps",
    ),
    "lora": ("rank", "alpha", "dropout"),
    "ssf": (),
}  # fmt: skip
"""Method -> options that only it has."""

SEARCH_METHOD_OPTIONS = {"lora": ("rank", "alpha", "max_rank"), "sft": ("density",), "ssf": ()}
"""Likewise, of `peft search`."""

EXCLUSIVE = (("density", "num_tunable_weights"), ("epochs", "max_steps"), ("resume", "overwrite"))
"""Pairs of options of which at most one can be given."""

DTYPES = ("auto", "float32", "bfloat16")
ALL_LINEAR = "all-linear"
QUANTIZED = ("nf4", "fp4", "int8", "torchao-int8", "quanto-int8", "quanto-int4")
"""Values of --quantize; nf4, fp4 and int8 are bitsandbytes'."""

TASK_PREFIX = "task:"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage (`--help` shows that)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("type", None, not_empty)  # of the arguments for which no other is said

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def find_foreign_option(args: argparse.Namespace, options: dict[str, tuple[str, ...]]) -> str | None:
    """An option that was given and belongs to another method, as a message, or None."""
    for method, names in options.items():
        for name in names:
            if method != args.method and getattr(args, name) is not None:
                return f"{option(name)} belongs to --method {method} and has no effect on --method {args.method}"
    return None


def find_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options that are right each by itself, or None."""
    if message := find_foreign_option(args, METHOD_OPTIONS):
        return message
    if args.selection_algorithm == "static" and args.reselection_steps is not None:
        return "--reselection-steps has no effect with --selection-algorithm static, which chooses once"
    for first, second in EXCLUSIVE:
        if getattr(args, first) not in (None, False) and getattr(args, second) not in (None, False):
            return f"{option(first)} and {option(second)} cannot be given together"
    if args.budget == "global" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "--budget global moves weights between layers, which needs a single process: start one, or leave it out"
    if args.data == TASK_PREFIX:
        return f"--data {TASK_PREFIX} lacks the name of the task, as in {TASK_PREFIX}spell_backward"
    if args.task_args is not None and not args.data.startswith(TASK_PREFIX):
        return f"--task-args is for --data {TASK_PREFIX}NAME, got --data {args.data}"
    return None


def find_search_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options of `peft search` that are right each by itself, or None."""
    if message := find_foreign_option(args, SEARCH_METHOD_OPTIONS):
        return message
    for name in ("storage", "study"):
        if getattr(args, name) is not None and args.engine not in ("tpe", "nsga2"):
            return f"{option(name)} is for --engine tpe and nsga2"
    if args.latency_objective and args.engine != "nsga2":
        return "--latency-objective is for --engine nsga2"
    return None


def find_memory_conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with options of `peft memory` that are right each by itself, or None."""
    if args.method == "full" and args.target_modules is not None:
        return "--target-modules is for adapters and has no effect on --method full"
    if args.adapter_args is not None and args.method in ("full", *METHODS):
        return f"--adapter-args is for other methods than {args.method}"
    return find_foreign_option(args, METHOD_OPTIONS)


# ---- Types of values ----


def number(kind: type, rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number of this kind for which the rule holds."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return convert


positive_int = number(int, "a whole number of at least 1", lambda value: value >= 1)
seed = number(int, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
positive = number(float, "a positive number", lambda value: 0 < value < float("inf"))
share = number(float, "a number in (0, 1]", lambda value: 0 < value <= 1)
probability = number(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


def not_empty(text: str) -> str:
    """A path, a name. An empty one, from a variable of the shell that was not set, would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def png_file(text: str) -> str:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must be a file name that ends in .png, got {text!r}")
    return text


def module_names(text: str) -> str | list[str]:
    """ "q_proj,v_proj" -> a list; "all-linear" and regular expressions stay strings."""
    if text == ALL_LINEAR:
        return text
    if any(character in text for character in "*+?()[]|^$\\"):
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return names


# ---- The parsers ----


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line. In what is returned, `command` is the name of the module that runs it.

    Raises:
        SystemExit: exit code 2 after one line on stderr, if the arguments are wrong; 0 after `--help`.
    """
    args = make_parser().parse_args(argv)
    checks = {"train": find_conflict, "search": find_search_conflict, "memory": find_memory_conflict}
    if args.command in checks and (message := checks[args.command](args)):
        make_parser().exit(2, f"peft {args.command}: error: {message}\n")
    return args


def make_parser() -> Parser:
    parser = Parser(prog="peft", description="Fine-tune language models with few trained parameters.")
    parser.register("type", None, str)  # its one argument is all the words of a command
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (add_train, add_evaluate, add_inspect, add_merge, add_search, add_memory):
        add_command(commands)
    return parser


def add_train(commands: argparse._SubParsersAction) -> None:
    text = "Fine-tune a causal language model, and measure what it can do before and after."
    train = commands.add_parser("train", help="fine-tune a model, measuring before and after", description=text)
    add = train.add_argument
    add("--model", default="smollm2", help="folder, hub id, or smollm2 (default), from its package")
    add("--method", default="sft", choices=METHODS, help="default: sft")
    add("--output", required=True, metavar="DIR", help="folder for adapter, metrics.json and loss.png")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --output")
    add_data_options(train.add_argument_group("data"))
    add_training_options(train.add_argument_group("training"))
    add_method_options(train)


def add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", required=True, help="a JSONL file, or task:NAME, a task of reasoning-gym")
    add("--task-args", type=json_object, metavar="JSON", help='settings of the task, as {"max_words": 5}')
    add("--train-size", type=positive_int, metavar="N", help="examples; default: 2000 (task), all (file)")
    text = "held-out examples; default: 200 (task), 10 %% of the file, at most 200"
    add("--eval-size", type=positive_int, metavar="N", help=text)
    text = "default: completions and assistant turns only"
    add("--loss-on", choices=("completions", "all"), default="completions", help=text)
    text = "tokens; longer examples are cut; default: 1024"
    add("--max-length", type=positive_int, default=1024, metavar="N", help=text)
    text = "fill sequences of --max-length with several examples, which do not see each other"
    add("--packing", action="store_true", help=text)


def add_training_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=positive, metavar="X", help="default: 1 (task), 3 (file)")
    add("--max-steps", type=positive_int, metavar="N", help="update steps, in place of --epochs")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="per device; default: 8")
    add("--grad-accum", type=positive_int, default=1, metavar="N", help="batches per update; default: 1")
    add("--lr", type=positive, help="learning rate; default: depends on the method")
    add("--seed", type=seed, default=0, help="default: 0")
    text = "of the base model; auto (default): bfloat16 on accelerators that have it, else float32"
    add("--dtype", choices=DTYPES, default="auto", help=text)
    text = "pack the base model's linear layers (not its head); nf4, fp4 and int8 are bitsandbytes'"
    add("--quantize", choices=QUANTIZED, help=text)
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--save-steps", type=positive_int, metavar="N", help="steps between checkpoints; default: a quarter of the run")


def add_method_options(train: argparse.ArgumentParser) -> None:
    text = "names with commas between them, a regular expression, or all-linear (default)"
    train.add_argument("--target-modules", type=module_names, default=ALL_LINEAR, metavar="NAMES", help=text)
    add_sft_options(train.add_argument_group("--method sft"))
    add = train.add_argument_group("--method lora").add_argument
    add("--rank", type=positive_int, metavar="R", help="default: 8")
    add("--alpha", type=positive_int, metavar="A", help="default: twice the rank")
    add("--dropout", type=probability, metavar="P", help="default: 0")


def add_sft_options(group: argparse._ArgumentGroup) -> None:
    """The options of `SftConfig` that are in METHOD_OPTIONS, with its texts, choices and defaults."""
    from ..tuners.sft.config import SftArguments, choices

    for field in dataclasses.fields(SftArguments):
        if field.name not in METHOD_OPTIONS["sft"]:
            continue
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" Default: {field.default}."
        if allowed := choices(field.name):
            group.add_argument(option(field.name), choices=allowed, help=text)
        else:
            kind, metavar = (share, "X") if field.name == "density" else (positive_int, "N")
            group.add_argument(option(field.name), type=kind, metavar=metavar, help=text)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    text = "Measure a saved adapter again, on the held-out examples of its own run."
    add = commands.add_parser("evaluate", help="measure a trained adapter again", description=text).add_argument
    add("adapter", metavar="DIR", help="folder that peft train wrote")
    add("--data", help="the run's data file, if it has moved")
    add("--check", action="store_true", help="exit code 1 unless the figure is that of metrics.json")
    add("--model", help="the base model, if it has moved")


def add_inspect(commands: argparse._SubParsersAction) -> None:
    text = "Show the configuration, parameters and sizes of an adapter or a model."
    add = commands.add_parser("inspect", help="show what is in an adapter or a model", description=text).add_argument
    add("path", metavar="DIR|MODEL", help="folder of an adapter; folder or hub id of a model; smollm2")
    add("--all", action="store_true", help="a line for every module, not one for all layers alike")
    add("--model", help="the adapter's base model: compare what the adapter changes with its weights")
    add("-o", "--plot", type=png_file, metavar="FILE", help="draw what the adapter changes (PNG)")


def add_merge(commands: argparse._SubParsersAction) -> None:
    text = "Fold an adapter into its base model and write an ordinary model."
    add = commands.add_parser("merge", help="fold an adapter into its base model", description=text).add_argument
    add("base", metavar="BASE", help="folder, hub id, or smollm2")
    add("adapter", metavar="ADAPTER", help="folder or hub id")
    add("-o", "--output", required=True, metavar="DIR", help="folder for the merged model")
    add("--dtype", choices=DTYPES, default="auto", help="auto (default): that of the base model's files")
    add("--overwrite", action="store_true", help="replace what is in --output")


def add_search(commands: argparse._SubParsersAction) -> None:
    text = "Find, without training, which layers of a model should get an adapter, and of what size (DE-NAS)."
    search = commands.add_parser("search", help="find the best structure of an adapter", description=text)
    add = search.add_argument
    add("model", metavar="MODEL", help="folder, hub id, or smollm2, from its package")
    add("--method", default="lora", choices=("lora", "ssf", "sft"), help="default: lora")
    add("--output", required=True, metavar="DIR", help="folder for structure, history and pictures")
    add("--overwrite", action="store_true", help="replace the structure in --output")
    add("--data", metavar="FILE", help="JSONL file to score on; default: a text of ours")
    add("--batch-size", type=positive_int, metavar="N", help="rows to score on; default: 4")
    add("--length", type=positive_int, metavar="N", help="tokens in each of them; default: 32")
    text = "modules to choose from; default: the method's own"
    add("--target-modules", type=module_names, metavar="NAMES", help=text)
    add("--dtype", choices=DTYPES, default="auto", help="of the model; default: as of peft train")
    add = search.add_argument_group("limits").add_argument
    add("--max-params", type=positive, metavar="X", help="most trained parameters, in millions")
    add("--min-params", type=positive, metavar="X", help="fewest, in millions")
    add("--max-latency", type=positive, metavar="MS", help="longest forward pass, in milliseconds")
    add_search_engines(search.add_argument_group("search"))
    add = search.add_argument_group("--method lora").add_argument
    add("--rank", type=positive_int, metavar="R", help="the budget, if there is no other: as a LoRA of R")
    add("--alpha", type=positive_int, metavar="A", help="for --rank; default: twice the rank")
    add("--max-rank", type=positive_int, metavar="R", help="largest rank of a layer; default: 12")
    add = search.add_argument_group("--method sft").add_argument
    add("--density", type=share, metavar="X", help="trained share of the weights; default: 0.01")


def add_search_engines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--score", choices=("gradient_coherence", "deltatuner"), help="default: gradient_coherence")
    text = "default: exact where the score is a sum over layers, else evolutionary"
    add("--engine", choices=("exact", "evolutionary", "random", "tpe", "nsga2"), help=text)
    add("--granularity", choices=("layer", "module"), help="what is decided as one; default: layer")
    add("--rounds", type=positive_int, metavar="N", help="at most so many; default: 10")
    add("--population", type=positive_int, metavar="N", help="structures in a round; default: 50")
    add("--seed", type=seed, help="default: 12345")
    add("--storage", metavar="WHERE", help="journal file or database URL, to share and to go on from")
    add("--study", metavar="NAME", help="name of the search in it; default: denas")
    add("--latency-objective", action="store_true", help="nsga2: trade off latency as well")


def add_memory(commands: argparse._SubParsersAction) -> None:
    text = "Tell how much memory training takes. Only the configuration of the model is read."
    memory = commands.add_parser("memory", help="tell how much memory training takes", description=text)
    add = memory.add_argument
    add("model", metavar="MODEL", help="folder, hub id, or smollm2, from its package")
    text = "full, sft (default), lora, ssf, or another of the library: ia3, prefix_tuning, ..."
    add("--method", default="sft", help=text)
    text = 'another method\'s fields: {"num_virtual_tokens": 20}'
    add("--adapter-args", type=json_object, metavar="JSON", help=text)
    add("--task", dest="task_type", metavar="TASK", help="head and loss: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, ...")
    text = "sequences per GPU; default: 8"
    add("--batch", "--batch-size", dest="batch_size", type=positive_int, default=8, metavar="N", help=text)
    text = "tokens in each; default: 512"
    add("--seq", "--max-length", dest="sequence_length", type=positive_int, default=512, metavar="N", help=text)
    add("--padding", action="store_true", help="batches come with an attention mask")
    add("--dtype", metavar="TYPE", help="of the weights; default: the configuration's")
    add("--mixed-precision", action="store_true", help="float32 weights, trained in bfloat16")
    add("--quantize", dest="quantization", metavar="HOW", help="pack the frozen base: nf4, fp4 or int8")
    add("--optimizer", metavar="NAME", help="adamw, adamw_8bit, sgd, adafactor; default: the method's")
    checkpointing = ("--checkpointing", "--gradient-checkpointing")
    add(*checkpointing, dest="gradient_checkpointing", action="store_true", help="as in peft train")
    add("--grad-accum", type=positive_int, default=1, metavar="N", help="batches per update")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--gpus", dest="num_gpus", type=positive_int, default=1, metavar="N", help="default: 1")
    add("--sharding", metavar="HOW", help="zero1, zero2, zero3 or fsdp; default: data parallelism")
    add("--offload", metavar="WHAT", help="to the CPU: optimizer, or all (weights too)")
    add_method_options(memory)
    memory.set_defaults(target_modules=None)
