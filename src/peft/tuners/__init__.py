"""The methods, one package or module each, on one shared core (`ops`, `tuners_utils`, `base`)."""

from .._lazy import attach
from .._names import MISSING_TABLE

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaptionPromptConfig": "peft.tuners.adaption_prompt",
        "AdaptionPromptModel": "peft.tuners.adaption_prompt",
        "CPTConfig": "peft.tuners.cpt",
        "CPTEmbedding": "peft.tuners.cpt",
        "LoHaConfig": "peft.tuners.loha",
        "LoHaModel": "peft.tuners.loha",
        "LoKrConfig": "peft.tuners.lokr",
        "LoKrModel": "peft.tuners.lokr",
        "VeraConfig": "peft.tuners.vera",
        "VeraModel": "peft.tuners.vera",
        "CompactLoraConfig": "peft.tuners.denas",
        "DenasConfig": "peft.tuners.denas",
        "LoraConfig": "peft.tuners.lora",
        "LoraModel": "peft.tuners.lora",
        "LoraRuntimeConfig": "peft.tuners.lora",
        "MultitaskPromptTuningConfig": "peft.tuners.multitask_prompt_tuning",
        "MultitaskPromptTuningInit": "peft.tuners.multitask_prompt_tuning",
        "PrefixEncoder": "peft.tuners.prefix_tuning",
        "PrefixTuningConfig": "peft.tuners.prefix_tuning",
        "PromptEmbedding": "peft.tuners.prompt_tuning",
        "PromptEncoder": "peft.tuners.p_tuning",
        "PromptEncoderConfig": "peft.tuners.p_tuning",
        "PromptEncoderReparameterizationType": "peft.tuners.p_tuning",
        "PromptTuningConfig": "peft.tuners.prompt_tuning",
        "PromptTuningInit": "peft.tuners.prompt_tuning",
        "SftArguments": "peft.tuners.sft",
        "SftConfig": "peft.tuners.sft",
        "SftModel": "peft.tuners.sft",
        "SsfConfig": "peft.tuners.ssf",
        "SsfModel": "peft.tuners.ssf",
    },
    MISSING_TABLE,
    (
        "adaption_prompt", "base", "cpt", "denas", "loha", "lora", "multitask_prompt_tuning", "ops", "p_tuning",
        "parts", "prefix_tuning", "prompt_tuning", "sft", "ssf", "targeting", "tuners_utils",
    ),
)  # fmt: skip
