"""LoRA layers: the mathematics of `W + scaling * B A` for linear, convolution and embedding layers.

`LoraLayer` holds what they share; in memory the factors are modules (`layer.lora_A["default"].weight`), for embeddings
bare parameters (`lora_embedding_A`). Letters: O out, I in, r rank, K kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..._lazy import explain_missing
from ...utils.loftq_utils import loftq_init
from ...utils.mixed_batch import runs_of
from ...utils.placement import home_device, offload_hook
from ...utils.quantization_utils import is_quantized
from ..ops import is_plain, no_global_hooks
from ..tuners_utils import BASE_ADAPTER, BaseTunerLayer, ScaledLayer
from .config import PREPARED_INITS
from .fused import fused_lora, lora_delta
from .init import at_work, check_start, factors_out_of, init_function
from .prepared import prepared
from .variants import Variant, variant_of

# Names under which callers find arguments that variants take; none of ours takes any.
VARIANT_KWARG_KEYS: list[str] = []
# In a mixed batch rows of fewer tokens are brought together by adapter, and rows of more are products of their own.
FEW_TOKENS = 16


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoraLayer(ScaledLayer):
    """What LoRA layers of all kinds share. A mixin: concrete layers inherit `nn.Module` too."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "lora_bias", "lora_variant")
    module_dicts = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")
    bare_in_files = ("lora_magnitude_vector",)
    lora_variant: dict[str, Variant]

    def update_layer(self, name, config, *, r: int, lora_alpha: float) -> None:
        self.r[name] = r
        self.lora_alpha[name] = lora_alpha
        self.use_rslora[name] = config.use_rslora
        self.lora_bias[name] = config.lora_bias
        self.scaling[name] = self._initial_scaling(name)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.create_factors(name, r, config.lora_bias)
        self.reset_lora_parameters(name, config.init_lora_weights)
        if (variant := variant_of(config)) is not None:
            self.lora_variant[name] = variant
            variant.create(self, name)

    @property
    def use_dora(self) -> dict[str, bool]:
        return {name: name in self.lora_magnitude_vector for name in self.r}

    def _initial_scaling(self, name: str) -> float:
        return self.op.lora_gain * scaling_of(self.r[name], self.lora_alpha[name], self.use_rslora[name])

    def create_factors(self, name: str, r: int, bias: bool) -> None:
        """Create `lora_A[name]` and `lora_B[name]`."""
        raise NotImplementedError

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters `A (r, I, *K)` and `B (O, r, ...)`."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def product(self, name):
        A, B = self.factors(name)
        return B @ A

    def reset_lora_parameters(self, name: str, init_lora_weights: bool | str) -> None:
        A, B = self.factors(name)
        if A.is_meta:
            return
        init_function(init_lora_weights)(A, B, self.r[name])
        if self.lora_bias[name]:
            nn.init.zeros_(self.lora_B[name].bias)

    def base_change(self, name, config):
        change, variant = self._init_change(name, config), self.lora_variant.get(name)
        if variant is None:
            return change

        def change_and_start():
            if change is not None:
                change()
            variant.start(self, name, config)

        return change_and_start

    def _init_change(self, name: str, config) -> Callable[[], None] | None:
        """What changes the base weight and fills the factors, for initialisations that do so.

        For an adapter from a file this repeats what was done for it; its own factors come from the file.

        Raises:
            ValueError: the layer is not a plain linear one of its own, or has other adapters.
        """
        base = self.get_base_layer()
        init = config.init_lora_weights
        out_of = factors_out_of(config)
        is_loftq = init == "loftq"
        if not is_loftq and init not in PREPARED_INITS and out_of is None:
            return None
        if config.from_file and (is_quantized(base) if is_loftq else self.op.kind == "Embedding"):
            return None  # quantised already; upstream never changes tables
        if home_device(base).type == "meta":
            return None
        if is_quantized(base):
            raise ValueError(
                f"init_lora_weights={init!r} changes plain weights, and these are packed already: "
                + (
                    "leave it out and call replace_lora_weights_loftq(model) on the finished model"
                    if is_loftq
                    else "save the changed model in plain form first, and pack that"
                )
            )
        if self.op.kind != "Linear" or self.op.shared or offload_hook(base) is not None:
            raise ValueError(
                f"init_lora_weights={init!r} is for linear layers whose weight is not tied to another module's and not "
                f"off-loaded, and this {type(base).__name__} is not one: leave it out of target_modules"
            )
        if len(self._available_adapters) > 1 and not (is_loftq and config.from_file):
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weights, which other adapters of the model were made "
                "for: only a model's first adapter can be initialised so. To use it beside others, convert it to a "
                "plain one (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if is_loftq:
            bits, turns = (config.loftq_config[field] for field in ("loftq_bits", "loftq_iter"))
            return partial(self._apply_loftq, name, bits, turns)
        check_start(init, self.op.weight_shape, self.r[name], self.scaling[name])
        if init in PREPARED_INITS:
            out_of = prepared(base, init, self.r[name])
        return partial(self._take_out, name, config, out_of)

    def _apply_loftq(self, name: str, bits: int, turns: int) -> None:
        """Quantise the base weight, and let the adapter make up for the error (see `utils.loftq_utils`)."""
        W, b = self.op.load()
        Q, A, B = loftq_init(W.detach(), bits, self.r[name], turns)
        self.op.store(Q, b)
        self.set_factors(name, A, B)

    @torch.no_grad()
    def _take_out(self, name: str, config, out_of: Callable) -> None:
        """Move a part of the base weight into the factors."""
        W, b = self.op.load()
        wide = at_work(W, config).to(torch.promote_types(W.dtype, torch.float32))
        A, B = out_of(wide, self.r[name], self.scaling[name])
        self.op.store((wide - self.scaling[name] * (B @ A)).to(W.device), b)
        self.set_factors(name, A, B * self.scaling[name])

    def set_factors(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Start from the delta `B A`, scaling included."""
        for factor, value in zip(self.factors(name), (A, B / self.scaling[name])):
            if not factor.is_meta:
                factor.data.copy_(value)

    @torch.no_grad()
    def set_rank(self, name: str, lora_alpha: float, A: torch.Tensor, B: torch.Tensor) -> None:
        """Start from the factors `A (r, I)`, `B (O, r)` of whatever rank; parameters stay those that they were.

        (Those on the meta device are replaced by ones where the base layer is.)
        """
        self.r[name], self.lora_alpha[name] = len(A), lora_alpha
        self.scaling[name] = self._initial_scaling(name)
        home = home_device(self.get_base_layer())
        for module, value, size in ((self.lora_A[name], A, "out_features"), (self.lora_B[name], B, "in_features")):
            old = module.weight
            if old.is_meta:
                module.weight = nn.Parameter(value.to(home, old.dtype), requires_grad=old.requires_grad)
            else:
                old.data = value.to(old)
            setattr(module, size, len(A))

    def _delta_bias(self, name: str) -> torch.Tensor | None:
        if not self.lora_bias[name]:
            return None
        return self.lora_B[name].bias * (self.scaling[name] / self.op.lora_gain)

    def post(self, name, x, y, before=()):
        variant = self.lora_variant.get(name)
        return super().post(name, x, y, before) if variant is None else variant.post(self, name, x, y, before)

    def fold(self, name, W, b):
        if (variant := self.lora_variant.get(name)) is not None:
            return variant.fold(self, name, W, b)
        W, b = super().fold(name, W, b)
        bias = self._delta_bias(name)
        if bias is None:
            return W, b
        return W, bias.detach() if b is None else b + bias.to(b)

    def remember(self, name, W, b):
        """The scaling as it is merged with (it may be set anew before unmerging), and the bias; of variants all."""
        if name in self.lora_variant:
            return BaseTunerLayer.remember(self, name, W, b)
        return float(super().remember(name, W, b)), None if b is None else b.detach()

    def unfold(self, name, W, b, memory):
        if name in self.lora_variant:
            return memory
        scaling, bias = memory
        W, b = super().unfold(name, W, b, scaling)
        return W, bias if self.lora_bias[name] else b

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class Linear(LoraLayer, nn.Module):
    """LoRA on `nn.Linear` and everything like it (transformers' Conv1D, packed linear layers)."""

    def create_factors(self, name, r, bias):
        self.lora_A[name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[name] = nn.Linear(r, self.out_features, bias=bias)

    def delta(self, name, x):
        A, B, s = self._adapter(name)
        if self.op.lora_gain != 1 and self.lora_bias[name]:  # the gain is the product's, not the bias's
            x = self.lora_dropout[name](x)
            return self.op.op(x, self.delta_weight(name).to(x.dtype), self._delta_bias(name).to(x.dtype))
        return lora_delta(self.lora_dropout[name](x), A, B, s, self.cast_input_dtype_enabled)

    def post(self, name, x, y, before=()):
        if name in self.lora_variant or self.op.lora_gain != 1:
            return super().post(name, x, y, before)
        A, B, s = self._adapter(name)
        return lora_delta(self.lora_dropout[name](x), A, B, s, self.cast_input_dtype_enabled, onto=y)

    def _adapter(self, name: str) -> tuple[nn.Module, nn.Module, float]:
        return self.lora_A[name], self.lora_B[name], self.scaling[name]

    def _fused(self, names: Sequence[str]) -> int:
        """How many of the first of these adapters one product takes: plain ones, which drop nothing or are alone."""
        if not no_global_hooks():
            return 0
        for count, name in enumerate(names):
            A, B, s = self._adapter(name)
            if name in self.lora_variant or not (is_plain(A) and is_plain(B) and isinstance(s, float)):
                return count
            if self._drops(name):
                return max(1, count)
        return len(names)

    def _drops(self, name: str) -> bool:
        return self.training and not isinstance(self.lora_dropout[name], nn.Identity)

    def _has_plain_call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> bool:
        """Whether all that a call of the base layer with these arguments does is the product of a plain layer."""
        base = self.base_layer
        return type(base) is nn.Linear and is_plain(base) and not args and not kwargs and x.is_floating_point()

    def _apply_adapters(self, names, x, *args, **kwargs):
        count = self._fused(names) if self._has_plain_call(x, args, kwargs) else 0
        if not count:
            return super()._apply_adapters(names, x, *args, **kwargs)
        first = names[0]
        dropped = self.lora_dropout[first](x) if self._drops(first) else None
        adapters = [self._adapter(name) for name in names[:count]]
        y = fused_lora(x, dropped, self.base_layer, [(0, x.shape[:-1].numel(), adapters)])
        for i, name in enumerate(names[count:], start=count):
            y = self.post(name, x, y, names[:i])
        return y

    def _apply_by_row(self, names, x, *args, **kwargs):
        own = [name for name in dict.fromkeys(names) if name != BASE_ADAPTER]
        fused = self._has_plain_call(x, args, kwargs) and x.dim() > 1 and own and self._fused(own) == len(own)
        tokens = x[:1].numel() // x.shape[-1]
        runs = runs_of(names)
        scattered = len(runs) > len(set(names)) and tokens < FEW_TOKENS
        if not fused or len(names) != len(x) or scattered or any(map(self._drops, own)):
            return super()._apply_by_row(names, x, *args, **kwargs)
        ways = [(start * tokens, stop * tokens, [self._adapter(n)]) for n, start, stop in runs if n != BASE_ADAPTER]
        return fused_lora(x, None, self.base_layer, ways)


class MultiheadAttention(Linear):
    """LoRA on the packed in-projection of `nn.MultiheadAttention`; its `out_proj` has a layer of its own."""


class _ConvNd(LoraLayer, nn.Module):
    """LoRA on convolutions: A has the base layer's kernel, B is a 1x1 convolution."""

    def create_factors(self, name, r, bias):
        base = self.get_base_layer()
        if base.groups != 1:
            raise ValueError(
                f"LoRA on a grouped convolution (groups={base.groups}) cannot be merged into its weight: leave it out "
                "of target_modules"
            )
        kind = type(self).conv
        self.lora_A[name] = kind(
            base.in_channels, r, base.kernel_size, base.stride, base.padding, base.dilation,
            bias=False, padding_mode=base.padding_mode,
        )  # fmt: skip
        self.lora_B[name] = kind(r, base.out_channels, 1, bias=bias)

    def product(self, name):
        A, B = self.factors(name)
        return torch.einsum("or,ri...->oi...", B.flatten(1), A)

    def delta(self, name, x):
        A, B = self.lora_A[name], self.lora_B[name]
        hidden = self.lora_dropout[name](x)
        if A.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            hidden = A._conv_forward(hidden, A.weight.to(x.dtype), None)
            y = B._conv_forward(hidden, B.weight.to(x.dtype), None if B.bias is None else B.bias.to(x.dtype))
        else:
            y = B(A(hidden))
        return y * self.scaling[name]


class Conv1d(_ConvNd):
    conv = nn.Conv1d


class Conv2d(_ConvNd):
    conv = nn.Conv2d


class Conv3d(_ConvNd):
    conv = nn.Conv3d


class Embedding(LoraLayer, nn.Module):
    """LoRA on `nn.Embedding`: A is (r, tokens), B is (width, r), both bare parameters. There is no dropout."""

    def create_factors(self, name, r, bias):
        if bias:
            raise ValueError("lora_bias=True is for layers with a bias; leave embeddings out of target_modules")
        self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, self.in_features))
        self.lora_embedding_B[name] = nn.Parameter(torch.zeros(self.out_features, r))

    def factors(self, name):
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def reset_lora_parameters(self, name, init_lora_weights):
        A, B = self.factors(name)
        if A.is_meta:
            return
        if init_lora_weights is True:
            # A row of the table is one column of B A: A zero and B normal, as embeddings are drawn.
            nn.init.zeros_(A)
            nn.init.normal_(B)
        elif init_lora_weights is False:
            nn.init.normal_(A)
            nn.init.normal_(B)
        else:
            init_function(init_lora_weights)(A, B, self.r[name])

    def delta(self, name, x):
        A, B = self.factors(name)
        return self.op.scaled(F.linear(F.embedding(x, A.T), B) * self.scaling[name])


explain_missing(
    __name__,
    {
        "ParamWrapper": "peft.tuners.lora.parameters",
        **dict.fromkeys(["dequantize_module_weight", "gather_params_ctx"], "peft.utils.integrations"),
    },
)
