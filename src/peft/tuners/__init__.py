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
        "BOFTConfig": "peft.tuners.boft",
        "BOFTModel": "peft.tuners.boft",
        "CompactLoraConfig": "peft.tuners.denas",
        "DenasConfig": "peft.tuners.denas",
        "IA3Config": "peft.tuners.ia3",
        "IA3Model": "peft.tuners.ia3",
        "LNTuningConfig": "peft.tuners.ln_tuning",
        "LNTuningModel": "peft.tuners.ln_tuning",
        "LoraConfig": "peft.tuners.lora",
        "LoraModel": "peft.tuners.lora",
        "LoraRuntimeConfig": "peft.tuners.lora",
        "OFTConfig": "peft.tuners.oft",
        "OFTModel": "peft.tuners.oft",
        "SftArguments": "peft.tuners.sft",
        "SftConfig": "peft.tuners.sft",
        "SftModel": "peft.tuners.sft",
        "SsfConfig": "peft.tuners.ssf",
        "SsfModel": "peft.tuners.ssf",
        "TrainableTokensConfig": "peft.tuners.trainable_tokens",
        "TrainableTokensModel": "peft.tuners.trainable_tokens",
    },
    MISSING_TABLE,
    (
        "base", "boft", "bottleneck", "denas", "ia3", "ln_tuning", "loha", "lokr", "lora", "oft", "ops", "parts",
        "sft", "ssf", "targeting", "trainable_tokens", "tuners_utils", "vera",
    ),
)  # fmt: skip
