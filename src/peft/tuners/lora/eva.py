"""EVA (arXiv 2410.07170): A starts as the main components of a layer's inputs, and ranks go where they explain most.

The inputs' covariance is decomposed batch by batch until the components stay as they are (section 3, algorithm 1).
Nothing of the base model changes. Letters: N rows of inputs, I input features, k components.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..._lazy import explain_missing
from ...utils.placement import home_device
from ...utils.warning import warn
from ..ops import make_op
from ..parts import remove_adapter
from .config import LoraConfig
from .layer import LoraLayer
from .model import LoraModel, rank_and_alpha

MOST_PASSES = 50  # over the data; far more than components need to settle, so that what never does is noticed


class Components(NamedTuple):
    """The main components of all inputs of a layer so far.

    The update is that of incremental principal component analysis (Ross et al. 2008, section 2): the old components,
    times their singular values, stand for all old rows, and one more row for the shift of the mean.
    """

    count: int
    mean: torch.Tensor  # (I,)
    S: torch.Tensor  # (k,) singular values of the centred inputs
    V: torch.Tensor  # (k, I) orthonormal rows
    energy: torch.Tensor  # sum of all squares of the centred inputs
    settled: bool = False

    @classmethod
    def of(cls, x: torch.Tensor) -> Components:
        """Those of nothing, for inputs like `x`."""
        I = x.shape[1]  # noqa: E741
        return cls(0, x.new_zeros(I), x.new_zeros(0), x.new_zeros(0, I), x.new_zeros(()))

    def after(self, x: torch.Tensor, k: int, tau: float) -> Components:
        """With `k` components at most, after the inputs `x` (N, I); settled: see `EvaConfig.tau`."""
        n, mean = len(x), x.mean(0)
        total = self.count + n
        shift = (self.count * n / total) ** 0.5 * (self.mean - mean)
        centred = x - mean
        rows = torch.cat([self.S[:, None] * self.V, centred, shift[None]])
        _, S, V = torch.linalg.svd(rows, full_matrices=False)
        energy = self.energy + centred.square().sum() + shift.square().sum()
        # Directions in which the inputs do not differ are noise.
        k = min(k, len(mean))
        here = min(k, int((S > S[0] * torch.finfo(S.dtype).eps * max(x.shape)).sum()))
        S, V = S[:here], V[:here]
        complete = here == k or self.count > len(mean)  # or no more are to be expected
        settled = complete and here == len(self.S) and bool(((V * self.V).sum(1).abs() >= tau).all())
        return Components(total, self.mean + (mean - self.mean) * (n / total), S, V, energy, settled)

    @property
    def explained(self) -> list[float]:
        """Share of the inputs' variance by component."""
        return (self.S.square() / self.energy).tolist()


class _Collector:
    """The components of every layer's inputs. Layers that see the same inputs (q, k, v) are decomposed once."""

    def __init__(self, ks: Mapping[str, int], config: LoraConfig, prepare, gather: bool):
        self.ks, self.tau, self.prepare, self.gather = ks, config.eva_config.tau, prepare, gather
        self.components: dict[str, Components | None] = dict.fromkeys(ks)
        self.batch: object = None  # what `prepare_model_inputs_fn` made of the batch at hand
        self._last: tuple = (None,) * 5  # the last update: what from, which input in which version, to how many, result

    @property
    def waiting(self) -> list[str]:
        return [name for name, found in self.components.items() if found is None or not found.settled]

    def hook(self, name: str, layer: nn.Module, args: tuple) -> None:
        before, k = self.components[name], self.ks[name]
        if before is not None and before.settled:
            return
        source, version, start, of, result = self._last
        if self.prepare_for(name) is not None or not (
            source is args[0] and version == args[0]._version and start is before and of == k
        ):
            x = self.rows(name, args)
            result = before
            if len(x):
                result = (Components.of(x) if before is None else before).after(x, k, self.tau)
            self._last = (args[0], args[0]._version, before, k, result)
        self.components[name] = result

    def prepare_for(self, name: str):
        """A function that is for this layer alone."""
        return self.prepare.get(name) if isinstance(self.prepare, Mapping) else None

    def rows(self, name: str, args: tuple) -> torch.Tensor:
        """The layer's inputs that count, (N, I), of all processes."""
        prepare = self.prepare_for(name) if isinstance(self.prepare, Mapping) else self.prepare
        x = args[0] if prepare is None else prepare(args, self.batch, name)
        x = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        if self.gather and torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, x.cpu())
            x = torch.cat(parts).to(x.device)
        return x


def forward_fn_dict(model: nn.Module, inputs: Mapping) -> object:
    """Call the model with a batch that is a dict."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping, peft_config: LoraConfig) -> torch.Tensor:
    """Indices (tokens, 2) into batch and sequence of the tokens that count: no padding, and those that bear a loss."""
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    if peft_config.eva_config.use_label_mask and model_input.get("labels") is not None:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: tuple | torch.Tensor, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """The rows (tokens, I) of a layer's input at the indices of `prepare_model_inputs_fn_language_modeling`.

    Raises:
        ValueError: the layer's input is not (batch, sequence, features).
    """
    x = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    if x.dim() != 3:
        raise ValueError(
            f"{layer_name} has inputs of shape {tuple(x.shape)}, not (batch, sequence, features): give a "
            "prepare_layer_inputs_fn for it, or None to take all rows"
        )
    return x[tuple(model_input.T)]


def _layers(model: nn.Module, config: LoraConfig | None, adapter_name: str) -> tuple[dict[str, nn.Module], LoraConfig]:
    """The base layers of the adapter (of a plain model: those that it would get), and its configuration."""
    found = {
        path: layer.get_base_layer()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer._available_adapters
    }
    if found:
        config = model.peft_config[adapter_name] if config is None else config
    elif config is None:
        raise ValueError(f"peft_config is required for a model without a LoRA adapter {adapter_name!r}")
    else:
        found = LoraModel.targets_of(model, config)
    if config.init_lora_weights != "eva":
        raise ValueError(f"EVA is for adapters with init_lora_weights='eva', got {config.init_lora_weights!r}")
    for path, layer in found.items():
        if (op := make_op(layer)) is None or op.kind != "Linear" or op.is_read:
            raise ValueError(f"EVA is for linear layers, and {path} is a {type(layer).__name__}: leave it out")
    return found, config


def _key(path: str) -> str:
    return path.removeprefix("base_model.model.")


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """A for every layer, (its rank, I). The model runs without adapters, and again over the data where need be.

    Args:
        model: with the adapter (it may be on the meta device), or without, with its configuration in `peft_config`.
        dataloader: batches for `forward_fn`.
        forward_fn: runs the model: `forward_fn(model, batch)`.
        prepare_model_inputs_fn: called with each batch and the configuration; what it returns (None: the batch) is for
            the next.
        prepare_layer_inputs_fn: `(the layer's arguments, that, the layer's name)` to the inputs that count,
            (..., I); by name, for layers of a kind; None: all.
        gather_distributed_inputs: put the inputs of all processes together.

    Returns:
        `{path of the layer: A}`, without those that get no rank.

    Raises:
        ValueError: an adapter with another initialisation, layers that are not linear, or that no batch reached.
    """
    layers, config = _layers(model, peft_config, adapter_name)
    ranks = {path: rank_and_alpha(config, _key(path))[0] for path in layers}
    ks = {path: int(config.eva_config.rho * r) for path, r in ranks.items()}
    collector = _Collector(ks, config, prepare_layer_inputs_fn, gather_distributed_inputs)
    device = home_device(next(iter(layers.values())))
    with ExitStack() as stack:
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        training = model.training
        stack.callback(model.train, training)
        model.eval()
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(collector.hook, path)).remove)
        _run(model, dataloader, config, collector, device, forward_fn, prepare_model_inputs_fn, show_progress_bar)
    return _redistributed(collector.components, ranks, config.eva_config.whiten)


def _run(model, dataloader, config, collector: _Collector, device, forward_fn, prepare, show_progress_bar) -> None:
    from accelerate.utils import send_to_device
    from tqdm import tqdm

    with tqdm(total=len(collector.ks), disable=not show_progress_bar, desc="EVA: layers that are settled") as bar:
        for _ in range(MOST_PASSES):
            is_used_up = True  # an iterator after its first pass
            for batch in dataloader:
                is_used_up = False
                batch = send_to_device(batch, device)
                collector.batch = batch if prepare is None else prepare(batch, config)
                forward_fn(model, batch)
                bar.update(len(collector.ks) - len(collector.waiting) - bar.n)
                if not collector.waiting:
                    return
            unseen = [path for path, components in collector.components.items() if components is None]
            if unseen:
                raise ValueError(
                    f"No batch of the dataloader reached {unseen[:3]} ({len(unseen)} of {len(collector.ks)} layers): "
                    "give data that do, or leave them out of target_modules"
                )
            if is_used_up:
                break
    warn(
        f"The components of {len(collector.waiting)} of {len(collector.ks)} layers, such as {collector.waiting[:3]}, "
        f"still changed with the last batch (tau={collector.tau}), and are used as they are: give more data"
    )


def _redistributed(components: Mapping[str, Components], ranks: Mapping[str, int], whiten: bool) -> dict:
    """The components that explain most, over all layers, as many as the layers' ranks are together (section 3.2)."""
    shares = [
        (share, path) for path, found in components.items() for share in (found.explained if found.energy > 0 else ())
    ]
    best = sorted(shares, key=lambda entry: -entry[0])[: sum(ranks.values())]
    chosen = {path: sum(own == path for _, own in best) for path in ranks}
    return {
        path: components[path].V[:r] / (components[path].S[:r, None].sqrt() if whiten else 1)
        for path, r in chosen.items()
        if r
    }


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise an adapter that was created with init_lora_weights="eva"; before its training, and its optimiser.

    Layers get other ranks, and those that get none lose the adapter; the configuration says so afterwards. The
    arguments are those of `get_eva_state_dict`, or its result as `eva_state_dict`.

    Raises:
        ValueError: no PeftModel, neither a dataloader nor a state dict, one for other layers, or as there.
    """
    if not hasattr(model, "peft_config") or not isinstance(getattr(model, "base_model", None), LoraModel):
        raise ValueError("initialize_lora_eva_weights is for a PeftModel with LoRA: make one with get_peft_model")
    layers, config = _layers(model, None, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("initialize_lora_eva_weights needs a dataloader, or an eva_state_dict")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    unknown = sorted(set(eva_state_dict) - set(layers))
    if unknown or not eva_state_dict:
        raise ValueError(f"eva_state_dict must be for layers of adapter {adapter_name!r}, got others: {unknown[:3]}")
    ranks, alphas = {}, {}
    for path, A in eva_state_dict.items():
        r, alpha = rank_and_alpha(config, _key(path))
        if config.eva_config.adjust_scaling_factors:
            alpha *= (len(A) / r) ** (0.5 if config.use_rslora else 1)
        ranks[f"^{re.escape(_key(path))}"], alphas[f"^{re.escape(_key(path))}"] = len(A), alpha
        layer = model.get_submodule(path)
        layer.set_rank(adapter_name, alpha, A, A.new_zeros(layer.out_features, len(A)))
    dropped = {path for path in layers if path not in eva_state_dict}
    targets = config.target_modules
    if dropped:
        remove_adapter(model, adapter_name, {model.get_submodule(path) for path in dropped})
        targets = {_key(path) for path in eva_state_dict}
        tuner = model.base_model
        tuner.targeted_module_names = [key for key in tuner.targeted_module_names if key in targets]
    model.peft_config[adapter_name] = replace(
        config,
        target_modules=targets,
        rank_pattern={key: rank for key, rank in ranks.items() if rank != config.r},
        alpha_pattern={key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha},
    )


explain_missing(__name__)
