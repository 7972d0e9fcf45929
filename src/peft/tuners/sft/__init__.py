"""Sparse fine-tuning (SFT, "SpIEL", arXiv 2401.16405): k chosen weights are trained, and re-chosen while training."""

from ..._lazy import attach
from ..._names import TABLE

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"peft{module}" for name, module in TABLE.items() if module.startswith(".tuners.sft.")}
    | {"SftLayer": "peft.tuners.sft.layer", "SparseDelta": "peft.tuners.sft.layer"},
)
