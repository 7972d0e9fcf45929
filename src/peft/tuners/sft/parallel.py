"""What the selection of sparse fine-tuning needs to know about other processes.

Under data parallelism every process must choose the same candidates: those that one process would choose on the joined
batch. So the dense gradient of a weight, which exists only while its layer's backward runs and only a block at a time,
is summed over the processes there and then. Processes may use different layers in a backward pass (experts, dropped
layers), so they agree on every sum beforehand, by messages of three numbers: see `Ranks`.

Left out: parameters that no process holds whole (FSDP, DeepSpeed ZeRO); positions cannot be exchanged in them, and they
are refused.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...utils.placement import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .gradients import Candidates
    from .layer import SparseDelta
    from .structured import GroupCandidates

THREADS = (
    "This process drives {} devices through nn.DataParallel, whose replicas cannot gather gradients; start one process "
    "per device with `accelerate launch` or `torchrun`, or show it one device"
)

END = (-1, 0, 0)
"""Message of a process that has come to the end of its backward pass."""


class Ranks:
    """The processes of a data-parallel run, while gradients are gathered in it.

    In the backward passes in which candidates are chosen, every process announces each block of a gradient that it
    wants to be summed, (number of the delta, first position, last position + 1), and then waits for the others. If
    they announce different blocks, the one of the last delta is summed first, since a backward pass goes from the last
    layer to the first; a process that announced something else does not use that layer, so it adds zeros. At the end of
    its backward pass a process adds zeros until all have come to the end. A layer that is used several times announces
    itself at the last of its uses, so all processes that use it must do so equally often.

    Every process must make the same number of backward passes per update step, and use at least one adapted layer in
    each of them; otherwise the process group's timeout ends the run.

    The messages and the sums have process groups of their own: DDP's reductions run at the same time, in an order of
    their own.

    Args:
        group: The processes that share a batch.
        deltas: The sparse deltas, in the same order in every process, best in that of the forward pass.
    """

    def __init__(self, group: ProcessGroup, deltas: list[SparseDelta]) -> None:
        self.size = torch.distributed.get_world_size(group)
        self.deltas = deltas
        self._numbers = {delta: number for number, delta in enumerate(deltas)}
        self._messages = self._sums = _own_group(group, "gloo")
        if deltas[0].indices.device.type != "cpu":
            self._sums = _own_group(group, torch.distributed.get_backend(group))
        self._tasks: set[int] = set()  # backward passes under way that will announce their end
        self._latest_task = -1
        self._added_zeros: dict[SparseDelta, int] = {}  # the backward pass in which this process did not use the delta
        # Of deltas that others use, until they are complete.
        self._choices: dict[SparseDelta, Candidates | GroupCandidates] = {}

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model does not take part in the run

    # ---- In a backward pass ----

    def enter(self, delta: SparseDelta) -> None:
        """Take part in the choices of the current backward pass, which has come to `delta`.

        Raises:
            RuntimeError: Other processes came to `delta` before this one, which has already added zeros to its sum.
        """
        task = torch._C._current_graph_task_id()
        if self._added_zeros.get(delta) == task:
            raise RuntimeError(
                f"Rank {torch.distributed.get_rank()} runs the adapted layers in another order than the other ranks "
                f"(delta {self._numbers[delta]} of {len(self.deltas)} came late), so their gradients cannot be summed. "
                f"Layers that only some ranks use must be registered in the order in which they run, and no layer may "
                f"be used more often by some ranks than by others"
            )
        if task == self._latest_task:
            return
        self._latest_task = task
        if task not in self._tasks and any(delta.candidates is None for delta in self.deltas):
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(task))

    def sum(self, delta: SparseDelta, gradient: Tensor, start: int) -> Tensor:
        """A new tensor: the sum over all processes of the gradient (n,) of `delta`'s weight from position `start` on.

        Raises:
            RuntimeError: Another process sums other positions of the same weight.
        """
        mine = (self._numbers[delta], start, start + gradient.numel())
        while (turn := self._agree(mine)) != mine:
            self._add_zeros(*turn)
        return self._all_reduce(gradient.clone())

    def _finish(self, task: int) -> None:
        self._tasks.discard(task)
        while (turn := self._agree(END)) != END:
            self._add_zeros(*turn)

    def _agree(self, mine: tuple[int, int, int]) -> tuple[int, int, int]:
        """The message among those of all processes whose turn it is."""
        messages = torch.empty(self.size, 3, dtype=torch.int64)
        torch.distributed.all_gather(list(messages), torch.tensor(mine), group=self._messages)
        announced = {tuple(message) for message in messages.tolist()}
        number, start, stop = turn = max(announced)
        if sum(other[0] == number for other in announced) > 1:
            raise RuntimeError(
                f"The ranks see the gradient of delta {number} in different blocks: {sorted(announced)}. Run all of "
                f"them with the same dtypes and versions"
            )
        return turn

    def _add_zeros(self, number: int, start: int, stop: int) -> None:
        """Take part in a sum to which this process has nothing to add, and in the choice that follows from it."""
        delta = self.deltas[number]
        choice = self._choices.setdefault(delta, delta.new_candidates())
        choice.see_sum(self._all_reduce(torch.zeros(stop - start, device=delta.indices.device)), start)
        if stop == delta.dense_numel:
            self._choices.pop(delta).choose()
            self._added_zeros[delta] = torch._C._current_graph_task_id()

    def _all_reduce(self, block: Tensor) -> Tensor:
        torch.distributed.all_reduce(block, group=self._sums)
        return block

    # ---- After an update step ----

    def mean(self, grads: dict[str, Tensor | None], deltas: dict[str, SparseDelta]) -> dict[str, Tensor]:
        """The candidates' gradients averaged as DDP does, without those of deltas that no process has used."""
        # Processes may differ in what they have used, but must agree on what they exchange.
        used = torch.tensor([grad is not None for grad in grads.values()], dtype=torch.int32)
        torch.distributed.all_reduce(used, group=self._messages)
        parts = {}
        for (name, grad), users in zip(grads.items(), used.tolist()):
            if users:
                candidates, values = deltas[name].candidates, deltas[name].values
                shape = (candidates.numel(), *values.shape[1:])
                parts[name] = torch.zeros(shape, device=candidates.device) if grad is None else grad
        if not parts:
            return {}
        device = self.deltas[0].indices.device
        joined = torch.cat([part.flatten().to(device) for part in parts.values()])
        means = self.mean_of(joined).split([part.numel() for part in parts.values()])
        return {name: mean.view(part.shape).to(part.device) for (name, part), mean in zip(parts.items(), means)}

    def mean_of(self, numbers: Tensor) -> Tensor:
        """The mean of a tensor that every process has, on the device of the deltas."""
        return self._all_reduce(numbers.to(self.deltas[0].indices.device, copy=True)).div_(self.size)


_own_groups: weakref.WeakKeyDictionary[ProcessGroup, dict[str, ProcessGroup]] = weakref.WeakKeyDictionary()


def _own_group(group: ProcessGroup, backend: str) -> ProcessGroup:
    """Another group of the members of `group`. Made once: torch gives one that follows a destroyed one its name, under
    which the processes would find each other's old addresses."""
    made = _own_groups.setdefault(group, {})
    if backend not in made:
        members = torch.distributed.get_process_group_ranks(group)
        made[backend] = torch.distributed.new_group(members, backend=backend, use_local_synchronization=True)
    return made[backend]


# ---- Which processes ----


def find_group(model: nn.Module, group: ProcessGroup | None | str) -> ProcessGroup | None:
    """The processes that share a batch, None if this one is alone.

    Args:
        model: The model, wrapped for data parallelism or not.
        group: "auto": take it from the wrapper; otherwise it is the answer.

    Raises:
        ValueError: "auto", there are several processes, but the model does not tell whether they share a batch; or a
            group that does not exist or that this process does not belong to.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        if group in ("auto", None):
            return None
        raise ValueError(f"SftSelector: process_group is {group!r}, but torch.distributed is not initialized")
    if group == "auto":
        parallel = (wrapper for wrapper in wrappers(model) if isinstance(wrapper, nn.parallel.DistributedDataParallel))
        group = next((wrapper.process_group for wrapper in parallel), None)
        if group is None and distributed.get_world_size() > 1:
            raise ValueError(
                f"There are {distributed.get_world_size()} processes, but {type(model).__name__} does not tell whether "
                "they share their batches: hand the model to SftSelector as DistributedDataParallel (or accelerate) "
                "has wrapped it, or say process_group=torch.distributed.group.WORLD, or process_group=None if every "
                "process trains a model of its own"
            )
    if group is None:
        return None
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError(
            f"SftSelector: rank {distributed.get_rank()} is not a member of the process_group it was given"
        )
    return group if size > 1 else None


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, from the outside in: torch.compile, data parallelism, ..."""
    found = []
    while isinstance(model, nn.Module):
        found.append(model)
        # In this order: a compiled wrapper shows the attributes of what it has compiled.
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return found


def check_whole(model: nn.Module, deltas: dict[str, SparseDelta]) -> None:
    """Refuse models whose deltas this process does not hold whole.

    Raises:
        ValueError: DeepSpeed, FSDP, a DTensor; nn.DataParallel, whose replicas are forgotten after every forward pass.
    """
    for wrapper in wrappers(model):
        if type(wrapper).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(refusal("DeepSpeed"))
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise ValueError(THREADS.format(len(wrapper.device_ids)))
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has wrapped anything by a module that is not loaded
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(refusal("FSDP"))
    for name, delta in deltas.items():
        if is_dtensor(delta.values) or is_dtensor(delta.indices):
            raise ValueError(f"{name}: {refusal('FSDP2 (fully_shard)')}")


def refusal(strategy: str) -> str:
    """Why a strategy that partitions is refused."""
    return (
        f"{strategy} partitions the trained values or their optimizer's state over the processes, but a reselection "
        f"moves a value to another position, with its moments, among all values of its weight, which no process holds. "
        f"Train with plain data parallelism (DDP): the trained values and their state are small. Where the frozen "
        f"base model does not fit into one device, load it in 4 bit"
    )
