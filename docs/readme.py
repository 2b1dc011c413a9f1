"""Make README.md from nbs/index.ipynb: its markdown, its code without directives, and nothing hidden."""

import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbformat import from_dict, reads

root = Path(__file__).resolve().parents[1]


def make(notebook: Path) -> str:
    """Return the text of the README."""
    processed = NBProcessor(nb=reads(notebook.read_text(encoding="utf-8"), 4)).nb
    shown = [cell for cell in processed.cells if not {"hide", "hide_input"} & set(cell.directives_)]
    nb = from_dict({**processed, "cells": [{k: v for k, v in cell.items() if k[-1] != "_"} for cell in shown]})
    nb.metadata.language_info = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r"\]\((?!https?:|#)", "](nbs/", text).strip() + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(make(root / "nbs/index.ipynb"), encoding="utf-8")
