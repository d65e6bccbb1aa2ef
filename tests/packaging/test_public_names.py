"""The names of `weighted_mtp`: loaded on first use, and the same for type checkers."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import weighted_mtp

HEAVY = ("numpy", "pandas", "polars", "pyarrow", "pydantic", "ray", "torch", "transformers", "vllm")


def imported_for_type_checkers() -> dict[str, str]:
    """Name and module of every import under `if TYPE_CHECKING`."""
    tree = ast.parse(Path(weighted_mtp.__file__).read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {}
    for node in branch.body:
        assert isinstance(node, ast.ImportFrom)
        found |= {alias.name: f"{node.module}" for alias in node.names}
    return found


def test_importing_the_package_loads_nothing_heavy_and_a_name_what_it_needs() -> None:
    script = (
        "import sys, weighted_mtp\nassert 'ShardSet' in dir(weighted_mtp)\n"
        f"print(*sorted(sys.modules.keys() & set({HEAVY})))\n"
        "from weighted_mtp import ShardSet, WeightsConfig\n"
        "print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["", "False True", ""]


def test_names_are_those_that_type_checkers_see() -> None:
    typed = imported_for_type_checkers()
    assert sorted(typed) == sorted(weighted_mtp.__all__)
    assert typed == {name: f"weighted_mtp.{module}" for name, module in weighted_mtp._MODULES.items()}
    for name, module in typed.items():
        assert getattr(weighted_mtp, name) is getattr(import_module(module), name)


def test_every_public_name_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    assert [name for name in weighted_mtp.__all__ if name not in page] == []
    assert [name for name in weighted_mtp.__all__ if not getattr(weighted_mtp, name).__doc__] == []


def test_an_unknown_name_is_an_attribute_error_and_subpackages_still_load() -> None:
    with pytest.raises(AttributeError, match="module 'weighted_mtp' has no attribute 'Shards'"):
        _ = weighted_mtp.Shards
    assert import_module("weighted_mtp.schemas").__name__ == "weighted_mtp.schemas"
