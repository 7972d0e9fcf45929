"""`AutoPeftModel*`: base model and adapter from one adapter's folder or hub id."""

from __future__ import annotations

import os
from typing import Any

from ._lazy import explain_missing
from .config import PeftConfig, find_file, split_hub_kwargs
from .mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .peft_model import PeftModel

# Task -> transformers' class for the base model.
_BASE_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class _BaseAutoPeftModel:
    _task: str | None = None

    def __init__(self, *args, **kwargs):
        raise OSError(
            f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(...), not by its constructor"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter on it.

        Args:
            pretrained_model_name_or_path: folder or hub id of the adapter.
            revision: of the adapter; the base model's stands in the adapter's configuration.
            kwargs: for the base model's `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...);
                `subfolder`, `token` and the like are for both.

        Raises:
            ValueError: the adapter names no base model, is for another task, or was made for a class that is not one
                of transformers'.
        """
        hub, _ = split_hub_kwargs(kwargs)
        adapter_hub = {**hub, **({"revision": revision} if revision else {})}
        adapter = PeftConfig.from_pretrained(pretrained_model_name_or_path, **adapter_hub)
        name = adapter.base_model_name_or_path
        if not name:
            raise ValueError(
                f"The adapter at {pretrained_model_name_or_path} names no base model (base_model_name_or_path): load "
                "the base model yourself and use PeftModel.from_pretrained"
            )
        base_kwargs = {key: value for key, value in kwargs.items() if key not in ("subfolder", "revision")}
        if adapter.revision is not None:
            base_kwargs["revision"] = adapter.revision
        base = cls.base_class(adapter).from_pretrained(name, **base_kwargs)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, adapter_hub)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls._task or adapter.task_type, PeftModel)
        return kind.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **adapter_hub
        )

    @classmethod
    def base_class(cls, adapter: PeftConfig) -> type:
        """transformers' class for the base model of an adapter.

        Raises:
            ValueError: the adapter is for another task, or was made for a class that is not one of transformers'.
        """
        import transformers

        task = adapter.task_type or cls._task
        if cls._task not in (None, task):
            raise ValueError(f"{cls.__name__} expects adapters for {cls._task}, this one is for {task}")
        if task is not None:
            return getattr(transformers, _BASE_CLASSES[task])
        mapping = adapter.auto_mapping or {}
        # Only transformers' own classes: a file must not make us import code.
        library = str(mapping.get("parent_library", ""))
        found = getattr(transformers, str(mapping.get("base_model_class")), None)
        if library.split(".")[0] != "transformers" or found is None:
            raise ValueError(
                "The adapter's configuration has no task_type, and its auto_mapping names no class of transformers "
                f"({mapping or 'it is empty'}): use the AutoPeftModelFor... class of your task, or load the base model "
                "yourself"
            )
        return found

    @staticmethod
    def _fit_vocabulary(base, path, hub: dict) -> None:
        """Resize the embeddings if the adapter comes with a tokenizer of another size (tokens were added)."""
        if not hasattr(base, "get_input_embeddings") or find_file(path, "tokenizer_config.json", **hub) is None:
            return
        from transformers import AutoTokenizer

        size = len(AutoTokenizer.from_pretrained(path, **hub))
        if base.get_input_embeddings().weight.shape[0] < size:
            base.resize_token_embeddings(size)


class AutoPeftModel(_BaseAutoPeftModel):
    """For the task that the adapter's configuration names."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    _task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    _task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    _task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    _task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    _task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    _task = "FEATURE_EXTRACTION"


explain_missing(__name__, {cls.__name__: "peft.peft_model" for cls in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()})
