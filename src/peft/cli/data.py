"""Rows of a JSONL file, and how they become tokens: what is trained on, what is cut, what is packed together.

A row is one of
    {"text": "..."}                                  trained on whole
    {"prompt": "...", "completion": "..."}           trained on the completion
    {"messages": [{"role": ..., "content": ...}]}    trained on the assistant's turns
Other keys are left alone. Tasks of reasoning-gym come here as rows of the last two kinds. Not here: streaming (files
are read whole), images, tool calls other than what a chat template makes of the messages' further keys.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .common import CliError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = (("text",), ("prompt", "completion"), ("messages",))
IGNORED = -100
"""The label of a token that is not trained on, as torch's cross entropy has it."""


# ---- Reading ----


def read_rows(path: str) -> list[dict[str, Any]]:
    """Read a JSONL file; blank lines are skipped. Every row gets its file and line number as `__where__`.

    Raises:
        CliError: there is no such file, it holds no rows, or a line (it is named) is not a row.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {line_number}"
                    rows.append(parse_row(line, where) | {"__where__": where})
    except OSError as error:
        raise CliError(f"cannot read the data file {path}: {error.strerror}") from error
    if not rows:
        raise CliError(f"the data file {path} is empty: it needs one JSON object per line")
    return rows


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """One line as a row; raises CliError, which names the line, if it is not one."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CliError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise CliError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
        raise CliError(f"{where}: JSON that cannot be read ({error})") from error
    if not isinstance(row, dict):
        raise CliError(f"{where}: must be a JSON object, got {type(row).__name__}")
    kinds = [kind for kind in KINDS if set(kind) & set(row)]
    if len(kinds) != 1 or not set(kinds[0]) <= set(row):
        raise CliError(
            f'{where}: must have "text", or "prompt" and "completion", or "messages"; got the keys {sorted(row)}'
        )
    if kinds[0] == ("messages",):
        check_messages(row["messages"], where)
    else:
        for key in kinds[0]:
            if not isinstance(row[key], str):
                raise CliError(f'{where}: "{key}" must be a string, got {type(row[key]).__name__}')
    try:
        json.dumps([row[key] for key in kinds[0]], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise CliError(f"{where}: {half} is half of a surrogate pair, and no character by itself") from error
    return row


def check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise CliError(f'{where}: "messages" must be a list of at least one message')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise CliError(f'{where}: message {number} must have the strings "role" and "content"')


def split_rows(
    rows: Sequence[dict[str, Any]], eval_size: int | None, train_size: int | None, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shuffle rows and set `eval_size` aside (None: a tenth, at most 200), as `(train, held out)`.

    At most `train_size` are trained on, and no copies of held-out rows.

    Raises:
        CliError: too few rows.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    eval_size = eval_size or max(1, min(200, len(rows) // 10))
    held_out = shuffled[:eval_size]
    seen = {content_of(row) for row in held_out}
    train = [row for row in shuffled[eval_size:] if content_of(row) not in seen]
    if not train:
        raise CliError(
            f"{len(rows)} rows ({len({content_of(row) for row in rows})} different ones) leave nothing to train on "
            f"after {eval_size} have been held out; lower --eval-size, or bring more"
        )
    if train_size is not None and train_size > len(train):
        raise CliError(f"--train-size {train_size} is more than the {len(train)} rows that are not held out")
    return train[:train_size], held_out


def content_of(row: dict[str, Any]) -> str:
    """What makes two rows the same."""
    return json.dumps({key: row[key] for kind in KINDS for key in kind if key in row}, sort_keys=True)


# ---- Tokens ----


@dataclass
class Example:
    """A tokenised row. `labels` are the tokens, with IGNORED in place of those that are not trained on."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first that is trained on."""
        return self.ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.ids))]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_length: int, loss_on: str = "completions"
) -> tuple[list[Example], int, int]:
    """Tokenise rows, as `(examples, number cut to max_length, number left out)`.

    An example is left out if nothing to train on is left in its first max_length tokens.
    """
    whole = [encode_row(tokenizer, row, loss_on) for row in rows]
    cut = [Example(example.ids[:max_length], example.labels[:max_length]) for example in whole]
    kept = [example for example in cut if example.trained]
    return kept, sum(len(example.ids) > max_length for example in whole), len(cut) - len(kept)


def encode_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], loss_on: str = "completions") -> Example:
    """Tokenise a row; trained on are "completions" (completions, the assistant's turns, whole texts) or "all"."""
    if "messages" in row:
        segments = chat_segments(tokenizer, row["messages"], row.get("__where__", "a row"))
        start = []  # the template writes it
    else:
        segments = [(row["text"], True)] if "text" in row else [(row["prompt"], False), (row["completion"], True)]
        start = opening(tokenizer)
    example = encode_segments(tokenizer, segments, start)
    eos = tokenizer.eos_token_id
    if eos is not None and segments[-1][1] and example.ids[-1:] != [eos]:
        example = Example([*example.ids, eos], [*example.labels, eos])
    labels = list(example.ids) if loss_on == "all" else example.labels
    # The first token follows nothing; where examples are packed it would be predicted from another one's last.
    return Example(example.ids, [IGNORED, *labels[1:]])


def encode_segments(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]], start: list[int]
) -> Example:
    """Tokenise a text that is given in pieces `(text, whether it is trained on)`.

    The tokens of a piece are those it has in the whole text, unless a token would cross a border between pieces. Then
    it is tokenised by itself, because at inference the prompt ends there too. What a template writes after the end of
    a turn (a line break) is not trained on.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    for segment, trained in segments:
        text += segment
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        crosses = whole[: len(ids)] != ids
        new = tokenizer(segment, add_special_tokens=False)["input_ids"] if crosses else whole[len(ids) :]
        end = len(new)
        if trained and tokenizer.eos_token_id in new:
            end -= new[::-1].index(tokenizer.eos_token_id)
        ids += new
        labels += [token if trained and i < end else IGNORED for i, token in enumerate(new)]
    if segments[-1][1]:  # nothing is left to read after the end of the last turn
        end = max((i + 1 for i, label in enumerate(labels) if label != IGNORED), default=len(ids))
        ids, labels = ids[:end], labels[:end]
    return Example(start + ids, [IGNORED] * len(start) + labels)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: its beginning-of-sequence token, or nothing."""
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] != plain[:1] else []


def chat_segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str
) -> list[tuple[str, bool]]:
    """A conversation as its chat template writes it, in pieces `(text, whether the assistant says it)`.

    Raises:
        CliError: there is no template, it refuses the messages, no turn is the assistant's, or it writes earlier turns
            in another way once later ones are there, so that they cannot be found.
    """
    text = render_chat(tokenizer, messages, where, open_turn=False)
    segments, position = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], where, open_turn=True)
        after = render_chat(tokenizer, messages[: i + 1], where, open_turn=False)
        if not (text.startswith(before) and text.startswith(after) and position <= len(before) <= len(after)):
            raise CliError(
                f"{where}: the chat template rewrites earlier turns, so those of the assistant cannot be told "
                f"from the others; give each as a row of its own with prompt and completion"
            )
        segments += [(text[position : len(before)], False), (text[len(before) : len(after)], True)]
        position = len(after)
    if not segments:
        raise CliError(f"{where}: no message has the role assistant, so there is nothing to train on")
    if text[position:].strip():
        segments.append((text[position:], False))
    return segments


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, open_turn: bool) -> str:
    """Messages as text, with the beginning of the assistant's next turn if `open_turn`."""
    if not tokenizer.chat_template:
        raise CliError(f"{where}: the model has no chat template; give rows with prompt and completion")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
    except Exception as error:  # a template is a program of the model's, and the messages are the user's
        raise CliError(f"{where}: the chat template refuses the messages: {first_line(error)}") from error


# ---- Packing ----


@dataclass
class Pack:
    """Examples one after another in one sequence, each with positions from 0: by these they are kept apart."""

    ids: list[int]
    labels: list[int]
    positions: list[int]


def pack(examples: Sequence[Example], max_length: int) -> list[Pack]:
    """Put examples into as few sequences of at most `max_length` tokens as first-fit decreasing finds."""
    packs: list[Pack] = []
    room: dict[int, list[int]] = {}  # free tokens -> the packs that have so many
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        free = min((free for free, at in room.items() if at and free >= size), default=None)
        if free is None:
            packs.append(Pack([], [], []))
            index, free = len(packs) - 1, max_length
        else:
            index = room[free].pop()
        packs[index].ids.extend(example.ids)
        packs[index].labels.extend(example.labels)
        packs[index].positions.extend(range(size))
        room.setdefault(free - size, []).append(index)
    return packs


def check_packing(model: PreTrainedModel) -> None:
    """Try on the model itself whether packed examples see each other.

    It gets one sequence alone, and behind another one. transformers' attention masks keep them apart by the positions;
    an architecture that makes masks of its own does not know.

    Raises:
        CliError: the results differ.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary < 8:
        raise CliError(f"--packing needs a model with at least 8 tokens, got {vocabulary}")
    first, second = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:8].view(2, 4).tolist()
    training = model.training
    model.eval()
    with torch.no_grad():
        packed, alone = (
            model(
                input_ids=torch.tensor([ids], device=model.device),
                position_ids=torch.tensor([[0, 1, 2, 3] * (len(ids) // 4)], device=model.device),
                use_cache=False,
            )
            .logits[0, -4:]
            .double()
            for ids in (first + second, second)
        )
    model.train(training)
    error = (packed - alone).abs().max() / alone.abs().max()
    if not error < 1e-2:  # bfloat16 rounds at 4e-3; a look at the other example changes the first figures
        raise CliError(f"--packing is not possible with {type(model).__name__}: packed examples would see each other")


# ---- Batches ----


class Collator:
    """Pads examples or packs on the right into one batch for 🤗 Trainer.

    Examples get an attention mask (batch, length). Packs get positions (batch, length) and no mask, which is how
    transformers' models are told that a sequence holds several.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, batch: Sequence[Example | Pack]) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(item.ids) for item in batch)
        fill = [length - len(item.ids) for item in batch]
        columns = {
            "input_ids": [item.ids + [self.pad_id] * n for item, n in zip(batch, fill)],
            "labels": [item.labels + [IGNORED] * n for item, n in zip(batch, fill)],
        }
        if isinstance(batch[0], Pack):  # the padding is one more example
            columns["position_ids"] = [item.positions + list(range(n)) for item, n in zip(batch, fill)]
        else:
            columns["attention_mask"] = [[1] * len(item.ids) + [0] * n for item, n in zip(batch, fill)]
        return {name: torch.tensor(column) for name, column in columns.items()}


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding. Which one does not matter: it is masked and not trained on."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
