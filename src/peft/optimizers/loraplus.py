"""LoRA+ (arXiv 2402.12354): a larger learning rate for B than for A, with any optimiser."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs
) -> Optimizer:
    """An optimiser of everything that trains in the model.

    Args:
        lr: of A, and of all else that is not named below.
        loraplus_lr_ratio: B's learning rate is so many times as large (the paper finds 16 good), and that of biases
            and other vectors with it.
        kwargs: `loraplus_lr_embedding` (default 1e-6) is the learning rate of LoRA on embeddings,
            `loraplus_weight_decay` (default 0) the decay of all but vectors; the others are the optimiser's.

    Raises:
        ValueError: nothing trains, or the ratio is not positive.
    """
    if loraplus_lr_ratio <= 0:
        raise ValueError(f"loraplus_lr_ratio must be positive, got {loraplus_lr_ratio!r}")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding" in name:
            rate = embedding_lr
        else:
            rate = lr * loraplus_lr_ratio if "lora_B" in name or parameter.dim() == 1 else lr
        groups.setdefault((rate, decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    if not groups:
        raise ValueError("Nothing in the model trains: activate an adapter for training first (set_adapter)")
    listed = [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]
    return optimizer_cls(listed, lr=lr, **kwargs)
