"""Turn sarfm's notebooks into pages: API tables from the parameter comments, links, contents, live plots.

Everything happens while Sphinx reads a notebook: no copy is made and nothing is executed or imported.
"""

import ast
import base64
import io
import json
import re
import tokenize
from html import escape
from pathlib import Path

SECTIONS = [("tutorials", "Tutorials"), ("runs", "Runs"), ("explanations", "Explanations"), ("gallery", "Gallery")]
FIRST = ("runs/pretrain", "runs/finetune", "tutorials/first_pretraining")  # before the others of their section
ROOMS = {  # folder of the library: what its pages are called together
    "": "Foundations and command line",
    "05_io": "Files",
    "10_scenes": "Scenes",
    "15_datasets": "Data sets",
    "20_patches": "Patches",
    "30_models": "Models",
    "35_tasks": "Tasks",
    "40_train": "Training",
    "50_evaluation": "Evaluation",
    "60_viz": "Seeing",
    "70_runs": "Running",
    "80_ice": "Sea ice",
    "81_land": "Land",
    "82_flood": "Floods",
}
ELSEWHERE = {  # types of other packages, linked to their documentation
    "Tensor": "https://docs.pytorch.org/docs/stable/tensors.html",
    "Generator": "https://docs.pytorch.org/docs/stable/generated/torch.Generator.html",
    "Module": "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html",
    "DataLoader": "https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.DataLoader",
    "Dataset": "https://docs.xarray.dev/en/stable/generated/xarray.Dataset.html",
    "DataArray": "https://docs.xarray.dev/en/stable/generated/xarray.DataArray.html",
    "ndarray": "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html",
    "ArrayLike": "https://numpy.org/doc/stable/reference/typing.html#numpy.typing.ArrayLike",
    "DataFrame": "https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.html",
    "Series": "https://pandas.pydata.org/docs/reference/api/pandas.Series.html",
    "Path": "https://docs.python.org/3/library/pathlib.html#pathlib.Path",
    "Figure": "https://matplotlib.org/stable/api/figure_api.html",
}
TAGS = {"hide": "remove-cell", "hide_input": "remove-input", "hide_output": "remove-output", "code-fold": "hide-input"}
LOADER = "application/vnd.holoviews_load.v0+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
BOKEH = ("application/vnd.holoviews_exec.v0+json", "application/vnd.bokehjs_exec.v0+json")
PANEL = re.compile(r"https://cdn\.holoviz\.org/panel/[\w.]+/dist/")
KNOWN = (
    "@jupyter-widgets/",
    "jupyter-leaflet",
    "anywidget",
    "jupyter-vue",
    "jupyter-vuetify",
)  # whose code the site has
Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- what a cell says ------------------------------------------------------------------------------------------


def directives(source: str) -> tuple[dict[str, str], str]:
    """Split the leading `#|` lines of a cell from its code."""
    lines, found = source.splitlines(), {}
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        words = lines.pop(0).partition("|")[2].replace(":", " ").split(maxsplit=1)
        if words:
            found[words[0]] = words[1].strip() if len(words) > 1 else ""
    return found, "\n".join(lines)


def comments(source: str) -> dict[int, str]:
    """Collect the trailing comments of a source by line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def public(body: list[ast.stmt]) -> list[ast.stmt]:
    """Keep the functions and classes that users are meant to call."""
    return [n for n in body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]


def parameters(node: Function, notes: dict[int, str]) -> list[tuple[str, str, str, str]]:
    """List a function's parameters as name, type, default, meaning; the result last, named `return`."""
    a, rows = node.args, []
    positional = [*a.posonlyargs, *a.args]
    defaults = dict(zip(reversed(positional), reversed(a.defaults), strict=False))
    defaults |= {k: d for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d}
    starred = [(a.vararg, "*"), (a.kwarg, "**")]
    given = [(p, "") for p in positional] + [starred[0]] + [(p, "") for p in a.kwonlyargs] + [starred[1]]
    for arg, star in given:
        if arg is None or (arg is positional[0] and arg.arg in ("self", "cls")) if positional else arg is None:
            continue
        default = ast.unparse(defaults[arg]) if arg in defaults else ""
        end = defaults[arg].end_lineno if arg in defaults else arg.end_lineno
        kind = ast.unparse(arg.annotation) if arg.annotation else ""
        rows.append((star + arg.arg, kind.strip("'\""), default, notes.get(end, "")))
    if node.returns and ast.unparse(node.returns) != "None":
        said = [notes[k] for k in range(node.returns.end_lineno, node.body[0].lineno) if k in notes]
        rows.append(("return", ast.unparse(node.returns).strip("'\""), "", " ".join(said)))
    return rows


def fields(node: ast.ClassDef | ast.Module, notes: dict[int, str]) -> list[tuple[str, str, str, str]]:
    """List the annotated fields of a dataclass or a pydantic model, whose meaning may stand in `Field`."""
    rows = []
    for n in node.body:
        if not isinstance(n, ast.AnnAssign) or ast.unparse(n.target).startswith("_"):
            continue
        given = {k.arg: k.value for k in n.value.keywords} if isinstance(n.value, ast.Call) else {}
        said = getattr(given.get("description"), "value", "")
        value = n.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "field"):
            value = given.get("default", next(iter(value.args), None))
        default = "" if value is None or ast.unparse(value) == "..." else ast.unparse(value)
        rows.append((ast.unparse(n.target), ast.unparse(n.annotation), default, notes.get(n.end_lineno, "") or said))
    return rows


# ---- what the page shows ---------------------------------------------------------------------------------------


class Links:
    """Where each name of the library is documented."""

    def __init__(self, symbols: dict[str, dict]):
        """Read nbdev's index of symbols."""
        self.full, short = set(), {}
        for module, names in symbols.items():
            self.full |= {module, *names}
            for name in names:
                own = name.removeprefix(module + ".")
                if not any(part.startswith("_") for part in own.split(".")):
                    short.setdefault(own, set()).add(name)
        self.short = {own: next(iter(names)) for own, names in short.items() if len(names) == 1}

    def target(self, word: str) -> str:
        """Find the full name of a symbol, or nothing."""
        word = word.removesuffix("()")
        return word if word in self.full else self.short.get(word, "")

    def prose(self, text: str) -> str:
        """Link the names in backticks, outside headings, fences and links."""
        fence, lines = False, []
        for line in text.split("\n"):
            fence ^= line.lstrip().startswith(("```", ":::"))
            if not fence and not line.startswith(("#", "    ", "|")):
                line = re.sub(r"(?<![\[`}])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)", self._role, line)
            lines.append(line)
        return "\n".join(lines)

    def _role(self, match: re.Match) -> str:
        full = self.target(match[1])
        return f"{{py:obj}}`{match[1]} <{full}>`" if full else match[0]

    def kind(self, annotation: str) -> str:
        """Write a type with the names in it linked."""
        written, plain = "", ""
        if "Literal" not in annotation:
            annotation = re.sub("['\"]", "", annotation)  # names that are not defined yet
        for part in [*re.split(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)", annotation), ""]:
            last = part.rpartition(".")[2]
            full = self.target(part) or self.short.get(last, "") if last else ""
            link = (
                f"{{py:obj}}`{last} <{full}>`"
                if full
                else f"[`{last}`]({ELSEWHERE[last]})"
                if last in ELSEWHERE
                else ""
            )
            if plain.strip() and (link or not part):
                space = " " if plain[-1] == " " else ""
                written += (" " if plain[0] == " " and written else "") + f"`{plain.strip()}`" + space
            plain = "" if link or not part else plain + part
            written += link
        return written.replace("|", r"\|")


def table(rows: list[tuple[str, str, str, str]], links: Links) -> str:
    """Write parameters as a table; the result is its last row."""
    if not rows:
        return ""
    clean = lambda text: links.prose(re.sub(r"([\\*_<>|\[\]])(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", text))
    code = lambda text: f"`{text}`".replace("|", r"\|") if text else ""
    shown = lambda name: "*returns*" if name == "return" else "**" + re.sub(r"([*_])", r"\\\1", name) + "**"
    brief = lambda text: text if len(text) < 40 else text[:37] + "..."
    full = [
        (shown(name), links.kind(kind), code(brief(default)), clean(meaning)) for name, kind, default, meaning in rows
    ]
    head, used = ("Parameter", "Type", "Default", "Meaning"), [any(row[k] for row in full) or k == 0 for k in range(4)]
    line = lambda cells: "| " + " | ".join(c for c, u in zip(cells, used, strict=True) if u) + " |"
    return "\n".join(["", line(head), line(["---"] * 4), *map(line, full), ""])


def signature(rows: list[tuple[str, str, str, str]]) -> str:
    """Write the names and the short defaults of a call."""
    short = lambda default: default if len(default) < 25 else "..."
    return ", ".join(n + (f"={short(d)}" if d else "") for n, _, d, _ in rows if n != "return")


def api(node: ast.stmt, notes: dict[int, str], links: Links, method: bool = False) -> str:
    """Describe a function, a method or a class as a directive of Sphinx's Python domain."""
    text = links.prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
        rows = parameters(init, notes) if init else fields(node, notes)
        rows = [r for r in rows if r[0] != "return"]
        inside = "\n".join(api(n, notes, links, method=True) for n in public(node.body) if isinstance(n, Function))
        call = f"({signature(rows)})" if rows else ""
        return f"::::::{{py:class}} {node.name}{call}\n\n{text}\n{table(rows, links)}\n{inside}\n::::::\n"
    rows, marks = parameters(node, notes), {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    if marks & {"property", "cached_property"}:
        kind = f"{links.kind(rows[0][1])} · " if rows else ""
        return f":::::{{py:property}} {node.name}\n\n{kind}{text}\n{rows[0][3] if rows else ''}\n:::::\n"
    option = "".join(f":{m}:\n" for m in ("classmethod", "staticmethod") if m in marks)
    what = "method" if method else "function"
    return f":::::{{py:{what}}} {node.name}({signature(rows)})\n{option}\n{text}\n{table(rows, links)}\n:::::\n"


def markdown(text: str) -> dict:
    """Make a markdown cell."""
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def outputs(cell: dict, state: dict, up: str) -> list[dict]:
    """Keep the outputs that a page can show: no loaders, and no widget whose state was not stored."""
    kept, loads = [], any(LOADER in out.get("data", {}) for out in cell["outputs"])
    for out in cell["outputs"]:
        data = out.get("data", {})
        widget = data.get(WIDGET, {}).get("model_id")
        if (loads and out["output_type"] == "display_data") or (widget and widget not in state):
            continue
        if any(mime in data for mime in BOKEH):
            out = out | {"data": {"text/html": PANEL.sub(f"{up}_static/panel/", "".join(data["text/html"]))}}
        kept.append(out)
    return kept


def code(cell: dict, links: Links) -> list[dict]:
    """Make what stands on the page for one code cell."""
    found, source = directives("".join(cell["source"]))
    if "default_exp" in found:
        return [markdown(f":::{{py:module}} sarfm.{found['default_exp']}\n:::")]
    tags = [tag for name, tag in TAGS.items() if name in found] + (
        ["remove-input"] if found.get("echo") == "false" else []
    )
    described, prompt = [], "Source"
    if "parameters" in cell["metadata"].get("tags", []):
        given = fields(ast.parse(source), comments(source))
        described = [markdown(f"::::{{rst-class}} sarfm-parameters\n{table(given, links)}\n::::")]
        tags.append("hide-input")
    if "export" in found or "exports" in found:
        body, notes = ast.parse(source).body, comments(source)
        described = [markdown(api(node, notes, links)) for node in public(body)]
        plain = all(isinstance(n, ast.Assign | ast.AnnAssign) for n in body)
        prompt = "Imports" if all(isinstance(n, ast.Import | ast.ImportFrom) for n in body) else "Source"
        tags += [] if plain or "exports" in found else ["hide-input"]
    if not source.strip():
        return described
    return [
        *described,
        cell
        | {
            "source": source,
            "metadata": {"tags": tags, "mystnb": {"code_prompt_show": prompt, "code_prompt_hide": prompt}},
        },
    ]


def title(text: str) -> str:
    """Set the sentence under a title as the page's lead."""
    return re.sub(
        r"^> *(.+(?:\n> *.+)*)",
        lambda m: f":::{{rst-class}} lead\n{m[1].replace(chr(10) + '> ', ' ')}\n:::",
        text,
        flags=re.M,
    )


# ---- contents --------------------------------------------------------------------------------------------------


def heading(path: Path) -> tuple[str, str, bytes]:
    """Read a notebook's title, its sentence and its first picture."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"]) if cells else ""
    name = re.search(r"^# +(.+)$", first, re.M)
    says = re.search(r"^> *(.+)$", first, re.M)
    datas = (out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
    picture = next((base64.b64decode("".join(d["image/png"])) for d in datas if "image/png" in d), b"")
    return name[1] if name else path.stem, says[1] if says else "", picture


def contents(app) -> str:
    """Write what follows the front page: cards by section, the library by room, and the site's contents."""
    docs, source = sorted(app.env.found_docs), Path(app.srcdir)
    thumbs = Path(app.confdir) / "_assets/thumbs"
    thumbs.mkdir(parents=True, exist_ok=True)
    shown, trees = [], []
    tree = lambda caption, names: "\n".join([":::{toctree}", ":hidden:", f":caption: {caption}", "", *names, ":::", ""])
    for folder, caption in SECTIONS:
        names = sorted(
            (d for d in docs if d.startswith(folder + "/")),
            key=lambda d: (d not in FIRST, FIRST.index(d) if d in FIRST else 0, d),
        )
        if not names:
            continue
        cards = []
        for name in names:
            what, says, picture = heading(source / f"{name}.ipynb")
            image = ""
            if picture:
                thumb = name.replace("/", "-") + ".png"
                (thumbs / thumb).write_bytes(picture)
                image = f'<img src="_static/thumbs/{thumb}" alt="" loading="lazy">'
            cards.append(
                f'<a class="sarfm-card" href="{name}.html">{image}<b>{escape(what)}</b><span>{escape(says)}</span></a>'
            )
        shown += [f"## {caption}", "", '<div class="sarfm-cards">' + "".join(cards) + "</div>", ""]
        trees.append(tree(caption, names))
    library = [d for d in docs if re.match(r"\d\d_", d)]
    lines = ["| Room | Module | What it is for |", "|---|---|---|"] if library else []
    for room, caption in ROOMS.items():
        names = [d for d in library if d.rpartition("/")[0] == room]
        for at, name in enumerate(names):
            what, says, _ = heading(source / f"{name}.ipynb")
            module = ".".join(part.partition("_")[2] for part in name.split("/"))
            lines.append(
                f"| {f'**{caption}**' if at == 0 else ''} | [`{module}`]({name}.ipynb) "
                f"| **{what}.** {says.replace('|', chr(92) + '|')} |"
            )
        if names:
            trees.append(tree(caption, names))
    reference = ["api"] if "api" in docs else []
    more = tree("Reference", [*reference, "Index <genindex>"])
    return "\n".join(
        [*shown, "## Library, by room", "", ":::{rst-class} sarfm-library", "", *lines, ":::", "", *trees, more]
    )


def names(links: Links) -> str:
    """Write the table of every public name, by module."""
    modules: dict[str, list[str]] = {}
    for own, full in sorted(links.short.items()):
        if "." not in own:
            modules.setdefault(full.removesuffix("." + own), []).append(f"{{py:obj}}`{own} <{full}>`")
    return "\n\n".join(f"## {module}\n\n" + " · ".join(found) for module, found in sorted(modules.items()))


def read(app, docname: str, source: list[str]) -> None:
    """Turn a notebook into what myst-nb shows."""
    from sarfm._modidx import d

    links = Links(d["syms"])
    if docname == "api":
        source[0] += "\n\n" + names(links)
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    nb = json.loads(source[0])
    state = nb["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for name in [k for k, model in state.items() if not model["model_module"].startswith(KNOWN)]:
        del state[name]
    cells = []
    for at, cell in enumerate(nb["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cells += code(cell | {"outputs": outputs(cell, state, "../" * docname.count("/"))}, links)
        elif cell["cell_type"] == "markdown":
            cells.append(markdown(title(text) if at == 0 else links.prose(text)))
    if docname == "index":
        cells.append(markdown(contents(app)))
    source[0] = json.dumps(nb | {"cells": [cell | {"id": f"cell-{at}"} for at, cell in enumerate(cells)]})


def always(app, env, added: set, changed: set, removed: set) -> list[str]:
    """Read again the pages that tell of all others."""
    return [name for name in ("index", "api") if name in env.found_docs]


def scripts(app, pagename: str, template: str, context: dict, doctree) -> None:
    """Load Bokeh's and Panel's code on the pages that have plots."""
    if doctree is not None and pagename in app.env.found_docs:
        text = Path(app.env.doc2path(pagename)).read_text(encoding="utf-8")
        if any(mime in text for mime in BOKEH):
            for name in ("bokeh.min.js", "bokeh-widgets.min.js", "bokeh-tables.min.js", "panel.min.js"):
                app.add_js_file(name, priority=300)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("env-get-outdated", always)
    app.connect("source-read", read)
    app.connect("html-page-context", scripts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
