from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from sparseprune.graph.ir import OPS
from sparseprune.graph.operators import operator_table

DOCS = Path(__file__).parents[1] / "docs"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_operators", DOCS / "generate_operators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operators_md_is_what_the_lowering_says() -> None:
    written = (DOCS / "operators.md").read_text(encoding="utf-8")
    assert written == load_generator().generate(), "stale: run python docs/generate_operators.py"
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    for row in rows:
        assert len(re.split(r"(?<!\\)\|", row)) == 5, f"three cells are expected in {row}"
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(name for name, _, _ in operator_table())


def test_what_operators_become_is_an_operator_of_programs() -> None:
    for name, becomes, _ in operator_table():
        assert becomes == "nothing" or OPS & set(re.findall(r"\w+", becomes)), f"{name} becomes {becomes!r}"


def test_program_md_lists_every_operator() -> None:
    text = (DOCS / "program.md").read_text(encoding="utf-8")
    table = text[text.index("| op | inputs |") :].split("\n\n")[0].splitlines()[2:]
    documented = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(documented) == len(set(documented))
    assert set(documented) == OPS
