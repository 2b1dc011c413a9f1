"""The size and the grain of the house, before and after: `python tests/measure_house.py --rev 2e75a2e --rev HEAD`.

Each revision is unpacked into a temporary folder (the working tree where none is named) and measured there: lines by
Python's tokenizer, cells from the notebooks' JSON, parameters from the `parameters` cells, imports in fresh processes.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from pathlib import Path
from statistics import mean, median, quantiles

root = Path(__file__).resolve().parents[1]
IMPORTS = """import importlib, sys, time
start = time.process_time()
for name in sys.argv[1:]: importlib.import_module(name)
print(time.process_time() - start)"""


def source(cell: dict) -> str:
    """Give the text of a cell."""
    return "".join(cell["source"])


def exported(cell: dict) -> bool:
    """Say whether nbdev writes this cell to a module."""
    return cell["cell_type"] == "code" and bool(re.search(r"^#\|\s*exporti?\b", source(cell), re.M))


def lines(cell: dict) -> int:
    """Count the lines of a cell that say something: neither blank nor a directive."""
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source(cell).splitlines())


def code_lines(text: str) -> int:
    """Count the lines with code or a docstring on them: no blank ones, none of comments only."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)})


def package(folder: Path) -> dict[str, float]:
    """Measure the modules that the notebooks export."""
    modules = [p for p in (folder / "sarfm").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    texts = [p.read_text(encoding="utf-8") for p in modules]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    functions = [n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    named = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)]
    return {
        "modules": len(modules),
        "package lines, all": sum(text.count("\n") for text in texts),
        "package lines, code": sum(map(code_lines, texts)),
        "lines per function, median": median(functions),
        "lines per function, p90": quantiles(functions, n=10)[-1],
        "walrus": sum(isinstance(n, ast.NamedExpr) for n in nodes),
        "named lambdas": len(named),
    }


def library(folder: Path) -> list[list[dict]]:
    """Read the cells of the notebooks that export a module."""
    books = [json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted((folder / "nbs").rglob("*.ipynb"))]
    return [cells for cells in books if any("#| default_exp" in source(cell) for cell in cells)]


def defines(cell: dict) -> bool:
    """Say whether an exported cell defines a function or a class (imports and constants show nothing)."""
    body = ast.parse(source(cell)).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)


def shown(cells: list[dict]) -> list[bool]:
    """Say for each exported definition whether the next code cell runs something."""
    code = [cell for cell in cells if cell["cell_type"] == "code" and source(cell).strip()]
    after = [*code[1:], None]
    pairs = zip(code, after, strict=True)
    return [b is not None and not exported(b) for a, b in pairs if exported(a) and defines(a)]


def grain(folder: Path) -> dict[str, float]:
    """Measure the exported cells of the library's notebooks, and the prose around them."""
    books = library(folder)
    sizes = [n for cells in books for cell in cells if exported(cell) and (n := lines(cell))]
    words = [len(source(c).split()) for cells in books for c in cells if c["cell_type"] == "markdown"]
    each = [
        sum(len(source(c).split()) for c in cells if c["cell_type"] == "markdown")
        / max(1, sum(lines(c) for c in cells if exported(c)))
        for cells in books
    ]
    return {
        "library notebooks": len(books),
        "exported cells": len(sizes),
        "lines per exported cell, median": median(sizes),
        "lines per exported cell, p90": quantiles(sizes, n=10)[-1],
        "lines per exported cell, max": max(sizes),
        "cells > 30 lines": sum(n > 30 for n in sizes),
        "cells > 60 lines": sum(n > 60 for n in sizes),
        "definitions followed by a running cell, %": 100 * mean(x for cells in books for x in shown(cells)),
        "prose words per exported line": sum(words) / sum(sizes),
        "notebooks under 2 words a line": sum(ratio < 2 for ratio in each),
    }


def groups(folder: Path) -> dict[str, set[str]]:
    """List the fields of every dataclass of the package, by its name."""
    found = {}
    for path in (folder / "sarfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return found


def runs(folder: Path) -> dict[str, float]:
    """Count the parameters of the run notebooks, and the fields of the groups that they name."""
    books = [json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted((folder / "nbs/runs").glob("*.ipynb"))]
    known, each, fields = groups(folder), [], set()
    for cells in books:
        tagged = [source(c) for c in cells if "parameters" in c["metadata"].get("tags", [])]
        nodes = [n for text in tagged for n in ast.parse(text).body if isinstance(n, ast.Assign | ast.AnnAssign)]
        each.append({(n.target if isinstance(n, ast.AnnAssign) else n.targets[0]).id for n in nodes})
        kinds = [ast.unparse(n.annotation) for n in nodes if isinstance(n, ast.AnnAssign)]
        fields |= {(k, field) for k in kinds if k in known for field in known[k]}
    lines_of = [sum(lines(c) for c in cells if c["cell_type"] == "code") for cells in books]
    return {
        "run notebooks": len(books),
        "run notebooks, lines of code": sum(lines_of),
        "distinct run parameters": len(set().union(*each)),
        "most parameters in one": max(map(len, each)),
        "distinct fields in their groups": len(fields),
    }


def import_seconds(folder: Path, room: str = "train", times: int = 5) -> dict[str, float]:
    """Time the import of a room's modules in fresh processes, in seconds of CPU."""
    names = [f"sarfm.{room}.{p.stem}" for p in sorted((folder / "sarfm" / room).glob("*.py")) if p.stem != "__init__"]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IMPORTS, *names]
    runs = [subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True) for _ in range(times)]
    if failed := [r.stderr.strip().splitlines()[-1] for r in runs if r.returncode]:
        print(f"sarfm.{room} of {folder.name} cannot be imported here: {failed[0]}", file=sys.stderr)
        return {}
    return {f"import of sarfm.{room}, CPU s": median(float(r.stdout) for r in runs)}


def measure(folder: Path) -> dict[str, float]:
    """Measure one checkout."""
    return package(folder) | grain(folder) | runs(folder) | import_seconds(folder)


def unpack(revision: str, folder: Path) -> Path:
    """Unpack the package and the notebooks of a revision."""
    archive = subprocess.run(["git", "archive", revision, "sarfm", "nbs"], cwd=root, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder / revision, filter="data")
    return folder / revision


def main() -> None:
    """Print one column for each revision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rev", action="append", default=[], help="a revision of git; the working tree when none")
    asked = parser.parse_args().rev
    with tempfile.TemporaryDirectory() as folder:
        found = {rev: measure(unpack(rev, Path(folder))) for rev in asked} or {"working tree": measure(root)}
    names = list(dict.fromkeys(name for column in found.values() for name in column))
    print(f"{'':44}" + "".join(f"{rev:>14}" for rev in found))
    for name in names:
        values = [column.get(name) for column in found.values()]
        print(
            f"{name:44}" + "".join(f"{'–' if v is None else f'{v:.6g}' if v > 99 else f'{v:.3g}':>14}" for v in values)
        )


if __name__ == "__main__":
    main()
