"""Configuration of multitask prompt tuning."""

from __future__ import annotations

import enum

from ...config import check_least, documented_dataclass
from ...utils.peft_types import PeftType
from ..prompt_tuning.config import PromptTuningConfig, PromptTuningInit


class MultitaskPromptTuningInit(str, enum.Enum):
    """How the prompt begins: as in prompt tuning, or from one that was trained on several source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@documented_dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning: a shared prompt times a low-rank matrix of each task (arXiv 2303.02861)."""

    method = PeftType.MULTITASK_PROMPT_TUNING
    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    """"RANDOM" or "TEXT" (a source training), or, from a file of a source training: "AVERAGE_SOURCE_TASKS" (each
    task's matrices are the mean of the source tasks'), "EXACT_SOURCE_TASK" (those of one), "ONLY_SOURCE_SHARED" (the
    shared prompt alone)."""
    prompt_tuning_init_state_dict_path: str | None = None
    """That file: `adapter_model.safetensors`, or `.bin`, which is read with weights_only=True."""
    prompt_tuning_init_task: int | None = 0
    """The source task for "EXACT_SOURCE_TASK"."""
    num_ranks: int | None = 1
    """Rank of the tasks' matrices."""
    num_tasks: int | None = 1
    """Number of tasks."""

    def __post_init__(self):
        wanted = self.member(MultitaskPromptTuningInit, "prompt_tuning_init")
        self.prompt_tuning_init = wanted if wanted == "TEXT" else PromptTuningInit.RANDOM  # what the shared prompt does
        super().__post_init__()
        self.prompt_tuning_init = wanted
        check_least(self, num_ranks=1, num_tasks=1)
        if wanted not in ("TEXT", "RANDOM") and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(f"prompt_tuning_init={wanted.value!r} needs prompt_tuning_init_state_dict_path")
        if wanted == "EXACT_SOURCE_TASK" and (self.prompt_tuning_init_task is None or self.prompt_tuning_init_task < 0):
            raise ValueError(f"prompt_tuning_init_task must be at least 0, got {self.prompt_tuning_init_task}")
