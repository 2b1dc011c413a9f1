"""Ice charts as figures and on the map: colours, legends, readouts, errors and hostile names, without a browser."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from pyproj import CRS, Transformer

from sarfm.ice import figures as icecharts
from sarfm.ice.charts import CHARTS, chart_label
from sarfm.scenes.open import make_scene
from sarfm.viz import classes as charts
from sarfm.viz import prediction_map as chartmap
from sarfm.viz.figures import class_colours, escape

POLAR = CRS.from_epsg(3413)
PAYLOADS = [
    "<script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "'><svg onload=window.pwned=1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<style>@keyframes x{}</style><b style='animation-name:x' onanimationstart=window.pwned=1></b>",
    "--><script>window.pwned=1</script><!--",
    "</title><script>window.pwned=1</script>",
    "$\\frac{1}{$ $x_{$ _first",
    "$\\frac{$",
    "100 % {0} {name}",
]


def swath(lon=-15.0, lat=80.5, size=120, step=400.0, turn=0.6):
    """A turned swath with a chart of two halves, an unclassified strip and land, known by GCPs alone."""
    x, y = Transformer.from_crs(4326, POLAR, always_xy=True).transform(lon, lat)
    rows, cols = (v.ravel() for v in np.meshgrid(*[np.linspace(0, size, 6)] * 2, indexing="ij"))
    c, s, half = np.cos(turn), np.sin(turn), size / 2
    at = x + step * (c * (cols - half) + s * (rows - half)), y + step * (s * (cols - half) - c * (rows - half))
    ties = Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*at)
    generator = np.random.default_rng(0)
    bands = {n: generator.normal(level, 2, (size, size)) for n, level in (("hh", -12), ("hv", -22))}
    attrs = {"scene": "20191011T131651_cis", "time": "2019-10-11T13:16:51"}
    gcps = np.stack([rows, cols, *ties], axis=1)
    scene = make_scene(bands, units="dB", quantity="sigma0", gcps=gcps, attrs=attrs)
    column = np.broadcast_to(np.arange(size), (size, size))
    halves = np.where(column < size // 2, 0, 5)
    codes = np.where(column >= size - 10, 255, halves).astype("uint8")
    scene["distance_map"] = ("y", "x"), np.where(column < 12, 0.0, 7.0)
    scene["incidence_angle"] = ("y", "x"), np.linspace(20, 45, size)[None].repeat(size, 0)
    return scene.assign({n: chart_label(codes, n) for n in CHARTS})


def guessed(scene):
    """A prediction that is 4 everywhere."""
    return xr.Dataset({n: chart_label(np.full(scene["sic"].shape, 4, "uint8"), n) for n in CHARTS})


def reconstruction(scene, ratio=0.75):
    """What reconstruct_scene returns, without a model."""
    from sarfm.scenes.open import stack_channels

    image = stack_channels(scene, ["hh", "hv"])
    hidden = np.random.default_rng(0).random(image.shape[1:]) < ratio
    filled = image.where(~hidden, image.mean(("y", "x"))).assign_attrs(image.attrs)
    layers = {"original": image, "masked": image.where(~hidden), "reconstruction": filled, "error": filled - image}
    return xr.Dataset(layers | {"hidden": (("y", "x"), hidden)})


@pytest.fixture(scope="module")
def scene():
    return swath()


@pytest.fixture(scope="module")
def widget(scene):
    return icecharts.chart_map(scene, guessed(scene))


# ---- classes and colours ----------------------------------------------------------------------------------------------------


def test_truth_lends_its_colours_to_a_prediction_without():
    scene = swath()
    plain = guessed(scene).map(lambda v: v.assign_attrs({k: a for k, a in v.attrs.items() if k != "flag_colors"}))
    layers = charts.chart_layers(scene, plain, "sod")
    assert list(layers) == ["truth", "prediction"]
    assert class_colours(layers["prediction"])[5] == ("old ice", CHARTS["sod"].colors[5])


def test_colours_come_from_whoever_has_them():
    scene = swath()
    del scene["sod"].attrs["flag_colors"]
    named = guessed(scene)
    named["sod"].attrs["flag_colors"] = "red green blue black white yellow"
    layers = charts.chart_layers(scene, named, "sod")
    assert {k: class_colours(v)[0][1] for k, v in layers.items()} == {"truth": "#ff0000", "prediction": "#ff0000"}


def test_prediction_alone_is_shown_in_its_own_colours():
    scene = swath()
    layers = charts.chart_layers(scene.drop_vars("sod"), guessed(scene), "sod")
    assert list(layers) == ["prediction"] and class_colours(layers["prediction"])[4][1] == CHARTS["sod"].colors[4]


def test_simulated_floe_numbers_are_no_chart():
    scene = swath().drop_vars("floe")
    scene["floe"] = ("y", "x"), np.ones(scene["hh"].shape, "int32")
    with pytest.raises(ValueError, match="'floe' with CF flags"):
        charts.chart_layers(scene, None, "floe")
    assert icecharts.chart_map(scene).chart.options == (("SIC", "sic"), ("SOD", "sod"))


def test_legend_names_what_occurs_and_nothing_else(scene):
    layers = charts.chart_layers(scene, guessed(scene), "sod")
    assert list(charts.present_classes(layers)) == ["open water", "thick first-year ice", "old ice"]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda s: icecharts.show_charts(s, charts=("ridges",)), "ridges"),
        (lambda s: icecharts.show_charts(s, channels=("vv",)), "vv"),
        (lambda s: icecharts.show_charts(s, guessed(s).isel(y=slice(9))), r"\(120, 120\) px"),
        (lambda s: icecharts.chart_map(s, channel="vv"), "vv"),
        (lambda s: icecharts.chart_map(s, chart="ridges"), "ridges"),
        (lambda s: icecharts.show_mask_ratios({}, s), "at least one"),
        (lambda s: icecharts.show_mask_ratios({0.5: reconstruction(s)}, s, channels=("vv",)), "vv"),
        (
            lambda s: icecharts.show_system1(s.drop_vars("sod"), reconstruction(s), guessed(s), guessed(s)),
            r"\['chart'\]",
        ),
    ],
)
def test_errors_say_what_is_there(scene, call, said):
    with pytest.raises(ValueError, match=said):
        call(scene)


# ---- figures ------------------------------------------------------------------------------------------------------------------


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


def printed(figure):
    """The figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def drawn_colour(figure, title, row, column):
    """The colour on paper of a place given as a fraction of the panel."""
    paper, ax = printed(figure), panel(figure, title)
    x, y = ax.transAxes.transform((column, 1 - row))
    return "#{:02x}{:02x}{:02x}".format(*paper[int(paper.shape[0] - y), int(x), :3])


@pytest.fixture(scope="module")
def figure(scene):
    return icecharts.show_charts(scene, guessed(scene))


@pytest.mark.parametrize(
    "title, column, colour",
    [
        ("SOD, chart", 0.3, CHARTS["sod"].colors[0]),
        ("SOD, chart", 0.7, CHARTS["sod"].colors[5]),
        ("SOD, chart", 0.04, charts.LAND_GREY),
        ("SIC, prediction", 0.7, CHARTS["sic"].colors[4]),
        ("SIC, prediction", 0.04, charts.LAND_GREY),
        ("FLOE, prediction", 0.3, CHARTS["floe"].colors[4]),
    ],
)
def test_known_pixels_have_the_colours_of_the_chart(figure, title, column, colour):
    assert drawn_colour(figure, title, 0.5, column) == colour.lower()


def test_figure_is_labelled(figure):
    assert figure.get_suptitle() == "20191011T131651_cis, 2019-10-11 13:16"
    titles = [ax.get_title() for ax in figure.axes if ax.get_visible() and ax.get_title()]
    assert titles == [
        "HH",
        "SIC, chart",
        "SOD, chart",
        "FLOE, chart",
        "HV",
        "SIC, prediction",
        "SOD, prediction",
        "FLOE, prediction",
    ]
    legend = [t.get_text() for t in panel(figure, "SOD, prediction").get_legend().get_texts()]
    assert legend == ["open water", "thick first-year ice", "old ice", "land", "not classified"]
    bars = [child.get_ylabel() for ax in figure.axes for child in ax.child_axes]
    assert bars == ["HH σ⁰ (dB)", "HV σ⁰ (dB)"]


def test_unclassified_is_hatched_and_never_a_class(scene):
    figure = icecharts.show_charts(scene, charts=("sod",))
    ax = panel(figure, "SOD, chart")
    assert ax.patch.get_hatch() and (ax.images[0].get_array()[:, -10:, 3] == 0).all()


def test_one_channel_and_one_chart_make_two_panels(scene):
    figure = icecharts.show_charts(scene, charts=("sic",), channels=("hv",))
    assert [ax.get_title() for ax in figure.axes if ax.get_visible() and ax.get_title()] == ["HV", "SIC, chart"]


def test_scale_bar_tells_the_distance(scene):
    from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

    figure = icecharts.show_charts(scene)
    bar = next(a for a in panel(figure, "HH").artists if isinstance(a, AnchoredSizeBar))
    printed(figure)
    assert bar.txt_label.get_text() == "10 km"
    width = bar.size_bar.get_children()[0].get_width()
    assert width * charts.spacing_m(scene) == pytest.approx(10_000, rel=1e-3)


@pytest.mark.parametrize("turn", [0.0, 0.6, 2.5])
def test_arrow_points_where_latitude_grows(turn):
    from sarfm.scenes.scene import scene_lonlat

    scene = swath(turn=turn)
    right, down = charts.north(scene)
    lon, lat = scene_lonlat(scene)
    middle, away = (60, 60), (60 + round(40 * down), 60 + round(40 * right))
    assert lat[away] > lat[middle] and abs(lon[away] - lon[middle]) < 0.1
    assert charts.north(swath(40.0, 89.9)) is None


@pytest.mark.parametrize("width, length", [(400e3, 100e3), (80e3, 20e3), (29.9e3, 5e3), (30e3, 10e3), (900.0, 200.0)])
def test_scale_bar_is_round(width, length):
    assert charts.scale_length_m(width) == length


def test_large_scene_is_averaged_in_power_and_charts_are_not():
    generator = np.random.default_rng(0)
    power = generator.exponential(0.1, (64, 64))
    scene = make_scene({"hh": 10 * np.log10(power)}, units="dB", quantity="sigma0")
    scene["sod"] = chart_label(generator.choice([0, 5], (64, 64)).astype("uint8"), "sod")
    values, label = charts.radar_values(scene, "hh", 8)
    wanted = 10 * np.log10(power.reshape(8, 8, 8, 8).mean((1, 3)))
    assert np.allclose(values, wanted, atol=1e-4) and label == "HH σ⁰ (dB)"
    assert np.array_equal(charts.thinned(scene["sod"], 8), scene["sod"][4::8, 4::8])


def test_lazy_scene_is_drawn_and_stays_lazy(scene):
    lazy = scene.chunk({"y": 60, "x": 60})
    figure = icecharts.show_charts(lazy, charts=("sod",), side_px=60)
    assert panel(figure, "SOD, chart").images[0].get_array().shape[:2] == (60, 60)
    assert lazy["hh"].chunks is not None


def test_system_1_panels_stand_where_the_paper_has_them(scene):
    figure = icecharts.show_system1(scene, reconstruction(scene), guessed(scene), guessed(scene))
    titles = [ax.get_title() for ax in figure.axes if ax.images and ax.get_title()]
    assert titles == [
        "HH", "HV", "SOD, chart",
        "HH, reconstructed, 75% hidden", "HV, reconstructed, 75% hidden", "SOD, prediction",
        "SOD, U-Net",
    ]  # fmt: skip
    land = [panel(figure, t).images[1].get_array()[:, :12, 3] for t in ("SOD, chart", "SOD, prediction", "SOD, U-Net")]
    assert all((part == 1).all() for part in land), "land is masked in all three"


def test_mask_ratios_share_their_greys_and_paint_what_was_hidden(scene):
    figure = icecharts.show_mask_ratios({0.9: reconstruction(scene, 0.9), 0.25: reconstruction(scene, 0.25)}, scene)
    shown = [ax for ax in figure.axes if ax.get_title()]
    assert len(shown) == 12 and [ax.get_ylabel() for ax in shown if ax.get_ylabel()] == ["25% hidden", "90% hidden"]
    hh = {ax.images[0].get_clim() for ax in shown[:3] + shown[6:9]}
    assert len(hh) == 1
    painted = [float(ax.images[1].get_array()[..., 3].mean()) for ax in shown if ax.get_title() == "masked"]
    assert np.allclose(painted, [0.25, 0.25, 0.9, 0.9], atol=0.02)


# ---- the map ------------------------------------------------------------------------------------------------------------------


def picture(url):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def test_map_is_polar_and_asks_no_server(widget):
    assert widget.pictures.grid.crs.to_epsg() == 3413
    assert not [layer for layer in widget.map.layers if "Tile" in type(layer).__name__]
    assert all(o.url.startswith("data:image/") for o in widget.overlays.values())
    assert widget.map.panes["radar"]["zIndex"] < widget.map.panes["left"]["zIndex"]


@pytest.mark.parametrize("lon, lat", [(-15.0, 80.5), (40.0, 89.97)], ids=["coast", "pole"])
def test_colours_lie_on_the_map_where_the_swath_has_them(lon, lat):
    scene = swath(lon, lat)
    widget = icecharts.chart_map(scene, guessed(scene), chart="sod")
    seen, grid = picture(widget.overlays["left"].url), widget.pictures.grid
    x_min, y_min, x_max, y_max = grid.bounds
    for row, column, colour in [(60, 30, CHARTS["sod"].colors[0]), (20, 90, CHARTS["sod"].colors[5]), (60, 116, None)]:
        x, y = (float(v) for v in grid.to_map(row + 0.5, column + 0.5))
        at = int((y_max - y) / (y_max - y_min) * seen.shape[0]), int((x - x_min) / (x_max - x_min) * seen.shape[1])
        assert "#{:02x}{:02x}{:02x}".format(*seen[at][:3]) == colour if colour else seen[at][3] == 0
    assert (picture(widget.overlays["right"].url)[..., 3] > 0).mean() > 0.4


def test_choices_exchange_the_right_pictures(widget):
    radar, left, right = (widget.overlays[n].url for n in ("radar", "left", "right"))
    widget.channel.value = "hv"
    assert widget.overlays["radar"].url != radar and widget.overlays["left"].url == left
    assert "HV" in widget.legend.value
    widget.channel.value, widget.chart.value = "hh", "sod"
    assert widget.overlays["radar"].url == radar and widget.overlays["right"].url != right
    assert "old ice" in widget.legend.value and "young ice" not in widget.legend.value
    widget.left.value = "radar"
    assert widget.overlays["left"].url == chartmap.EMPTY
    widget.chart.value, widget.left.value = "sic", "truth"
    assert widget.overlays["left"].url == left and widget.overlays["right"].url == right


def test_side_without_a_chart_is_empty(scene):
    widget = icecharts.chart_map(scene, guessed(scene)[["sod"]], chart="sic")
    assert widget.right.value == "prediction" and widget.overlays["right"].url == chartmap.EMPTY
    widget.chart.value = "sod"
    assert widget.overlays["right"].url != chartmap.EMPTY


def test_empty_picture_is_one_transparent_pixel():
    assert picture(chartmap.EMPTY).shape == (1, 1, 4) and picture(chartmap.EMPTY)[0, 0, 3] == 0


def test_readout_is_the_scenes_own_pixel(scene, widget):
    widget.look_at(*widget.pictures.grid.to_map(10.5, 80.5))
    text, hh = widget.pixel.value, float(scene["hh"][10, 80])
    assert "row 10, column 80" in text and f"{hh:.1f} dB".replace("-", "−") in text
    assert "50 percent" in text and "40 percent" in text and "old ice" in text and "thick first-year ice" in text
    assert f"{float(scene['incidence_angle'][10, 80]):.1f}°" in text and "80." in text and "°W" in text
    widget.look_at(*widget.pictures.grid.to_map(10.5, 118.5))
    assert "not classified" in widget.pixel.value
    widget.look_at(0.0, 0.0)
    assert "outside the scene" in widget.pixel.value and "dB" not in widget.pixel.value


def test_mouse_reads_memory_and_only_a_click_reads_a_file(scene, widget):
    x, y = (float(v) for v in widget.pictures.grid.to_map(33.5, 44.5))
    widget._moved("mousemove", (y, x))
    assert "row 33, column 44" in widget.pixel.value
    lazy = icecharts.chart_map(scene.chunk({"y": 60, "x": 60}))
    lazy._moved("mousemove", (y, x))
    assert "row 33, column 44" not in lazy.pixel.value
    lazy._moved("click", (y, x))
    assert "row 33, column 44" in lazy.pixel.value


def test_invalid_pixels_say_so_and_are_clear(scene):
    holed = scene.copy(deep=True)
    holed["hh"][50:70, 50:70] = np.nan
    layers = {"sod": charts.chart_layers(holed, None, "sod")}
    assert charts.pixel_values(holed, layers, 60, 60)["HH"] == "no data"
    widget = icecharts.chart_map(holed)
    x, y = (float(v) for v in widget.pictures.grid.to_map(60.5, 60.5))
    seen, (x_min, y_min, x_max, y_max) = picture(widget.overlays["radar"].url), widget.pictures.grid.bounds
    assert (
        seen[int((y_max - y) / (y_max - y_min) * len(seen)), int((x - x_min) / (x_max - x_min) * seen.shape[1]), 3] == 0
    )


def test_blocks_reach_the_edge_of_the_map():
    scene = swath(size=101)
    grid = charts_grid(scene)
    whole = chartmap.on_map(grid, np.arange(101 * 101.0).reshape(101, 101))
    blocks = chartmap.on_map(grid, np.arange(25.0)[:, None].repeat(25, 1), 4)
    assert np.array_equal(np.isfinite(whole), np.isfinite(blocks))
    assert np.nanmin(blocks) == 0 and np.nanmax(blocks) == 24


def charts_grid(scene):
    from sarfm.viz.projection import project_scene

    return project_scene(scene)


def test_scene_without_a_place_is_laid_out_in_pixels():
    scene = make_scene({"hh": np.full((40, 50), -12.0) + np.arange(50) / 10}, units="dB", quantity="sigma0")
    scene["sic"] = chart_label(np.full((40, 50), 7, "uint8"), "sic")
    widget = icecharts.chart_map(scene)
    assert widget.pictures.grid.crs is None and "row 20, column 25" in widget.pixel.value
    assert icecharts.show_charts(scene, charts=("sic",), channels=("hh",))._repr_png_()


# ---- hostile text -------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [n for n, v in attributes if n.startswith("on") or "javascript:" in str(v)]


def named(text):
    """A scene whose names all hold the text."""
    scene = swath(size=40)
    word = text.replace(" ", "_")
    scene = scene.drop_vars(list(CHARTS)).assign_attrs(scene=text, time=text, title=text)
    codes = np.zeros((40, 40), "uint8")
    flags = {"flag_values": np.uint8([0]), "flag_meanings": word, "flag_colors": "#ff0000", "long_name": text}
    scene["sod"] = (("y", "x"), codes, flags)
    return scene


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_names_make_no_element(payload):
    plain = icecharts.chart_map(named("plain"), chart="sod")
    widget = icecharts.chart_map(named(payload), chart="sod")
    for part, wanted in ((widget.legend, plain.legend), (widget.pixel, plain.pixel)):
        found = Tags(part.value)
        assert found.tags == Tags(wanted.value).tags and not found.handlers
    assert escape(payload.replace(" ", "_").replace("_", " ")) in widget.legend.value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_names_are_drawn_as_text(payload):
    figure = icecharts.show_charts(named(payload), charts=("sod",))
    printed(figure)
    assert figure.get_suptitle().startswith(payload[:20])
    shown = [t.get_text() for t in panel(figure, "SOD, chart").get_legend().get_texts()]
    assert shown[0] == payload.replace("_", " ")


def test_colour_that_is_none_is_refused():
    scene = named("ice")
    scene["sod"].attrs["flag_colors"] = "red;position:fixed"
    with pytest.raises(ValueError, match="position:fixed"):
        icecharts.chart_map(scene, chart="sod")
