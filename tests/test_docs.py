"""The pages: what the extension makes of a notebook, and the built site in a browser that reaches no other host."""

import ast
import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S

root = Path(__file__).parents[1]
site = root / "_docs/html"
sys.path.insert(0, str(root / "docs"))
from sarfm_docs import WIDGET, Links, api, comments, directives, outputs, parameters  # noqa: E402

NOTEBOOKS = [
    p
    for p in sorted((root / "nbs").rglob("*.ipynb"))
    if (site / p.relative_to(root / "nbs")).with_suffix(".html").exists()
]
LINKS = Links({"sarfm.sar": {"sarfm.sar.to_db": ("", ""), "sarfm.sar._hidden": ("", "")}})
SOURCE = '''
def look(
    image: "DataArray | None",  # (H, W), in dB | linear, p*p pixels
    *,
    looks: tuple[int, int] = (3, 3),  # rows and columns
) -> Tensor:  # (H, W)
    """See `to_db` first."""
'''


def described(source: str = SOURCE) -> str:
    """Describe the first definition of a source."""
    return api(ast.parse(source).body[0], comments(source), LINKS)


def test_parameters_carry_type_default_and_meaning():
    rows = parameters(ast.parse(SOURCE).body[0], comments(SOURCE))
    assert rows == [
        ("image", "DataArray | None", "", "(H, W), in dB | linear, p*p pixels"),
        ("looks", "tuple[int, int]", "(3, 3)", "rows and columns"),
        ("return", "Tensor", "", "(H, W)"),
    ]


def test_tables_escape_what_markdown_would_take():
    text = described()
    assert r"in dB \| linear, p\*p pixels" in text
    assert "[`DataArray`](https://docs.xarray.dev" in text and r"`\| None`" in text
    assert "{py:obj}`to_db <sarfm.sar.to_db>`" in text


def test_only_public_names_are_linked_and_code_is_left_alone():
    text = LINKS.prose("`to_db()` and `_hidden`\n```\n`to_db`\n```\n# `to_db`")
    assert text == "{py:obj}`to_db() <sarfm.sar.to_db>` and `_hidden`\n```\n`to_db`\n```\n# `to_db`"


def test_classes_show_methods_but_not_private_ones():
    text = described(
        'class A:\n    """Be."""\n    b: int = 1  # pixels\n    def c(self, d: int) -> int:  # m\n        """Do."""\n    def _e(self): ...\n'
    )
    assert "{py:class} A(b=1)" in text and "{py:method} c(d)" in text and "_e" not in text


def test_directives_are_taken_off():
    assert directives("#| export\n#| echo: false\n\nx = 1") == ({"export": "", "echo": "false"}, "x = 1")


def test_a_widget_without_stored_state_is_not_shown():
    cell = {"outputs": [{"output_type": "display_data", "data": {WIDGET: {"model_id": "a"}}}]}
    assert outputs(cell, {}, "") == [] and outputs(cell, {"a": {}}, "") == cell["outputs"]


# ---- the built site -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """Serve the built site on this machine."""
    if not (site / "index.html").exists():
        pytest.skip("the site is not built: run `make docs`")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Start Chromium, or say that there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no Chromium on this machine: the browser tests did not run")
    from playwright.sync_api import sync_playwright

    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found, args=[*quiet.split(), "--disable-component-update", "--disable-sync"]
        )
        yield started
        started.close()


def visit(browser, address: str, page: str, scheme: str = "light"):
    """Open a page with every other host refused; return it and what went wrong."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1300, "height": 900})
    context.set_default_timeout(PATIENCE_S * 1000)
    tab, faults = context.new_page(), []
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
    tab.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or faults.append(f"asked {r.url}"))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("response", lambda r: r.status >= 400 and faults.append(f"{r.status} {r.url}"))
    tab.goto(f"{address}/{page}", wait_until="load")
    tab.wait_for_timeout(500)
    return tab, faults


def pages() -> list[str]:
    """Choose the front page, a page of every kind, and every page with a widget or a live plot."""
    notebooks = [p.relative_to(root / "nbs").with_suffix("") for p in NOTEBOOKS]
    live = [n for n in notebooks if any(m in (root / f"nbs/{n}.ipynb").read_text() for m in (WIDGET, "holoviews_exec"))]
    kinds = {str(n.parent): n for n in reversed(notebooks) if n.name != "index"}
    return [f"{n}.html" for n in dict.fromkeys([Path("index"), Path("api"), Path("genindex"), *kinds.values(), *live])]


@pytest.mark.browser
@pytest.mark.parametrize("page", pages())
def test_page_asks_no_other_host_and_fits_the_window(browser, address, page):
    tab, faults = visit(browser, address, page)
    assert not faults
    assert tab.locator("article h1").first.inner_text().strip()
    assert tab.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, "wider than the window"
    text = tab.locator("article").inner_text()
    assert "``" not in text.replace("```", "") and "{py:" not in text, "markup on the page"
    tab.context.close()


@pytest.mark.browser
def test_reader_sees_the_scheme_of_the_system(browser, address):
    shades = {}
    for scheme in ("light", "dark"):
        tab, faults = visit(browser, address, "index.html", scheme)
        shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(int(v) for v in shade.strip("rgba()").split(",")[:3])
        assert not faults
        tab.context.close()
    assert shades["light"] > 600 > 200 > shades["dark"]


@pytest.mark.browser
def test_search_finds_a_function(browser, address):
    tab, faults = visit(browser, address, "search.html?q=to_db")
    tab.wait_for_selector("ul.search li")
    assert any("to_db" in text for text in tab.locator("ul.search li").all_inner_texts()) and not faults
    tab.context.close()


@pytest.mark.browser
def test_types_and_names_link_to_where_they_are_documented(browser, address):
    tab, _ = visit(browser, address, "00_sar.html")
    table = tab.locator("dl.py.function").first.locator("table")
    assert table.locator("th").all_inner_texts()[:2] == ["Parameter", "Type"]
    assert tab.locator("dl.py table a[href*='docs.xarray.dev']").count() > 0
    assert tab.locator("article p a.reference.internal code").count() > 0
    tab.context.close()


def stored_widgets() -> list[str]:
    """Find the pages that show a widget from the state that their notebooks store."""
    return [str(p.relative_to(root / "nbs").with_suffix(".html")) for p in NOTEBOOKS if WIDGET in p.read_text()]


@pytest.mark.parametrize("path", sorted((root / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_state_of_widgets_is_stored_where_one_is_shown(path):
    notebook = json.loads(path.read_text())
    shown = [out["data"] for cell in notebook["cells"] for out in cell.get("outputs", ()) if "data" in out]
    assert ("widgets" in notebook["metadata"]) == any(WIDGET in data for data in shown)


@pytest.mark.browser
@pytest.mark.parametrize("page", stored_widgets())
def test_widget_is_drawn_without_a_kernel(browser, address, page):
    tab, faults = visit(browser, address, page)
    tab.wait_for_selector(".jupyter-widgets")
    assert not faults
    tab.context.close()
