"""`search_structure`: from a model, an adapter's configuration and a few examples to a structure."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig
from ..tuners_utils import BaseTunerLayer
from .config import DenasConfig
from .gradients import score_table
from .report import SearchResult
from .search import Scorer, Search
from .space import SearchSpace
from .structure import LAYER_NAME
from .supernet import Supernet, supernet

EXAMPLE_TEXT = (
    "The river rises in the hills behind the old town and reaches the sea after ninety miles. In spring, when the "
    "snow melts, it carries stones as large as a fist; in August children cross it without getting their knees wet. "
    "People have argued about the bridge for years. Who should pay for it, and would anybody use it? An engineer "
    "measured the traffic: 412 cars on a weekday, 1,305 on a Sunday. 'Build it of wood,' she wrote, 'and it will last "
    "for forty winters. Build it of steel, and your grandchildren will thank you.' The council read her letter twice, "
    "asked three questions, and postponed the vote until the harvest was over."
)


def search_structure(
    model: nn.Module,
    config: TargetedConfig,
    search: DenasConfig | None = None,
    tokenizer: Any = None,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    layer_name: str = LAYER_NAME,
    progress: bool = True,
) -> SearchResult:
    """Find, without training, which layers of a model should get an adapter, and of what size.

    The model is left as it was: weights, flags, gradients, mode, and the state of random number generators.

    Args:
        model: the base model, without adapters.
        config: a LoraConfig, SsfConfig or SftConfig. Its targets are those to choose from; its size (rank, density) is
            the budget where `search` names none.
        search: how to search; None: `DenasConfig()`.
        tokenizer: makes a batch from a text of ours where `batch` is not given; for models that generate text.
        batch: what the model is called with, one batch or several (their gradients are averaged; "deltatuner" takes
            one). Scores from gradients need the labels in it. Take examples of the data to be trained on.
        layer_name: key of the structure that says which layers are on.
        progress: show a bar.

    Raises:
        ValueError: a model with adapters, neither tokenizer nor batch, a batch without labels, a budget that no
            structure meets, or a method without structures.
        ImportError: an engine of Optuna's without Optuna.
    """
    search = search or DenasConfig()
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("A search needs the base model without adapters: take it back with unload() first")
    batches = make_batches(model, search, tokenizer, batch)
    space = SearchSpace(model, config, search, with_alpha=not search.is_additive)
    if space.method == PeftType.SSF and search.is_additive and search.max_params is None:
        raise ValueError(
            f"The score {search.score!r} of SSF grows with every layer, so without a limit all are taken "
            f"({space.full_params:,} parameters): give max_params (in millions)"
        )
    space.budget(search)  # limits that cannot be met are refused before anything is computed
    with contextlib.ExitStack() as stack:
        stack.enter_context(left_as_it_was(model, search.seed))
        table = net = None
        if search.is_additive:
            model.eval()
            table = score_table(model, space, batches)
        if not search.is_additive or search.needs_latency:
            if len(batches) > 1:
                raise ValueError(f"score='deltatuner' and latencies take one batch, got {len(batches)}")
            net = stack.enter_context(supernet(model, space, batches[0], search.seed))
            _check_latency(net, search)
        data = _checksum(space, batches) if search.storage is not None else 0
        running = Search(space, Scorer(space, search, table, net), search, progress, data)
        best = running.run()
    return SearchResult(space, best, running.history, running.front, layer_name)


def _checksum(space: SearchSpace, batches: Sequence[Mapping[str, Any]]) -> int:
    """Of the batches, and of the model by its first target's weight, in the precision that all devices have."""
    weight = next(iter(space.layout.ops.values())).load()[0].detach()
    tensors = [value for batch in batches for _, value in sorted(batch.items()) if torch.is_tensor(value)]
    checksum = 0
    for tensor in (weight, *tensors):
        exact = tensor.bfloat16() if tensor.is_floating_point() else tensor.long()
        checksum = zlib.crc32(exact.cpu().contiguous().view(torch.uint8).numpy(), checksum)
    return checksum


def _check_latency(net: Supernet, search: DenasConfig) -> None:
    """Refuse a limit that the model breaks without any adapter, or with the largest one.

    Raises:
        ValueError: such a limit.
    """
    for name, on, what in (
        ("max_latency", 0, "less than this batch takes without an adapter, {:.3g} ms: raise it, or cut the batch"),
        ("min_latency", 1, "more than this batch takes with the largest adapter, {:.3g} ms: lower it"),
    ):
        limit = getattr(search, name)
        if limit is not None:
            codes = np.zeros((len(net.space.units), 1 + len(net.space.values)), dtype=np.int64)
            codes[:, 0], codes[:, 1:2] = on, on * (net.space.costs.shape[1] - 1)
            net.apply(codes)
            latency = 1000 * net.latency()
            if (latency < limit) if on else (latency > limit):
                raise ValueError(f"{name} = {limit:g} ms is " + what.format(latency))


def make_batches(model: nn.Module, search: DenasConfig, tokenizer: Any, batch: Any) -> list[dict[str, Any]]:
    """The batches to measure on, on the model's device.

    Raises:
        ValueError: there is nothing to make one from, or the tokenizer is another model's.
    """
    device = next(model.parameters()).device
    if batch is not None:
        given = [batch] if isinstance(batch, Mapping) else list(batch)
        if not given or not all(isinstance(one, Mapping) and one for one in given):
            raise ValueError("batch must be what the model is called with, a dict of tensors, or a list of such")
        return [
            {name: value.to(device) if torch.is_tensor(value) else value for name, value in one.items()}
            for one in given
        ]
    if tokenizer is None:
        raise ValueError(
            "A search measures gradients on a few examples: give a `batch` (what the model is called with, with "
            "labels), best of the data to be trained on, or the `tokenizer`, and a batch is made from a short text"
        )
    generates = getattr(model, "can_generate", None)
    if search.is_additive and not (callable(generates) and generates()):
        raise ValueError(
            f"{type(model).__name__} is no language model, so that no labels can be made from a text: give a `batch` "
            "with labels, or score='deltatuner', which needs none"
        )
    ids = list(tokenizer(EXAMPLE_TEXT)["input_ids"])
    rows, length = search.batch_size, search.sequence_length
    ids = (ids * (1 + rows * length // len(ids)))[: rows * length]
    embeddings = model.get_input_embeddings()
    if max(ids) >= embeddings.weight.shape[0]:
        raise ValueError(
            f"The tokenizer has the token {max(ids)}, but the model has {embeddings.weight.shape[0]} of them: it "
            "belongs to another model"
        )
    tokens = torch.tensor(ids, device=device).view(rows, length)
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}]


@contextlib.contextmanager
def left_as_it_was(model: nn.Module, seed: int) -> Iterator[None]:
    """Within this context the model is frozen and the generators are seeded; afterwards all is as it was before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter, _ in flags if parameter.grad is not None]
    training = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device.index for parameter, _ in flags if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in training:
                module.training = mode
