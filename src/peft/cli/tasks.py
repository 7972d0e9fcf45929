"""Tasks of reasoning-gym as data: problems with answers that can be checked, generated from a seed.

Training and held-out problems come from ranges of seeds that do not overlap, and a problem that is held out is dropped
from the training problems if it turns up there as well (small tasks have few different problems).
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from .common import CliError, first_line, need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Reply with the answer only."
EVAL_SEED_OFFSET = 10**9
"""Problem i of a task is generated from the number seed + i: so far apart, the two ranges never meet."""

TRIES = 20
"""Problems generated per problem that is wanted, before we conclude that a task has not enough different ones."""

THINKING = re.compile(r"^\s*<think>.*?</think>", re.S)


class Task:
    """A task of reasoning-gym with its settings.

    Raises:
        CliError: reasoning-gym is missing, or does not have the task, or refuses the settings.
    """

    def __init__(self, name: str, settings: dict[str, Any] | None, seed: int) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise need("reasoning-gym", f"--data task:{name}") from error

        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise CliError(f"reasoning-gym has no task {name!r}; it has {len(DATASETS)}, among them {', '.join(close)}")
        reserved = sorted({"seed", "size"} & set(settings or {}))
        if reserved:
            raise CliError(f"--task-args cannot hold {reserved}: --seed, --train-size and --eval-size say these")
        self.name = name
        self._source = {}
        for purpose, offset in (("train", 0), ("eval", EVAL_SEED_OFFSET)):
            try:
                self._source[purpose] = reasoning_gym.create_dataset(
                    name, seed=seed + offset, size=EVAL_SEED_OFFSET, **(settings or {})
                )
            except (TypeError, ValueError, AssertionError) as error:  # what its settings are checked with
                raise CliError(f"task {name} refuses --task-args {settings}: {first_line(error)}") from error

    def problems(self, train_size: int, eval_size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Problems as `(train, held out)`, each a dict with `question`, `answer` and what the task scores by.

        The held-out ones are all different. Training problems may repeat, where the task has few.

        Raises:
            CliError: the task has too few different problems, or no single right answer to train on.
        """
        held_out: dict[str, dict[str, Any]] = {}
        for problem in self._generate("eval", eval_size):
            held_out.setdefault(problem["question"], problem)
            if len(held_out) == eval_size:
                break
        train = []
        for problem in self._generate("train", train_size):
            if problem["question"] not in held_out:
                train.append(problem)
            if len(train) == train_size:
                break
        if len(held_out) < eval_size or len(train) < train_size:
            raise CliError(
                f"task {self.name} with these --task-args has too few different problems: {TRIES} tries for each gave "
                f"{len(held_out)} of {eval_size} to hold out and {len(train)} of {train_size} others to train on"
            )
        return train, list(held_out.values())

    def _generate(self, purpose: str, count: int):
        for i in range(count * TRIES):
            problem = self._source[purpose][i]
            if not isinstance(problem["answer"], str):
                raise CliError(f"task {self.name} comes without an answer to train on")
            yield problem

    def is_correct(self, reply: str, problem: dict[str, Any]) -> bool:
        """Whether the task's own scoring gives a reply all points."""
        return self._source["eval"].score_answer(THINKING.sub("", reply).strip(), problem) >= 1


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
