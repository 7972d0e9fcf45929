"""Initial values of LoRA's factors.

Pure functions, of two kinds: those in `INITS` fill `A (r, I, ...)` and `B (O, r, ...)` in place; those that
`factors_out_of` finds give the factors that are to be taken out of the weight.
Letters: O out, I in, r rank, s scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ...utils.other import infer_device


def at_work(W: torch.Tensor, config) -> torch.Tensor:
    """The weight where it is to be worked on: with `ephemeral_gpu_offload` on an accelerator, if there is one."""
    runtime = getattr(config, "runtime_config", None)
    return W.to(infer_device()) if runtime is not None and runtime.ephemeral_gpu_offload else W


def kaiming(A: torch.Tensor, B: torch.Tensor, r: int) -> None:
    """Microsoft's: A as `nn.Linear` draws its weight, B zero."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


def gaussian(A: torch.Tensor, B: torch.Tensor, r: int) -> None:
    """A ~ N(0, 1/r), B zero."""
    nn.init.normal_(A, std=1 / r)
    nn.init.zeros_(B)


def random(A: torch.Tensor, B: torch.Tensor, r: int) -> None:
    """Both drawn as `nn.Linear` draws its weight: the delta is not zero. For tests."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def orthogonal(A: torch.Tensor, B: torch.Tensor, r: int) -> None:
    """Orthogonal factors with `B A = 0`: A and B take the even and the odd vectors of one orthogonal basis.

    The basis Q is (r, r); B's columns are `Q[:, 0::2] X` and A's rows `Y Q[:, 1::2]^T` for random X, Y, so that B A
    vanishes because the two halves of Q are orthogonal, and neither factor is zero.

    Raises:
        ValueError: an odd rank, or a weight that is no matrix.
    """
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r}")
    if A.dim() != 2:
        raise ValueError(f"init_lora_weights='orthogonal' is for linear layers, got a weight of shape {tuple(A.shape)}")
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    even, odd = basis[:, 0::2], basis[:, 1::2]  # (r, r/2) each
    scale = 1 / math.sqrt(r)
    A.data.copy_(odd @ torch.randn(r // 2, A.shape[1]) * scale)  # rows of A lie in span(odd)
    B.data.copy_(torch.randn(B.shape[0], r // 2) @ even.T * scale)


def lowrank(W: torch.Tensor, q: int, niter: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`U (O, q)`, `S (q,)`, `V (I, q)` as `torch.svd_lowrank`, but the same every time.

    An adapter from a file needs the base weight that it was trained with.
    """
    with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(W, q=q, niter=niter)


def pissa(W: torch.Tensor, r: int, s: float, niter: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`A`, `B` with `s B A` the part of `W` (O, I) with the largest singular values (arXiv 2404.02948, eq. 2 and 3).

    Args:
        niter: iterations of a randomised decomposition, fast and approximate; None: the exact one.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = lowrank(W, r, niter)
        Vh = V.T
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: torch.Tensor, r: int, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`B` the first r orthonormal columns Q, `A` the first r rows R of `W = Q R` (arXiv 2406.01775, algorithm 1)."""
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def check_start(init: str, shape: tuple[int, ...], r: int, s: float) -> None:
    """Refuse what `factors_out_of` cannot start from, before any weight is changed.

    Raises:
        ValueError: the rank is larger than that of a weight of this shape, or the scaling is negative.
    """
    if r > min(shape):
        raise ValueError(
            f"init_lora_weights={init!r} starts from r={r} directions of the weight, and a weight of shape "
            f"{tuple(shape)} has {min(shape)}: give this layer a smaller rank (rank_pattern)"
        )
    if s < 0:
        raise ValueError(f"init_lora_weights={init!r} needs a positive lora_alpha, got a scaling of {s}")


def factors_out_of(config) -> Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]] | None:
    """For initialisations that take `s B A` out of the base weight: `(W, r, s) -> (A, B)`; None for the others."""
    init = config.init_lora_weights
    if init == "olora":
        return olora
    if init == "pissa":
        return pissa
    if iterations := PISSA_NITER.fullmatch(str(init)):
        return partial(pissa, niter=int(iterations[1]))
    return None


PISSA_NITER = re.compile(r"pissa_niter_(\d+)")
INITS = {True: kaiming, False: random, "gaussian": gaussian, "orthogonal": orthogonal}


def init_function(init_lora_weights: bool | str) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """The function for a value of `LoraConfig.init_lora_weights`.

    Others fill the factors later, or are of saved adapters, whose tensors come from the file; one that it lacks is
    reported, and keeps what the usual initialisation gave it.
    """
    return INITS.get(init_lora_weights, kaiming)


def without_initial(
    config, tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> tuple[object, dict[str, torch.Tensor]]:
    """An adapter for the model's original weights, out of one for weights that its initialisation changed.

    What the initialisation took out of the weight, `s B0 A0`, is put back by the adapter itself, exactly:
    `s (B A - B0 A0)` is a LoRA of twice the rank.

    Args:
        config: the adapter's configuration.
        tensors, initial: trained and as initialised, by their keys in a file.

    Returns:
        The configuration and the tensors of the new adapter.

    Raises:
        ValueError: the base weights were not changed, or the tensors are not of the same adapter.
    """
    if not getattr(config, "init_changes_base", False):
        raise ValueError(
            f"path_initial_model_for_weight_conversion is for initialisations that change the base weights, and "
            f"this adapter's ({getattr(config, 'init_lora_weights', config.peft_type)!r}) does not: leave it out"
        )
    shapes = {key: tensor.shape for key, tensor in initial.items()}
    if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        raise ValueError(
            "path_initial_model_for_weight_conversion holds tensors of another adapter: give the folder to which this "
            "one was saved before its training"
        )
    new = {}
    for key, tensor in tensors.items():
        start = initial[key].to(tensor)
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            new[key] = torch.cat([tensor, start])
        elif key.endswith((".lora_B.weight", ".lora_embedding_B")):
            new[key] = torch.cat([tensor, -start], dim=1)
        else:
            new[key] = tensor  # biases start at 0; a magnitude is that of the same sum of weights
    growth = math.sqrt(2) if config.use_rslora else 2  # so that the scaling stays
    config = replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: growth * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )
    return config, new
