"""Whole scenes: seams, borders, holes, memory, nested masks, units."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from sarfm.evaluation import predict
from sarfm.evaluation.pictures import reconstruct_scene, tile_scores
from sarfm.evaluation.predict import (
    open_prediction,
    predict_scene,
)
from sarfm.evaluation.tiles import Tiling, predict_layers, tile_starts
from sarfm.ice.charts import at_sea, chart_targets
from sarfm.io.files import CorruptData, StoreLocked, lock
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.patches.contract import InputContract
from sarfm.scenes.channels import Target
from sarfm.scenes.open import make_scene
from sarfm.tasks.tasks import Classes, task_for

RATIOS = (0.25, 0.5, 0.75, 0.9)


def contract(**changes):
    base = {"channels": ["vv", "vh"], "quantity": "gamma0", "units": "dB", "mean": [-12.0, -18.0], "std": [3.0, 3.0]}
    return InputContract(**(base | {"patch_size": 4, "crop_px": 32} | changes))


def scene(height=70, width=90, seed=0, hole=True):
    field = np.random.default_rng(seed).normal(-12, 3, (2, height, width)).astype(np.float32)
    if hole:
        field[:, 10:30, 20:60] = np.nan
    return make_scene({"vv": field[0], "vh": field[1] - 6}, units="dB", quantity="gamma0")


def mae():
    torch.manual_seed(0)
    return MAE(Encoder(2, patch_size=4, width=32, depth=1, heads=2), decoder_width=32, decoder_depth=1, decoder_heads=2)


def classes(name, count, **options):
    """Make a task of classes that are called by their numbers."""
    return Classes(Target(name, classes={k: f"class {k}" for k in range(count)}), **options)


class Pixelwise(nn.Module):
    """Class by the value of the pixel alone; counts how often it is run."""

    tiles, tasks = 0, {"kind": classes("kind", 3)}

    def forward(self, image, valid):
        self.tiles += len(image)
        assert torch.equal(image, image.where(valid[:, None], torch.zeros(())))
        return {"kind": torch.stack([image[:, 0], -image[:, 0], 0.3 * image[:, 1]], 1)}


@pytest.mark.parametrize("size", [(70, 90), (32, 32), (20, 25), (33, 31), (100, 20)])
@pytest.mark.parametrize(("overlap", "tile"), [(0.0, 32), (0.5, 32), (0.7, 24)])
def test_tiling_changes_nothing_for_a_pixelwise_model(size, overlap, tile):
    one = scene(*size, hole=size == (70, 90))
    image, valid = contract().apply(one)
    whole = Pixelwise()(image[None], valid[None])["kind"][0].softmax(0)
    found = predict_scene(Pixelwise(), contract(), one, Tiling(tile, overlap, batch=3), probabilities=True)
    np.testing.assert_array_equal(found["kind"], np.where(valid, whole.argmax(0), 255))
    np.testing.assert_allclose(found["probability_kind"].values[valid], whole.max(0).values[valid], rtol=1e-4)
    assert np.isnan(found["probability_kind"].values[~valid]).all()
    assert found["kind"].dtype == np.uint8 and found["kind"].attrs["flag_values"].tolist() == [0, 1, 2]


def test_every_pixel_is_covered_by_tiles():
    for length, side, stride in itertools.product((1, 31, 32, 33, 64, 100, 257), (32,), (1, 7, 16, 32)):
        starts = tile_starts(length, side, stride)
        covered = np.zeros(max(length, side), int)
        for start in starts:
            covered[start : start + side] += 1
        assert covered[:length].min() >= 1 and starts == sorted(set(starts)) and starts[-1] + side <= max(length, side)


@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_blend_without_seams(axis):
    class Position(nn.Module):
        """Says something else in every corner of a tile: the worst model for tiling."""

        tasks = {"kind": classes("kind", 2)}

        def forward(self, image, valid):
            ramp = torch.linspace(-2, 2, image.shape[-1])
            ramp = (ramp[:, None] if axis == 0 else ramp).expand(len(image), *image.shape[-2:])
            return {"kind": torch.stack([ramp, -ramp], 1)}

    one = scene(128, 128, hole=False)
    jumps = {}
    for overlap in (0.0, 0.5):
        found = predict_scene(Position(), contract(), one, Tiling(overlap=overlap), probabilities=True)
        water = found["probability_kind"].where(found["kind"] == 0, 1 - found["probability_kind"]).values
        jumps[overlap] = np.abs(np.diff(water, axis=axis)).max()
    assert jumps[0.5] < 0.25 * jumps[0.0]


def test_empty_tiles_are_not_run_and_empty_scenes_end_well():
    one = scene(64, 64, hole=False)
    for name in ("vv", "vh"):
        one[name][:, 32:] = np.nan
    model = Pixelwise()
    predict_scene(model, contract(), one, Tiling(overlap=0.0))
    assert model.tiles == 2
    one = one.where(False).assign_attrs(one.attrs)
    for name in ("vv", "vh"):
        one[name].attrs = scene().data_vars[name].attrs
    bands = [band for _, band in predict_layers(Pixelwise(), contract(), one, beside=True)]
    assert all((b["kind"] == 255).all() and np.isnan(b["probability_kind"]).all() for b in bands)
    assert sum(len(band["kind"]) for band in bands) == 64


def test_memory_does_not_grow_with_the_height():
    import tracemalloc

    import dask.array as da

    def lazy(height):
        values = da.random.default_rng(0).normal(-12, 3, (height, 128), chunks=(64, 128)).astype(np.float32)
        attrs = {"units": "dB", "quantity": "gamma0"}
        layers = {name: (("y", "x"), values, attrs) for name in ("vv", "vh")}
        layers["valid"] = (("y", "x"), da.ones((height, 128), dtype=bool, chunks=(64, 128)))
        return xr.Dataset(layers, coords={"y": np.arange(height) + 0.5, "x": np.arange(128) + 0.5})

    peaks = []
    for height in (256, 1024):
        bands = predict_layers(Pixelwise(), contract(), lazy(height))
        next(bands)
        tracemalloc.start()
        for _ in bands:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.5 * peaks[0]


def test_place_of_the_scene_is_kept():
    import rioxarray  # noqa: F401
    from rasterio.transform import from_origin

    field = np.random.default_rng(0).normal(-12, 3, (40, 40)).astype(np.float32)
    one = make_scene(
        {"vv": field, "vh": field},
        units="dB",
        quantity="gamma0",
        crs="EPSG:32633",
        transform=from_origin(5e5, 5e6, 10, 10),
    )
    for made in (predict_scene(Pixelwise(), contract(), one), reconstruct_scene(mae(), contract(), one, 0.5)):
        assert made.rio.crs == one.rio.crs and made.rio.transform() == one.rio.transform()
        assert made["x"].equals(one["x"]) and made["y"].equals(one["y"])


@pytest.mark.parametrize("masking", ["random", "block"])
@pytest.mark.parametrize("size", [(70, 90), (32, 32), (20, 25)])
def test_masks_are_nested_and_visible_pixels_untouched(size, masking):
    one, model = scene(*size), mae()
    made = [reconstruct_scene(model, contract(), one, ratio, masking=masking) for ratio in RATIOS]
    hidden = [m["hidden"].values for m in made]
    for less, more in itertools.pairwise(hidden):
        assert (more | ~less).all() and more.sum() > less.sum()
    for m in made:
        original, visible = m["original"].values, ~m["hidden"].values
        for name in ("masked", "reconstruction"):
            np.testing.assert_array_equal(m[name].values[:, visible], original[:, visible])
        assert np.isnan(m["masked"].values[:, ~visible]).all()
        assert np.isnan(m["error"].values[:, visible]).all()
        assert (np.isnan(m["reconstruction"].values) == np.isnan(original)).all()
        difference = (m["reconstruction"] - m["original"]).values[:, ~visible]
        np.testing.assert_allclose(m["error"].values[:, ~visible], difference, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made[0]["original"][0], one["vv"])


def test_the_ratio_counts_observed_patches_at_borders_too():
    made = reconstruct_scene(mae(), contract(), scene(32, 40, hole=False), 0.5)
    border = made["hidden"].values[:, 32:]
    assert 0.4 < border.mean() < 0.6


def test_masks_follow_the_seed_and_not_the_batch():
    one, model = scene(), mae()
    first = reconstruct_scene(model, contract(), one, 0.75, seed=1, batch=1)
    again = reconstruct_scene(model, contract(), one, 0.75, seed=1, batch=8)
    other = reconstruct_scene(model, contract(), one, 0.75, seed=2)
    assert first["hidden"].equals(again["hidden"]) and not first["hidden"].equals(other["hidden"])
    np.testing.assert_allclose(first["reconstruction"], again["reconstruction"], atol=1e-4)


def test_a_tile_is_the_training_crop():
    one, model = scene(32, 32, hole=False), mae()
    made = reconstruct_scene(model, contract(), one, 0.5)
    image, valid = contract().apply(one)
    hidden = torch.from_numpy(made["hidden"].values[::4, ::4].copy()).reshape(1, -1)
    expected = contract().denormalise(model.eval().pictures(image[None], valid[None], hidden=hidden)["reconstruction"])[
        0
    ]
    np.testing.assert_allclose(made["reconstruction"], expected, atol=1e-4)
    assert made.attrs["tile_px"] == 32


def test_tile_scores_agree_with_the_pixels():
    made = reconstruct_scene(mae(), contract(), scene(), 0.75)
    table = tile_scores(made)
    assert list(zip(table["row"], table["col"], strict=True)) == [(r, c) for r in (0, 32, 64) for c in (0, 32, 64)]
    weighted = np.nansum(table["mse_db"] * table["pixels"]) / table["pixels"].sum()
    assert np.isclose(weighted, np.nanmean(made["error"].values ** 2), rtol=1e-4)
    alone = tile_scores(made.sel(channel=["vh"]), 16)
    assert len(alone) == 5 * 6 and (alone["units"] == "dB").all()


def test_other_units_say_so():
    field = np.random.default_rng(0).gamma(4, 0.02, (40, 40)).astype(np.float32)
    linear = make_scene({"vv": field, "vh": field}, units="1", quantity="sigma0")
    made = reconstruct_scene(
        mae(), contract(units="1", quantity="sigma0", mean=[0.08] * 2, std=[0.04] * 2), linear, 0.5
    )
    assert made["original"].attrs["units"] == "1" and made["error"].attrs["units"] == "dB"
    np.testing.assert_array_equal(made["original"][0], field)
    number = make_scene({"vv": field * 3000, "vh": field * 3000}, units="1", quantity="digital_number")
    made = reconstruct_scene(
        mae(), contract(units="1", quantity="digital_number", mean=[250.0] * 2, std=[99.0] * 2), number, 0.5
    )
    assert "digital number" in made["error"].attrs["long_name"] and set(tile_scores(made)["units"]) == {"1"}


def test_refusals():
    one = scene()
    with pytest.raises(ValueError, match="overlap"):
        predict_scene(Pixelwise(), contract(), one, Tiling(overlap=1.0))
    with pytest.raises(ValueError, match="Choose a multiple"):
        predict_scene(Pixelwise(), contract(), one, Tiling(30))
    with pytest.raises(ValueError, match="crop_px"):
        predict_scene(Pixelwise(), contract(crop_px=None), one)
    with pytest.raises(ValueError, match="can't reconstruct"):
        reconstruct_scene(Pixelwise(), contract(), one, 0.5)
    with pytest.raises(ValueError, match="masking"):
        reconstruct_scene(mae(), contract(), one, 0.5, masking="stripes")
    with pytest.raises(ValueError, match="ratio"):
        reconstruct_scene(mae(), contract(), one, 1.0)
    with pytest.raises(ValueError, match="hh"):
        predict_scene(Pixelwise(), contract(channels=["hh", "vh"]), one)


# ---- several charts, strides, files ----------------------------------------------------------------------------------


class Charts(nn.Module):
    """Three charts by the value of the pixel alone, the concentration by regression."""

    tasks = {
        name: task_for(target, **({"loss_of": "number"} if name == "sic" else {}))
        for name, target in chart_targets().items()
    }

    def forward(self, image, valid):
        ramp = image[:, :1] * torch.linspace(-2, 2, 7).reshape(1, 7, 1, 1)
        return {"sic": 6 * image[:, :1], "sod": ramp[:, :6], "floe": ramp.flip(1)}


def swath(height=70, width=90, **options):
    rows, columns = (v.ravel() for v in np.meshgrid(np.linspace(0, height, 5), np.linspace(0, width, 5), indexing="ij"))
    gcps = np.stack([rows, columns, -40 + columns / 200, 87 - rows / 3000], axis=1)
    one = scene(height, width, **options)
    return one.assign_coords(
        {f"gcp_{n}": ("gcp", v) for n, v in zip(("row", "col", "lon", "lat"), gcps.T, strict=True)}
    )


@pytest.mark.parametrize("stride_px", [32, 20, 9])
def test_charts_are_those_of_the_whole_scene(stride_px):
    one = scene()
    image, valid = contract().apply(one)
    whole = {name: said[0] for name, said in Charts()(image[None], valid[None]).items()}
    found = predict_scene(Charts(), contract(), one, Tiling(stride_px=stride_px, batch=3), probabilities=True)
    assert list(found) == ["sic", "sod", "floe", "estimate_sic", "probability_sod", "probability_floe"]
    for name in ("sod", "floe"):
        np.testing.assert_array_equal(found[name], np.where(valid, whole[name].argmax(0), 255))
        said = found[f"probability_{name}"].values
        np.testing.assert_allclose(said[valid], whole[name].softmax(0).max(0).values[valid], rtol=1e-4)
        assert np.isnan(said[~valid]).all() and said.dtype == np.float32
    estimate = found["estimate_sic"].values
    np.testing.assert_allclose(estimate[valid], whole["sic"][0][valid], atol=1e-4)
    expected = np.where(valid, np.clip(np.round(np.nan_to_num(estimate)), 0, 10), 255)
    np.testing.assert_array_equal(found["sic"], expected)
    assert {found[n].dtype for n in Charts.tasks} == {np.dtype("uint8")} and set(np.unique(expected)) >= {0, 10, 255}
    assert np.isnan(estimate[~valid]).all()


def test_charts_have_names_and_colours():
    found = predict_scene(Charts(), contract(), scene())
    assert found["sod"].attrs["flag_meanings"].split()[-1] == "old_ice"
    for name, task in Charts.tasks.items():
        assert found[name].attrs["flag_values"].tolist() == list(range(task.target.size))
        assert len(found[name].attrs["flag_colors"].split()) == task.target.size
        assert found[name].attrs["_FillValue"] == 255
    empty = scene(40, 40, hole=False)
    for name in ("vv", "vh"):
        empty[name][:] = np.nan
    assert (predict_scene(Charts(), contract(), empty)["sic"] == 255).all()


def test_answers_must_be_those_that_were_announced():
    model = Charts()
    model.tasks = {"sic": Charts.tasks["sic"]}
    with pytest.raises(ValueError, match="`tasks`"):
        predict_scene(model, contract(), scene())
    for silent, message in ((mae(), "MAE has no `tasks`"), (nn.Identity(), "Identity has no `tasks`")):
        with pytest.raises(ValueError, match=message):
            predict_scene(silent, contract(), scene())
    bare = Pixelwise()
    bare.forward = lambda image, valid: torch.cat([image, image], 1)
    with pytest.raises(ValueError, match=r"the model answers Tensor, expected \['kind'\]"):
        predict_scene(bare, contract(), scene())
    with pytest.raises(ValueError, match="stride_px"):
        predict_scene(Charts(), contract(), scene(), Tiling(stride_px=33))


@pytest.mark.parametrize("model", [Pixelwise(), Charts()], ids=["one", "charts"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("strip", [48, 6144])
def test_a_file_holds_what_a_dataset_would(tmp_path, monkeypatch, model, lazy, strip):
    monkeypatch.setattr(predict, "CHUNK", (16, 24))
    monkeypatch.setattr(predict, "STRIP", strip)
    one = swath().assign_attrs(sensor="Sentinel-1", time="2019-04-30T10:18:30", spacing_m=40.0)
    given = one.chunk(y=25, x=40) if lazy else one
    path, cut = tmp_path / "one.zarr", Tiling(stride_px=11)
    held = predict_scene(model, contract(), given, cut, probabilities=True, out=path)
    expected = predict_scene(model, contract(), one, cut, probabilities=True)
    if strip < 90:  # tiles come in other batches, which may round otherwise
        xr.testing.assert_allclose(held.load(), expected, rtol=1e-5)
        assert all(held[name].equals(expected[name]) for name in held if held[name].dtype == np.uint8)
    else:
        xr.testing.assert_identical(held.load(), expected)
    assert held.dtypes == expected.dtypes and list(held) == list(expected)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.lock"))
    with pytest.raises(FileExistsError, match="remove it"):
        predict_scene(model, contract(), one, out=path)


def test_a_prediction_that_was_killed_has_no_name(tmp_path):
    code = """
        import sys, time, torch
        sys.path.insert(0, sys.argv[1])
        from test_predict import Pixelwise, contract, predict_scene, scene
        class Slow(Pixelwise):
            def forward(self, image, valid):
                print("tile", flush=True)
                time.sleep(0.05)
                return super().forward(image, valid)
        predict_scene(Slow(), contract(), scene(600, 90), out=sys.argv[2])
    """
    path = tmp_path / "one.zarr"
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(25):
            child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    assert not path.exists() and list(tmp_path.glob("*.partial"))
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_prediction(path)
    predict_scene(Pixelwise(), contract(), scene(600, 90), out=path)
    xr.testing.assert_identical(open_prediction(path).load(), predict_scene(Pixelwise(), contract(), scene(600, 90)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.zarr"]


def test_damage_to_a_predicted_store_is_named(tmp_path):
    path = tmp_path / "one.zarr"
    predict_scene(Pixelwise(), contract(), scene(), probabilities=True, out=path)
    chunk = path / "probability_kind" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="(?i)crc|checksum"):
        open_prediction(path).load()
    chunk.unlink()
    with pytest.raises(CorruptData, match="'probability_kind'.*missing"):
        open_prediction(path)
    with lock(tmp_path / "two.zarr"), pytest.raises(StoreLocked):
        predict_scene(Pixelwise(), contract(), scene(), out=tmp_path / "two.zarr")


def test_a_failed_prediction_leaves_nothing(tmp_path):
    class Breaks(Pixelwise):
        def forward(self, image, valid):
            if self.tiles > 6:
                raise RuntimeError("out of memory")
            return super().forward(image, valid)

    with pytest.raises(RuntimeError, match="out of memory"):
        predict_scene(Breaks(), contract(), scene(), Tiling(batch=1), out=tmp_path / "one.zarr")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_lazy_scene_are_read_about_once():
    import dask.array as da

    read = []

    def block(block_info=None):
        rows, columns = block_info[None]["array-location"]
        read.append(rows)
        return np.full((rows[1] - rows[0], columns[1] - columns[0]), -12, np.float32)

    chunks = ((64,) * 8, (64,))
    lazy = da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    one = make_scene({"vv": lazy, "vh": lazy}, units="dB", quantity="gamma0")
    found = predict_scene(Pixelwise(), contract(), one, Tiling(stride_px=3))
    assert (found["kind"] == found["kind"][0, 0]).all() and len(read) <= 4 * 8


@pytest.mark.parametrize("strip", [None, 40])
def test_land_gets_no_class(tmp_path, monkeypatch, strip):
    whole = scene()
    zones = np.full((70, 90), 20.0, np.float32)
    zones[40:, :25] = 0
    with_zones = whole.assign(distance_map=(("y", "x"), zones))
    sea = at_sea(with_zones)
    said, before = (predict_scene(Pixelwise(), contract(), whole, where=w, probabilities=True) for w in (sea, None))
    assert (said.kind.values[zones == 0] == 255).all() and np.isnan(said.probability_kind.values[zones == 0]).all()
    assert np.array_equal(said.kind.values[zones > 0], before.kind.values[zones > 0])
    if strip:
        monkeypatch.setattr(predict, "STRIP", strip, raising=False)
    held = predict_scene(Pixelwise(), contract(), with_zones, where=sea, out=tmp_path / "p.zarr")
    assert np.array_equal(held.kind.values, said.kind.values)
    for wrong in (sea.astype(int), sea[:-1]):
        with pytest.raises(ValueError, match="expected bool"):
            predict_scene(Pixelwise(), contract(), whole, where=wrong)


# ---- targets of every kind ---------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A class and a number of each pixel by its value alone, and tags, a number and a class of the whole tile."""

    def __init__(self):
        super().__init__()
        targets = [
            Target("cover", classes={3: "open", 7: "dense forest"}, colors={3: "#aabbcc", 7: "#112233"}),
            Target("height", kind="number", units="m", limits=(0.0, 40.0)),
            Target("land", kind="tags", of="tile", classes={0: "forest", 1: "inland water"}),
        ]
        self.tasks = {target.name: task_for(target) for target in targets}

    def forward(self, image, valid):
        tile = image.new_tensor([[1.0, -2.0]]).expand(len(image), -1)
        return {"cover": torch.cat([image[:, :1], -image[:, :1]], 1), "height": 20 + 30 * image[:, :1], "land": tile}


def test_each_kind_of_target_is_put_together_in_its_way():
    one = scene()
    image, valid = contract().apply(one)
    found = predict_scene(Kinds(), contract(), one, Tiling(stride_px=11), probabilities=True)
    assert list(found) == ["cover", "height", "land_forest", "land_inland_water", "probability_cover"]
    np.testing.assert_array_equal(found["cover"], np.where(valid, np.where(image[0] < 0, 7, 3), 255))
    said = found["cover"].attrs
    assert said["flag_meanings"] == "open dense_forest" and said["flag_colors"] == "#aabbcc #112233"
    assert said["flag_values"].tolist() == [3, 7] and said["_FillValue"] == 255
    height = np.where(valid, (20 + 30 * image[0]).clamp(0, 40), np.nan)
    np.testing.assert_allclose(found["height"], height, atol=1e-4)
    assert found["height"].attrs["units"] == "m" and found["height"].dtype == np.float32
    np.testing.assert_allclose(found["land_inland_water"].values[valid], 1 / (1 + np.exp(2)), rtol=1e-5)
    assert list(predict_scene(Kinds(), contract(), one)) == list(found)[:-1]


def test_kinds_are_kept_in_a_file(tmp_path):
    held = predict_scene(Kinds(), contract(), swath(), out=tmp_path / "kinds.zarr").load()
    xr.testing.assert_identical(held, predict_scene(Kinds(), contract(), swath()))


class Constant(torch.nn.Module):
    """A method that says one number of whatever is hidden, or makes other pictures or none."""

    def __init__(self, kind="prediction"):
        super().__init__()
        self.encoder, self.kind = mae().encoder, kind

    def pictures(self, image, valid=None, generator=None, hidden=None):
        return {self.kind: torch.full_like(image, 0.3)} if self.kind else {}


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75, 0.9])
def test_windows_that_agree_give_back_their_number_exactly(overlap):
    one = scene()
    made = [reconstruct_scene(m, contract(), one, 0.75, overlap=o) for m, o in ((Constant(), overlap), (mae(), 0.0))]
    assert (made[0]["hidden"] == made[1]["hidden"]).all()  # what is hidden doesn't depend on how it is filled in
    expected = contract().denormalise(torch.full((2, 1, 1), 0.3)).numpy()
    hidden = made[0]["hidden"].values & np.isfinite(made[0]["original"].values)
    np.testing.assert_array_equal(
        made[0]["reconstruction"].values[hidden], np.broadcast_to(expected, hidden.shape)[hidden]
    )
    visible = ~made[0]["hidden"].values
    np.testing.assert_array_equal(made[0]["reconstruction"].values[:, visible], made[0]["original"].values[:, visible])


class WindowMean(Constant):
    """A method that says of every window its own mean."""

    def pictures(self, image, valid=None, generator=None, hidden=None):
        return {"prediction": image.mean(dim=(2, 3), keepdim=True).expand_as(image)}


def test_overlapping_windows_have_no_seams():
    slope = scene(64, 160, hole=False)
    slope["vv"] = slope["vv"] + np.linspace(-10, 10, 160, dtype=np.float32)
    seam = {}
    for overlap in (0.0, 0.5, 0.75):
        made = reconstruct_scene(WindowMean(), contract(), slope, 0.75, overlap=overlap)
        said = made["reconstruction"].where(made["hidden"]).values[0]
        seam[overlap] = np.nanmean([np.abs(said[:, k] - said[:, k - 1]) for k in range(32, 160, 32)])
    assert seam[0.0] > 3 and seam[0.75] < seam[0.5] < 0.2 * seam[0.0], seam


@pytest.mark.parametrize("kind", ["", "attention"])
def test_a_method_without_pictures_says_so(kind):
    with pytest.raises(ValueError, match="Constant makes no picture of what it predicts.*Choose a method"):
        reconstruct_scene(Constant(kind), contract(), scene(), 0.75)


def test_channels_of_several_units_are_scored_by_unit():
    from sarfm.evaluation.pictures import _compare, denormalised, score_reconstructions
    from sarfm.viz.figures import quantity_label, shown

    draw = np.random.default_rng(0)
    bands = {
        "vv": draw.normal(-12, 2, (32, 32)),
        "power": draw.uniform(0.01, 1, (32, 32)),
        "coherence": draw.random((32, 32)),
    }
    said = {"vv": "dB", "power": "1", "coherence": "1"}, {"vv": "sigma0", "power": "gamma0", "coherence": "coherence"}
    scene = make_scene({n: v.astype("float32") for n, v in bands.items()}, units=said[0], quantity=said[1])
    numbers = {"mean": [-12.0, 0.3, 0.5], "std": [2.0, 0.2, 0.3]}
    stated = contract(channels=list(bands), units=list(said[0].values()), quantity=list(said[1].values()), **numbers)
    original = denormalised(stated, scene)
    assert original["units"].values.tolist() == ["dB", "1", "1"] and "units" not in original.attrs
    shift = xr.DataArray([1.0, 1.0, 0.25], dims="channel")  # 1 dB, a factor, and a quarter
    made = original + shift.where(original["channel"] != "power", original * 0.5)
    hidden = xr.DataArray(draw.random((32, 32)) < 0.5, dims=("y", "x"))
    compared = _compare(original, made, hidden).assign_attrs(tile_px=32)
    tiles, together = score_reconstructions({"a": compared})
    assert set(tiles["units"]) == {"dB", "1"} and set(together) == {
        f"{s}_{u}" for s in ("rmse", "rmse_of_the_mean", "ssim") for u in ("dB", "1")
    }
    decibels = np.array([1.0, 10 * np.log10(1.5)])  # of vv and of the power
    assert together["rmse_dB"] == pytest.approx(np.sqrt((decibels**2).mean()), rel=1e-4)
    assert together["rmse_1"] == pytest.approx(0.25, rel=1e-4)
    one = scene["coherence"]
    assert shown(one)[1] == "" and quantity_label(one) == "coherence"
    np.testing.assert_array_equal(shown(one)[0], one)
