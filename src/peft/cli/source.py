"""Where examples come from: `--data`, read, split and tokenised. The same arguments give the same examples."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .arguments import TASK_PREFIX
from .common import CliError, notice
from .data import Example, content_of, encode_rows, read_rows, split_rows
from .tasks import Task, task_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_TRAIN_SIZE, TASK_EVAL_SIZE = 2000, 200


HASH_SEED_HINT = "a few tasks draw other problems in every process unless PYTHONHASHSEED=0 is set from the start"
"""What to say when data have changed that come from a task."""


@dataclass
class Source:
    """Rows of a file, or problems of a task, to train on and to measure with."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    task: Task | None = None
    train_examples: list[Example] = field(default_factory=list)
    held_out_examples: list[Example] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """A fingerprint of the content, by which a changed file is noticed."""
        # What else a problem has may hold sets, which are written in another order by every process.
        key = (lambda problem: [problem["question"], problem["answer"]]) if self.task else content_of
        text = json.dumps([[key(row) for row in rows] for rows in (self.train, self.held_out)])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_digest(self, expected: str, what: str) -> None:
        """Raise CliError, which says what has changed, if the content is not the expected one."""
        if self.digest != expected:
            raise CliError(f"{what} ({HASH_SEED_HINT})" if self.task else what)

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str) -> None:
        """Fill in the examples, and say what has been cut.

        Raises:
            CliError: nothing is left to train on or to measure with, or a problem does not fit into `max_length`.
        """
        self.train_examples = self._encode("training", self.train, tokenizer, max_length, loss_on)
        # What is measured is the same whatever is trained on; with other arguments figures could not be compared.
        self.held_out_examples = self._encode("held-out", self.held_out, tokenizer, max_length, "completions")

    def check_fit(self, model: PreTrainedModel) -> None:
        """Raise CliError if the model has no embedding for one of the tokens, or for its position."""
        examples = [*self.train_examples, *self.held_out_examples]
        largest, longest = max(max(example.ids) for example in examples), max(len(example.ids) for example in examples)
        rows = model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise CliError(
                f"the tokenizer has a token {largest}, but the model only {rows} embeddings: they do not fit"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise CliError(
                f"an example has {longest} tokens, but the model {positions} positions: give --max-length {positions}"
            )

    def _encode(
        self, what: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str
    ) -> list[Example]:
        if self.task:
            rows = [task_row(tokenizer, problem) for problem in rows]
        examples, cut, dropped = encode_rows(tokenizer, rows, max_length, loss_on)
        if self.task and cut:
            raise CliError(f"{cut} of {len(rows)} {what} problems are longer than --max-length {max_length}; raise it")
        if cut:
            notice(f"{cut} of {len(rows)} {what} examples are cut to --max-length {max_length} tokens")
        if dropped:
            notice(f"{dropped} of {len(rows)} {what} examples are left out: no token to train on within --max-length")
        if not examples:
            raise CliError(f"no {what} example has a token to train on within --max-length {max_length}")
        return examples


def read_source(args: argparse.Namespace) -> Source:
    """Read what `--data` names; `args` are those of `peft train`.

    Raises:
        CliError: the data cannot be used; see `data.read_rows` and `tasks.Task`.
    """
    if not args.data.startswith(TASK_PREFIX):
        return Source(*split_rows(read_rows(args.data), args.eval_size, args.train_size, args.seed))
    name = args.data.removeprefix(TASK_PREFIX)
    sizes = (args.train_size or TASK_TRAIN_SIZE, args.eval_size or TASK_EVAL_SIZE)
    task = Task(name, args.task_args or {}, *sizes, args.seed)
    return Source(task.train, task.held_out, task)
