"""`peft evaluate`, and the two measures that `peft train` takes before and after: accuracy and held-out loss.

Batches are shared out over the processes of a distributed run, and the results gathered. So every process must hold
the whole model: data parallelism, not a model split over devices.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CliError, NotFinite, format_table, notice
from .data import Collator, Example, pad_id_of
from .source import Source, read_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS_FILE = "metrics.json"
MEASURED_WITH = {
    "model", "data", "task_args", "train_size", "eval_size", "seed", "max_length", "loss_on", "batch_size", "dtype",
}  # fmt: skip
"""Arguments of a run that say what was measured, and how."""

GENERATION_BATCH = 8
"""Generation takes so many times more rows at a time than training: it keeps no activations."""


@dataclass
class Measure:
    """A measured figure."""

    metric: str
    """ "accuracy", the share of problems solved, or "loss", per token."""
    value: float
    replies: list[str] = field(default_factory=list)
    """What the model said to each problem."""

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} %" if self.metric == "accuracy" else f"{self.value:.4f}"


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, batch_size: int) -> Measure:
    """Accuracy on the held-out problems of a task, or loss on the held-out rows of a file (`source` is tokenised).

    Raises:
        NotFinite: the loss is infinite or not a number.
    """
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if source.task is None:
                loss = held_out_loss(model, tokenizer, source.held_out_examples, batch_size)
                if not math.isfinite(loss):
                    raise NotFinite(f"the held-out loss is {loss}")
                return Measure("loss", loss)
            replies = reply_to(model, tokenizer, source.held_out_examples, batch_size * GENERATION_BATCH)
    finally:
        model.train(training)
    correct = [source.task.is_correct(reply, problem) for reply, problem in zip(replies, source.held_out)]
    return Measure("accuracy", sum(correct) / len(correct), replies)


def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int
) -> float:
    """Mean cross entropy per token that counts."""
    from accelerate.utils import gather_object

    collate = Collator(pad_id_of(tokenizer))
    sums = []
    for rows in own_batches([len(example.ids) for example in examples], batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in collate([examples[row] for row in rows]).items()}
        tokens = sum(examples[row].trained for row in rows)
        sums.append((model(**batch, use_cache=False).loss.item() * tokens, tokens))
    losses, tokens = zip(*gather_object(sums))
    return sum(losses) / sum(tokens)


def reply_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int
) -> list[str]:
    """What the model says to the prompt of each example, decoded greedily."""
    from accelerate.utils import gather_object

    # A right reply is as long as the answer; what comes much later than the longest one cannot be right.
    new_tokens = max(example.trained for example in examples) + 4
    replies = []
    for rows in own_batches([len(example.prompt) for example in examples], batch_size):
        texts = generate(model, tokenizer, [examples[row].prompt for row in rows], new_tokens)
        replies += zip(rows, texts)
    return [text for _, text in sorted(gather_object(replies))]


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], new_tokens: int
) -> list[str]:
    """Continue prompts of tokens, padded on the left into one batch."""
    import torch

    pad_id = pad_id_of(tokenizer)
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends) or None,
    )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def own_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the rows in each batch of this process, sorted by length so that little is padding."""
    from accelerate import PartialState

    state = PartialState()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from batches[state.process_index :: state.num_processes]


# ---- The command ----


def run(args: argparse.Namespace) -> int:
    """`peft evaluate`: measure an adapter again; returns 1 if `--check` finds another figure than its run did."""
    from accelerate import PartialState

    from .models import load_adapter, load_model, load_tokenizer, quiet_transformers, resolve_dtype

    metrics = read_metrics(Path(args.adapter))
    run_args = argparse.Namespace(**metrics["arguments"])
    run_args.data, run_args.model = args.data or run_args.data, args.model or run_args.model
    source = read_source(run_args)
    source.check_digest(metrics["data_digest"], f"{run_args.data} is not what {args.adapter} was measured with")
    quiet_transformers()
    tokenizer = load_tokenizer(run_args.model)
    source.tokenize(tokenizer, run_args.max_length, run_args.loss_on)
    quantize = metrics["arguments"].get("quantize")  # runs of earlier versions do not have it
    base = load_model(run_args.model, resolve_dtype(run_args.dtype), quantize=quantize)
    source.check_fit(base)
    model = load_adapter(base, args.adapter, is_trainable=True)  # bitsandbytes has other, coarser kernels for inference
    model.to(PartialState().device)
    notice(f"measuring on {len(source.held_out_examples)} held-out examples")
    now = measure(model, tokenizer, source, run_args.batch_size)
    then = Measure(metrics["metric"], metrics["after"])
    print(format_table([[f"held-out {now.metric}", now], ["in metrics.json", then]]))
    if args.check and str(now) != str(then):
        notice(f"--check: {now} is not the {then} of metrics.json")
        return 1
    return 0


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run; raises CliError if there is none, or another program wrote it."""
    if not (folder / METRICS_FILE).is_file():
        raise CliError(f"{folder} has no {METRICS_FILE}: it is not the --output of a finished peft train")
    return read_record(folder / METRICS_FILE, "metric", "after")


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """What was noted of a run, with its arguments, the digest of its data, and `keys`.

    Raises:
        CliError: the file holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CliError(f"{path} is not valid JSON: {error}") from error
    missing = {"arguments", "data_digest", *keys} - set(record if isinstance(record, dict) else ())
    if not missing:
        missing = MEASURED_WITH - set(record["arguments"] if isinstance(record["arguments"], dict) else ())
    if missing:
        raise CliError(f"{path} lacks {sorted(missing)}: peft train did not write it, or another version did")
    return record
