"""The model card (`README.md`) beside a saved adapter."""

from __future__ import annotations

import os

from ..config import write_text

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

_TEXT = """
# {method} adapter{of_base}

{trained:,} trained parameters ({share:.3%} of {total:,}), written by PEFT {version}.

```python
from peft import {auto}

model = {auto}.from_pretrained("path/or/hub-id of this adapter")
```
"""


def write_model_card(model, folder: str | os.PathLike) -> None:
    """Write the card of a `PeftModel`, or update the metadata of the card that is there (its text is kept)."""
    from huggingface_hub import ModelCard, ModelCardData

    from .. import __version__

    path = os.path.join(folder, "README.md")
    # Of the active adapter; where none is, of the first.
    config = model.peft_config.get(model.active_adapter) or next(iter(model.peft_config.values()))
    base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None)
    base = None if not base or os.path.isdir(base) else base
    method = getattr(config.peft_type, "value", str(config.peft_type))
    task = getattr(config.task_type, "value", config.task_type)
    if os.path.exists(path):
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        trained, total = model.get_nb_trainable_parameters()
        text = _TEXT.format(
            method=method,
            of_base=f" of {base}" if base else "",
            trained=trained,
            total=total,
            share=trained / max(1, total),
            version=__version__,
            auto=type(model).__name__.replace("PeftModel", "AutoPeftModel"),
        )
        card = ModelCard("---\n" + ModelCardData().to_yaml() + "\n---\n" + text)
    card.data.library_name = "peft"
    if base:
        card.data.base_model = base
    if task in _PIPELINES and card.data.get("pipeline_tag") is None:
        card.data.pipeline_tag = _PIPELINES[task]
    tags = {*(card.data.get("tags") or []), method.lower(), *([f"base_model:adapter:{base}"] if base else [])}
    card.data.tags = sorted(tags)
    write_text(path, str(card))
