"""Initial values of LoRA's factors: pure functions that fill `A (r, I, ...)` and `B (O, r, ...)` in place."""

from __future__ import annotations

import math
from collections.abc import Callable

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


INITS = {True: kaiming, False: random, "gaussian": gaussian, "orthogonal": orthogonal}


def init_function(init_lora_weights: bool | str) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """The function for a value of `LoraConfig.init_lora_weights`.

    Names that are not in this version are of saved adapters (`LoraConfig` refuses them elsewhere). Their tensors come
    from the file; one that it lacks is reported, and keeps what the usual initialisation gave it.
    """
    return INITS.get(init_lora_weights, kaiming)
