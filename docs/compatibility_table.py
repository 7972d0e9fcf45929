"""Writes the tables of `docs/source/compatibility.md`: what upstream has, and whether it is here.

    python docs/compatibility_table.py                      after a change of ours
    python docs/compatibility_table.py --ask-upstream       for another upstream (`make interop` makes its environment)

What is known of upstream lies in `upstream_api.json`: names, parameters, fields with their defaults and accepted
values, told by the installed package's own introspection. Ours is asked in the same way. What stands between the
markers `<!-- NAME -->` and `<!-- end of NAME -->` of the page is replaced.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import inspect
import json
import os
import re
import subprocess
import types
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/source/compatibility.md"
UPSTREAM = ROOT / "docs/upstream_api.json"
UPSTREAM_PYTHON = ROOT / ".venv-upstream/bin/python"


def accepted(hint) -> Iterator[str]:
    """The single values that a type names: of literals and enumerations, also inside unions and containers."""
    if typing.get_origin(hint) is typing.Literal:
        yield from map(repr, typing.get_args(hint))
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (repr(member.value) for member in hint)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from accepted(part)


def default(field: dataclasses.Field) -> str:
    """A field's default as text; enumerations by their values."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return "required"
    return repr(value.value) if isinstance(value, enum.Enum) else repr(value)


def facts() -> dict:
    """What the peft of this interpreter has."""
    import peft

    methods = {getattr(t, "value", t): cls.__name__ for t, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    configs = {}
    for cls in {peft.PeftConfig, *peft.PEFT_TYPE_TO_CONFIG_MAPPING.values()}:
        hints = typing.get_type_hints(cls)
        configs[cls.__name__] = {
            field.name: [default(field), sorted({*accepted(hints[field.name])})]
            for field in dataclasses.fields(cls)
            if field.init and (cls is peft.PeftConfig or field.name not in common)
        }
    names = {name: getattr(peft, name) for name in sorted(peft.__all__)}
    # A value with brackets stands for many: "pissa_niter_[number of iters]".
    for fields in configs.values():
        for fact in fields.values():
            fact[1] = [value for value in fact[1] if "[" not in value]
    return {
        "version": peft.__version__,
        "names": {n: [*inspect.signature(x).parameters] if inspect.isfunction(x) else None for n, x in names.items()},
        "methods": dict(sorted(methods.items())),
        "configs": dict(sorted(configs.items())),
    }


def ask(python: str) -> dict:
    """`facts` of another interpreter's peft."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, __file__, "--facts"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def listed(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def methods_table(upstream: dict, ours: dict) -> str:
    """One row per method of either library, ours first."""
    rows = ["| `PeftType` | configuration | upstream | here |", "|---|---|---|---|"]
    both = upstream["methods"] | ours["methods"]
    for name in sorted(both, key=lambda name: (name not in ours["methods"], name)):
        there = ["yes" if name in library["methods"] else "no" for library in (upstream, ours)]
        rows.append(f"| `{name}` | `{both[name]}` | {' | '.join(there)} |")
    return "\n".join(rows)


def names_table(upstream: dict, ours: dict) -> str:
    """Upstream's public names in three groups; a function differs if a parameter of upstream's is not taken here."""
    groups: dict[str, list[str]] = {"yes": [], "differs": [], "no": []}
    for name, parameters in upstream["names"].items():
        if name not in ours["names"]:
            groups["no"].append(f"`{name}`")
            continue
        here = ours["names"][name]
        lacks = [p for p in parameters or () if here is not None and p not in here and "kwargs" not in here]
        groups["differs" if lacks else "yes"].append(f"`{name}`" + (f" (without {listed(lacks)})" if lacks else ""))
    rows = [f"| {here} | {', '.join(names) or '-'} |" for here, names in groups.items()]
    return "\n".join(["| here | names |", "|---|---|", *rows])


def is_refused(cls: type, name: str, value: str) -> bool:
    """Whether our configuration refuses a value that upstream's type names; our messages begin with the field."""
    try:
        cls(**{name: ast.literal_eval(value)})
    except (ValueError, NotImplementedError) as error:
        return str(error).startswith(name)
    return False


def difference(cls: type, name: str, upstream: list, ours: list) -> str | None:
    """In which way a field is not upstream's; None: in no way that can be seen from outside."""
    from peft import LoraConfig
    from peft.tuners.lora.config import NOT_YET

    if issubclass(cls, LoraConfig) and name in NOT_YET:
        return "only its default"
    (there, theirs), (here, own) = upstream, ours
    found = [f"default {here}, upstream {there}"] if here != there else []
    lacking = [value for value in theirs if (value not in own if own else is_refused(cls, name, value))]
    found += [f"not {', '.join(lacking)}"] if lacking else []
    more = sorted({*own} - {*theirs}) if theirs else []
    found += [f"also {', '.join(more)}"] if more else []
    return "; ".join(found) or None


def fields_table(upstream: dict, ours: dict) -> str:
    """Upstream's fields, configuration by configuration; those of `PeftConfig` once."""
    import peft

    rows = ["| configuration | yes | differs | no | here only |", "|---|---|---|---|---|"]
    for cls in sorted(upstream["configs"].keys() & ours["configs"].keys(), key=lambda n: (n != "PeftConfig", n)):
        fields, here = upstream["configs"][cls], ours["configs"][cls]
        known = [name for name in fields if name in here]
        notes = {name: difference(getattr(peft, cls), name, fields[name], here[name]) for name in known}
        cells = (
            listed(name for name in known if notes[name] is None),
            ", ".join(f"`{name}` ({note.replace('|', '/')})" for name, note in notes.items() if note),
            listed(name for name in fields if name not in here),
            listed(name for name in here if name not in fields),
        )
        rows.append(f"| `{cls}` | " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(rows)


def refused_table(refused: dict[str, str]) -> str:
    """The fields of `LoraConfig` that cannot be set."""
    return "\n".join(["| field | method |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in refused.items())])


def replace_section(text: str, name: str, content: str) -> str:
    """The page with what is between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE} has no section between '<!-- {name} -->' and '<!-- end of {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text)


def page(text: str) -> str:
    """The page with its tables as they have to be."""
    from peft.tuners.lora.config import NOT_YET

    upstream, ours = json.loads(UPSTREAM.read_text(encoding="utf-8")), facts()
    sections = {
        "methods": methods_table(upstream, ours),
        "names": names_table(upstream, ours),
        "fields": fields_table(upstream, ours),
        "refused fields": refused_table(NOT_YET),
    }
    for name, content in sections.items():
        text = replace_section(text, name, content)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ask-upstream", action="store_true", help=f"write {UPSTREAM.name} anew")
    parser.add_argument("--upstream-python", metavar="PATH", default=str(UPSTREAM_PYTHON))
    parser.add_argument("--facts", action="store_true", help="print what the peft at hand has, and nothing else")
    args = parser.parse_args()
    if args.facts:
        print(json.dumps(facts()))
        return
    if args.ask_upstream:
        told = ask(args.upstream_python)
        told["configs"] = {cls: json.dumps(fields) for cls, fields in told["configs"].items()}
        text = json.dumps(told, indent=1)
        # One line for each configuration, so that a change can be read.
        text = re.sub(r'"(\{.*\})"(,?)$', lambda match: json.loads(f'"{match[1]}"') + match[2], text, flags=re.M)
        UPSTREAM.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
