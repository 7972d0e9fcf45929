"""A layer's input for the backward pass, computed again where that is cheaper than keeping it.

The gradient of an adapter's parameters needs the layer's input. Often that input is the result of an elementwise step
(a norm's scaling, an activation times a gate, dropout) whose factors autograd keeps anyway; then the result can be had
again from them for the price of the step. `keep` looks at the input's place in the autograd graph and gives the tensors
to save: those factors, which take no further memory, or else the input itself.

Nothing is computed again where a saved tensor has hooks (activation checkpoints, off-loading of activations): reading
it would run them once too often. Nor while torch.compile traces, which decides by itself what to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

# Steps back from the input: RMSNorm in half precision takes three (scale, cast, divide by the root).
DEPTH = 4
_METADATA = "peft.tuners.recompute"

Build = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Recipe:
    """How to make a tensor again from the tensors that `keep` gave with it.

    Layers with a common input (q, k, v) share one recipe, and in a backward pass what the first of them makes serves
    the others too.
    """

    def __init__(self, build: Build):
        self._build = build
        self._users = 1
        self._uses = 0
        self._made: dict[Callable | None, torch.Tensor] = {}

    def __call__(self, parts: Sequence[torch.Tensor], form: Callable | None = None) -> torch.Tensor:
        """The tensor, or `form` of it (which is shared as well)."""
        if self._users == 1 or torch.is_grad_enabled():  # a second derivative goes on through the parts
            made = self._build(parts)
            return form(made) if form else made
        if not self._made:
            self._uses = 0
        if form not in self._made:
            self._made[form] = form(self._build(parts)) if form else self._build(parts)
        made = self._made[form]
        self._uses += 1
        if self._uses >= self._users:
            self._made = {}
        return made


_ITSELF = Recipe(lambda parts: parts[0])


def keep(x: torch.Tensor, counted: bool = True) -> tuple[list[torch.Tensor], Recipe]:
    """`(parts, recipe)`: save the parts, and in backward `recipe(parts)` is `x`.

    Args:
        counted: the caller will use the recipe once per backward pass; who may not use it gets one of its own, since
            those who share one wait for each other.
    """
    if torch.compiler.is_compiling() or hooks_are_active():
        return [x], _ITSELF
    node = x.grad_fn
    if node is None or x._version:  # what was changed in place behind autograd's back its node would not make
        return [x], _ITSELF
    parts: list[torch.Tensor] = []
    build = _rebuild(node, parts, DEPTH)
    if build is None:
        return [x], _ITSELF
    if not counted:
        return parts, Recipe(build)
    recipe = node.metadata.get(_METADATA)
    if recipe is None:
        recipe = node.metadata[_METADATA] = Recipe(build)
    else:
        recipe._users += 1
    return parts, recipe


def hooks_are_active() -> bool:
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("not entered while hooks are active"):
            return False
    except RuntimeError:
        return True


def _rebuild(node, parts: list[torch.Tensor], depth: int) -> Build | None:
    """How to make the result of `node` from tensors that the graph has saved; they are appended to `parts`."""
    maker = _MAKERS.get(node.name()) if depth else None
    return maker(node, parts, depth) if maker else None


def _saved(node, name: str, parts: list[torch.Tensor]) -> Build | None:
    """The tensor that `node` has saved as `name`, or None."""
    raw = getattr(node, f"_raw_saved_{name}")
    if getattr(raw, "unpack_hook", raw) is not None:  # an old torch does not say whether there is one
        return None
    tensor = getattr(node, f"_saved_{name}")
    if tensor is None:
        return None
    parts.append(tensor)
    place = len(parts) - 1
    return lambda parts: parts[place]


def _input(node, number: int, parts: list[torch.Tensor], depth: int) -> Build | None:
    """The input of `node`, as the result of the node before it."""
    before, output = node.next_functions[number]
    return None if before is None or output else _rebuild(before, parts, depth - 1)


def _product(node, parts, depth) -> Build | None:
    left, right = (
        _saved(node, name, parts) or _input(node, number, parts, depth) for number, name in enumerate(("self", "other"))
    )
    return None if left is None or right is None else lambda parts: left(parts) * right(parts)


def _cast(node, parts, depth) -> Build | None:
    value, dtype = _input(node, 0, parts, depth), node._input_metadata[0].dtype
    return value and (lambda parts: value(parts).to(dtype))


def _dropout(node, parts, depth) -> Build | None:
    mask, value, p = _saved(node, "result1", parts), _input(node, 0, parts, depth), node._saved_p
    return value and mask and (lambda parts: value(parts) * mask(parts) * (1 / (1 - p)))


def _gelu(node, parts, depth) -> Build | None:
    value, approximate = _saved(node, "self", parts), node._saved_approximate
    return value and (lambda parts: F.gelu(value(parts), approximate=approximate))


def _silu(node, parts, depth) -> Build | None:
    value = _saved(node, "self", parts)
    return value and (lambda parts: F.silu(value(parts)))


def _layer_norm(node, parts, depth) -> Build | None:
    needed = [_saved(node, name, parts) for name in ("input", "result1", "result2")]
    if None in needed or node._saved_result1.dtype in (torch.float16, torch.bfloat16):  # statistics that were rounded
        return None
    affine = [_saved(node, name, parts) for name in ("weight", "bias")]

    def build(parts):
        x, mean, inverse_deviation = (get(parts) for get in needed)
        weight, bias = (get and get(parts) for get in affine)
        y = (x.to(mean.dtype) - mean) * inverse_deviation
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(x.dtype)

    return build


# By the name of the autograd node: what makes its result again.
_MAKERS: dict[str, Callable] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "NativeDropoutBackward0": _dropout,
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "NativeLayerNormBackward0": _layer_norm,
}
