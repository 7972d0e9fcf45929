"""Tasks of reasoning-gym as data: problems with answers that can be checked, generated from a seed.

Training and held-out problems come from ranges of seeds that do not overlap, and a problem that is held out is dropped
from the training problems if it turns up there as well (small tasks have few different problems).
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .common import CliError, first_line, need

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Reply with the answer only."
EVAL_SEED_OFFSET = 10**9
"""Problem i of a task is generated from the number seed + i: so far apart, the two ranges never meet."""

TRIES = 20
"""Problems generated per problem that is wanted, before we conclude that a task has not enough different ones."""

THINKING = re.compile(r"^\s*<think>.*?</think>", re.S)


class Task:
    """Problems of a task of reasoning-gym.

    Attributes:
        train, held_out: the problems, each a dict with `question`, `answer` and what the task scores by. Those that are
            held out are all different; training problems may repeat, where the task has few.

    Raises:
        CliError: reasoning-gym is missing, does not have the task or refuses its settings; or the task has too few
            different problems, or no single right answer to train on.
    """

    def __init__(self, name: str, settings: dict[str, Any], train_size: int, eval_size: int, seed: int) -> None:
        self.name, self.settings = name, settings
        self._scorer = self._source(eval_size, seed + EVAL_SEED_OFFSET)
        held_out = {}
        for problem in self._generate(self._scorer, eval_size):
            held_out.setdefault(problem["question"], problem)
            if len(held_out) == eval_size:
                break
        self.held_out = list(held_out.values())
        others = self._generate(self._source(train_size, seed), train_size)
        unseen = (problem for problem in others if problem["question"] not in held_out)
        self.train = list(itertools.islice(unseen, train_size))
        if len(self.held_out) < eval_size or len(self.train) < train_size:
            raise CliError(
                f"task {name} with --task-args {json.dumps(settings)} has too few different problems: {TRIES} tries "
                f"for each found {len(self.held_out)} of {eval_size} to hold out and {len(self.train)} of {train_size} "
                f"to train on"
            )

    def _source(self, count: int, seed: int) -> ProceduralDataset:
        """The generator of problems, with room for TRIES times `count`."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise need("reasoning-gym", f"--data task:{self.name}") from error

        if self.name not in DATASETS:
            close = difflib.get_close_matches(self.name, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise CliError(
                f"reasoning-gym has no task {self.name!r}; it has {len(DATASETS)}, among them {', '.join(close)}"
            )
        reserved = sorted({"seed", "size"} & set(self.settings))
        if reserved:
            raise CliError(f"--task-args cannot hold {reserved}: --seed, --train-size and --eval-size say these")
        with self._refusing():
            return reasoning_gym.create_dataset(self.name, seed=seed, size=count * TRIES, **self.settings)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What a task says of wrong settings, at once or when it first uses them, becomes a CliError."""
        try:
            yield
        except (TypeError, ValueError, AssertionError) as error:
            settings = json.dumps(self.settings)
            raise CliError(f"task {self.name} refuses --task-args {settings}: {first_line(error)}") from error

    def _generate(self, source: ProceduralDataset, count: int) -> Iterator[dict[str, Any]]:
        for i in range(count * TRIES):
            with self._refusing():
                problem = source[i]
            if not isinstance(problem["answer"], str):
                raise CliError(f"task {self.name} comes without an answer to train on")
            yield problem

    def is_correct(self, reply: str, problem: dict[str, Any]) -> bool:
        """Whether the task's own scoring gives a reply all points."""
        return self._scorer.score_answer(THINKING.sub("", reply).strip(), problem) >= 1


def task_row(tokenizer: PreTrainedTokenizerBase, problem: dict[str, Any]) -> dict[str, Any]:
    """A problem as a row of data: a conversation if the model has a chat template, else a prompt and a completion."""
    question = problem["question"].strip()
    if not tokenizer.chat_template:
        return {"prompt": f"{question}\nAnswer:", "completion": f" {problem['answer']}"}
    answer = {"role": "assistant", "content": problem["answer"]}
    if accepts_system_role(tokenizer):
        system, user = {"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}
        return {"messages": [system, user, answer]}
    return {"messages": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}, answer]}


def accepts_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "?"}]
    try:
        return INSTRUCTION in tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return False
