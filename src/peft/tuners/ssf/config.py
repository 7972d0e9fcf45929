"""Configuration of SSF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...config import PeftConfig, documented
from ...utils.peft_types import PeftType
from ..common_config import check_layer_selection


@documented
@dataclass
class SsfConfig(PeftConfig):
    """SSF: one scale and one shift per output channel, `y' = y * scale + shift` (arXiv 2210.08823, eq. 4).

    Raises:
        ValueError: a value outside its range; it is named with the rule.
    """

    target_modules: list[str] | str | None = None
    """Modules to adapt: a list of names (matched at the end of a module's name), a regular expression for the whole
    name, or "all-linear". None: every linear layer of the backbone (attention and MLP), the head left out."""
    exclude_modules: list[str] | str | None = None
    """Modules not to adapt, given like target_modules."""
    bias: Literal["none", "all"] | None = "none"
    """Whether the base model's biases train as well. (None, in files of deltatuner, means "none".)"""
    init_ssf_weights: bool | Literal["normal"] = True
    """True: scale 1 and shift 0, so that the model starts as it was. "normal": the paper's draw, scale ~ N(1, 0.02),
    shift ~ N(0, 0.02)."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole beside the adapter, such as a new classification head."""
    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; None: all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that the layer numbers count in, such as "layers" or "h"; None: the first number in a name."""

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SSF
        self.bias = "none" if self.bias is None else self.bias
        if self.bias not in ("none", "all"):
            raise ValueError(f"bias must be 'none' or 'all', got {self.bias!r}")
        if self.init_ssf_weights not in (True, "normal"):
            raise ValueError(f"init_ssf_weights must be True or 'normal', got {self.init_ssf_weights!r}")
        check_layer_selection(self)
