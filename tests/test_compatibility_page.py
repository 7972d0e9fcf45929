"""The tables of the compatibility page are what the two libraries have. Upstream's part is on file; see the script."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

import peft

SCRIPT = Path(__file__).parent.parent / "docs" / "compatibility_table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("compatibility_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def upstream(table) -> dict:
    return json.loads(table.UPSTREAM.read_text(encoding="utf-8"))


def cells(rows: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    (row,) = [line for line in rows.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.split(" | ")]


def test_the_page_is_up_to_date(table):
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "run: python docs/compatibility_table.py"


def test_what_the_page_says_of_names_holds(table, upstream):
    rows = table.names_table(upstream, table.facts())
    for here in ("yes", "no"):
        names = [name.strip(" `|") for name in cells(rows, here)[1].split(",")]
        assert len(names) > 50 and [name for name in names if hasattr(peft, name) != (here == "yes")] == []
    assert peft.__version__.startswith(f"{upstream['version']}+")


def test_every_field_has_its_place(table, upstream):
    rows = table.fields_table(upstream, table.facts())
    for cls in ("LoraConfig", "VeraConfig", "CPTConfig"):
        _, same, differs, lacking, own = cells(rows, f"`{cls}`")
        ours = {field.name for field in dataclasses.fields(getattr(peft, cls))}
        assert lacking == "-" and all(f"`{name}`" in same + differs for name in upstream["configs"][cls])
        assert {name for name in ours if f"`{name}`" in own} == ours - {
            *upstream["configs"][cls],
            *upstream["configs"]["PeftConfig"],
        }


def test_a_difference_is_seen(table, upstream):
    ours = table.facts()
    other = copy.deepcopy(upstream)
    other["names"] |= {"get_peft_model": ["model", "from_the_future"], "of_tomorrow": None}
    other["configs"]["LoraConfig"] |= {"r": ["9", []], "bias": ["'none'", ["'none'", "'some'"]], "depth": ["1", []]}
    names = table.names_table(other, ours)
    assert cells(names, "differs")[1] == "`get_peft_model` (without `from_the_future`) |"
    assert "`of_tomorrow`" in cells(names, "no")[1]
    _, same, differs, lacking, _ = cells(table.fields_table(other, ours), "`LoraConfig`")
    assert "`r` (default 8, upstream 9)" in differs and "`r`" not in same
    assert "`bias` (not 'some'; also 'all', 'lora_only')" in differs and lacking == "`depth`"
    assert table.is_refused(peft.LoraConfig, "bias", "'some'")
    assert not table.is_refused(peft.LoraConfig, "bias", "'all'")
