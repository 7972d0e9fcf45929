"""Which optional libraries are installed: answered without importing any of them.

The functions and the version flags keep upstream's names, because training frameworks import them from here. A library
counts as available when its package can be found and is a real package: a folder of the same name that happens to lie
in the working directory does not. Whether the library then works on this machine shows when it is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

from packaging.version import Version


@functools.cache
def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@functools.cache
def _has_version(distribution: str, minimum: str) -> bool:
    try:
        return Version(importlib.metadata.version(distribution)) >= Version(minimum)
    except importlib.metadata.PackageNotFoundError:
        return False


is_bnb_available = functools.partial(_is_installed, "bitsandbytes")  # 8-bit and 4-bit storage, 8-bit optimisers
is_bnb_4bit_available = functools.partial(_has_version, "bitsandbytes", "0.39.0")  # the first with 4-bit linear layers
is_aqlm_available = functools.partial(_is_installed, "aqlm")  # additive quantisation
is_diffusers_available = functools.partial(_is_installed, "diffusers")
is_eetq_available = functools.partial(_is_installed, "eetq")  # 8-bit storage
is_gptqmodel_available = functools.partial(_is_installed, "gptqmodel")  # GPTQ and AWQ storage
is_hqq_available = functools.partial(_is_installed, "hqq")  # half-quadratic quantisation
is_inc_available = functools.partial(_is_installed, "neural_compressor")  # Intel's
is_optimum_available = functools.partial(_has_version, "optimum", "0")  # a namespace package: it has no file to find
is_te_available = functools.partial(_is_installed, "transformer_engine")
is_torchao_available = functools.partial(_is_installed, "torchao")
is_torchao_ge_v0_18_0 = functools.partial(_has_version, "torchao", "0.18.0")


def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine is installed with its PyTorch extension, a distribution of its own."""
    return is_te_available() and _is_installed("transformer_engine_torch")


@functools.cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed and, with `check_device`, gives a device."""
    if not _is_installed("torch_xla"):
        return False
    if not check_device:
        return True
    import torch_xla.core.xla_model

    try:
        torch_xla.core.xla_model.xla_device()
    except RuntimeError:  # what torch_xla raises where there is no such device
        return False
    return True


@functools.cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Intel GPU and, with `check_device`, can put a tensor on it."""
    import torch

    if not torch.xpu.is_available():
        return False
    if check_device:
        try:
            torch.empty(1, device="xpu")
        except RuntimeError:  # seen by the driver, but not usable
            return False
    return True


is_transformers_ge_v5 = _has_version("transformers", "5.0.0")
is_transformers_ge_v5_1_0 = _has_version("transformers", "5.1.0")
is_transformers_ge_v5_4_0 = _has_version("transformers", "5.4.0")
is_transformers_ge_v5_6_0 = _has_version("transformers", "5.6.0")
is_transformers_ge_v5_13_0 = _has_version("transformers", "5.13.0")
is_transformers_ge_v5_17_0 = _has_version("transformers", "5.17.0")
