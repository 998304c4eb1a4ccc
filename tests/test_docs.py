from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from sparseprune.graph.ir import OPS
from sparseprune.graph.operators import operator_table
from sparseprune.zoo import NETWORKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


def test_every_file_is_in_the_map_of_contributing_md() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\w+", text[: text.index("## Rules")]))
    isa = re.compile(r"_(scalar|avx2|avx512|neon)$")  # vec_<isa>, kernels_<isa>
    for folder in ("sparseprune", "csrc", "bench", "docs"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".pyi", ".cpp", ".h", ".md") and path.stem != "__init__":
                stem = isa.sub("_", path.stem)
                assert stem in known, f"{path.relative_to(ROOT)} is not in the map"


def test_readme_names_every_network_and_links_to_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in NETWORKS:
        assert f"`{name}`" in text
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).is_file(), target
