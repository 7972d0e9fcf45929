"""Adapters of several methods in one model."""

from ..._lazy import explain_missing
from .model import COMPATIBLE_TUNER_TYPES, MixedModel

__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]

explain_missing(__name__)
