"""Many scenes: what is listed, what goes on, what is not done twice, and real scenes of three kinds on their maps."""

import re

import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
import zarr
from rasterio.transform import from_origin
from torch import nn

from sarfm.evaluation.many import list_inputs, predict_many
from sarfm.evaluation.predict import open_prediction, predict_scene
from sarfm.evaluation.tiles import predict_layers
from sarfm.models.vit import Encoder
from sarfm.models.weights import load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.runs.held_out import class_map
from sarfm.scenes.channels import Target
from sarfm.scenes.open import make_scene, open_scene, save_scene
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes
from sarfm.viz.classes import chart_layers


class Darkness(nn.Module):
    """Call what is darker than the mean of the first channel "dark"; counts how often it is run."""

    tiles, tasks = 0, {"tone": Classes(Target("tone", classes={0: "light", 1: "dark"}))}

    def forward(self, image, valid):
        self.tiles += len(image)
        return {"tone": torch.stack([image[:, 0], -image[:, 0]], 1)}


def contract(channels, units, quantity, mean, std, crop_px=64):
    said = {"channels": channels, "units": units, "quantity": quantity, "patch_size": 8, "crop_px": crop_px}
    return InputContract(**said, mean=[mean] * len(channels), std=[std] * len(channels))


def three(folder):
    field = np.random.default_rng(0).normal(-12, 3, (60, 80)).astype(np.float32)
    place = {"crs": "EPSG:32650", "transform": from_origin(5e5, 7e5, 10, 10)}
    for name, band in (("first", "vv"), ("second", "hh")):
        save_scene(make_scene({band: field}, units="dB", quantity="sigma0", **place), folder / f"{name}.nc")
    (folder / "third.tif").write_text("no image")
    (folder / "notes.txt").write_text("no scene")
    return field


def test_what_cannot_be_predicted_is_listed_and_the_rest_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    field, model = three(tmp_path / "in"), Darkness()
    wants = contract(["vv"], "dB", "sigma0", -12.0, 3.0)
    inputs = list_inputs([str(tmp_path / "in")])
    assert list(inputs) == ["first", "second", "third"]
    found = predict_many(model, wants, inputs, tmp_path / "out").set_index("scene")
    assert found["status"].to_dict() == {"first": "done", "second": "refused", "third": "refused"}
    assert "hh" in found.loc["second", "reason"] and "third.tif" in found.loc["third", "reason"]
    assert not list((tmp_path / "out").glob("second*")) and found.loc["first", "maps"] == "first_tone.tif"
    np.testing.assert_array_equal(open_prediction(tmp_path / "out" / "first.zarr")["tone"], field < -12)
    with rasterio.open(tmp_path / "out" / "first_tone.tif") as cog:
        np.testing.assert_array_equal(cog.read(1), field < -12)
        assert cog.transform == from_origin(5e5, 7e5, 10, 10) and cog.crs.to_epsg() == 32650


def test_what_is_done_is_not_done_again(tmp_path):
    (tmp_path / "in").mkdir()
    three(tmp_path / "in")
    model, wants = Darkness(), contract(["vv"], "dB", "sigma0", -12.0, 3.0)
    inputs = list_inputs([str(tmp_path / "in" / "first.nc")])
    predict_many(model, wants, inputs, tmp_path / "out", maps=False)
    ran = model.tiles
    again = predict_many(model, wants, inputs, tmp_path / "out")
    assert model.tiles == ran and again["status"].tolist() == ["there already"]
    assert (tmp_path / "out" / "first_tone.tif").exists()


def test_nothing_to_predict_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to predict"):
        list_inputs([str(tmp_path)])
    with pytest.raises((ValueError, OSError), match="nobody_knows"):
        list_inputs(["nobody_knows"])


REAL = {
    "grid": (["land/terramesh_s1rtc_lulc/38D_378R_2_3_S1RTC.tif"], {"channels": ["vv", "vh"], "units": "dB", "quantity": "gamma0"}),
    "swath": (
        ["sea_ice/s1_ew_hv_sigma0/S1A_EW_GRDM_1SDH_20161005T142446.tif"],
        {"channels": ["hv"], "units": "1", "quantity": "sigma0", "nodata": "none"},
    ),
    "pair": (
        ["flood/ombria_s1/before/0010.png", "flood/ombria_s1/after/0010.png"],
        {"channels": ["vv"], "units": "1", "quantity": "digital_number", "nodata": 255, "times": ["before", "after"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_real_scenes_become_stores_and_maps(shared, tmp_path, kind):
    files, answers = REAL[kind]
    files = [str(shared / file) for file in files]
    scene = open_scene(files if len(files) > 1 else files[0], **answers)
    name = next(str(n) for n in scene.data_vars if n != "valid")
    values = scene[name].values
    channels = [f"{name}@{k}" for k in range(scene.sizes["time"])] if "time" in scene.dims else [name]
    first = values[0] if "time" in scene.dims else values
    middle, spread = float(np.nanmedian(first)), float(np.nanstd(first))
    wants = contract(channels, scene[name].attrs["units"], scene[name].attrs["quantity"], middle, spread)
    inputs = list_inputs(["+".join(files)], answers=answers)
    found = predict_many(Darkness(), wants, inputs, tmp_path)
    assert found["status"].tolist() == ["done"], found["reason"][0]
    made = open_prediction(tmp_path / found["store"][0])["tone"].values
    seen = np.isfinite(values).all(0) if values.ndim == 3 else np.isfinite(values)
    assert (made[~seen] == 255).all() and 0.3 < (made[seen] == 1).mean() < 0.7
    assert ((made == 1) == (first < middle))[seen & (np.abs(first - middle) > 1e-3 * spread)].all()
    if kind == "pair":
        assert found["maps"][0] == ""  # a picture without a place
        return
    with rasterio.open(tmp_path / found["maps"][0]) as cog:
        drawn = cog.read(1)
        assert cog.crs.is_projected and abs((drawn == 1).sum() / (drawn != 255).sum() - (made[seen] == 1).mean()) < 0.02
        if kind == "grid":
            np.testing.assert_array_equal(drawn, made)


def test_a_model_of_single_dates_sees_a_stack_date_by_date(tmp_path):
    field = np.random.default_rng(0).normal(-12, 3, (3, 40, 48)).astype(np.float32)
    times = ["2024-01-05", "2024-01-17", "2024-01-29T05:30:00"]
    scene = make_scene({"vv": field}, units="dB", quantity="sigma0", times=times)
    opened = {"delta": lambda: scene}
    found = predict_many(Darkness(), contract(["vv"], "dB", "sigma0", -12.0, 3.0), opened, tmp_path / "single")
    assert found["scene"].tolist() == [f"delta_{t}" for t in ("20240105T000000", "20240117T000000", "20240129T053000")]
    for name, image in zip(found["store"], field, strict=True):
        np.testing.assert_array_equal(open_prediction(tmp_path / "single" / name)["tone"], image < -12)
    at_once = predict_many(
        Darkness(), contract(["vv@2", "vv@0"], "dB", "sigma0", -12.0, 3.0), opened, tmp_path / "both"
    )
    assert at_once["scene"].tolist() == ["delta"]
    np.testing.assert_array_equal(open_prediction(tmp_path / "both" / "delta.zarr")["tone"], field[2] < -12)
    other = predict_many(Darkness(), contract(["hh"], "dB", "sigma0", -12.0, 3.0), opened, tmp_path / "other")
    assert other["scene"].tolist() == ["delta"] and "hh" in other["reason"][0]


# ---- a prediction has the codes, names and colours of its label ---------------------------------------------------------

CODES = {
    "few": ({1: "open water", 2: "new ice", 5: "old ice"}, "uint8", 255),
    "with 0 and 255": ({0: "open water", 7: "new ice", 255: "old ice"}, "uint8", 254),
    "large": ({1: "open water", 2: "new ice", 300: "old ice"}, "uint16", 255),
    "negative": ({-1: "open water", 0: "new ice", 5: "old ice"}, "int32", 255),
}
COLOURS = ("#0a2a5e", "#7fb2d9", "#dfe8f0")


@pytest.mark.parametrize("kind", CODES)
def test_a_prediction_has_the_codes_names_and_colours_of_its_label(tmp_path, kind):
    classes, dtype, empty = CODES[kind]
    target = Target("stage", classes=classes, colors=dict(zip(classes, COLOURS, strict=True)))
    torch.manual_seed(0)
    encoder = Encoder(1, patch_size=8, width=32, depth=4, heads=2)
    network = Predictor(encoder, {"stage": Classes(target)}, head="linear", head_width=16)
    wants = contract(["vv"], "dB", "sigma0", -12.0, 3.0, 32)
    field = np.random.default_rng(0).normal(-12, 3, (60, 80)).astype(np.float32)
    field[:9] = np.nan
    place = {"crs": "EPSG:32650", "transform": from_origin(5e5, 7e5, 10, 10)}
    label = np.array(list(classes), dtype)[np.random.default_rng(1).integers(0, 3, (60, 80))]
    scene = make_scene({"vv": field}, units="dB", quantity="sigma0", labels={"stage": (label, target)}, **place)
    save_model(network, tmp_path / "model", wants)
    model, wants = load_model(tmp_path / "model")
    assert model.tasks["stage"].target == target
    found = predict_many(model, wants, {"one": lambda: scene}, tmp_path)
    assert found["status"].tolist() == ["done"], found["reason"][0]
    made, raw = open_prediction(tmp_path / "one.zarr")["stage"].load(), xr.open_zarr(tmp_path / "one.zarr")["stage"]
    numbers = np.concatenate([band["stage"] for _, band in predict_layers(model, wants, scene)])
    expected = np.append(np.resize(list(classes), 255), empty)[numbers]
    assert made.dtype == dtype and np.array_equal(made, expected) and len(np.unique(numbers)) > 2
    assert np.array_equal(np.nan_to_num(raw, nan=empty), expected)  # as any reader of CF sees it
    for told in (made, raw, scene["stage"]):
        assert np.array_equal(told.attrs["flag_values"], list(classes))
        assert told.attrs["flag_meanings"] == "open_water new_ice old_ice"
        assert told.attrs["flag_colors"].split() == list(COLOURS)
    with rasterio.open(tmp_path / "one_stage.tif") as cog:
        assert np.array_equal(cog.read(1), expected) and cog.nodata == empty
        assert cog.tags(1)["flag_values"].split() == list(map(str, classes))
        if dtype[0] == "u":
            colours = {code: (*bytes.fromhex(c[1:]), 255) for code, c in zip(classes, COLOURS, strict=True)}
            assert {code: cog.colormap(1)[code] for code in classes} == colours
    if dtype[0] == "u":
        names = re.findall("<Category>(.*?)</Category>", (tmp_path / "one_stage.tif.aux.xml").read_text())
        assert {code: names[code] for code in classes} == {k: v.replace(" ", "_") for k, v in classes.items()}
    both = chart_layers(scene, made.to_dataset(), "stage")
    assert all(np.array_equal(layer.attrs["flag_values"], list(classes)) for layer in both.values())
    assert np.array_equal(class_map(made), np.where(numbers == 255, 255, numbers))


def test_a_store_of_class_numbers_is_refused(tmp_path):
    field = np.random.default_rng(0).normal(-12, 3, (60, 80)).astype(np.float32)
    scene = make_scene({"vv": field}, units="dB", quantity="sigma0")
    predict_scene(Darkness(), contract(["vv"], "dB", "sigma0", -12.0, 3.0), scene, out=tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "a.zarr")["tone"].attrs["target_codes"] = [1, 4]
    with pytest.raises(ValueError, match="a.zarr holds .'tone'. as class numbers.*predict the scene again"):
        open_prediction(tmp_path / "a.zarr")
