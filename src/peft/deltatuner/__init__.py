"""deltatuner's interface: `optimize` a model with a compact LoRA, SSF or SFT, found by DE-NAS.

    from peft.deltatuner import deltatuner, deltatuner_args

A thin layer over `peft.tuners.denas`.
"""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"DeltaTunerArguments": "peft.deltatuner.deltatuner_args", "optimize": "peft.deltatuner.deltatuner"},
    submodules=("deltatuner", "deltatuner_args"),
)
