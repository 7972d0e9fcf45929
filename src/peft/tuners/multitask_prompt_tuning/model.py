"""The prompt of multitask prompt tuning: `P_k = P * (u_k v_k^T)`, element by element (arXiv 2303.02861, 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from ..prompt_tuning.model import PromptEmbedding


class MultitaskPromptEmbedding(PromptEmbedding):
    """A shared prompt P, and factors u, v of each task.

    Letters: K tasks, R their rank.
    """

    in_decoder = True
    kept = ("prefix_task_cols", "prefix_task_rows")

    def __init__(self, config, word_embeddings):
        super().__init__(config, word_embeddings)
        tasks, rank = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.total_virtual_tokens, rank).normal_(std=0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, self.width(config)).normal_(std=0.02))
        inits = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
        if config.prompt_tuning_init in inits and not (config.inference_mode or self.embedding.weight.is_meta):
            self._start_from_source(config)

    @torch.no_grad()
    def _start_from_source(self, config) -> None:
        from ...utils.save_and_load import read_tensors

        path = config.prompt_tuning_init_state_dict_path
        source = read_tensors(path)
        wanted = {"prompt_embeddings": self.embedding.weight}
        if config.prompt_tuning_init != "ONLY_SOURCE_SHARED":
            wanted |= {name: getattr(self, name) for name in self.kept}
        for name, parameter in wanted.items():
            if name not in source:
                raise ValueError(f"{path!r} has no tensor {name!r}: it is not of multitask prompt tuning")
            given = source[name]
            if name != "prompt_embeddings":
                if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                    given = given.mean(0, keepdim=True)
                elif config.prompt_tuning_init_task >= len(given):
                    raise ValueError(f"{path!r} has {len(given)} tasks, got {config.prompt_tuning_init_task=}")
                else:
                    given = given[config.prompt_tuning_init_task].unsqueeze(0)
                given = given.expand(config.num_tasks, *given.shape[1:])
            if given.shape != parameter.shape:
                raise ValueError(
                    f"{name} of {path!r} has the shape {tuple(given.shape)}, the configuration wants "
                    f"{tuple(parameter.shape)} (num_virtual_tokens, num_ranks, the model's width)"
                )
            parameter.copy_(given)

    def get_prompt(self, batch, task_ids=None):
        """(B, S T, D), of the task of each row.

        Raises:
            ValueError: no `task_ids`, not one per row, or a task that there is not.
        """
        tasks = len(self.prefix_task_cols)
        if task_ids is None:
            raise ValueError(
                f"Multitask prompt tuning needs task_ids, the task of each row (0 to {tasks - 1}). (A Trainer hands "
                "them on with remove_unused_columns=False and a data collator that keeps them)"
            )
        task_ids = torch.as_tensor(task_ids, device=self.prefix_task_cols.device)
        if task_ids.shape != (batch,) or not ((task_ids >= 0) & (task_ids < tasks)).all():
            raise ValueError(f"task_ids must be {batch} numbers from 0 to {tasks - 1}, got {task_ids.tolist()}")
        return super().get_prompt(batch) * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])
