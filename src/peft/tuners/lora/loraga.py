"""LoRA-GA (arXiv 2407.05000): factors along the gradient of the weight, so that the first steps are its steps.

With the gradient's decomposition `G = U S V^T`, B and A start as columns of U and rows of V^T (theorem 3.1), and the
weight loses `scaling * B A` (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..._lazy import explain_missing
from ..ops import make_op
from .config import LoraConfig, LoraGAConfig
from .init import lowrank
from .prepared import Prepared, from_file, linear_targets, prepare


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Prepare a model for `get_peft_model` with init_lora_weights="lora_ga".

    Args:
        model: the base model; all of its gradients must be computable, its weights stay.
        lora_config: of the adapter to come, with its `lora_ga_config`.
        train_step: runs forward and backward passes on some batches. Gradients add up. Not called if the file is there.
        cache_file: where the gradients are written, or, if it is there, read from.

    Raises:
        ValueError: a configuration for another initialisation, layers that are no plain linear ones or too small, or
            weights that get no gradient.
    """
    targets = linear_targets(model, lora_config, "lora_ga", vectors=2)
    layers = {name: layer for name, (layer, _) in targets.items()}
    keys = [_key(name) for name in targets]
    gradients = from_file(cache_file, keys, lambda: _gradients(model, layers, train_step))
    for name, (layer, r) in targets.items():
        G = gradients[_key(name)].to(layer.weight.device, torch.float32)
        if not G.isfinite().all():
            raise ValueError(f"The gradient of {name} has values that are not finite")
        U, _, V = lowrank(G, min(4 * r, *G.shape), niter=8)
        factors = partial(_factors, U[:, : 2 * r], V[:, : 2 * r], lora_config.lora_ga_config)
        prepare(layer, Prepared("lora_ga", r, factors))


def _key(name: str) -> str:
    """Of a gradient in the cache, as upstream has it."""
    return f"{name}._peft_loraga_grad"


def _gradients(model: nn.Module, layers: dict[str, nn.Module], train_step: Callable[[], None]) -> dict:
    """`{key: (O, I)}`, the sums of the weights' gradients, in float32."""
    sums: dict[str, torch.Tensor] = {}

    def collect(name: str, weight: nn.Parameter) -> None:
        G = weight.grad.detach().float()
        sums[name] = sums[name] + G if name in sums else G
        weight.grad = None  # a train_step may or may not clear them

    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    handles = []
    try:
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(partial(collect, name)))
        train_step()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
    if missing := [name for name in layers if name not in sums]:
        raise ValueError(
            f"train_step gave no gradient to {missing[:3]} ({len(missing)} of {len(layers)} weights): it has to run a "
            "forward and a backward pass of the model"
        )
    return {_key(name): make_op(layers[name]).to_view(G).cpu() for name, G in sums.items()}


def _factors(U, V, config: LoraGAConfig, W: torch.Tensor, r: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (r, I)`, `B (O, r)` out of U (O, 2 r) and V (I, 2 r)."""
    order = torch.arange(2 * r)
    if config.direction == "ArBr":
        order = order.view(r, 2).flip(1).T.flatten()
    elif config.direction == "A2rBr":
        order = order.roll(r)
    elif config.direction == "random":  # the same every time: a file needs the base weights that it was trained with
        order = torch.randperm(2 * r, generator=torch.Generator().manual_seed(0))
    A, B = V[:, order[:r]].T.to(W), U[:, order[r:]].to(W)
    if config.scale == "stable":
        length = len(W) ** 0.25 / config.stable_gamma**0.5
    elif config.scale == "gd_scale":
        length = 1 / s
    else:
        length = 1.0
    if config.scale == "weight_svd":
        B = B * lowrank(W, min(8, *W.shape), niter=8)[1][0]
    return A * length, B * length


explain_missing(__name__)
