"""The methods, one package or module each, on one shared core (`ops`, `tuners_utils`, `base`)."""

from .._lazy import attach
from .._names import MISSING_TABLE

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaLoraConfig": "peft.tuners.adalora",
        "AdaLoraModel": "peft.tuners.adalora",
        "CompactLoraConfig": "peft.tuners.denas",
        "DenasConfig": "peft.tuners.denas",
        "LoHaConfig": "peft.tuners.loha",
        "LoHaModel": "peft.tuners.loha",
        "LoKrConfig": "peft.tuners.lokr",
        "LoKrModel": "peft.tuners.lokr",
        "LoraConfig": "peft.tuners.lora",
        "LoraModel": "peft.tuners.lora",
        "LoraRuntimeConfig": "peft.tuners.lora",
        "SftArguments": "peft.tuners.sft",
        "SftConfig": "peft.tuners.sft",
        "SftModel": "peft.tuners.sft",
        "SsfConfig": "peft.tuners.ssf",
        "SsfModel": "peft.tuners.ssf",
        "VeraConfig": "peft.tuners.vera",
        "VeraModel": "peft.tuners.vera",
    },
    MISSING_TABLE,
    (
        "adalora",
        "base",
        "denas",
        "loha",
        "lokr",
        "lora",
        "lycoris_utils",
        "ops",
        "parts",
        "sft",
        "ssf",
        "targeting",
        "tuners_utils",
        "vera",
    ),
)
