"""LoftQ (arXiv 2310.08659): start LoRA where a quantised weight and the adapter together are closest to the weight.

`loftq_init` looks for both (algorithm 1): `init_lora_weights="loftq"` of a plain base model, whose weights become
quantised values in their own type. `replace_lora_weights_loftq` fits adapters to a base model that is packed already.

Letters: O out, I in, r rank.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable

import torch
from torch import nn

from .._lazy import explain_missing
from ..config import find_first
from .quantization_utils import dequantize, is_quantized

BLOCK_SIZE = 64  # weights with a common scale, as in QLoRA
_OFFSET = 1 - (1 / 32 + 1 / 30) / 2  # the outermost quantile of NF4; LoftQ takes it for all numbers of bits


@functools.cache
def normal_float_codes(bits: int) -> torch.Tensor:
    """The values of NF4 (arXiv 2305.14314, appendix E) and its like for other numbers of bits, (2**bits,) in -1..1.

    Quantiles of the normal distribution: half of them above 0, 0 itself, and one less below.
    """
    half = 2 ** (bits - 1)
    below = torch.special.ndtri(torch.linspace(1 - _OFFSET, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, _OFFSET, half + 1, dtype=torch.float64))
    codes = torch.cat([below, above[1:]])
    return codes / codes.abs().max()


def round_to_normal_float(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` rounded to the nearest of 2**bits values times the largest magnitude of its block, in its own type."""
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scale = flat.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = normal_float_codes(bits).to(flat)
    nearest = torch.bucketize((flat / scale).contiguous(), (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)


def closest_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, B)`, (r, I) and (O, r), whose product `B A` is the best approximation of a matrix (O, I) of this rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    short = max(0, rank - len(S))  # a rank above the matrix's own
    return nn.functional.pad(A, (0, 0, 0, short)), nn.functional.pad(B, (0, short))


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise a weight (O, I) and approximate what is lost, in turns (algorithm 1).

    Args:
        num_bits: 2, 4 or 8.
        reduced_rank: r.
        num_iter: turns; in each the weight less the last product is quantised anew.

    Returns:
        `(Q, A, B)`, (O, I), (r, I), (O, r): the quantised values in the weight's type, and factors in float32.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    product = 0.0
    for _ in range(num_iter):
        Q = round_to_normal_float(wide - product, num_bits).to(weight.dtype)
        A, B = closest_factors(wide - Q, reduced_rank)
        product = B @ A
    return Q, A, B


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the LoRA layers on packed weights the factors that make up best for what packing has lost, in place.

    The packed weights stay as they are: this is LoftQ's first turn.

    Args:
        peft_model: a LoRA model whose base model was quantised on loading.
        model_path: where the base model's own weights are as safetensors: a file, a folder or a hub id. None: where
            the model says that it is from.
        callback: called with the model and the name of each layer that was changed; False puts its old factors back.
            (Keep those that make an error on some data smaller, for example.)

    Raises:
        ValueError: no such adapter on packed weights, or no float weights for one of them; nothing was changed.
    """
    from ..tuners.lora import Linear

    base = peft_model.get_base_model()
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, Linear) and adapter_name in layer.lora_A and is_quantized(layer.get_base_layer())
    }
    if not layers:
        raise ValueError(f"The model has no LoRA adapter {adapter_name!r} on packed linear layers: LoftQ has no use")
    path = model_path if model_path is not None else getattr(base, "name_or_path", None)
    if not path:
        raise ValueError("The model does not say where its weights are from: give model_path")
    weights = _Checkpoint(path)
    keys = {name: weights.key(name, getattr(base, "base_model_prefix", "")) for name in layers}
    for name, layer in layers.items():
        theirs, ours = weights.shape(keys[name]), tuple(layer.op.stored_shape)
        if theirs != ours:
            raise ValueError(f"{keys[name]} in {path} is {theirs}, and the layer's weight is {ours}")
    for name, layer in layers.items():
        factors = layer.factors(adapter_name)
        before = [factor.detach().clone() for factor in factors]
        packed = dequantize(layer.get_base_layer()).float()
        lost = layer.op.to_view(weights.read(keys[name]).to(packed) - packed)
        layer.set_factors(adapter_name, *closest_factors(lost, layer.r[adapter_name]))
        if callback is not None and not callback(peft_model, name):
            for factor, old in zip(factors, before):
                factor.data.copy_(old)


class _Checkpoint:
    """The tensors of a safetensors file, or of the files of a folder or hub repository, read one by one."""

    def __init__(self, path: str | os.PathLike):
        self.path, found = path, str(path)
        if not os.path.isfile(path):
            names = ["model.safetensors", "model.safetensors.index.json"]
            found = find_first(path, names, "weights as safetensors")
        parts = [found]
        if found.endswith(".json"):
            with open(found, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            parts = [find_first(path, [name], "a part of the weights") for name in names]
        self.files = {}  # key -> the file that holds it
        for part in parts:
            with self._open(part) as file:
                self.files |= dict.fromkeys(file.keys(), part)

    @staticmethod
    def _open(file: str):
        from safetensors import safe_open

        return safe_open(file, "pt")

    def key(self, name: str, prefix: str) -> str:
        """The key of the weight of module `name`; a checkpoint may have the model's base prefix where it has not."""
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        for key in (f"{name}.weight" for name in names):
            if key in self.files:
                return key
        raise ValueError(f"{self.path} has no {name}.weight: give the model_path of the weights that were quantised")

    def shape(self, key: str) -> tuple[int, ...]:
        with self._open(self.files[key]) as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        with self._open(self.files[key]) as file:
            return file.get_tensor(key)


explain_missing(__name__)
