"""The house rules that a reader of the code relies on."""

import ast
import json
import re
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parents[1]
sys.path.insert(0, str(root / "docs"))
from sarfm_docs import comments, fields, parameters  # noqa: E402

MODULES = sorted(p for p in (root / "sarfm").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
MADE = {".ipynb_checkpoints", "runs"}  # folders below a section: what a notebook left when it ran
NOTEBOOKS = sorted(
    p for p in (root / "nbs").rglob("*.ipynb") if not MADE & set(p.relative_to(root / "nbs").parts[1:-1])
)
LIBRARY = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
ROOM = re.compile(r"\d\d_(\w+)")
short = lambda path: str(path.relative_to(root))


def settings() -> dict[str, str]:
    """Read the one list of metadata and dependencies."""
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def cells(path: Path, kind: str = "") -> list[dict]:
    """Read the cells of a notebook, their sources as one text each."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if kind in c["cell_type"]]


# ---- one list -----------------------------------------------------------------------------------------------------


def test_dependencies_are_listed_once():
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert not {"dependencies", "optional-dependencies", "version", "description"} & set(project)
    assert {"dependencies", "optional-dependencies", "version"} <= set(project["dynamic"])
    environment = yaml.safe_load((root / "environment.yml").read_text())
    assert environment["dependencies"] == [f"python>={settings()['min_python']}", "pip", {"pip": ["-e .[dev]"]}]
    assert not list(root.glob("*requirements*.txt"))


def test_version_is_stated_everywhere_alike():
    import sarfm

    version = settings()["version"]
    assert sarfm.__version__ == version
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (root / "CHANGELOG.md").read_text()


def test_readme_is_made_from_the_index():
    from readme import make

    assert (root / "README.md").read_text(encoding="utf-8") == make(root / "nbs/index.ipynb"), "run `make readme`"


def module_of(path: Path) -> str:
    """Name the module that a library notebook exports: its room and its own name; 78_names is the package itself."""
    if path.name == "78_names.ipynb":
        return "sarfm.__init__"
    room = [] if path.parent.name == "nbs" else [ROOM.fullmatch(path.parent.name)[1]]
    return ".".join(["sarfm", *room, path.stem[3:]])


def imported(path: Path) -> set[str]:
    """List the modules of sarfm that a module names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = ["sarfm", *path.relative_to(root / "sarfm").parts[:-1]]
            base = package[: len(package) + 1 - node.level] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_rooms_of_the_contract_are_the_folders():
    parser = ConfigParser()
    parser.read(root / ".importlinter")
    layers = re.findall(r"sarfm\.(\w+)", parser["importlinter:contract:rooms"]["layers"])
    folders = {p.parent if p.parent.name != "nbs" else p for p in LIBRARY if module_of(p) != "sarfm.__init__"}
    rooms = sorted(folders, key=lambda p: p.name, reverse=True)
    names = [ROOM.fullmatch(p.stem)[1] for p in rooms]
    wings = {n for n, p in zip(names, rooms, strict=True) if p.name >= "80"}
    assert [n for n in layers if n not in wings] == [n for n in names if n not in wings]
    assert set(layers) == set(names), "each room stands in .importlinter, and no other"


def test_a_room_is_ordered_by_its_numbers():
    number = {module_of(p): (p.parent.name, int(p.name[:2])) for p in LIBRARY}
    wrong = []
    for module, (room, own) in number.items():
        for other in imported(root / (module.replace(".", "/") + ".py")) & set(number):
            if number[other][0] == room and number[other][1] >= own and other != module:
                wrong.append(f"{module} ({own:02}) imports {other} ({number[other][1]:02})")
    assert not wrong, "\n".join(wrong)


# ---- words -------------------------------------------------------------------------------------------------------

ICE = re.compile(r"(?<![a-z])(sic|sod|floes?|ai4arctic)(?![a-z])", re.I)  # words of one field
STILL_ICE = 13  # how often the modules below the wings name it today, at most; shrinks to nothing
VAGUE = {  # words that the field has a term for: augment, EMA, assemble, interpolate, predict ...
    "turn", "turned", "follow", "paint", "painted", "called", "told", "furnish", "occurring", "middle", "between",
}  # fmt: skip


def identifiers(path: Path) -> list[str]:
    """List what a module names: variables, functions, classes, parameters, attributes."""
    kinds = {ast.Name: "id", ast.FunctionDef: "name", ast.ClassDef: "name", ast.arg: "arg", ast.Attribute: "attr"}
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [getattr(n, kinds[type(n)]) for n in nodes if type(n) in kinds]
    return names + [n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg]


def test_general_rooms_know_no_ice():
    texts = {short(p): p.read_text(encoding="utf-8") for p in MODULES if p.parent.name != "ice"}
    found = {name: n for name, text in texts.items() if (n := len(ICE.findall(text)))}
    assert sum(found.values()) <= STILL_ICE, f"ice lives in the wing: {found}"


def test_names_are_the_terms_of_the_field():
    vague = lambda name: VAGUE & set(re.findall(r"[a-z]+", name.lower()))
    found = {short(p): names for p in MODULES if (names := [n for n in identifiers(p) if vague(n)])}
    assert not found, f"use the field's terms: {found}"


# ---- notebooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_notebook_is_fit_to_be_committed(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) <= (1_000_000 if "gallery" in path.parts else 500_000), f"{len(text) / 1e3:.0f} kB"
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", first["source"]), "no title and description"
    assert not re.search(r"/(work|home|root|Users|tmp)/|C:\\\\Users", text), "a path of a machine"
    assert not (left := re.search(r"@[A-Z]+@|\b(TODO|FIXME|XXX)\b", "".join(c["source"] for c in cells(path)))), left
    assert not re.search(r"^\s*[!%]pip ", "\n".join(c["source"] for c in cells(path, "code")), re.M)
    errors = [o["ename"] for c in cells(path, "code") for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, f"stored errors {errors}"


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_library_notebook_stores_outputs_and_names_its_module(path):
    code = cells(path, "code")
    module = [re.search(r"default_exp (\S+)", c["source"])[1] for c in code if "#| default_exp" in c["source"]]
    assert module == [module_of(path).removeprefix("sarfm.")]
    assert any(c["outputs"] for c in code), "no stored output: run the notebook"
    drawn = any("plt.subplots(" in c["source"] for c in code if "#| export" not in c["source"])
    kinds = {kind.partition("/")[0] for c in code for o in c["outputs"] for kind in o.get("data", {})}
    assert not drawn or "image" in kinds, "its figures are missing: run the notebook, with MPLBACKEND unset"


# ---- code ---------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    r"torch\.save\((?!\w+, (file|writer)\))": "sarfm.io.files.atomic_write",
    r"\bopen\([^)\n]*[\"'][wax]b?\+?[\"']": "sarfm.io.files.atomic_write",
    r"\.write_(text|bytes)\(": "sarfm.io.files.atomic_write",
    r"except Exception|except BaseException|except:": "the errors that are expected",
    r"^from \S+ import \*|^\s+from \S+ import \*": "names",
    r"weights_only=False": "weights_only=True",
    r"yaml\.(load|full_load|unsafe_load)\(": "yaml.safe_load",
    r"\bpkg_resources\b": "importlib.metadata",
}


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_module_avoids_what_breaks(path):
    text = path.read_text(encoding="utf-8")
    code = re.sub(r"(?m)^\s*#.*$", "", text)
    for pattern, instead in FORBIDDEN.items():
        if path.name in ("files.py", "download.py") and instead == "sarfm.io.files.atomic_write":
            continue  # the one writes for all, the other continues a file that is not complete yet
        found = [m[0] for m in re.finditer(pattern, code, re.M)]
        assert not found, f"{found}: use {instead}"
    calls = [(ast.unparse(n.func), n.lineno) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    unwanted = {"eval", "exec"} | (set() if path.name == "cli.py" else {"print"})
    assert not (found := [call for call in calls if call[0] in unwanted]), f"{found} in the library"


SAYS_ENOUGH = re.compile(r"Iterator\[None\]|(?!Tensor|Data|Series|Path|Mapping|Iterator)[A-Z]\w+")  # a class of its own
HOOK = re.compile(
    r"on_\w+|configure_\w+|\w+_step|\w+_dataloader|(load_)?state_dict|\w+_checkpoint|setup|log|log_\w+|experiment|name|version"
)


def undocumented(path: Path) -> list[str]:
    """Name what in the public interface lacks a docstring, a type or the meaning of a parameter."""
    text = path.read_text(encoding="utf-8")
    notes, faults = comments(text), []

    def check(node: ast.stmt, owner: str = "") -> None:
        name = owner + node.name
        if not ast.get_docstring(node) and node.name != "__init__":
            faults.append(f"{name} has no docstring")
        if isinstance(node, ast.ClassDef):
            rows = fields(node, notes)
            faults.extend(f"{name}.{n}: {'type' if not k else 'meaning'}" for n, k, _, m in rows if not (k and m))
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name == "__init__"):
                    check(child, f"{name}.")
            return
        if owner and HOOK.fullmatch(node.name):
            return  # Lightning calls it, with arguments that Lightning documents
        if not node.returns and node.name != "__init__":
            faults.append(f"{name} returns no stated type")
        for parameter, kind, _, meaning in parameters(node, notes):
            if parameter == "return" and (kind == owner.rstrip(".") or SAYS_ENOUGH.fullmatch(kind)):
                continue
            faults.extend(
                f"{name}({parameter}) has no {what}"
                for what, given in (("type", kind), ("meaning", meaning))
                if not given
            )

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            check(node)
    return faults


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_public_interface_is_typed_and_documented(path):
    assert not (faults := undocumented(path)), "\n".join(faults)


def test_a_missing_meaning_is_found(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text('def f(\n    a: int,\n    b,  # metres\n) -> int:  # pixels\n    """Do."""\n')
    assert undocumented(path) == ["f(a) has no meaning", "f(b) has no type"]


def test_kinds_are_installed_as_they_are_listed():
    from importlib.metadata import entry_points

    for line in settings()["entry_points"].strip().splitlines():
        group, point = line.split()
        name, _, value = point.partition("=")
        assert {p.value for p in entry_points(group=group, name=name)} == {value}, f"{line}: run `make setup`"
