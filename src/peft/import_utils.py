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
def _installed_version(distribution: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_version(distribution: str, minimum: str) -> bool:
    installed = _installed_version(distribution)
    return installed is not None and installed >= Version(minimum)


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed (8-bit and 4-bit storage, 8-bit optimisers)."""
    return _is_installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether the installed bitsandbytes has 4-bit linear layers (since 0.39)."""
    return is_bnb_available() and _has_version("bitsandbytes", "0.39.0")


def is_aqlm_available() -> bool:
    """Whether AQLM (additive quantisation) is installed."""
    return _is_installed("aqlm")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_installed("diffusers")


def is_eetq_available() -> bool:
    """Whether EETQ (8-bit storage) is installed."""
    return _is_installed("eetq")


def is_gptqmodel_available() -> bool:
    """Whether GPTQModel (GPTQ and AWQ storage) is installed."""
    return _is_installed("gptqmodel")


def is_hqq_available() -> bool:
    """Whether HQQ (half-quadratic quantisation) is installed."""
    return _is_installed("hqq")


def is_inc_available() -> bool:
    """Whether Intel Neural Compressor is installed."""
    return _is_installed("neural_compressor")


def is_optimum_available() -> bool:
    """Whether Optimum is installed."""
    return _installed_version("optimum") is not None  # a namespace package: it has no file that could be looked for


def is_te_available() -> bool:
    """Whether Transformer Engine is installed."""
    return _is_installed("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine is installed with its PyTorch extension, a distribution of its own."""
    return is_te_available() and _is_installed("transformer_engine_torch")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _is_installed("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao 0.18.0 or newer is installed."""
    return is_torchao_available() and _has_version("torchao", "0.18.0")


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
