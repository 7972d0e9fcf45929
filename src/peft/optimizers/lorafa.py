"""LoRA-FA (arXiv 2308.03303): A is frozen, and B moves so that `B A` follows full fine-tuning best.

With A frozen, no input of a layer has to be kept for the gradient of A. Letters: O out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..tuners.lora.layer import LoraLayer


class LoraFAOptimizer(torch.optim.AdamW):
    """AdamW that replaces the gradient of every B by `G (A A^T)^-1 / s^2`, the least-squares fit of `s B A` to the
    gradient of the whole weight.

    Args:
        params: all that trains.
        pairs: `(B, A, s)` of every LoRA.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        pairs: Iterable[tuple[nn.Parameter, nn.Parameter, float]] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.pairs = list(pairs)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for B, A, s in self.pairs:
            if B.grad is not None:
                B.grad.copy_(self._fitted(B.grad.flatten(1), A.flatten(1), s).view_as(B))
        super().step()
        return loss

    @staticmethod
    def _fitted(G: torch.Tensor, A: torch.Tensor, s: float) -> torch.Tensor:
        """`G (A A^T)^-1 / s^2`, (O, r); a little is added to the diagonal, for A whose rows depend on each other."""
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        gram = A @ A.T
        gram += 1e-8 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram, G.to(A).T).T / s**2


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """Freeze A of the active LoRA and give an optimiser of B, and of all else that trains.

    On embeddings both factors train, as without LoRA-FA: there A is zero at the start.

    Args:
        r, lora_alpha, use_rslora: the adapter's (None: whichever it has). The layers' own scalings count, patterns
            included.

    Raises:
        ValueError: they are not the adapter's, or the model has no LoRA that trains, or one of bare parameters.
    """
    config = model.active_peft_config
    if getattr(config, "target_parameters", None):
        raise ValueError(
            "LoRA-FA corrects the gradient of B by one A per layer, and adapters of target_parameters have one per "
            "expert: use another optimiser, such as AdamW"
        )
    given = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
    other = {name: value for name, value in given.items() if getattr(config, name, None) != value}
    if other:
        raise ValueError(
            f"The active adapter has { ({name: getattr(config, name, None) for name in other}) }, got {other}"
        )
    pairs = []
    for layer in model.modules():
        for name in layer.active_adapters if isinstance(layer, LoraLayer) else ():
            if name in layer.lora_B and layer.lora_B[name].weight.requires_grad:
                A, B = layer.factors(name)
                A.requires_grad_(False)
                pairs.append((B, A, layer.scaling[name]))
    if not pairs:
        raise ValueError("The model has no LoRA that trains: activate one for training first (set_adapter)")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay)
