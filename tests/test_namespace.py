"""The names a user looks for are importable from sarfm itself, and cost nothing until they are asked for."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sarfm

NAMES = [name for name in sarfm.__all__ if name != "__version__"]


def test_importing_sarfm_imports_nothing_heavy():
    code = "import sys, sarfm; dir(sarfm); print([m for m in ('torch', 'numpy', 'pandas', 'xarray', 'matplotlib', 'ipywidgets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_one_of_its_module(name):
    home = import_module(f"sarfm.{sarfm._HOMES[name]}")
    assert getattr(sarfm, name) is getattr(home, name)
    assert name in home.__all__ and name in dir(sarfm)


def test_type_checkers_see_the_names_that_python_sees():
    tree = ast.parse(Path(sarfm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: line.module.removeprefix("sarfm.") for line in block.body for name in line.names}
    assert seen == sarfm._HOMES and set(NAMES) == set(seen)


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'open_scenes'; it offers .*open_scene"):
        sarfm.open_scenes  # noqa: B018


def test_modules_are_still_importable_as_attributes():
    from sarfm import scenes

    assert scenes.__name__ == "sarfm.scenes"
