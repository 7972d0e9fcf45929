"""What a model's adapters are and do, layer by layer and as a whole: what is active, merged, training, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .tuners.tuners_utils import BaseTunerLayer
from .utils.other import AdapterParts, walk
from .utils.quantization_utils import find_backend, logical_numels

Irregular = Literal["irregular"]  # layers disagree


@dataclass
class TunerLayerStatus:
    """The adapters of one layer, or of one module that is trained whole (`modules_to_save`)."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The adapters of a model; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trained, all)` numbers of parameters.

    Packed weights count those they encode; the positions of sparse deltas are no parameters.
    """
    positions = {
        id(tensor)
        for _, layer in walk(model)
        if isinstance(layer, BaseTunerLayer)
        for name in layer._available_adapters
        for _, tensor in layer.adapter_tensors(name)
        if not tensor.is_floating_point()
    }
    counts = [(n, p.requires_grad) for p, n in logical_numels(model) if id(p) not in positions]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _agree(values) -> bool | list | Irregular:
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _module_type(layer: nn.Module) -> str:
    """ "lora.Linear" for the adapter layers of our methods (package and class), the class for anything else."""
    module, name = type(layer).__module__, type(layer).__name__
    return f"{module.split('.')[2]}.{name}" if module.startswith("peft.tuners.") else name


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of everything that holds adapters in a `PeftModel` or in a model with injected adapters.

    Raises:
        ValueError: the model has no adapter layers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = "model." if base is not model else ""
    rows = []
    for path, layer in base.named_modules():
        if not isinstance(layer, AdapterParts) or not layer.adapter_layer_names:
            continue
        names = sorted(layer._available_adapters)
        tensors = {n: [t for _, t in layer.adapter_tensors(n) if t.is_floating_point()] for n in names}
        backend = find_backend(layer.get_base_layer()) if isinstance(layer, BaseTunerLayer) else None
        rows.append(
            TunerLayerStatus(
                name=prefix + path,
                module_type=_module_type(layer),
                enabled=not layer.disable_adapters,
                active_adapters=layer.active_adapters,
                merged_adapters=list(getattr(layer, "merged_adapters", [])),
                requires_grad={n: _agree(t.requires_grad for t in tensors[n]) for n in names if tensors[n]},
                available_adapters=names,
                devices={n: sorted({t.device.type for t in tensors[n]}) for n in names},
                quantization_backend=None if backend is None else backend.name,
            )
        )
    if not rows:
        raise ValueError(f"{type(base).__name__} has no adapter layers: there is no status to report")
    return rows


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapter layers together.

    Raises:
        ValueError: the model has no adapter layers.
    """
    layers = get_layer_status(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = sorted({name for layer in layers for name in layer.available_adapters})
    trained, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(getattr(model, "base_model", None)).__name__ if base is not model else "None",
        peft_types={
            n: getattr(c.peft_type, "value", c.peft_type) for n, c in getattr(model, "peft_config", {}).items()
        },
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agree(layer.enabled for layer in layers),
        active_adapters=_agree(layer.active_adapters for layer in layers),
        # Modules that are trained whole are never merged, and cannot disagree.
        merged_adapters=_agree(m.merged_adapters for m in base.modules() if isinstance(m, BaseTunerLayer)),
        requires_grad={n: _agree(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, [])}) for n in names},
        quantization_backend=layers[0].quantization_backend,
    )
