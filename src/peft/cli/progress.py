"""The progress bar of a training run: loss, tokens per second, time left."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback

from .common import NotFinite


class Progress(TrainerCallback):
    """One bar on stderr, drawn by the first process. In a log file it is a line every ten seconds.

    A loss that is no finite number ends the training.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self.first_step = 0
        """The step from which this process trains: not 0 if the run is resumed."""
        self.seconds = 0.0
        self._began = 0.0
        self._tokens_before = self._tokens = 0
        self._shown: dict[str, str] = {}

    @property
    def tokens_per_second(self) -> float:
        return (self._tokens - self._tokens_before) / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            file=sys.stderr,
            disable=not state.is_world_process_zero,
            mininterval=0.1 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        )
        self.first_step = state.global_step
        self._tokens_before = self._tokens = state.num_input_tokens_seen
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.perf_counter() - self._began
        self._tokens = state.num_input_tokens_seen
        self._shown["tokens/s"] = f"{self.tokens_per_second:,.0f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise NotFinite(
                    f"training diverged: the loss is {logs['loss']} at step {state.global_step}; lower --lr"
                )
            self._shown["loss"] = f"{float(logs['loss']):.3f}"

    def close(self) -> None:
        """Finish the bar's line, also after an error."""
        if self._bar is not None:
            self._bar.close()
