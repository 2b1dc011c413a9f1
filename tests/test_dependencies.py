"""What is imported is declared, and what is declared is imported."""

import ast
import re
import shlex
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat

root = Path(__file__).parents[1]
WITHOUT_IMPORT = {  # declared, and needed although no line of the package imports it
    "bokeh": "the versions whose JavaScript fits what panel and hvplot draw",
    "datashader": "hvplot's rasterize=True",
    "h5netcdf": "an engine of xarray, for files that may not be locked",
    "jupyterlab": "the workbench itself",
    "panel": "hvplot's widgets, in the version that fits bokeh",
    "torchvision": "timm imports it; declared so that it is the build that fits torch",
}
COMING: set[str] = set()  # declared before what imports it has landed: empty in a release
TOOLS = {  # development, called by name
    "build", "execnb", "fastcore", "ghapi", "import-linter", "myst-nb", "nbdev", "pre-commit", "pyrefly", "pytest-xdist", "ruff",
    "sphinx", "sphinx-book-theme",
}  # fmt: skip


def normalised(name: str) -> str:
    """Write a distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(key: str) -> set[str]:
    """List the distributions of one list of settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return {normalised(re.match(r"[\w.-]+", text)[0]) for text in shlex.split(parser["DEFAULT"][key])}


def imported(text: str) -> set[str]:
    """List the top-level modules that a text imports, also by `importlib.import_module` and `pytest.importorskip`."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"sarfm"}


def texts(*patterns: str) -> list[str]:
    """Read modules, and the code of notebooks as modules."""
    found = []
    for path in sorted(p for pattern in patterns for p in root.glob(pattern)):
        if path.suffix == ".py":
            found.append(path.read_text(encoding="utf-8"))
        else:
            cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
            found += [re.sub(r"^\s*[%!].*$", "", source, flags=re.M) for source in cells]
    return found


def distributions(*patterns: str) -> dict[str, set[str]]:
    """Name the distributions that give each imported module; a module that nobody gives stands for itself."""
    given = packages_distributions()
    names = {name for text in texts(*patterns) for name in imported(text)}
    beside = {p.stem for p in [*(root / "tests").glob("*.py"), *(root / "docs").glob("*.py")]}
    return {name: {normalised(d) for d in given.get(name, [name])} for name in names - beside}


def test_every_import_of_the_package_is_declared():
    known = declared("requirements") | declared("stac_requirements")  # an extra, imported inside functions only
    undeclared = {m: d for m, d in distributions("sarfm/**/*.py", "nbs/runs/*.ipynb").items() if not d & known}
    assert not undeclared, f"add to requirements of settings.ini: {undeclared}"


def test_every_requirement_is_imported():
    used = set().union(*distributions("sarfm/**/*.py", "nbs/runs/*.ipynb").values())
    unused = declared("requirements") - used - set(WITHOUT_IMPORT) - COMING
    assert not unused, f"nothing imports {sorted(unused)}: drop them from settings.ini"
    stale = (set(WITHOUT_IMPORT) & used) | (COMING & used) | (set(WITHOUT_IMPORT) - declared("requirements"))
    assert not stale, f"{sorted(stale)} needs no exception any more"


def test_development_imports_are_declared():
    everywhere = distributions("sarfm/**/*.py", "nbs/**/*.ipynb", "tests/**/*.py", "docs/*.py")
    lists = ("requirements", "dev_requirements", "bench_requirements", "stac_requirements")
    known = set().union(*map(declared, lists))
    assert not (undeclared := {m: d for m, d in everywhere.items() if not d & known}), undeclared
    used = set().union(*everywhere.values())
    unused = set().union(*map(declared, lists[1:])) - used - TOOLS
    assert not unused, f"nothing imports or calls {sorted(unused)}"


def test_what_is_imported_is_found_wherever_it_stands():
    text = "import a.b, os\ndef f():\n    from c.d import e\n    import_module('g.h')\nfrom . import x\nfrom sarfm.io import y\n"
    assert imported(text) == {"a", "c", "g"}
