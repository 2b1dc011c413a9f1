"""The page of a run folder: what comes from files is text there, and links lead where they should."""

import re
from html import unescape
from urllib.parse import unquote

from sarfm.io.files import write_json
from sarfm.runs.index_page import write_index

HOSTILE = "<script>alert(1)</script>\"'&"


def test_hostile_texts_and_names_stay_text(tmp_path):
    name = "a<b>\"'#?%20 & c"
    record = {"notebook": HOSTILE, "status": HOSTILE, "error": HOSTILE, "metrics": {HOSTILE: HOSTILE}}
    record |= {"parameters": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "started": HOSTILE}
    record |= {"device": {"cores": 2, "processor": HOSTILE}, "timings_s": {HOSTILE: 1.0}}
    write_json(tmp_path / "runs" / name / "run.json", record)
    figure = tmp_path / "runs" / name / "figures" / "x<i>#.png"
    figure.parent.mkdir()
    figure.write_bytes(b"")
    pages = [write_index(tmp_path / "runs"), tmp_path / "runs" / name / "index.html"]
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.search(r"<script|<b>\"|<i>", text)
        for link in re.findall(r'(?:href|src)="([^"]*)"', text):
            assert link == "data:," or (page.parent / unquote(unescape(link))).exists()
