"""A training process that is killed (a real one, with SIGKILL) goes on from its last checkpoint as if nothing had been.

Every run is a process of its own. Runs that start from the same seed must end with the same weights bit for bit,
whether they were killed or not. The processes are forked from a server that has imported everything and computed
nothing.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft import PeftModel, SftAdamW, SftConfig, SftSelector, SftSM3, SftTrainer, get_peft_model

STEPS = 12
MOMENTS = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "save")
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["peft.peft_model", "peft.tuners.sft.trainer", "transformers.trainer", "transformers.models.llama.modeling_llama"]
)
algorithms = pytest.mark.parametrize("algorithm", ["rigl", "sm3"])


@dataclasses.dataclass
class Run:
    """One training, to be done by one process."""

    folder: Path
    algorithm: str
    seed: int
    resume: bool | str = False
    kill_at: tuple[str, int] | None = None
    """Moment of the n-th update step, counted from 1, or "write" and the number of a file operation in checkpoint-4."""

    def model(self) -> PeftModel:
        torch.manual_seed(self.seed)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        base = LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.2, initializer_range=0.3)
        )
        torch.manual_seed(random.randrange(2**32) if self.resume else self.seed)  # the start must not matter any more
        return get_peft_model(base, self.config())

    def config(self) -> SftConfig:
        return SftConfig(
            task_type="CAUSAL_LM",
            density=0.2,
            selection_algorithm=self.algorithm,
            reselection_steps=5,
            selection_accumulation_steps=3,
            modules_to_save=["lm_head"],
        )

    def data(self) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return [{"input_ids": row, "labels": row} for row in torch.randint(32, (40, 6), generator=generator)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_files(run: Run) -> list[str]:
    """List the file operations in the checkpoint of step 4 as they happen, and die before the chosen one.

    What torch.save and safetensors do in C++ and Rust is not among them.
    """
    seen: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.chmod") and "checkpoint-4" in str(args[0]):
            seen.append(event)
            if run.kill_at == ("write", len(seen)):
                die()

    sys.addaudithook(hook)
    return seen


class Killer(TrainerCallback):
    """Kills its own process at the chosen moment."""

    def __init__(self, run: Run) -> None:
        for moment in MOMENTS:
            setattr(self, f"on_{moment}", lambda args, state, control, moment=moment, **kw: self.strike(moment, state))
        self.run = run

    def strike(self, moment: str, state) -> None:
        step = state.global_step + (moment not in ("step_end", "save"))  # the step that is being taken
        if self.run.kill_at == (moment, step):
            die()


def train_with_trainer(run: Run) -> None:
    torch.set_num_threads(1)
    args = TrainingArguments(
        str(run.folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        weight_decay=0.1,
        save_steps=2,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=run.seed,
    )
    model = run.model()
    trainer = SftTrainer(Trainer)(model=model, args=args, train_dataset=run.data(), callbacks=[Killer(run)])
    operations = watch_files(run)
    trainer.train(resume_from_checkpoint=run.resume)
    finish(run, model, trainer.optimizer, trainer.sft_selector, operations=len(operations))


def train_in_a_loop(run: Run) -> None:
    """A loop of one's own, with a checkpoint of one's own after every second update step."""
    torch.set_num_threads(1)
    model, data, start = run.model(), run.data(), 0
    if run.resume:
        base = model.unload()
        saved = max(run.folder.glob("step-*"))
        model = PeftModel.from_pretrained(base, saved, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if run.algorithm == "rigl":
        optimizer = SftAdamW(parameters, lr=0.02, weight_decay=0.1)
    else:
        deltas = {delta.values: delta for _, _, delta in model.active_deltas()}
        optimizer = SftSM3(parameters, deltas, lr=0.02, momentum=0.5)
    selector = SftSelector(model, optimizer, run.config(), STEPS, grad_accumulation_steps=2)
    if run.resume:
        start = int(saved.name[-2:])
        optimizer.load_state_dict(torch.load(saved / "optimizer.pt"))
        selector.load_state_dict(load_file(saved / "selector.safetensors"))
        torch.set_rng_state(torch.load(saved / "random.pt"))
    model.train()
    for step in range(start, STEPS):
        for micro in range(2):
            ids = torch.stack([row["input_ids"] for row in data[(6 * step + 3 * micro) % 36 :][:3]])
            (model(input_ids=ids, labels=ids).loss / 2).backward()
            if micro == 0 and run.kill_at == ("substep_end", step + 1):
                die()
        optimizer.step()
        optimizer.zero_grad()
        if run.kill_at == ("optimizer_step", step + 1):
            die()
        selector.step()
        if run.kill_at == ("step_end", step + 1):
            die()
        if step % 2:
            part = run.folder / "part"
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part)
            torch.save(optimizer.state_dict(), part / "optimizer.pt")
            save_file(selector.state_dict(), part / "selector.safetensors")
            torch.save(torch.get_rng_state(), part / "random.pt")
            part.rename(run.folder / f"step-{step + 1:02}")
    finish(run, model, optimizer, selector)


def finish(
    run: Run, model: PeftModel, optimizer: torch.optim.Optimizer, selector: SftSelector, operations: int = 0
) -> None:
    """Write down everything that training has changed, and two counts."""
    result = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    result |= {f"{name}.indices": delta.indices.clone() for _, name, delta in model.active_deltas()}
    for number, state in optimizer.state_dict()["state"].items():
        result |= {f"optimizer.{number}.{name}": tensor.clone() for name, tensor in state.items()}
    result["operations"] = torch.tensor(operations)
    result["moved"] = torch.tensor(sum(entry["moved"] for entry in selector.history))
    save_file(result, run.folder / "result.safetensors")


def execute(run: Run, train=train_with_trainer) -> dict[str, torch.Tensor] | int:
    """The result of a run in a process of its own, or how the process ended."""
    run.folder.mkdir(exist_ok=True)
    process = processes.Process(target=train, args=(run,))
    process.start()
    process.join()
    return load_file(run.folder / "result.safetensors") if process.exitcode == 0 else process.exitcode


def assert_same(expected: dict[str, torch.Tensor], result: dict[str, torch.Tensor] | int) -> None:
    assert isinstance(result, dict), f"the process ended with {result}"
    assert expected.keys() == result.keys()
    for name in expected.keys() - {"moved", "operations"}:  # counted by each process for itself
        assert expected[name].dtype == result[name].dtype and torch.equal(expected[name], result[name]), name


@algorithms
def test_a_killed_trainer_goes_on(algorithm, seed, tmp_path):
    unbroken = execute(Run(tmp_path / "unbroken", algorithm, seed))
    assert unbroken["moved"] > 0
    # Windows are steps 1..3, 6..8 and 11..12: one kill in the middle of one, and one at any step.
    steps = [random.choice([3, 7, 8]), random.randrange(3, STEPS + 1)]
    for number, step in enumerate(steps):
        moment = random.choice(MOMENTS[:5])
        broken = Run(tmp_path / str(number), algorithm, seed, kill_at=(moment, step))
        assert execute(broken) == -signal.SIGKILL, f"not killed in {broken.kill_at}"
        result = execute(dataclasses.replace(broken, kill_at=None, resume=True))
        print(f"killed at {broken.kill_at}")
        assert_same(unbroken, result)


@algorithms
def test_a_killed_loop_goes_on(algorithm, seed, tmp_path):
    unbroken = execute(Run(tmp_path / "unbroken", algorithm, seed), train_in_a_loop)
    assert unbroken["moved"] > 0
    for number, step in enumerate([random.choice([3, 7, 8]), random.randrange(3, STEPS + 1)]):
        moment = random.choice(["substep_end", "optimizer_step", "step_end"])
        broken = Run(tmp_path / str(number), algorithm, seed, kill_at=(moment, step))
        assert execute(broken, train_in_a_loop) == -signal.SIGKILL
        result = execute(dataclasses.replace(broken, kill_at=None, resume=True), train_in_a_loop)
        print(f"killed at {broken.kill_at}")
        assert_same(unbroken, result)


def test_a_checkpoint_that_is_not_whole_is_not_taken_for_one(seed, tmp_path):
    """Killed while it was writing a checkpoint: that one is refused, the one before it is as good as ever."""
    unbroken = execute(Run(tmp_path / "unbroken", "rigl", seed))
    operations = int(unbroken["operations"])
    names = {path.name for path in (tmp_path / "unbroken" / "checkpoint-4").iterdir()}
    assert operations > 15  # the first one makes the folder, the last one opens trainer_state.json
    for number in random.sample(range(2, operations + 1), 3):
        print(f"killed at file operation {number} of {operations}")
        broken = Run(tmp_path / f"write-{number}", "rigl", seed, kill_at=("write", number))
        assert execute(broken) == -signal.SIGKILL
        for path in (broken.folder / "checkpoint-4").iterdir():
            if path.suffix == ".safetensors" and path.name in names:
                load_file(path)  # has its name, so is whole
        again = dataclasses.replace(broken, kill_at=None, resume=True)
        assert execute(again) == 1, "went on from a checkpoint that is not whole"
        again = dataclasses.replace(again, resume=str(broken.folder / "checkpoint-2"))
        assert_same(unbroken, execute(again))
