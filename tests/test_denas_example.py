"""The example of DE-NAS runs as it is called, and compares adapters of one size."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from tiny_models import make_tokenizer, save_llama

from peft import PeftConfig
from peft.tuners.denas import read_structure

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "denas_search", raising=False)
    model = save_llama(tmp_path / "model", make_tokenizer())
    output = tmp_path / "out"
    importlib.import_module("denas_search").main(["--model", model, "--steps", "3", "--output", str(output)])
    printed = capsys.readouterr().out
    even, compact = (
        int(re.search(rf"^{name}: ([\d,]+) trained", printed, re.M)[1].replace(",", "")) for name in ("even", "compact")
    )
    assert even - 96 < compact <= even
    config = PeftConfig.from_pretrained(output)
    assert config.peft_type == "LORA" and "structure" not in config.to_dict()  # an ordinary one; beside it is
    assert set(read_structure(output)) == set(config.structure) == {"num_hidden_layers", "r", "alpha"}
    assert (output / "search.png").is_file() and (output / "adapter_model.safetensors").is_file()
