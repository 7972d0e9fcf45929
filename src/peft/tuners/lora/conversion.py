"""Any adapter that changes weights as a LoRA: the change is formed, layer by layer, and factorised.

For programs that take nothing but LoRA. Left out: norms, which have no matrix, and grouped convolutions.
Letters: O out, I in, K kernel, r rank.
"""

from __future__ import annotations

import os
import re

import torch
from torch import nn

from ...config import PeftConfig
from ...utils.save_and_load import get_peft_model_state_dict, write_adapter
from ...utils.warning import warn
from ..tuners_utils import BaseTunerLayer
from .config import LoraConfig

_KEPT = (
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
)  # fmt: skip


class LoraConversion(tuple[LoraConfig, dict[str, torch.Tensor]]):
    """`(config, tensors)` of the LoRA, by their keys in a file.

    Attributes:
        errors: by layer, the share of the weight's change (Frobenius norm) that the LoRA misses.
    """

    errors: dict[str, float]

    def __new__(cls, config: LoraConfig, tensors: dict[str, torch.Tensor], errors: dict[str, float]):
        pair = super().__new__(cls, (config, tensors))
        pair.errors = errors
        return pair


def _check_rank(rank: float) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not (rank >= 1 if whole else isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            "rank must be a positive whole number, or a fraction in (0, 1] (of the squared singular values to be "
            f"kept), got {rank!r}"
        )


def _factors(D: torch.Tensor, rank: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`A (r, I*K)`, `B (O, r)` closest to `D (O, I*K)`, and the share of D that they miss."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    energy = S.double().square().cumsum(0)
    if isinstance(rank, float):
        r = int((energy < rank * energy[-1] * (1 - 1e-12)).sum()) + 1
    else:
        r = rank
    r = min(r, len(S))
    missed = (1 - energy[r - 1] / energy[-1]).clamp(min=0).sqrt().item() if energy[-1] > 0 else 0.0
    return Vh[:r], U[:, :r] * S[:r], missed


def _layers(model: nn.Module, adapter_name: str) -> dict[str, BaseTunerLayer]:
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter_name in module._available_adapters
    }
    if not layers:
        raise ValueError(f"The model has no layer with an adapter {adapter_name!r} that could be converted")
    for path, layer in layers.items():
        if not layer.supports_lora_conversion(adapter_name):
            raise TypeError(
                f"{path} ({type(layer).__name__} on {type(layer.get_base_layer()).__name__}) cannot be a LoRA: only a "
                "change of the weight of a linear, convolution or embedding layer can"
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged: call unmerge_adapter() before converting it")
    return layers


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict | None = None,
) -> LoraConversion:
    """The LoRA that comes closest to what an adapter does to the weights. The model stays as it is.

    Args:
        model: with adapters of any method that folds into weights.
        rank: of the LoRA; in a layer that is smaller, as many as it has. A float is the share of the squared singular
            values that every layer keeps at least, with a rank of its own.
        compile_kwargs: compile the factorisation, with these arguments of `torch.compile`.

    Returns:
        `(config, tensors)`, with the `errors` of the layers.

    Raises:
        ValueError: a rank outside its range, no such adapter, or it is merged, or changes what a LoRA has no place for.
        TypeError: a layer whose adapter is no change of a matrix.
    """
    from tqdm import tqdm

    _check_rank(rank)
    layers = _layers(model, adapter_name)
    source = getattr(model, "peft_config", {}).get(adapter_name)
    if isinstance(source, LoraConfig):
        warn(f"Adapter {adapter_name!r} is a LoRA already; converting it makes one of another rank")
    attention = next((path for path, layer in layers.items() if layer.op.is_read), None)
    if attention and isinstance(rank, float):
        raise ValueError(
            f"{attention} belongs to a MultiheadAttention, both of whose projections have one rank in a LoRA: give a "
            f"whole number, got rank={rank}"
        )
    factorise = _factors if compile_kwargs is None else torch.compile(_factors, **compile_kwargs)
    tensors, errors, ranks, biases = {}, {}, {}, {}
    for path, layer in tqdm(layers.items(), disable=not progressbar, desc="Converting to LoRA"):
        W, b = layer.op.load()
        wide = torch.promote_types(W.dtype, torch.float32)
        with layer.whole_adapter(adapter_name):
            folded, shifted = layer.fold(adapter_name, W.to(wide), None if b is None else b.to(wide))
        D = folded - W.to(wide)
        A, B, errors[path] = factorise(D.flatten(1), rank)
        B = B / layer.op.lora_gain
        kernel = D.shape[2:]
        name = "lora_embedding_{}" if layer.op.kind == "Embedding" else "lora_{}.weight"
        for letter, factor in (("A", A.view(len(A), -1, *kernel)), ("B", B.view(*B.shape, *[1] * len(kernel)))):
            tensors[f"{path}.{name.format(letter)}"] = factor.contiguous()
        if not path.endswith(".base_layer.out_proj"):  # an attention's, which goes along with it
            ranks[path.removeprefix("base_model.model.")] = len(A)
        if shifted is not None:
            biases[path] = shifted - (0 if b is None else b.to(wide))
    has_bias = any(bias.any() for bias in biases.values())
    if has_bias:
        tables = [path for path, layer in layers.items() if layer.op.kind == "Embedding"]
        if tables:
            raise ValueError(
                f"The adapter changes biases, which needs lora_bias=True, and embeddings ({tables[0]}), which cannot "
                "have that: it is no LoRA"
            )
        for path, layer in layers.items():
            bias = biases.get(path)
            tensors[f"{path}.lora_B.bias"] = D.new_zeros(layer.out_features) if bias is None else bias
    tensors |= _whole_parts(model, adapter_name, layers)
    return LoraConversion(_config(source, layers, rank, ranks, has_bias), tensors, errors)


def _whole_parts(model: nn.Module, adapter_name: str, layers: dict) -> dict[str, torch.Tensor]:
    """What the adapter has besides its layers: modules that are trained whole, and biases of the base model."""
    if adapter_name not in (getattr(model, "peft_config", None) or {}):
        return {}
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    inside = tuple(f"{path}.{attribute}" for path, layer in layers.items() for attribute in layer.adapter_layer_names)
    return {key: tensor for key, tensor in own.items() if not key.startswith(inside)}


def _config(source: PeftConfig | None, layers: dict, rank: float, ranks: dict[str, int], has_bias: bool) -> LoraConfig:
    kept = {field: value for field in _KEPT if (value := getattr(source, field, None)) is not None}
    kept.setdefault("target_modules", sorted(ranks))
    r = rank if isinstance(rank, int) else max(ranks.values())
    pattern = {f"^{re.escape(key)}": own for key, own in ranks.items() if own != r}
    bias = getattr(source, "bias", "none")
    bias = bias if bias in ("none", "all") else "lora_only"
    return LoraConfig(
        r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_bias=has_bias, bias=bias, **kept
    )


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict | None = None,
) -> dict[str, float]:
    """Write an adapter as a LoRA into a folder; see `convert_to_lora`.

    Returns:
        The errors of the layers: the share of the weight's change that the LoRA misses.
    """
    conversion = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config, tensors = conversion
    config.inference_mode = True
    os.makedirs(path, exist_ok=True)
    write_adapter(tensors, os.fspath(path))
    config.save_pretrained(path)
    return conversion.errors
