"""Parameter-efficient fine-tuning: the API and the adapter files of Hugging Face PEFT, plus sparse fine-tuning (SFT)
and scaling and shifting (SSF).

Nothing is imported until it is used, torch included: every public name and submodule is resolved on first access, from
the one table in `_names.py`. Type checkers and IDEs read the same names from the block below.
"""

from typing import TYPE_CHECKING

__version__ = "0.21.2+sft.1"  # upstream's API level, which other libraries check, and our own release as local label

if TYPE_CHECKING:
    from .auto import (
        AutoPeftModel as AutoPeftModel,
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .config import (
        PeftConfig as PeftConfig,
        PromptLearningConfig as PromptLearningConfig,
    )
    from .mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config as get_peft_config,
        inject_adapter_in_model as inject_adapter_in_model,
    )
    from .mapping_func import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        get_peft_model as get_peft_model,
    )
    from .mixed_model import (
        PeftMixedModel as PeftMixedModel,
    )
    from .peft_model import (
        PeftModel as PeftModel,
        PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification,
        get_layer_status as get_layer_status,
        get_model_status as get_model_status,
    )
    from .tuners.lora import (
        LoraConfig as LoraConfig,
        LoraModel as LoraModel,
        LoraRuntimeConfig as LoraRuntimeConfig,
    )
    from .tuners.sft import (
        SftAdamW as SftAdamW,
        SftArguments as SftArguments,
        SftConfig as SftConfig,
        SftModel as SftModel,
        SftSelector as SftSelector,
        SftSM3 as SftSM3,
        SftTrainer as SftTrainer,
    )
    from .tuners.ssf import (
        SSFConfig as SSFConfig,
        SsfConfig as SsfConfig,
        SsfModel as SsfModel,
    )
    from .utils import (
        NoMatchingPeftModuleError as NoMatchingPeftModuleError,
        PeftError as PeftError,
        PeftType as PeftType,
        PeftWarning as PeftWarning,
        TaskType as TaskType,
        cast_mixed_precision_params as cast_mixed_precision_params,
        get_base_model_state_dict as get_base_model_state_dict,
        get_peft_model_state_dict as get_peft_model_state_dict,
        load_peft_weights as load_peft_weights,
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
        set_base_model_state_dict as set_base_model_state_dict,
        set_peft_model_state_dict as set_peft_model_state_dict,
        shift_tokens_right as shift_tokens_right,
    )
else:
    from ._lazy import attach
    from ._names import MISSING_TABLE, SUBMODULES, TABLE

    __getattr__, __dir__, __all__ = attach(__name__, TABLE, MISSING_TABLE, SUBMODULES)
    del attach, MISSING_TABLE, SUBMODULES, TABLE
