"""One library's part of the interoperability check; run by `run.py` with the interpreter that has the library.

    worker.py bases FOLDER SEED            write the base models and the inputs that both libraries share
    worker.py save FOLDER LIBRARY          make every case's adapters, save them and what they compute
    worker.py load FOLDER LIBRARY OTHER    load what the other library saved, and compare

What a case gives or how it failed goes into JSON files; only `run.py` judges.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from cases import BASES, CASES, PLAIN, Case, make_inputs, outputs
from safetensors.torch import load_file, save_file
from torch import nn


def write_bases(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    for name, make in BASES.items():
        model, path = make(), folder / "bases" / name
        path.mkdir(parents=True)
        if name in PLAIN:
            save_file(model.state_dict(), path / "model.safetensors")
        else:
            model.save_pretrained(path)
        save_file(make_inputs(name), path / "inputs.safetensors")


def load_base(folder: Path, case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The base model and its inputs, from the files."""
    path = folder / "bases" / case.base
    inputs = load_file(path / "inputs.safetensors")
    if case.base in PLAIN:
        model = PLAIN[case.base]()
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model.eval(), inputs
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(path).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(path, dtype=case.dtype)
    return model.eval(), inputs


def adapter_folder(folder: Path, library: str, case: Case, adapter: str) -> Path:
    """Where `save_pretrained` puts an adapter: in the folder itself, or in one of the adapter's name."""
    saved = folder / library / case.name
    return saved if adapter == "default" else saved / adapter


def compute(model: nn.Module, inputs: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """What the model gives with each adapter, without any, and with another one per row of the batch."""
    results = {}
    extra = {key: torch.tensor(value) for key, value in case.extra.items()}
    with torch.no_grad():
        for name in case.adapters:
            model.set_adapter(name)
            results[name] = outputs(model(**inputs, **extra))
        if case.is_prompt and not hasattr(model.get_base_model(), "prepare_inputs_for_generation"):
            results["(disabled)"] = outputs(model.get_base_model()(**inputs))  # upstream cannot disable such prompts
        else:
            with model.disable_adapter():
                results["(disabled)"] = outputs(model(**inputs))
        if len(case.adapters) > 1 and case.upstream_mixes:
            results["(mixed)"] = outputs(model(**inputs, adapter_names=[*case.adapters, "__base__"]))
        model.set_adapter(next(iter(case.adapters)))
    return {name: result.clone() for name, result in results.items()}


def state(model: nn.Module, case: Case) -> dict:
    """Everything about an adapted model, other than its numbers, that programs can see."""
    from peft import get_peft_model_state_dict

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model.print_trainable_parameters()
    tensors = {name: get_peft_model_state_dict(model, adapter_name=name) for name in case.adapters}
    return {
        "class": type(model).__name__,
        "peft_type": str(model.peft_type.value),
        "active_adapter": model.active_adapter,
        "active_adapters": list(model.active_adapters),
        "printed": printed.getvalue().strip(),
        "parameters": {_plain(n): [list(p.shape), str(p.dtype), p.requires_grad] for n, p in model.named_parameters()},
        "state_dict": {a: {k: [list(t.shape), str(t.dtype)] for k, t in ts.items()} for a, ts in tensors.items()},
        "model_status": None if case.is_prompt else asdict(model.get_model_status()),
        "layer_status": []
        if case.is_prompt
        else sorted((asdict(s) for s in model.get_layer_status()), key=lambda s: s["name"]),
    }


def _plain(name: str) -> str:
    """The name of a parameter; in adapted attention upstream has others, and the last adapter alone."""
    inside = re.sub(r"attn\.(model|base_layer)\.", "attn.", name)
    return re.sub(r"(adaption_\w+)\.default$", r"\1", inside)


def save(folder: Path, library: str, case: Case) -> dict:
    import peft

    base, inputs = load_base(folder, case)
    torch.manual_seed(0)
    (first, config), *others = case.adapters.items()
    make_config = getattr(peft, case.config)
    model = peft.get_peft_model(base, make_config(**config), adapter_name=first)
    for name, config in others:
        model.add_adapter(name, make_config(**config))
    with torch.no_grad():
        for name in case.adapters:  # so that nothing that is trained is as it was
            model.set_adapter(name)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_adapter(first)
    model.eval()
    report = state(model, case)
    path = folder / library / case.name
    model.save_pretrained(path)
    save_file(compute(model, inputs, case), path / "outputs.safetensors")
    for name in case.adapters:
        own = adapter_folder(folder, library, case, name)
        report.setdefault("files", {})[name] = sorted(file.name for file in own.iterdir() if file.is_file())
        report.setdefault("configs", {})[name] = json.loads((own / "adapter_config.json").read_text())
    return report


def load(folder: Path, library: str, other: str, case: Case) -> dict:
    """Load the other library's adapters, compare, and save them again."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    base, inputs = load_base(folder, case)
    (first, *others), expected = case.adapters, load_file(folder / other / case.name / "outputs.safetensors")
    model = PeftModel.from_pretrained(base, adapter_folder(folder, other, case, first), adapter_name=first)
    for name in others:
        model.load_adapter(adapter_folder(folder, other, case, name), adapter_name=name)
    model.eval()
    again = folder / f"{library} loads {other}" / case.name
    model.save_pretrained(again)
    report = {"tensors": {}, "configs": {}, "class": type(model).__name__}
    for name in case.adapters:
        source = adapter_folder(folder, other, case, name)
        tensors, own = (
            load_file(source / "adapter_model.safetensors"),
            get_peft_model_state_dict(model, adapter_name=name),
        )
        report["tensors"][name] = sorted(
            key for key in {*tensors, *own} if key not in tensors or key not in own or not tensors[key].equal(own[key])
        )
        resaved = again if name == "default" else again / name
        report["configs"][name] = json.loads((resaved / "adapter_config.json").read_text())
        PeftConfig.from_pretrained(source)
    results = compute(model, inputs, case)
    report["differences"] = {name: (results[name] - expected[name]).abs().max().item() for name in expected}
    plain = expected["(disabled)"]
    report["spread"] = (expected[first][:, -plain.shape[1] :] - plain).abs().max().item()  # without virtual tokens
    if case.is_prompt:
        return report
    trainable = PeftModel.from_pretrained(
        load_base(folder, case)[0], adapter_folder(folder, other, case, first), adapter_name=first, is_trainable=True
    )
    report["trainable"] = sorted(_plain(name) for name, p in trainable.named_parameters() if p.requires_grad)
    with torch.no_grad():
        merged = outputs(model.merge_and_unload()(**inputs))
    report["merged_difference"] = (merged - expected[first]).abs().max().item()
    return report


def main() -> None:
    command, folder, *rest = sys.argv[1:]
    folder = Path(folder)
    torch.set_num_threads(1)  # for such small matrices more threads cost more than they give
    if command == "bases":
        write_bases(folder, int(rest[0]))
        return
    import peft

    target = folder / " ".join([command, *rest])
    target.mkdir()
    (target / "version.txt").write_text(peft.__version__)
    for case in CASES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                report = {"save": save, "load": load}[command](folder, *rest, case)
            except Exception:
                report = {"error": traceback.format_exc()}
        report["warnings"] = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
        (target / f"{case.name}.json").write_text(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
