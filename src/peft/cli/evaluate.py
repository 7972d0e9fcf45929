"""`peft evaluate`, and the two measures that `peft train` takes before and after: accuracy and held-out loss.

Examples are sorted by length, shared out over the processes of a distributed run, and the results gathered. So every
process holds the whole model: data parallelism, not a model split over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .tasks import Task

GENERATION_BATCH = 8
"""Generation runs so many times more rows at a time than training: it keeps no activations."""


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    batch_size: int,
) -> tuple[float, list[str]]:
    """Share of problems that the model solves, decoding greedily, and its replies.

    Args:
        problems: those of the task.
        examples: the same, tokenised; the prompt of each is what the model sees.
        batch_size: rows per batch of training.
    """
    # A right reply is as long as the answer; what comes much later than the longest one cannot be right.
    new_tokens = max(example.trained for example in examples) + 8
    replies = [""] * len(examples)
    for rows in in_batches(examples, batch_size * GENERATION_BATCH, lambda example: len(example.prompt)):
        prompts = [examples[row].prompt for row in rows]
        for row, reply in zip(rows, generate(model, tokenizer, prompts, new_tokens)):
            replies[row] = reply
    for gathered in gather(list(enumerate(replies))):
        replies[gathered[0]] = gathered[1] or replies[gathered[0]]
    correct = [task.is_correct(reply, problem) for reply, problem in zip(replies, problems)]
    return sum(correct) / len(correct), replies
