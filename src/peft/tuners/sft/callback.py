"""What drives the selector of an `SftTrainer`; a module of its own, since it needs transformers to be imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import SftTrainerMixin


class SftCallback(TrainerCallback):
    def __init__(self, trainer: SftTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_sft_selection()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.sft_selector.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.stop_sft_selection()
