"""LoRA on bare parameters (`target_parameters`): fused experts, whose weights are no modules of their own.

A parameter of 3 dimensions is one weight per expert, each with a delta `scaling * B A` of its own; one of 2 dimensions
is a single weight. The module that owns it runs with the changed weight in its place. Several parameters of one module
have one wrapper each, one around the other, in the order in which the module has them; files are laid out so.

Letters: E experts, O out, I in, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ...utils.other import AuxiliaryTrainingWrapper, Places
from ...utils.placement import offload_hook
from ..ops import ParameterOp
from ..tuners_utils import BaseTunerLayer
from .layer import LoraLayer


class ParamWrapper(LoraLayer, nn.Module):
    """LoRA on the parameter `parameter_name` of the innermost base layer: A is (E r, I), B is (O, r E).

    Modules of transformers that are marked `is_transposed` hold (E, I, O), all others (E, O, I) or (O, I).
    """

    numbered_in_files = True

    def __init__(self, base_layer: nn.Module, parameter_name: str):
        super().__init__(base_layer)
        self.parameter_name = parameter_name
        owner = self.get_base_layer()
        if offload_hook(owner) is not None:
            raise ValueError(f"target_parameters: the parameters of {type(owner).__name__} are off-loaded")
        if len(self.op.stored_shape) not in (2, 3):
            raise ValueError(
                f"target_parameters: {parameter_name} of {type(owner).__name__} has the shape "
                f"{tuple(self.op.stored_shape)}, and only parameters of 2 or 3 dimensions can have a LoRA"
            )
        if not self.weight.is_floating_point():
            raise ValueError(f"target_parameters: {parameter_name} of {type(owner).__name__} is packed")

    @property
    def op(self) -> ParameterOp:
        if "_op" not in self.__dict__:
            self.__dict__["_op"] = ParameterOp(self.get_base_layer(), self.parameter_name)
        return self.__dict__["_op"]

    @property
    def _is_transposed(self) -> bool:
        return len(self.op.stored_shape) == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    @property
    def num_experts(self) -> int:
        shape = self.op.stored_shape
        return shape[0] if len(shape) == 3 else 1

    @property
    def in_features(self) -> int:
        return self.op.stored_shape[-2 if self._is_transposed else -1]

    @property
    def out_features(self) -> int:
        return self.op.stored_shape[-1 if self._is_transposed else -2]

    def create_factors(self, name, r, bias):
        self.lora_A[name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    def product(self, name):
        A, B = self.factors(name)
        A = A.unflatten(0, (self.num_experts, -1))  # (E, r, I)
        B = B.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)  # (E, O, r)
        D = B @ A
        return (D.mT if self._is_transposed else D).reshape(self.op.stored_shape)

    def _apply_adapters(self, names, *args, **kwargs):
        W, _ = self.folded(names)
        inner, path = self.base_layer, self.parameter_name
        while isinstance(inner, BaseTunerLayer):
            inner, path = inner.base_layer, f"base_layer.{path}"
        return torch.func.functional_call(self.base_layer, {path: W}, args, kwargs)

    def _mixed_forward(self, adapter_names, *args, **kwargs):
        raise ValueError(
            "A mixed batch cannot go through target_parameters: an expert sees tokens of all rows, and has one weight "
            "for them"
        )

    def supports_lora_conversion(self, adapter_name="default"):
        return False  # it is one already, in a form of its own


def walk_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, str, str]]:
    """`(name, path of the module that owns it, its name there)` of a base model's parameters, as without adapters."""
    if isinstance(module, BaseTunerLayer):
        yield from walk_parameters(module.base_layer, path)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    prefix = f"{path}." if path else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, path, name
    for name, child in module._modules.items():
        if child is not None:
            yield from walk_parameters(child, prefix + name)


def wrapper_of(model: nn.Module, owner: str, parameter_name: str) -> ParamWrapper:
    """The wrapper for a parameter of the module at `owner`; a new one where there is none yet.

    Raises:
        ValueError: the module is adapted as a whole, or has no weights in the clear.
    """
    module = layer = model.get_submodule(owner)
    while isinstance(layer, ParamWrapper):
        if layer.parameter_name == parameter_name:
            return layer
        layer = layer.base_layer
    if isinstance(layer, BaseTunerLayer):
        raise ValueError(
            f"{owner} is a target of target_modules, and its {parameter_name} one of target_parameters: narrow one of "
            "them (target_modules=[] for none)"
        )
    if not owner:
        raise ValueError(f"target_parameters: {parameter_name} is a parameter of the whole model, which has no place")
    wrapper = ParamWrapper(module, parameter_name)
    wrapper.train(module.training)
    Places(model).replace(module, wrapper)
    return wrapper
