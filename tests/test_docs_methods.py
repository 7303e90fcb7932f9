"""docs/methods.md against the table of methods: each has its section, with the same headings, and names its options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from graftory.adapters import METHODS
from graftory.compose import METHODS as MERGES
from graftory.config import CONFIGS
from graftory.hub.codecs.peft import WRITES

TEXT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
HEADINGS = ["Idea", "Formula", "Use it when", "Command", "Parameters", "Paper"]
TRAINED = [name for name, kind in CONFIGS.items() if kind.trained_by == "train"]


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_has_its_section(name: str) -> None:
    section = SECTIONS[name]
    assert re.findall(r"^### (.*)$", section, flags=re.MULTILINE) == HEADINGS
    assert f"hub train task.yaml --base bert-base-uncased --method {name}" in section
    options = [field.name for field in dataclasses.fields(CONFIGS[name]) if "help" in field.metadata]
    listed = section if "As [lora](#lora)" not in section else SECTIONS["lora"]
    assert all(f"| `{option}`" in listed for option in options)
    assert all(number in section for number in re.findall(r"\d{4}\.\d{5}", METHODS[name].paper))


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_stands_in_both_tables(name: str) -> None:
    assert f"| [{name}](#{name}) | adapter |" in TEXT
    assert len(re.findall(rf"^\| {name} \|", TEXT, flags=re.MULTILINE)) == 1


def test_the_table_says_what_is_linear() -> None:
    """A method that folds into weights is one whose row says that its update is linear."""
    for name in TRAINED:
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", TEXT, flags=re.MULTILINE)
        assert (row.split("|")[2].strip() == "yes") is METHODS[name].linear


def test_the_table_says_what_merges_and_what_files_hold_it() -> None:
    """By the tables of merges and of PEFT's files; a way to train is what it is stored as."""
    mergeable = {name for merge in MERGES.values() for name in merge.accepts}
    for name in TRAINED:
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", TEXT, flags=re.MULTILINE)
        mixed, merges, _, files = (cell.strip() for cell in row.split("|"))
        kept = CONFIGS[CONFIGS[name].stored_as or name]
        assert mixed.startswith("yes")
        assert merges == ("yes" if kept.method in mergeable else "–") or merges.startswith("yes, as")
        assert ("PEFT's" in files) is (kept in WRITES)
