"""Writes the tables of `docs/source/compatibility.md` that can be read off the two libraries.

    python docs/compatibility_table.py            (`make interop` makes the environment of upstream's package)

Upstream's methods and LoRA's fields are asked of an interpreter that has upstream's package, ours of the one that runs
this file. What stands between the markers `<!-- NAME -->` and `<!-- end of NAME -->` of the page is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from pathlib import Path

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from peft.tuners.lora.config import NOT_YET

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/source/compatibility.md"
UPSTREAM_PYTHON = ROOT / ".venv-upstream/bin/python"

# What the upstream interpreter prints: {method: name of its configuration class}.
ASK_METHODS = """
import json, peft
classes = peft.PEFT_TYPE_TO_CONFIG_MAPPING
print(json.dumps({t.value: classes[t].__name__ for t in peft.PeftType}))
"""


def ask(python: str, code: str):
    """What `code`, run by another interpreter, prints as JSON in its last line."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def methods_table(upstream: dict[str, str]) -> str:
    """One row per method of either library, ours first."""
    ours = {getattr(t, "value", t): cls.__name__ for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    lines = ["| `PeftType` | configuration | upstream | here |", "|---|---|---|---|"]
    for name in sorted({*upstream, *ours}, key=lambda name: (name not in ours, name)):
        there = ["yes" if name in methods else "no" for methods in (upstream, ours)]
        lines.append(f"| `{name}` | `{ours.get(name) or upstream[name]}` | {' | '.join(there)} |")
    return "\n".join(lines)


def fields_table() -> str:
    """The fields of `LoraConfig` that cannot be set."""
    rows = (f"| `{name}` | {method} |" for name, method in NOT_YET.items())
    return "\n".join(["| field | method |", "|---|---|", *rows])


def replace_section(text: str, name: str, content: str) -> str:
    """The page with what is between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE} has no section between '<!-- {name} -->' and '<!-- end of {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream-python", metavar="PATH", default=str(UPSTREAM_PYTHON))
    args = parser.parse_args()
    methods = ask(args.upstream_python, ASK_METHODS)
    unknown = sorted(set(methods) - {t.value for t in PeftType})
    if unknown:
        raise SystemExit(f"PeftType lacks methods of upstream's: {unknown}")
    text = PAGE.read_text(encoding="utf-8")
    text = replace_section(text, "methods", methods_table(methods))
    text = replace_section(text, "refused fields", fields_table())
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
