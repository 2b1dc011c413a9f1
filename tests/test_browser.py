"""The widget in a real JupyterLab and the exported page from file://, in headless Chromium, without any network but loopback."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from patience import PATIENCE_S

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
PICTURES = Path(__file__).parents[1] / "test-results"

MODEL = """
import torch
from sarfm.datasets.catalog import open_dataset
from sarfm.patches.contract import InputContract
from sarfm.scenes.open import stack_channels
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder

torch.manual_seed(0)
scenes = open_dataset("borneo")
scene = scenes[next(iter(scenes))].load()
image = stack_channels(scene, ["vv@0", "vh@0"])
said = {k: scene["vv"].attrs[k] for k in ("units", "quantity")}
scale = {"mean": image.mean(("y", "x")).values.tolist(), "std": image.std(("y", "x")).values.tolist()}
contract = InputContract(channels=["vv@0", "vh@0"], patch_size=8, crop_px=64, **said, **scale)
model = MAE(Encoder(2, patch_size=8, width=32, depth=1, heads=2), decoder_width=32, decoder_depth=1, decoder_heads=2)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
pixels, valid = contract.apply(scene)
for step in range(10):
    batch = {"image": pixels[None, :, 64:128, 40 * step % 300:][..., :64], "valid": valid[None, 64:128, 40 * step % 300:][..., :64]}
    loss, _ = model.loss(model.draw(batch))
    optimiser.zero_grad(); loss.backward(); optimiser.step()
"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that lets loopback, file and data through, and notes everything else, every error and every console message of that level."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE_S * 1000)
    page = context.new_page()
    page.refused, page.errors = [], []

    def gate(route):
        url = route.request.url
        if url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "file://", "data:", "blob:", "about:")):
            route.continue_()
        else:
            page.refused.append(url)
            route.abort()

    context.route("**/*", gate)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()


def pixels(target):
    """Take a screenshot of a page or an element as an array."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(target.screenshot())).convert("RGB")).astype(int)


def settled(target, different_from=None):
    """Wait until a picture stands still (and is another one than before)."""
    last, end = None, time.time() + PATIENCE_S
    while time.time() < end:
        now = pixels(target)
        same = last is not None and now.shape == last.shape and (now == last).all()
        if same and (different_from is None or share(now, different_from) > 0.01):
            return now
        last = now
        time.sleep(0.2)
    raise AssertionError("the picture did not change, or did not come to rest")


def share(a, b):
    """Tell which share of the pixels differs visibly."""
    return float((np.abs(a - b).max(-1) > 8).mean()) if a.shape == b.shape else 1.0


def keep(target, name):
    PICTURES.mkdir(exist_ok=True)
    target.screenshot(path=PICTURES / f"{name}.png")


# ---- the exported page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from sarfm.viz.pages import export_comparison

    made = {}
    exec(compile(MODEL, "model", "exec"), made)
    path = tmp_path_factory.mktemp("page") / "map.html"
    return export_comparison(made["model"], made["scene"], path, made["contract"], seeds=(0, 1))


def test_exported_page_works_offline(page, exported):
    requests = []
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith("data:") else None)
    page.goto(exported.as_uri())
    stage = page.locator("#stage")
    first = settled(stage)
    keep(page, "page_75")

    page.focus("#ratio")
    page.keyboard.press("ArrowRight")
    most = settled(stage, first)
    assert "90 % hidden" in page.inner_text("#right-name")
    keep(page, "page_90")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert "25 % hidden" in page.inner_text("#right-name")
    few = settled(stage, most)
    keep(page, "page_25")

    page.select_option("#right", label="error")
    error = settled(stage, few)
    page.select_option("#left", label="masked")
    masked = settled(stage, error)
    page.select_option("#channel", index=1)
    assert "VH" in page.inner_text("#grey-name") and "dB" in page.inner_text("#grey-name")
    page.select_option("#channel", index=0)
    page.select_option("#seed", index=1)
    seeded = settled(stage, masked)
    page.select_option("#left", label="original")
    page.select_option("#right", label="reconstruction")
    page.select_option("#seed", index=0)
    before = settled(stage, seeded)
    assert share(before, few) < 0.001, "the same choices show the same picture"

    box = page.locator("#divider").bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] - 250, box["y"] + 100, steps=5)
    page.mouse.up()
    assert share(settled(stage), before) > 0.01
    assert requests == [exported.as_uri()] and not page.refused and not page.errors


def test_exported_page_shows_a_tile_and_a_place(page, exported):
    page.goto(exported.as_uri())
    box = page.locator("#stage").bounding_box()
    centre = box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5
    settled(page.locator("#stage"))
    page.mouse.click(*centre)
    assert page.inner_text("#tile-hint").startswith("Tile at row")
    numbers = page.inner_text("#scores")
    assert "dB²" in numbers and "SSIM" in numbers
    keep(page, "page_tile")
    page.mouse.move(centre[0] + 3, centre[1])
    assert page.inner_text(".place").startswith("5.39") and "°E" in page.inner_text(".place")
    page.mouse.click(box["x"] + 20, box["y"] + box["height"] - 100)
    assert page.inner_text("#tile-hint").startswith("Click")
    assert not page.errors


# ---- hostile text ---------------------------------------------------------------------------------------------------------

PAYLOADS = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><img src=x onerror=window.pwned=1>',
    "'><svg onload=window.pwned=1>",
    "<svg/onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<iframe src=javascript:parent.pwned=1></iframe>",
    "<body onload=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>",
    "<video><source onerror=window.pwned=1></video>",
    "<math><mi//xlink:href='data:x,<script>window.pwned=1</script>'>",
    "<input autofocus onfocus=window.pwned=1>",
    "<style>@keyframes x{}</style><b style='animation-name:x' onanimationstart=window.pwned=1></b>",
    "<a href='javascript:window.pwned=1' id=title>x</a>",
    "--><script>window.pwned=1</script><!--",
    "<!--<script>window.pwned=1</script>",
    "]]><script>window.pwned=1</script>",
    "{{DATA}}<script>window.pwned=1</script>{{LEAFLET_JS}}",
    "\\u003cscript\\u003ewindow.pwned=1\\u003c/script\\u003e",
    "</title><script>window.pwned=1</script>",
    "</textarea><img src=x onerror=window.pwned=1>",
    "\u2028window.pwned=1//",
    "`${window.pwned=1}`",
]


@pytest.mark.row(12)
def test_hostile_text_runs_nowhere(page, tmp_path, row):
    """Every HTML producer, fed with 25 payloads as scene title, attributes, date and class names."""
    from sarfm.viz.comparison import Comparison
    from sarfm.viz.pages import export_comparison
    from sarfm.viz.widgets import compare_masks, legend_html, numbers_html

    made = {}
    exec(compile(MODEL, "model", "exec"), made)
    made["model"].eval()
    numbers = {"mse": 1.0, "ssim": 0.5, "hidden": 75.0}
    for k, payload in enumerate(PAYLOADS):
        with row.case(payload):
            scene = made["scene"].isel(y=slice(0, 64), x=slice(200, 264)).copy()
            scene.attrs.update(
                {name: payload for name in ("title", "sensor", "source", "attribution", "licence", "acquisition_time")}
            )
            scene = scene.assign_coords(time=[payload] * scene.sizes["time"])
            path = export_comparison(
                made["model"], scene, tmp_path / f"{k}.html", made["contract"], ratios=(0.5,), channels=["vv@0"]
            )
            assert payload not in path.read_text(encoding="utf-8") or "<" not in payload
            page.goto(path.as_uri())
            page.wait_for_function("document.getElementById('title').textContent.length > 0")
            page.wait_for_timeout(30)
            assert page.evaluate("window.pwned") is None, payload
            assert page.evaluate("document.querySelectorAll('script').length") == 3, payload
            comparison = Comparison(made["model"], scene, made["contract"], ratios=(0.5,))
            parts = [legend_html(comparison, "vv@0"), numbers_html({payload: numbers}, payload, payload)]
            if k % 8 == 0:
                widget = compare_masks(made["model"], scene, made["contract"], ratios=(0.5,))
                parts += [widget.legend.value, widget.numbers.value]
            page.set_content("".join(parts))
            page.wait_for_timeout(30)
            assert page.evaluate("window.pwned") is None, payload
            assert (
                page.evaluate("document.querySelectorAll('script, iframe, svg, input, [onload], [onerror]').length")
                == 0
            ), payload


# ---- JupyterLab -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own: loopback, token, free port, own folders."""
    root = tmp_path_factory.mktemp("lab")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = root / "settings" / "@jupyterlab"
    for name, value in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
    }
    env = {
        **os.environ,
        **{k: str(root / v) for k, v in own.items()},
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "spaces"),
    }
    (root / "work").mkdir()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
    ]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=let-me-in",
        f"--ServerApp.root_dir={root / 'work'}",
    ]
    command += ["--LabApp.expose_app_in_browser=True"]
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=root)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).read()
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, (root / "log").read_text()
                    time.sleep(0.25)
            yield port, root / "work"
        finally:
            server.terminate()
            server.wait(timeout=PATIENCE_S)


def test_jupyterlab_wants_the_token(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{lab[0]}/api/contents", timeout=5)


@pytest.mark.slow
def test_widget_in_jupyterlab(page, lab):
    port, folder = lab
    show = "from sarfm.viz.widgets import compare_masks\ncompare_masks(model, scene, contract)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (MODEL, show)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, folder / "compare.ipynb")
    page.goto(f"http://127.0.0.1:{port}/lab/tree/compare.ipynb?token=let-me-in")
    page.wait_for_function("window.jupyterapp !== undefined")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"{kernel} === 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function("document.querySelectorAll('.leaflet-container img.leaflet-image-layer').length === 2")
    page.locator(".leaflet-container").scroll_into_view_if_needed()
    chart = page.locator(".leaflet-container")
    before = settled(chart)
    assert before.std() > 20, "the map is blank"
    keep(page, "lab_75")

    handle = page.locator(".noUi-handle").first
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("[...document.querySelectorAll('.widget-readout')].some(e => e.textContent.includes('90'))")
    most = settled(chart, before)
    keep(page, "lab_90")
    few = most
    for _ in range(3):  # each picture is waited for, however busy the machine
        handle.press("ArrowLeft")
        few = settled(chart, few)
    keep(page, "lab_25")
    assert share(few, before) > 0.01

    box = chart.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
    page.wait_for_function("document.body.innerText.includes('Tile at row')")
    assert "dB²" in page.locator(".jp-OutputArea").last.inner_text()
    keep(page, "lab_tile")
    page.locator("select").nth(1).select_option("error")
    settled(chart, few)
    keep(page, "lab_error")
    assert not [url for url in page.refused if "127.0.0.1" not in url], page.refused


ICE = """
import numpy as np
import xarray as xr
from pyproj import CRS, Transformer
from sarfm.ice.charts import chart_label
from sarfm.scenes.open import make_scene
from sarfm.ice.sea_ice import simulate_ice
from sarfm.ice.figures import chart_map

def swath(lon, lat, side=300, step=300.0):
    polar, half = CRS.from_epsg(3413), side / 2
    x, y = Transformer.from_crs(4326, polar, always_xy=True).transform(lon, lat)
    rows, cols = (v.ravel() for v in np.meshgrid(*[np.linspace(0, side, 7)] * 2, indexing="ij"))
    c, s = np.cos(0.5), np.sin(0.5)
    at = x + step * (c * (cols - half) + s * (rows - half)), y + step * (s * (cols - half) - c * (rows - half))
    ties = Transformer.from_crs(polar, 4326, always_xy=True).transform(*at)
    ice = simulate_ice((side, side), 1, spacing_m=step, open_water=0.3, floe_diameter_m=(3e3, 2e4))
    bands = {n: ice[n].values for n in ("hh", "hv")}
    scene = make_scene(bands, units="dB", quantity="sigma0", gcps=np.stack([rows, cols, *ties], axis=1))
    blocks = ice["ice_class"].values.reshape(side // 30, 30, -1, 30).mean((1, 3)).repeat(30, 0).repeat(30, 1)
    codes = {"sic": np.clip(blocks * 5, 0, 10), "sod": np.clip(blocks * 2, 0, 5), "floe": np.clip(blocks * 2, 0, 6)}
    truth = {n: chart_label(v.astype("uint8"), n) for n, v in codes.items()}
    fine = np.clip(ice["ice_class"].values * 2, 0, 5).astype("uint8")
    scene = scene.assign(truth).assign(incidence_angle=ice["incidence_angle"].variable)
    return scene, xr.Dataset({n: chart_label(fine, n) for n in codes})
"""


@pytest.mark.slow
@pytest.mark.parametrize("lon, lat", [(-15.0, 80.5), (40.0, 89.9)], ids=["coast", "pole"])
def test_ice_chart_map_in_jupyterlab(page, lab, lon, lat):
    port, folder = lab
    name = f"ice{lat:.0f}"
    show = f"scene, predicted = swath({lon}, {lat})\nchart_map(scene, predicted)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (ICE, show)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page.goto(f"http://127.0.0.1:{port}/lab/workspaces/{name}/tree/{name}.ipynb?token=let-me-in")
    page.wait_for_function("window.jupyterapp !== undefined")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"{kernel} === 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    pictures = "document.querySelectorAll('.leaflet-container img.leaflet-image-layer').length === 3"
    page.wait_for_function(pictures)
    chart = page.locator(".leaflet-container")
    chart.scroll_into_view_if_needed()
    before = settled(chart)
    assert before.std() > 20, "the map is blank"
    keep(page, f"{name}_sic")

    box = chart.bounding_box()
    middle = page.locator("td:text-is('place') + td").inner_text()
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.45)
    page.wait_for_function(
        "old => { const words = document.body.innerText; return /SIC predicted\\s+\\d+ percent/.test(words) && !words.includes(old); }",
        arg=middle,
    )
    numbers = page.locator(".jp-OutputArea").last.inner_text()
    assert "dB" in numbers and "incidence angle" in numbers and f"{lat:.1f}"[:2] in numbers

    page.locator(".widget-dropdown select").nth(0).select_option("SOD")
    stage = settled(chart, before)
    keep(page, f"{name}_sod")
    page.locator(".widget-dropdown select").nth(1).select_option("HV")
    radar = settled(chart, stage)
    page.locator(".widget-dropdown select").nth(2).select_option("radar")
    left = settled(chart, radar)
    half = left.shape[1] // 2
    assert share(left[:, half + 20 :], radar[:, half + 20 :]) < 0.02, "the right side stays"
    page.locator(".noUi-handle").first.focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    settled(chart, left)
    keep(page, f"{name}_pale")
    swipe = page.locator(".leaflet-sbs-range, .leaflet-sbs-divider").first
    assert swipe.count() == 1
    assert not [url for url in page.refused if "127.0.0.1" not in url], page.refused


def test_the_map_of_a_split_shows_its_tiles(page, tmp_path):
    """Parts are switched off, the tile under the mouse says its name, and no host is asked for anything."""
    import pandas as pd

    from sarfm.patches.splits import band_borders, band_points, split_by_bands
    from sarfm.viz.parts import export_parts

    lon, lat = (v.ravel() for v in np.meshgrid(np.arange(109, 119, 0.2), np.arange(-4, 7, 0.2)))
    tiles = pd.DataFrame({"west": lon, "south": lat, "east": lon + 0.2, "north": lat + 0.2})
    tiles["place"] = [f"tile {k}" for k in range(len(tiles))]
    parts = split_by_bands(tiles, 20, 0.9)
    file = export_parts(tiles, parts, tmp_path / "parts.html", band_borders(band_points(tiles), 20, 0.9))
    page.goto(file.as_uri())
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.wait_for_function("document.getElementById('tile').innerText.includes('tile ')")
    number = int(page.locator("#tile").inner_text().split("patch")[1].split()[0])
    assert (
        f"tile {number}" in page.locator("#tile").inner_text() and parts[number] in page.locator("#tile").inner_text()
    )
    before = page.locator("#map").screenshot()
    page.locator("#part-0").uncheck()
    page.wait_for_timeout(500)
    assert page.locator("#map").screenshot() != before
    assert "nothing shared" in page.locator("#leaks").inner_text()
    assert not page.refused and not page.errors


def test_the_page_of_predictions_shows_two_models_and_their_errors(page, tmp_path):
    """Sides, season and opacity are chosen; hostile names stay words; no host is asked for anything."""
    from sarfm.datasets.catalog import open_dataset
    from sarfm.viz.prediction_page import export_predictions

    tile = open_dataset("land_simulated")["europe/00000"]
    hostile = "</script><img src=x onerror=window.pwned=1>"
    guesses = {"near": tile[["land_cover"]].roll(x=2), hostile: tile[["land_cover"]].roll(x=12)}
    file = export_predictions(tile, guesses, tmp_path / "page.html", note="rolled")
    page.goto(file.as_uri())
    page.wait_for_selector("#scores tr:nth-child(3)")
    right = (guesses["near"]["land_cover"].values == tile["land_cover"].values).mean()
    assert f"{100 * right:.1f} %" in page.locator("#scores").inner_text()
    assert hostile in page.locator("#scores").inner_text() and page.evaluate("window.pwned") is None
    first = settled(page.locator("#map"))
    page.locator("#left").select_option(label="near: wrong")
    page.locator("#right").select_option(label="truth")
    second = settled(page.locator("#map"), different_from=first)
    page.locator("#left").select_option(label="radar")
    page.locator("#right").select_option(label="radar")
    radar = settled(page.locator("#map"), different_from=second)
    page.locator("#date").fill("2")
    assert page.locator("#date-name").inner_text() == "summer"
    settled(page.locator("#map"), different_from=radar)
    assert not page.refused and not page.errors


def test_the_page_of_attention_answers_for_every_patch(page, tmp_path):
    """A click asks for a patch; shares, cosines and colours are those of the encoder; no host is asked for anything."""
    import base64

    import torch
    from PIL import Image

    from sarfm.evaluation.attention import SceneAttention, patches_seen, top_mass
    from sarfm.viz.attention import attention_picture
    from sarfm.viz.attention_map import AttentionPictures
    from sarfm.viz.attention_page import export_attention

    made = {}
    exec(compile(MODEL, "model", "exec"), made)
    scene = made["scene"].isel(y=slice(40, 130), x=slice(180, 300)).copy(deep=True)
    scene["vv"][..., :16, :16] = np.nan  # a hole, and sides that no patch divides
    look = SceneAttention(made["model"].encoder, made["contract"], scene)
    pictures = AttentionPictures(look, side_px=800)
    hostile = "<img src=x onerror=window.pwned=1>"
    page.goto(export_attention(look, tmp_path / "page.html", heads=[1, 0], note=hostile).as_uri())
    page.wait_for_selector("#alike tr:nth-child(9)")
    row, column = pictures.first_patch()
    assert page.inner_text("#patch-hint").startswith(f"Patch at row {8 * row}, column {8 * column}, 8 × 8 px")
    first = settled(page.locator("#stage"))

    nodes, box = pictures.nodes(), page.locator("#map").bounding_box()

    def click(r, c):
        x, y = nodes[r : r + 2, c : c + 2].mean((0, 1))
        at = page.evaluate("([x, y]) => map.latLngToContainerPoint(L.latLng(y, x))", [float(x), float(y)])
        page.mouse.click(box["x"] + at["x"], box["y"] + at["y"])

    click(6, 3)
    assert page.inner_text("#patch-hint").startswith("Patch at row 48, column 24")
    second = settled(page.locator("#stage"), first)
    keep(page, "page_attention")
    cells = [line.split("\t") for line in page.inner_text("#alike").splitlines()[1:]]
    cosines = look.alike((6, 3))
    for (where, cosine), (_, _, best) in zip(cells, pictures.most_alike((6, 3)), strict=True):
        place = tuple(int(word) // 8 for word in where.replace(",", "").split()[1::2])
        assert abs(float(cosine) - cosines[place]) < 0.015 and abs(float(cosine) - best) < 0.015

    shares = pictures.shares((6, 3))
    seen = float(page.inner_text("#numbers").split("\t")[1].split(" of ")[0])
    assert abs(seen - float(patches_seen(torch.from_numpy(shares)))) < 2
    url = page.evaluate("made['attention']")
    painted = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA")).astype(int)
    wanted = 255 * pictures.grid.warp(attention_picture(look, shares), fill=0.0)
    assert painted.shape == wanted.shape and (painted[..., 3] == wanted[..., 3]).all()
    assert np.median(np.abs(painted - wanted)[wanted[..., 3] > 0]) < 8

    page.locator("#mass").fill("0.5")
    kept = int(top_mass(torch.from_numpy(shares), 0.5).sum())
    assert abs(int(page.inner_text("#numbers").rpartition("\t")[2].split()[0]) - kept) <= 2
    third = settled(page.locator("#stage"), second)
    page.select_option("#query", label="the class token")
    page.select_option("#head", label="head 1")
    classed = page.evaluate("shares()")
    assert np.allclose(classed, pictures.shares("class", 1)[look.present], atol=pictures.shares("class", 1).max() / 400)
    settled(page.locator("#stage"), third)
    click(0, 0)  # nothing was observed there
    assert page.inner_text("#patch-hint").startswith("Patch at row 48, column 24")
    assert hostile in page.inner_text("#note") and page.evaluate("window.pwned") is None
    assert not page.refused and not page.errors
