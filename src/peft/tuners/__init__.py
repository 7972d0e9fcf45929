"""The methods, one package or module each, on one shared core (`ops`, `tuners_utils`, `base`)."""

from .._lazy import attach
from .._names import MISSING_TABLE

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LoHaConfig": "peft.tuners.loha",
        "LoHaModel": "peft.tuners.loha",
        "LoKrConfig": "peft.tuners.lokr",
        "LoKrModel": "peft.tuners.lokr",
        "VeraConfig": "peft.tuners.vera",
        "VeraModel": "peft.tuners.vera",
        "AdaLoraConfig": "peft.tuners.adalora",
        "AdaLoraModel": "peft.tuners.adalora",
        "CompactLoraConfig": "peft.tuners.denas",
        "DenasConfig": "peft.tuners.denas",
        "LoraConfig": "peft.tuners.lora",
        "LoraModel": "peft.tuners.lora",
        "LoraRuntimeConfig": "peft.tuners.lora",
        "SftArguments": "peft.tuners.sft",
        "SftConfig": "peft.tuners.sft",
        "SftModel": "peft.tuners.sft",
        "SsfConfig": "peft.tuners.ssf",
        "SsfModel": "peft.tuners.ssf",
    },
    MISSING_TABLE,
    ("base", "loha", "denas", "lora", "ops", "parts", "sft", "ssf", "targeting", "tuners_utils"),
)
