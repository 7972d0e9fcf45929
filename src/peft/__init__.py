"""Parameter-efficient fine-tuning: the API and the adapter files of Hugging Face PEFT, plus sparse fine-tuning (SFT),
scaling and shifting (SSF), and the search for compact deltas (DE-NAS).

Nothing is imported until it is used, torch included: every public name and submodule is resolved on first access, from
the one table in `_names.py`. Type checkers and IDEs read the same names from the block below.
"""

from typing import TYPE_CHECKING

__version__ = "0.21.2+sft.1"  # upstream's API level, which other libraries check, and our own release as local label

if TYPE_CHECKING:
    # fmt: off
    # isort: off
    from .auto import (
        AutoPeftModel as AutoPeftModel, AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .config import PeftConfig as PeftConfig, PromptLearningConfig as PromptLearningConfig
    from .mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING, get_peft_config as get_peft_config,
        inject_adapter_in_model as inject_adapter_in_model,
    )
    from .mapping_func import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING, get_peft_model as get_peft_model,
    )
    from .memory import MemoryEstimate as MemoryEstimate, estimate_memory as estimate_memory
    from .mixed_model import PeftMixedModel as PeftMixedModel
    from .peft_model import (
        PeftModel as PeftModel, PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering, PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification, get_layer_status as get_layer_status,
        get_model_status as get_model_status,
    )
    from .tuners.adalora import AdaLoraConfig as AdaLoraConfig, AdaLoraModel as AdaLoraModel
    from .tuners.adaption_prompt import (
        AdaptionPromptConfig as AdaptionPromptConfig, AdaptionPromptModel as AdaptionPromptModel,
    )
    from .tuners.boft import BOFTConfig as BOFTConfig, BOFTModel as BOFTModel
    from .tuners.bottleneck import BottleneckConfig as BottleneckConfig, BottleneckModel as BottleneckModel
    from .tuners.cpt import CPTConfig as CPTConfig, CPTEmbedding as CPTEmbedding
    from .tuners.denas import (
        CompactLoraConfig as CompactLoraConfig, DenasConfig as DenasConfig, search_structure as search_structure,
    )
    from .tuners.ia3 import IA3Config as IA3Config, IA3Model as IA3Model
    from .tuners.ln_tuning import LNTuningConfig as LNTuningConfig, LNTuningModel as LNTuningModel
    from .tuners.loha import LoHaConfig as LoHaConfig, LoHaModel as LoHaModel
    from .tuners.lokr import LoKrConfig as LoKrConfig, LoKrModel as LoKrModel
    from .tuners.lora import (
        EvaConfig as EvaConfig, LoftQConfig as LoftQConfig, LoraConfig as LoraConfig, LoraGAConfig as LoraGAConfig,
        LoraModel as LoraModel, LoraRuntimeConfig as LoraRuntimeConfig, convert_to_lora as convert_to_lora,
        get_eva_state_dict as get_eva_state_dict, initialize_lora_eva_weights as initialize_lora_eva_weights,
        preprocess_loraga as preprocess_loraga, save_as_lora as save_as_lora,
    )
    from .tuners.multitask_prompt_tuning import (
        MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
        MultitaskPromptTuningInit as MultitaskPromptTuningInit,
    )
    from .tuners.oft import OFTConfig as OFTConfig, OFTModel as OFTModel
    from .tuners.p_tuning import (
        PromptEncoder as PromptEncoder, PromptEncoderConfig as PromptEncoderConfig,
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from .tuners.prefix_tuning import PrefixEncoder as PrefixEncoder, PrefixTuningConfig as PrefixTuningConfig
    from .tuners.prompt_tuning import (
        PromptEmbedding as PromptEmbedding, PromptTuningConfig as PromptTuningConfig,
        PromptTuningInit as PromptTuningInit,
    )
    from .tuners.sft.config import SftArguments as SftArguments, SftConfig as SftConfig
    from .tuners.sft.model import SftModel as SftModel
    from .tuners.sft.optimizer import SftAdamW as SftAdamW, SftSM3 as SftSM3
    from .tuners.sft.selector import SftSelector as SftSelector
    from .tuners.sft.static import select_static as select_static
    from .tuners.sft.trainer import SftTrainer as SftTrainer
    from .tuners.ssf import SSFConfig as SSFConfig, SsfConfig as SsfConfig, SsfModel as SsfModel
    from .tuners.trainable_tokens import (
        TrainableTokensConfig as TrainableTokensConfig, TrainableTokensModel as TrainableTokensModel,
    )
    from .tuners.vera import VeraConfig as VeraConfig, VeraModel as VeraModel
    from .utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError, PeftError as PeftError
    from .utils.loftq_utils import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .utils.other import (
        cast_mixed_precision_params as cast_mixed_precision_params,
        prepare_model_for_kbit_training as prepare_model_for_kbit_training, shift_tokens_right as shift_tokens_right,
    )
    from .utils.peft_types import PeftType as PeftType, TaskType as TaskType
    from .utils.save_and_load import (
        get_base_model_state_dict as get_base_model_state_dict, get_peft_model_state_dict as get_peft_model_state_dict,
        load_peft_weights as load_peft_weights, set_base_model_state_dict as set_base_model_state_dict,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from .utils.warning import PeftWarning as PeftWarning
    # isort: on
    # fmt: on
else:
    from ._lazy import attach
    from ._names import SUBMODULES, TABLE

    __getattr__, __dir__, __all__ = attach(__name__, TABLE, SUBMODULES)
    del attach, SUBMODULES, TABLE
