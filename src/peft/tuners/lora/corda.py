"""CorDA (arXiv 2406.05223): factors out of a decomposition of the weight that knows what goes through it.

`W = U S V^T C^-1` with `W C = U S V^T` and C the covariance of the layer's inputs (section 3.2). The adapter gets the
part with the largest singular values ("ipm"), or with the smallest ("kpm"), and the weight loses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..._lazy import explain_missing
from ..ops import make_op
from .config import LoraConfig
from .prepared import Prepared, from_file, linear_targets, prepare

_PARTS = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare a model for `get_peft_model` with init_lora_weights="corda".

    Args:
        model: the base model.
        lora_config: of the adapter to come, with its `corda_config`.
        run_model: runs the model on some samples, a few hundred. Not called if the files are there.
        hooked_model: what `run_model` calls, if that is not `model`, with modules of the same names.

    Raises:
        ValueError: a configuration for another initialisation, layers that cannot be decomposed, neither data nor
            files, or layers that no sample reached.
    """
    config = lora_config.corda_config
    targets = linear_targets(model, lora_config, "corda")
    hooked = hooked_model or model

    def covariances():
        if run_model is None:
            raise ValueError("preprocess_corda needs run_model, unless cache_file or covariance_file is there")
        return _covariances({name: hooked.get_submodule(name) for name in targets}, run_model, config)

    def decompositions():
        from tqdm import tqdm

        found = from_file(config.covariance_file, targets, covariances)
        tensors = {}
        for name, (layer, r) in tqdm(targets.items(), disable=not config.verbose, desc="CorDA: decomposing"):
            W = make_op(layer).load()[0].float()
            parts = _decompose(W, found[name].to(W), r, config.corda_method)
            tensors |= {f"{name}.eigens.{part}": tensor.cpu() for part, tensor in zip(_PARTS, parts)}
        return tensors

    names = [f"{name}.eigens.{part}" for name in targets for part in _PARTS]
    tensors = from_file(config.cache_file, names, decompositions)
    for name, (layer, r) in targets.items():
        factors = partial(_factors, *(tensors[f"{name}.eigens.{part}"] for part in _PARTS))
        prepare(layer, Prepared("corda", r, factors, keep=not config.prune_temporary_fields))


def _covariances(layers: dict[str, nn.Module], run_model: Callable[[], None], config) -> dict[str, torch.Tensor]:
    """`{name: (I, I)}`, the mean of `x^T x` over the calls, with `x` (N, I) scaled to a largest value of 1."""
    sums: dict[str, torch.Tensor] = {}
    calls = dict.fromkeys(layers, 0)

    def collect(name: str, layer: nn.Module, args: tuple) -> None:
        x = args[0].detach().flatten(0, -2).float()
        x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        product = x.T @ x
        if not product.isfinite().all():
            raise ValueError(f"An input of {name} has values that are not finite")
        # The mean so far, not the sum, which float16 could not hold.
        calls[name] += 1
        mean = sums.get(name)
        product = product if mean is None else mean.float() + (product - mean.float()) / calls[name]
        sums[name] = product.half() if config.use_float16_for_covariance else product

    handles = [layer.register_forward_pre_hook(partial(collect, name)) for name, layer in layers.items()]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name in layers if name not in sums]:
        raise ValueError(f"run_model reached none of {unseen[:3]} ({len(unseen)} of {len(layers)} layers)")
    return {name: covariance.cpu() for name, covariance in sums.items()}


def _decompose(W: torch.Tensor, C: torch.Tensor, r: int, method: str) -> tuple[torch.Tensor, ...]:
    """`S (r,)`, `U (O, r)` and `C^-1 V (I, r)` of the part that the adapter gets.

    C gets a share of its mean diagonal added to the diagonal, doubled until it can be inverted (section 3.2).
    """
    eye, share = torch.eye(len(C), device=C.device), 0.01
    while True:
        damped = C + share * C.diagonal().mean().clamp(min=torch.finfo(C.dtype).tiny) * eye
        inverse = torch.linalg.inv_ex(damped)[0]
        if torch.linalg.matrix_norm(damped @ inverse - eye) < 0.05:
            break
        share *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    part = slice(0, r) if method == "ipm" else slice(len(S) - r, None)
    return S[part], U[:, part], inverse.T @ Vh[part].T


def _factors(S, U, V, W: torch.Tensor, r: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (r, I)`, `B (O, r)` with `s B A = U S V^T`."""
    root = (S.to(W) / s).sqrt()
    return root[:, None] * V.to(W).T, U.to(W) * root


explain_missing(__name__)
