"""The layer that every method's layer is: a base layer with any number of named adapters.

`BaseTunerLayer` holds what all methods share (forward in all its forms, merging, switching, freezing, deleting); a
method adds its mathematics through `pre`, `post`, `fold` and `update_layer`. `AdditiveLayer` and `WeightSpaceLayer`
are the two common shapes of it. The model-level half, `BaseTuner`, is `tuners/base.py`.

Several active adapters compose in the order in which they are listed: layer `F_i = post_i . F_{i-1} . pre_i`, with
`F_0` the base layer, so that forward equals the base layer with the weight `fold_n(... fold_1(W))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .._lazy import explain_missing
from ..utils.mixed_batch import run_by_row
from ..utils.placement import onloaded as onload_layer, whole_modules  # noqa: F401  (others import the first)
from ..utils.warning import warn
from .attention import ReadLayer
from .ops import BlockOp, InProjectionOp, Op, make_op

__all__ = [
    "AdditiveLayer", "BASE_ADAPTER", "BaseTunerLayer", "LowRankLayer", "MergeError", "ScaledLayer", "WeightSpaceLayer",
]  # fmt: skip

BASE_ADAPTER = "__base__"  # in a mixed batch: this row goes through the base model


def as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def base_of(module: nn.Module) -> nn.Module:
    """What an adapter layer is around; of any other module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class MergeError(NamedTuple):
    """What packing a merged weight again has cost, as Frobenius norms over one layer, or over several (`total`)."""

    error: float
    """Of the stored weight less the exact one."""
    weight: float
    """Of the exact merged weight."""
    change: float
    """Of what the adapters changed in the weight."""

    @classmethod
    def total(cls, errors: Iterable[MergeError]) -> MergeError:
        return cls(*(math.hypot(*norms) for norms in zip(*errors)))

    @property
    def of_weight(self) -> float:
        """The error as a share of the weight."""
        return self.error / (self.weight or 1.0)

    def __str__(self) -> str:
        return f"{self.of_weight:.2%} of the weight, {self.error / (self.change or 1.0):.0%} of the change"


class _Merge(NamedTuple):
    """What one call of `merge` leaves behind."""

    memories: dict[str, object]  # adapter -> what `unfold` needs
    kept: object  # `Op.keep`; where the weight is packed this is put back, and nothing is unfolded
    error: MergeError | None


class BaseTunerLayer(ReadLayer):
    """Mixin of all adapter layers; a concrete layer also inherits `nn.Module`, after this class.

    Class attributes of a method:
        adapter_layer_names: attributes that map an adapter's name to its module or parameter: ParameterDicts.
        other_param_names: attributes that map an adapter's name to anything else: plain dicts.
        module_dicts: of both those that hold modules: ModuleDicts.
        bare_in_files: of the first those whose modules' `weight` has no name of its own in files.
    """

    module_dicts: tuple[str, ...] = ()
    bare_in_files: tuple[str, ...] = ()
    # Whether files tell several layers around one base layer by how deep they are inside of each other.
    numbered_in_files = False

    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    # Whether parameters of half precision are widened to float32 (autocast_adapter_dtype) after creation.
    widens_parameters: bool = True
    # Whether what shares the base layer's weight is adapted likewise, so that merging changes it for all of them.
    keeps_ties: bool = False
    # Whether the base model's embeddings belong into the file of an adapter that targets them.
    saves_embeddings: bool = True
    # What users are told who merge adapters of a method without `fold`.
    not_merged_because: str = "The adapter's method has no form as a change of its base layer's weights"
    cast_input_dtype_enabled: bool = True  # see helpers.disable_input_dtype_casting

    def __init__(self, base_layer: nn.Module):
        if "_modules" not in vars(self):  # other libraries' layers inherit nn.Module first, and have called it
            nn.Module.__init__(self)
        self.base_layer = base_layer
        for names, kind in (("other_param_names", dict), ("adapter_layer_names", nn.ParameterDict)):
            for cls in reversed(type(self).__mro__):  # the code of a base relies on what it names
                for attribute in vars(cls).get(names, ()):
                    setattr(self, attribute, nn.ModuleDict() if attribute in self.module_dicts else kind())
        self.merged_adapters: list[str] = []
        self._merges: list[_Merge] = []
        self._dropping: set[str] = set()  # adapters whose configuration drops something in training
        self._init_flags()

    # The mathematics, one method each

    def update_layer(self, name: str, config) -> None:
        """Create the parameters of adapter `name`."""
        raise NotImplementedError

    def base_change(self, name: str, config) -> Callable[[], None] | None:
        """For initialisations that change the base weight: what does it, when all layers have agreed.

        Called when the layer is in its place in the model.
        """
        return None

    def pre(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter does to the layer's input."""
        return x

    def post(self, name: str, x: torch.Tensor, y: torch.Tensor, before: Sequence[str] = ()) -> torch.Tensor:
        """What the adapter does to the layer's output `y`; `x` is its input before `pre` of this adapter.

        `before` names the adapters that `y` already contains; a method that needs the weight takes
        `self.folded(before)`.
        """
        return y

    def fold(self, name: str, W: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same change on the weights: `W[O, I, *K]`, `b[O]` or None."""
        raise TypeError(self.not_merged_because)

    @classmethod
    def folds(cls) -> bool:
        """Whether the method has a form as a change of its base layer's weights."""
        return cls.fold is not BaseTunerLayer.fold

    def remember(self, name: str, W: torch.Tensor, b: torch.Tensor | None):
        """What `unfold` will need; called with the weights before `fold`. By default all of it (no copy is made)."""
        return W.detach(), None if b is None else b.detach()

    def unfold(self, name: str, W: torch.Tensor, b: torch.Tensor | None, memory):
        """Undo `fold`."""
        return memory

    def before_load(self, name: str, path: str, tensors: dict[str, torch.Tensor]) -> None:
        """Called before tensors are loaded into adapter `name`; a method whose sizes may change adapts them here.

        Args:
            path: of this layer in the model.
            tensors: by their names in the model, those of all layers; it may change those that it has.
        """

    def before_save(self, name: str, path: str, tensors: dict[str, torch.Tensor]) -> None:
        """Called with what is to be saved of adapter `name`, by its names in the model; may change it."""

    def after_load(self, name: str) -> None:
        """Called when tensors were loaded into adapter `name`: bring them into the form that the method relies on."""

    # The base layer

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer."""
        layer = self.base_layer
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer

    @property
    def op(self) -> Op:
        """The view of the base layer (`tuners/ops.py`)."""
        layer = self.get_base_layer()
        op = self.__dict__.get("_op")
        if op is None or op.layer is not layer:
            op = make_op(layer)
            if op is None or (op.is_read and not self.folds()):
                op = BlockOp(layer)
            self.__dict__["_op"] = op
        return op

    @property
    def in_features(self) -> int:
        return self.op.in_features

    @property
    def out_features(self) -> int:
        return self.op.out_features

    def folded(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(W, b)` of the base layer with `names` folded in, differentiable, the base layer untouched."""
        W, b = self.op.load()
        for name in names:
            W, b = self.fold(name, W, b)
        return W, b

    # Forward

    def forward(self, *args, **kwargs) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if isinstance(self.op, InProjectionOp):
            return self._attend(adapter_names, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(adapter_names, *args, **kwargs)
        active = self._applied_adapters()
        if not active:
            return self.base_layer(*args, **kwargs)
        return self._apply_adapters(active, *args, **kwargs)

    def _applied_adapters(self) -> list[str]:
        """Active adapters that this layer has and that are not in the base weight already."""
        return [name for name in self.active_adapters if self.has_adapter(name) and name not in self.merged_adapters]

    def _apply_adapters(self, names: Sequence[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self._compose(names, self.base_layer, x, *args, **kwargs)

    def _compose(self, names: Sequence[str], base: Callable[..., torch.Tensor], x: torch.Tensor, *args, **kwargs):
        """`F_n(x)` of these adapters, with `base` for `F_0`."""
        inputs = [x]  # the input of F_n, F_{n-1}, ..., F_0
        for name in reversed(names):
            inputs.append(self.pre(name, inputs[-1]))
        y = base(inputs.pop(), *args, **kwargs)
        for i, name in enumerate(names):
            y = self.post(name, inputs.pop(), y, names[:i])
        return y

    def _mixed_forward(self, adapter_names: Sequence[str], *args, **kwargs) -> torch.Tensor:
        """Row `i` of the batch goes through `adapter_names[i]` (`__base__`: none)."""
        self._refuse_merged()
        own = {name for name in set(adapter_names) if self.has_adapter(name)}
        ways = [name if name in own else BASE_ADAPTER for name in adapter_names]
        return self._apply_by_row(ways, *args, **kwargs)

    @property
    def base_is_apart(self) -> bool:
        """Whether `pre`, the base layer and `post` one after the other give what `_apply_adapters` gives."""
        return type(self)._apply_adapters is BaseTunerLayer._apply_adapters

    def _apply_by_row(self, names: Sequence[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`_apply_adapters` for a mixed batch. All its rows go through the base layer together, if that is apart."""
        if not self.base_is_apart or len(set(names)) < 2:
            return run_by_row(self._apply_or_base, names, (x, *args), kwargs)
        inner = x
        if type(self).pre is not BaseTunerLayer.pre:
            inner = run_by_row(lambda name, x: x if name == BASE_ADAPTER else self.pre(name, x), names, (x,), {})
        y = self.base_layer(inner, *args, **kwargs)
        return run_by_row(lambda name, x, y: y if name == BASE_ADAPTER else self.post(name, x, y), names, (x, y), {})

    def _refuse_merged(self) -> None:
        if self.merged:
            raise ValueError("A mixed batch needs the plain base weights: call unmerge_adapter() first")

    def _apply_or_base(self, name: str, *args, **kwargs) -> torch.Tensor:
        if name == BASE_ADAPTER:
            return self.base_layer(*args, **kwargs)
        return self._apply_adapters([name], *args, **kwargs)

    # Merging

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @torch.inference_mode(False)  # the weights are there to stay: no tensors that cannot be trained or saved later
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (default: the active ones) into the base weight.

        Half-precision and packed weights are folded in float32 and rounded, or packed again, once.

        Args:
            safe_merge: check every result before anything is written.

        Raises:
            ValueError: `safe_merge` met a value that is not finite.
            TypeError: the weight is packed in a way that cannot be made here.
        """
        names = self.active_adapters if adapter_names is None else as_list(adapter_names)
        for name in names:
            if name in self.merged_adapters:
                warn(f"Adapter {name!r} is merged already, nothing to do")
        if safe_merge:
            self.check_merge(names)
        names = self._mergeable(names)
        if not names:
            return
        base, b = self.op.load()
        kept, memories, W = self.op.keep(), {}, base
        for name in names:
            with self.whole_adapter(name):
                memories[name] = self.remember(name, W, b) if kept is None else None
                W, b = self.fold(name, _wide(W), None if b is None else _wide(b))
        self.op.store(W, b)
        error = None
        if kept is not None:
            stored, _ = self.op.load()
            error = MergeError(*(t.float().norm().item() for t in (stored.float() - W, W, W - base.float())))
        self._merges.append(_Merge(memories, kept, error))
        self.merged_adapters += names

    @property
    def merge_error(self) -> MergeError | None:
        """What packing the merged weight has cost, last time; None: nothing is merged, or the weight is not packed."""
        return self._merges[-1].error if self._merges else None

    @torch.no_grad()
    def check_merge(self, adapter_names: Sequence[str]) -> None:
        """Form what merging would write, and write nothing.

        Raises:
            ValueError: it has values that are not finite, in the type in which the layer keeps its weight.
        """
        W, b = self.op.load()
        dtype = W.dtype
        for name in self._mergeable(adapter_names):
            with self.whole_adapter(name):
                W, b = self.fold(name, _wide(W), None if b is None else _wide(b))
            W = W.to(dtype)
            if not (W.isfinite().all() and (b is None or b.to(dtype).isfinite().all())):
                raise ValueError(f"Merging adapter {name!r} would give values that are not finite; nothing was merged")

    def whole_adapter(self, name: str, write: bool = False):
        """Within this context an adapter's parameters are whole and here, as in a forward; see `whole_modules`."""
        containers = [getattr(self, attribute) for attribute in self.adapter_layer_names]
        containers = [container for container in containers if name in container]
        # Bare parameters are held by the container itself; those of the other adapters come along with them.
        held = [c[name] if isinstance(c[name], nn.Module) else c for c in containers]
        parts = [part for holder in held for part in holder.modules()]
        return whole_modules(parts, write)

    def _mergeable(self, names: Sequence[str]) -> list[str]:
        new = [name for name in names if name in self._available_adapters and name not in self.merged_adapters]
        if new and not self.folds():
            raise TypeError(self.not_merged_because)
        if new and self.base_is_apart and (limit := getattr(self.get_base_layer(), "max_norm", None)) is not None:
            raise ValueError(
                f"An embedding with max_norm={limit} would shorten its merged rows as well, which the adapter beside "
                "it does not: keep the adapter as it is, or set max_norm to None"
            )
        self.check_active([*self.merged_adapters, *new])
        return new

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warn("Nothing is merged, so there is nothing to unmerge")
            return
        self.unmerge_to(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge_to(self, count: int) -> None:
        """Take merged adapters out again, the last first, until `count` are left (as after an earlier `merge`)."""
        while len(self.merged_adapters) > count:
            merge = self._merges.pop()
            if merge.kept is not None:
                self.op.put_back(merge.kept)
            else:
                W, b = self.op.load()
                for name, memory in reversed(merge.memories.items()):
                    with self.whole_adapter(name):
                        W, b = self.unfold(name, W, b, memory)
                self.op.store(W, b)
            del self.merged_adapters[-len(merge.memories) :]
        if not self.merged:
            self.op.retie()

    # Which adapters there are, which are active, which train

    def _get_available_adapters(self) -> set[str]:
        return self._available_adapters

    def has_adapter(self, name: str) -> bool:
        return any(name in getattr(self, attribute, ()) for attribute in self.adapter_layer_names)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return as_list(self._active_adapter)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make `adapter_names` the active ones: they train (unless `inference_mode`), the others do not.

        What its user froze stays frozen.
        """
        names = as_list(adapter_names)
        self.check_active(names)
        for name in self._available_adapters:
            self._set_flags(name, name in names and not inference_mode)
        self._active_adapter = names

    def train(self, mode: bool = True) -> nn.Module:
        """As nn.Module's, past those leaves of adapters that are in this mode already: there may be many adapters."""
        self.training = mode
        for child in self.children():
            if isinstance(child, nn.ModuleDict):
                child.training = mode
                for entry in child._modules.values():
                    if entry._modules or entry.training is not mode:
                        entry.train(mode)
            else:
                child.train(mode)
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off.

        `requires_grad` stays as it is: a backward pass of an earlier forward may still be to come, and autograd drops
        the gradient of a parameter that was frozen in between.
        """
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with everything it left.

        Raises:
            ValueError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged: call unmerge_adapter() before deleting it")
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (container := getattr(self, attribute)):
                del container[adapter_name]
        self._forget_flags(adapter_name)
        self._dropping.discard(adapter_name)
        if adapter_name in self.active_adapters:
            self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's change of the layer is one of a matrix, which a LoRA can approximate."""
        return self.folds() and self.op.kind != "Norm" and getattr(self.op, "groups", 1) == 1


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


class AdditiveLayer(BaseTunerLayer):
    """`W + delta_weight`: give `delta_weight`, and `delta` where the product is cheaper without forming it."""

    def delta_weight(self, name: str) -> torch.Tensor:
        """The adapter's change of the weight, (O, I, *K)."""
        raise NotImplementedError

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The adapter's change of the output for the input `x`."""
        D = self.delta_weight(name)
        return self.op.op(x, D.to(x.dtype) if x.is_floating_point() else D, None)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`delta_weight` in the orientation in which the base layer stores its weight."""
        return self.op.to_view(self.delta_weight(adapter))

    def post(self, name, x, y, before=()):
        return y + self.delta(name, x).to(y.dtype)

    @property
    def base_is_apart(self):
        return self.op.kind != "Embedding" or self.op.own_forward is None

    def _apply_adapters(self, names, x, *args, **kwargs):
        if self.base_is_apart:
            return super()._apply_adapters(names, x, *args, **kwargs)
        return self.op.op(x, *self.folded(names), *args, **kwargs)  # which rows are taken only its forward knows

    def fold(self, name, W, b):
        return W + self.delta_weight(name).to(W), b

    def remember(self, name, W, b):
        return None

    def unfold(self, name, W, b, memory):
        return _wide(W) - self.delta_weight(name).to(W.device, _wide(W).dtype), b


class ScaledLayer(AdditiveLayer):
    """`W + scaling * product`: give `product` and `_initial_scaling`; callers may change the scaling at any time."""

    other_param_names = ("r", "scaling")

    def product(self, name: str) -> torch.Tensor:
        """The change of the weight without the scaling, (O, I, *K)."""
        raise NotImplementedError

    def _initial_scaling(self, name: str) -> float:
        """The scaling that the configuration asks for."""
        raise NotImplementedError

    def delta_weight(self, name):
        return self.product(name) * self.scaling[name]

    def remember(self, name, W, b):
        """The scaling as it is merged with: it may be set anew before unmerging."""
        return self.scaling[name]

    def unfold(self, name, W, b, memory):
        now, self.scaling[name] = self.scaling[name], memory
        try:
            return super().unfold(name, W, b, None)
        finally:
            self.scaling[name] = now

    # As diffusers and transformers use it

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the delta by `scale` times what its configuration says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or (None) set it back to what the configuration says."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._initial_scaling(name) if scale is None else self.scaling[name] / scale


class LowRankLayer(AdditiveLayer):
    """`W + B A` with plain factors over all inputs of an output: give `factors`, and `dropout` where there is some.

    I K is the number of weights of one output channel: input channels (of one group) times the kernel's size.
    """

    dropout: str  # attribute that maps an adapter's name to the module that drops inputs of the delta (not tokens)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (r, I K)` and `B (O, r)`, scaled."""
        raise NotImplementedError

    def dropped(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.dropout)[name](x)

    def delta_weight(self, name):
        A, B = self.factors(name)
        return (B @ A).view(self.op.weight_shape)

    def delta(self, name, x):
        if self.op.kind not in ("Linear", "Embedding"):
            return super().delta(name, self.dropped(name, x))
        A, B = self.factors(name)
        if self.op.kind == "Linear":
            return F.linear(F.linear(self.dropped(name, x), A.to(x.dtype)), B.to(x.dtype))
        return self.op.scaled(F.linear(F.embedding(x, A.T), B))


class WeightSpaceLayer(BaseTunerLayer):
    """Methods that are a function of the weight: forward runs the op on the folded weight."""

    def _apply_adapters(self, names, x, *args, **kwargs):
        return self.op.op(x, *self.folded(names))


# Other libraries import these from here; `base` imports this module, so they cannot be imported above.
explain_missing(
    __name__,
    {
        "BasePromptEncoder": "peft.tuners.prompt_learning",
        "BaseTuner": "peft.tuners.base",
        "get_pattern_key": "peft.tuners.targeting",
        "init_empty_weights": "accelerate",
        **dict.fromkeys(["clone_module", "replicate_layers"], "peft.tuners.lora.replication"),
        **dict.fromkeys(
            ["cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"], "peft.tuners.parts"
        ),
    },
)
