"""The folder that `peft train` writes to: at every moment it holds a finished adapter, a run to resume, or nothing.

A run in progress lives in the subfolder `checkpoints`: Trainer's checkpoints, and run.json, which says what is being
trained. Its results are written to a temporary folder beside, moved into place when all of them are there, and then
`checkpoints` goes. A run that fails takes with it what it had begun to write.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import write_text
from .arguments import option
from .common import CliError, NotFinite, beside, first_line, give_usual_modes, notice, remove_empty
from .evaluate import METRICS_FILE, Measure, read_metrics, read_record

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .source import Source

CHECKPOINTS, RUN_FILE = "checkpoints", "run.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
NOT_OF_THE_RUN = ("command", "output", "resume", "overwrite", "save_steps")
"""Arguments that may differ when a run is resumed. All others decide what is trained."""


class Output:
    """The output folder of a run. Making this object looks at the folder, and changes nothing.

    Attributes:
        finished: --resume was given for a run that is complete.
        last_checkpoint: the checkpoint to go on from; None: start at the beginning.
        before: what the run had measured before training, if it has been begun.

    Raises:
        CliError: the folder holds something that is neither to be resumed nor to be overwritten, or there is nothing to
            resume.
    """

    def __init__(self, folder: Path, resume: bool, overwrite: bool) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.last_checkpoint: str | None = None
        self.before: Measure | None = None
        self._run: dict[str, Any] | None = None
        self._writes = False  # in a distributed run, one process does
        if folder.exists() and not folder.is_dir():
            raise CliError(f"--output {folder} is a file; it must be a folder, or not exist")
        begun = (self.checkpoints / RUN_FILE).is_file()
        adapter = any((folder / name).is_file() for name in ADAPTER_FILES)
        self.finished = resume and not begun and adapter and (folder / METRICS_FILE).is_file()
        if resume and not begun and not self.finished:
            raise CliError(f"--resume: {folder} holds no run of peft train to go on with")
        if not (resume or overwrite) and (begun or adapter):
            what = "an unfinished run (--resume goes on with it)" if begun else "an adapter"
            raise CliError(f"--output {folder} already holds {what}; --overwrite replaces it")
        if self.finished:
            self._run = read_metrics(folder)
        elif resume:
            self._read_run()

    def _read_run(self) -> None:
        path = self.checkpoints / RUN_FILE
        try:
            self._run = read_record(path, "before")
            if self._run["before"] is not None:
                self.before = Measure(**self._run["before"])
        except (CliError, TypeError) as error:
            raise CliError(f"--resume: {first_line(error)}; --overwrite starts again") from error
        complete, _ = self._find_checkpoints()
        self.last_checkpoint = str(complete[-1]) if complete else None

    def _find_checkpoints(self) -> tuple[list[Path], list[Path]]:
        """Checkpoints `(whole ones by step, others)`. trainer_state.json is written last; torch's files are zips."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        found.sort(key=lambda path: int(path.name.rpartition("-")[2]))
        whole = (path for path in found if all(map(zipfile.is_zipfile, path.glob("*.pt*"))))
        complete = [path for path in whole if is_json(path / "trainer_state.json")]
        return complete, [path for path in found if path not in complete]

    def identity(self, args: argparse.Namespace, digest: str) -> dict[str, Any]:
        """What makes a run this one and no other."""
        arguments = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
        return {"arguments": arguments, "data_digest": digest}

    def check_same_run(self, args: argparse.Namespace, source: Source) -> None:
        """Raise CliError if the run to resume, finished or not, is not the one that these arguments describe."""
        if self._run is None:
            return
        now, then = self.identity(args, source.digest), self._run
        old, new = then["arguments"], now["arguments"]
        others = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if others:
            begun, given = (", ".join(f"{option(name)} {values.get(name)}" for name in others) for values in (old, new))
            raise CliError(
                f"--resume: the run in {self.folder} was begun with {begun}, and not {given}; give the same "
                f"arguments, or --overwrite to start again"
            )
        source.check_digest(then["data_digest"], f"--resume: {args.data} has changed since {self.folder} was begun")

    # ---- Writing ----

    @contextlib.contextmanager
    def writing(self, args: argparse.Namespace, digest: str, training_args: TrainingArguments) -> Iterator[None]:
        """Begin the run, or go on with it; if the block fails, leave nothing that is half there."""
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self._writes = training_args.process_index == 0
        try:
            with training_args.main_process_first():  # the others wait for the folder
                if self._writes:
                    self._begin(args, digest)
            yield
        except BaseException as error:
            if self._writes:
                # The same command would diverge again. What an earlier one has left is not ours to remove.
                self._clean_up(made, keep=self.last_checkpoint is not None or not isinstance(error, NotFinite))
            raise

    def _begin(self, args: argparse.Namespace, digest: str) -> None:
        if self._run is None:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self._run = {**self.identity(args, digest), "before": None}
        for incomplete in self._find_checkpoints()[1]:
            notice(f"{incomplete} is not complete, or damaged: it is removed")
            shutil.rmtree(incomplete)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._write_run()

    def _write_run(self) -> None:
        write_text(self.checkpoints / RUN_FILE, json.dumps(self._run, indent=2, allow_nan=False))

    def keep_before(self, before: Measure) -> None:
        """Note what has been measured before training, for when the run is resumed."""
        self.before = before
        if self._writes:
            self._run["before"] = dataclasses.asdict(before)
            self._write_run()

    def _clean_up(self, made: list[Path], keep: bool) -> None:
        """Remove what cannot be resumed (unless `keep`, everything), and of the folders `made` the empty ones."""
        complete, incomplete = self._find_checkpoints()
        keep = keep and bool(complete)
        for folder in incomplete if keep else [self.checkpoints]:
            shutil.rmtree(folder, ignore_errors=True)
        if keep:
            notice(f"{complete[-1]} is kept; the same command with --resume goes on from there")
        remove_empty(made)

    @contextlib.contextmanager
    def results(self) -> Iterator[Path]:
        """A folder to write the results to; they are moved into place when the block is done, and the run is over."""
        with beside(self.folder / "results") as temporary:
            yield temporary
            give_usual_modes(temporary)
            written = sorted(path.name for path in temporary.iterdir())
            # An old configuration goes first and the new one comes last: without one, a folder holds no adapter.
            for name in ADAPTER_FILES:
                (self.folder / name).unlink(missing_ok=True)
            for name in sorted(written, key=lambda name: name == ADAPTER_FILES[0]):
                os.replace(temporary / name, self.folder / name)
        shutil.rmtree(self.checkpoints)


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
