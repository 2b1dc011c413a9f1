"""`sarfm.land.bigearthnet`: both editions become Scenes with tags, and what is wrong with a file is said by its name."""

import io
import json
import tarfile
import warnings

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import yaml
from rasterio.transform import from_origin
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from sarfm.datasets.catalog import check, entry_files, open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.io.files import CorruptData, carried, unpack
from sarfm.land import bigearthnet_sample
from sarfm.land.bigearthnet import (
    ARCHIVES,
    PUBLISHED,
    V1,
    V1_128PX,
    V2,
    V2_128PX,
    check_archive,
    enlarged,
    patch_scene,
    patch_time,
    published_contract,
    read_bands,
    read_lists,
    read_metadata,
    split_lists,
)
from sarfm.land.bigearthnet_classes import (
    CLASSES_19,
    CLASSES_43,
    CORINE,
    DROPPED,
    bigearthnet_tags,
    class_numbers,
    corine_names,
)
from sarfm.patches.leaks import leak_report
from sarfm.patches.loading import CropDataset, Crops
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split
from sarfm.scenes.scene import check_scene, make_scene

STEM = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP"


def planes(seed: int = 0) -> dict[str, np.ndarray]:
    """Draw decibels of both polarisations."""
    draw = np.random.default_rng(seed)
    means = {"vv": -12, "vh": -19}
    return {name: draw.normal(mean, 2, (120, 120)).astype("float32") for name, mean in means.items()}


def tiff(path, bands, dtype="float32", names=None, epsg=32633):
    """Write a GeoTIFF with its bands in the order that is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = next(iter(bands.values())).shape
    profile = {"driver": "GTiff", "count": len(bands), "height": height, "width": width, "dtype": dtype}
    place = {"crs": f"EPSG:{epsg}", "transform": from_origin(384000, 5352000, 10, 10)}
    with rasterio.open(path, "w", **profile, **place) as file:
        file.write(np.stack(list(bands.values())).astype(dtype))
        file.descriptions = names or [None] * len(bands)
    return path


def write_v2(folder, patches: int = 6, **changed):
    """Write a folder of version 2; the table names patches `changed` by number."""
    rows = []
    for k in range(patches):
        name = f"{STEM}_{k}_9"
        for pol, values in planes(k).items():
            tiff(folder / "BigEarthNet-S1" / STEM[:-6] / name / f"{name}_{pol.upper()}.tif", {pol: values})
        split = ("train", "train", "validation", "test", "train", "test")[k % 6]
        row = {"patch_id": f"S2_{k}", "labels": ["Pastures", CLASSES_19[k]], "split": split, "s1_name": name}
        row |= {"country": ("Austria", "Portugal")[k % 2], "contains_seasonal_snow": False}
        rows.append(row | changed.get(f"patch_{k}", {}))
    pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    return folder


def write_v1(folder, patches: int = 3, lists: bool = True):
    """Write a folder of version 1."""
    for k in range(patches):
        name = f"{STEM}_{k}_9"
        below = folder / "BigEarthNet-S1-v1.0" / name
        for pol, values in planes(k).items():
            tiff(below / f"{name}_{pol.upper()}.tif", {pol: values})
        labels = {"labels": ["Rice fields", "Airports"] if k else ["Airports"], "corresponding_s2_patch": f"S2_{k}"}
        (below / f"{name}_labels_metadata.json").write_text(json.dumps(labels))
        if lists:
            (folder / f"{('train', 'val', 'test')[k % 3]}.csv").write_text(f"S2A_MSIL2A_20170613T101031_{k}_9,{name}\n")
    return folder


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """Lend a folder of version 2."""
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    """Lend a folder of version 1."""
    return write_v1(tmp_path_factory.mktemp("v1"))


# ---- classes ------------------------------------------------------------------------------------------------------

# the fold as another program has it: number among the 43 to number among the 19
NUMBERS = {0: 0, 1: 0, 2: 1, 11: 2, 12: 2, 13: 2, 14: 3, 15: 3, 16: 3, 18: 3, 17: 4, 19: 5, 20: 6, 21: 7, 22: 8, 23: 9}
NUMBERS |= {24: 10, 25: 11, 31: 11, 26: 12, 27: 12, 28: 13, 29: 14, 33: 15, 34: 15, 35: 16, 36: 16, 38: 17, 39: 17}
NUMBERS |= {40: 18, 41: 18, 42: 18}


@pytest.mark.parametrize(
    ("of_43", "of_19"),
    [
        ("Continuous urban fabric", "Urban fabric"),
        ("Industrial or commercial units", "Industrial or commercial units"),
        ("Rice fields", "Arable land"),
        ("Vineyards", "Permanent crops"),
        ("Olive groves", "Permanent crops"),
        ("Annual crops associated with permanent crops", "Permanent crops"),
        ("Pastures", "Pastures"),
        ("Complex cultivation patterns", "Complex cultivation patterns"),
        ("Agro-forestry areas", "Agro-forestry areas"),
        ("Natural grassland", "Natural grassland and sparsely vegetated areas"),
        ("Sparsely vegetated areas", "Natural grassland and sparsely vegetated areas"),
        ("Sclerophyllous vegetation", "Moors, heathland and sclerophyllous vegetation"),
        ("Transitional woodland/shrub", "Transitional woodland, shrub"),
        ("Beaches, dunes, sands", "Beaches, dunes, sands"),
        ("Peatbogs", "Inland wetlands"),
        ("Salines", "Coastal wetlands"),
        ("Water courses", "Inland waters"),
        ("Coastal lagoons", "Marine waters"),
        ("Sea and ocean", "Marine waters"),
    ],
)
def test_a_name_of_43_is_folded_into_one_of_19(of_43, of_19):
    assert [CLASSES_19[k] for k in bigearthnet_tags([of_43]).nonzero()[0]] == [of_19]
    assert np.array_equal(bigearthnet_tags([of_43]), bigearthnet_tags([of_19]))


def test_the_fold_by_names_is_the_published_one_by_numbers():
    of = class_numbers()
    assert {k: of[name] for k, name in enumerate(CLASSES_43) if of[name] is not None} == NUMBERS
    assert [k for k, name in enumerate(CLASSES_43) if of[name] is None] == [*range(3, 11), 30, 32, 37]
    assert CLASSES_43[0] == "Continuous urban fabric" and CLASSES_43[42] == "Sea and ocean"
    assert CLASSES_19[7] == "Agro-forestry areas" and CLASSES_19[18] == "Marine waters"
    assert list(CORINE) == sorted(CORINE) and len(CORINE) == 43 and set(DROPPED) < set(CORINE)


@pytest.mark.parametrize("name", ["Bare rock", "Airports", "Green urban areas", "Intertidal flats"])
def test_a_dropped_class_alone_makes_nineteen_zeros(name):
    assert bigearthnet_tags([name]).tolist() == [0] * 19
    assert bigearthnet_tags([name, "Sea and ocean"]).nonzero()[0].tolist() == [18]


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match=r"'Peat bogs' is no class of BigEarthNet.*Did you mean 'Peatbogs'"):
        bigearthnet_tags(["Pastures", "Peat bogs"])
    with pytest.raises(ValueError, match=r"codes of CORINE's third level that BigEarthNet has, got \[335\]"):
        corine_names([211, 335])


@pytest.mark.parametrize("edition", ["v1", "v2"])
def test_entries_state_the_same_target_and_differ_only_in_their_pixels(edition):
    target = load_entry("bigearthnet_s1_v2").target("land_cover")
    assert target.names == [name.replace(",", "") for name in CLASSES_19] and target.size == 19
    read = lambda name: yaml.safe_load((carried("data_catalogs") / f"{name}.yaml").read_text())
    plain, enlarged_too = read(f"bigearthnet_s1_{edition}"), read(f"bigearthnet_s1_{edition}_128px")
    assert {k for k in plain if plain[k] != enlarged_too[k]} == {"id", "title", "description", "spacing_m", "read"}
    assert plain["targets"] == read("bigearthnet_s1_v2")["targets"]


# ---- decibels -----------------------------------------------------------------------------------------------------


def test_polarisations_go_by_name_whatever_the_order(tmp_path):
    values = planes()
    for order in (("vh", "vv"), ("vv", "vh")):
        path = tiff(tmp_path / f"{order[0]}_first.tif", {n: values[n] for n in order}, names=[n.upper() for n in order])
        for name, band in read_bands(path).items():
            assert np.array_equal(band.values, values[name]) and band.values.dtype == np.float32


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8"])
def test_whole_numbers_are_refused_and_never_truncated(tmp_path, dtype):
    path = tiff(tmp_path / "a_VV.tif", {"vv": planes()["vv"].clip(0) if dtype == "uint8" else planes()["vv"]}, dtype)
    with pytest.raises(CorruptData, match=rf"a_VV.tif: holds {dtype}, expected float32.*lost their fractions"):
        read_bands(path)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers_are_not_called_whole_numbers(tmp_path, dtype):
    path = tiff(tmp_path / "a_VV.tif", {"vv": planes()["vv"]}, dtype)
    with pytest.raises(CorruptData, match=rf"a_VV.tif: holds {dtype}, complex numbers; give decibels as float32"):
        read_bands(path)


@pytest.mark.parametrize(
    ("name", "stated"),
    [("a_VV", ["VH"]), ("a", [None, None]), ("a", ["VV", "VV"]), ("a", ["VV", "HH"]), ("a_VV", ["VH", "VH"])],
)
def test_bands_that_nobody_can_tell_apart_are_refused(tmp_path, name, stated):
    values = dict(zip("ab", planes().values(), strict=True))
    path = tiff(tmp_path / f"{name}.tif", {k: values[k] for k in "ab"[: len(stated)]}, names=stated)
    with pytest.raises(CorruptData, match=r"names its bands \[.*\], expected VV or VH"):
        read_bands(path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tiff(tmp_path / "a_VV.tif", {"vv": planes()["vv"]})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CorruptData, match=r"a_VV.tif: is no whole GeoTIFF.*fetch it again"):
        read_bands(path)


def test_enlarging_is_torchvisions_resize():
    values = planes()["vv"]
    theirs = resize(torch.from_numpy(values)[None], [128, 128], InterpolationMode.BILINEAR, antialias=True)[0].numpy()
    assert np.abs(enlarged(values, 128) - theirs).max() < 1e-5
    power = resize(torch.from_numpy(10 ** (values.astype("f8") / 10))[None], [128, 128], antialias=True)[0].numpy()
    assert np.abs(enlarged(values, 128, "power") - 10 * np.log10(power)).max() < 1e-4
    assert np.array_equal(enlarged(values, 120), values)


def test_averages_in_decibels_and_in_power_differ_as_they_must():
    assert enlarged(np.float32([[0, 20], [0, 20]]), 5)[2, 2] == pytest.approx(10)
    assert enlarged(np.float32([[0, 20], [0, 20]]), 5, "power")[2, 2] == pytest.approx(10 * np.log10(50.5))
    with pytest.raises(ValueError, match="a side of at least 120 px, got 'db' and 64"):
        enlarged(planes()["vv"], 64)


# ---- version 2 ----------------------------------------------------------------------------------------------------


def test_a_patch_of_version_2_is_what_was_written(v2):
    entry = load_entry("bigearthnet_s1_v2")
    found = V2.scenes(entry, v2)
    assert list(found) == [f"{STEM}_{k}_9" for k in range(6)]
    scene = V2.open_scene(entry, found[f"{STEM}_3_9"])
    for name, values in planes(3).items():
        assert np.array_equal(scene[name].values, values) and scene[name].attrs["units"] == "dB"
        assert scene[name].attrs["quantity"] == "sigma0"
    assert scene.land_cover.values.nonzero()[0].tolist() == [3, 4]
    stated = {"part": "test", "country": "Portugal", "time": "2017-06-13T16:50:43", "mode": "IW", "processing": "GRD"}
    assert {key: scene.attrs[key] for key in stated} == stated
    assert float(scene.x[0]) == 384005 and float(scene.y[0]) == 5351995 and scene.sizes["x"] == 120


def test_a_patch_is_the_scene_that_make_scene_makes(tmp_path):
    for epsg in (32633, 32629):
        path = tiff(tmp_path / f"{epsg}.tif", planes(), names=["VV", "VH"], epsg=epsg)
        place = {"crs": f"EPSG:{epsg}", "transform": (10, 0, 384000, 0, -10, 5352000)}
        holed = planes() | {"vv": np.where(planes()["vv"] > -8, np.nan, planes()["vv"])}
        read = read_bands(path)
        read["vv"] = read["vv"]._replace(values=holed["vv"])
        made = make_scene(holed, units="dB", quantity="sigma0", attrs={"mode": "IW", "processing": "GRD"}, **place)
        assert check_scene(patch_scene(read, None, {})).identical(made)
        assert patch_scene(read, bigearthnet_tags(["Pastures"]), {}).land_cover.attrs["target_kind"] == "tags"
    with pytest.raises(CorruptData, match="patch_x"):
        loud = {name: band._replace(values=band.values + 500) for name, band in read.items()}
        patch_scene(loud, None, {"source": "patch_x"})


def test_enlarged_patches_lie_on_the_same_ground(v2):
    entry = load_entry("bigearthnet_s1_v2_128px")
    name, source = next(iter(V2_128PX.scenes(entry, v2).items()))
    scene, plain = V2_128PX.open_scene(entry, source), V2.open_scene(entry, source)
    assert dict(scene.sizes) | {"tag_land_cover": 19} == {"y": 128, "x": 128, "tag_land_cover": 19}
    edges = lambda s: (float(s.x[0] - (s.x[1] - s.x[0]) / 2), float(s.x[-1] + (s.x[1] - s.x[0]) / 2))
    assert edges(scene) == pytest.approx(edges(plain)) and float(scene.x[1] - scene.x[0]) == 9.375
    assert scene.attrs["resized"] == "128 px, bilinear in decibels" and patch_time(name) == "2017-06-13T16:50:43"


def test_a_store_has_official_parts_and_countries(v2, tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    store = Cut("bigearthnet_s1_v2", str(v2), channels=("vh", "vv"), patch_px=120).store(progress=False)
    assert len(store) == 6 and store.channel_names == ["vh", "vv"]
    parts = Split().parts(store)
    assert parts.tolist() == ["train", "train", "val", "test", "train", "test"]
    lists = split_lists(store)
    assert len(lists["train_val"]) == 4 and lists["Portugal_test"] == [f"{STEM}_3_9", f"{STEM}_5_9"]
    both = Split(by="list", train_list="train_val", val_list="none", test_list="test")
    assert (both.parts(store) == "train").sum() == 4
    with pytest.raises(ValueError, match="share"):  # val is in train_val
        Split(by="list", train_list="train_val", test_list="test").parts(store)
    contract = published_contract("v2").model_copy(update={"spacing_m": 10.0, "crop_px": 120})
    item = CropDataset(store, np.arange(6), contract, Crops(120), ["land_cover"], augment=False)[2]
    expected = (planes(2)["vh"] - np.float32(-19.1966)) / np.float32(5.4501)
    assert np.allclose(item["image"][0], expected, atol=1e-5)
    assert item["target_land_cover"].nonzero().ravel().tolist() == [2, 4]


def test_what_the_folder_lacks_is_left_out_and_said(tmp_path):
    folder, entry = write_v2(tmp_path), load_entry("bigearthnet_s1_v2")
    (gone := next((folder / "BigEarthNet-S1").rglob("*_2_9_VH.tif"))).unlink()
    with pytest.warns(UserWarning, match=r"of 6 patches of metadata.parquet, 1 lack VV or VH and are left out.*_2_9"):
        found = V2.scenes(entry, folder)
    assert len(found) == 5 and gone.parent.name not in found
    for path in (folder / "BigEarthNet-S1").rglob("*_VV.tif"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="VH and VV of none of the 6 patches"):
        V2.scenes(entry, folder)
    (folder / "metadata.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="there is no metadata.parquet beside"):
        V2.scenes(entry, folder)
    with pytest.raises(FileNotFoundError, match="there is no folder BigEarthNet-S1 in"):
        V2.scenes(entry, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "dev"}, r"a part of .* got .* and 'dev'"),
        ({"s1_name": "../../etc"}, r"expected a patch"),
        ({"s1_name": f"{STEM}_1_9"}, r"names 1 patches twice"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, change, said):
    folder = write_v2(tmp_path, 2, patch_0=change)
    with pytest.raises(CorruptData, match=said):
        read_metadata(folder / "metadata.parquet")


def test_a_table_that_was_cut_or_is_another_is_refused(tmp_path):
    folder = write_v2(tmp_path, 1)
    table = folder / "metadata.parquet"
    pd.read_parquet(table).drop(columns="labels").to_parquet(folder / "other.parquet")
    with pytest.raises(CorruptData, match=r"has no column \['labels'\]"):
        read_metadata(folder / "other.parquet")
    table.write_bytes(table.read_bytes()[:-10])
    with pytest.raises(CorruptData, match="is no whole Parquet file"):
        read_metadata(table)


def test_a_class_that_nobody_knows_is_named_with_its_patch(tmp_path):
    folder, entry = write_v2(tmp_path, 1, patch_0={"labels": ["Pasture"]}), load_entry("bigearthnet_s1_v2")
    source = V2.scenes(entry, folder)[f"{STEM}_0_9"]
    with pytest.raises(ValueError, match=rf"{STEM}_0_9: 'Pasture' is no class.*Did you mean 'Pastures'"):
        V2.open_scene(entry, source)


# ---- holes --------------------------------------------------------------------------------------------------------


def test_nan_tiles_are_kept_out_of_training(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    folder = write_v2(tmp_path, 3)
    for k, rows in ((0, slice(None)), (1, slice(0, 60))):
        holed = planes(k)["vv"]
        holed[rows] = np.nan if k else np.inf
        tiff(next((folder / "BigEarthNet-S1").rglob(f"*_{k}_9_VV.tif")), {"vv": holed})
    store = Cut("bigearthnet_s1_v2", str(folder), patch_px=120).store(progress=False)
    assert store.index["valid_fraction"].tolist() == [0, 0.5, 1]
    taken = {"channels": ["vv", "vh"], "crop_px": 120, "spacing_m": 10.0}
    contract = published_contract().model_copy(update=taken)
    assert CropDataset(store, [0, 1, 2], contract, Crops(120)).rows.tolist() == [1, 2]
    hole = CropDataset(store, [1], contract, Crops(120), augment=False)[0]
    assert not hole["valid"][:60].any() and (hole["image"][:, :60] == 0).all() and hole["valid"][60:].all()


def test_a_patch_without_one_polarisation_is_refused(tmp_path):
    values = planes()
    only = read_bands(tiff(tmp_path / "a_VV.tif", {"vv": values["vv"]}))
    with pytest.raises(CorruptData, match=r"a_patch: has no VH, it has \['vv'\]"):
        patch_scene(only, None, {"source": "a_patch"})
    moved = read_bands(tiff(tmp_path / "a_VH.tif", {"vh": values["vh"]}, epsg=32634))
    with pytest.raises(CorruptData, match="lie on different grids"):
        patch_scene(only | moved, None, {"source": "a_patch"})


def changed(tmp_path, change):
    """Read a patch whose numbers were changed."""
    return read_bands(tiff(tmp_path / "p.tif", {n: change(n, v) for n, v in planes().items()}, names=["VV", "VH"]))


@pytest.mark.parametrize("side", [0, 128])
def test_power_passed_off_as_decibels_is_refused(tmp_path, side):
    power = changed(tmp_path, lambda name, v: 10 ** (v.astype(float) / 10))
    bordered = {name: band._replace(values=band.values * (np.arange(120) > 10)) for name, band in power.items()}
    for bands in (power, bordered):
        with pytest.raises(CorruptData, match=r"^patch_x: is nowhere below 0 dB .*medians VV 0\.0.*give decibels"):
            patch_scene(bands, None, {"source": "patch_x"}, side)


def test_bright_ground_is_no_power(tmp_path):
    city = changed(tmp_path, lambda name, v: v + 25 if name == "vv" else v)
    assert (city["vv"].values > 0).all() and patch_scene(city, None, {}).valid.values.all()
    one = changed(tmp_path, lambda name, v: np.where(np.arange(120) > 0, v + 40, v))
    assert patch_scene(one, None, {}).valid.values.all()


def test_a_patch_of_zeros_holds_no_data(tmp_path):
    assert not patch_scene(changed(tmp_path, lambda name, v: 0 * v), None, {}).valid.values.any()
    half = changed(tmp_path, lambda name, v: v if name == "vv" else 0 * v)
    assert patch_scene(half, None, {}).valid.values.all()


@pytest.mark.parametrize("side", [0, 128])
def test_a_patch_that_is_no_square_is_refused_and_not_stretched(tmp_path, side):
    cut = changed(tmp_path, lambda name, v: v[:, :64])
    with pytest.raises(CorruptData, match=r"^patch_x: has 120 x 64 px, expected a square"):
        patch_scene(cut, None, {"source": "patch_x"}, side)


@pytest.mark.parametrize("missing", [None, float("nan"), ["Pastures", None]])
def test_missing_labels_are_not_none_of_the_classes(tmp_path, missing):
    folder = write_v2(tmp_path, 2)
    rows = pd.read_parquet(folder / "metadata.parquet")
    rows["labels"] = [["Pastures"], missing]
    rows.to_parquet(folder / "metadata.parquet")
    with pytest.raises(CorruptData, match=rf"metadata.parquet: {STEM}_1_9 has .* as labels, expected a list of names"):
        V2.scenes(load_entry("bigearthnet_s1_v2"), folder)
    rows["labels"] = float("nan")
    rows.to_parquet(folder / "metadata.parquet")
    with pytest.raises(CorruptData, match=rf"{STEM}_0_9 has .* as labels"):
        read_metadata(folder / "metadata.parquet")


def test_labels_as_text_are_refused_as_text(tmp_path):
    folder = write_v2(tmp_path, 1, patch_0={"labels": "['Pastures', 'Mixed forest']"})
    with pytest.raises(CorruptData, match=rf"{STEM}_0_9 has labels as text, .*Pastures.*ast.literal_eval"):
        read_metadata(folder / "metadata.parquet")


@pytest.mark.parametrize("labels", [[], ["Airports"]])
def test_an_empty_list_or_dropped_classes_make_nineteen_zeros(tmp_path, labels):
    folder, entry = write_v2(tmp_path, 2, patch_0={"labels": labels}), load_entry("bigearthnet_s1_v2")
    scene = V2.open_scene(entry, V2.scenes(entry, folder)[f"{STEM}_0_9"])
    assert scene.land_cover.values.tolist() == [0] * 19


# ---- version 1 ----------------------------------------------------------------------------------------------------


def test_a_patch_of_version_1_has_its_43_classes_folded(v1):
    entry = load_entry("bigearthnet_s1_v1")
    found = V1.scenes(entry, v1)
    parts, tags = {}, {}
    for name, source in found.items():
        scene = V1.open_scene(entry, source)
        parts[name[-3]], tags[name[-3]] = scene.attrs["part"], scene.land_cover.values.nonzero()[0].tolist()
        assert np.array_equal(scene.vh.values, planes(int(name[-3]))["vh"])
    assert parts == {"0": "train", "1": "val", "2": "test"} and tags == {"0": [], "1": [2], "2": [2]}
    assert V1_128PX.open_scene(entry, next(iter(found.values()))).sizes["x"] == 128


def test_version_1_without_lists_has_no_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    folder = write_v1(tmp_path, lists=False)
    store = Cut("bigearthnet_s1_v1", str(folder), patch_px=120).store(progress=False)
    with pytest.raises(ValueError, match=r"no patch of .* is listed for training; put train.csv, val.csv and test.csv"):
        Split().parts(store)


def test_lists_of_version_1_are_read_wherever_the_name_stands(tmp_path):
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "bigearthnet-train.csv").write_text(f"S2A_MSIL2A_20170613T101031_0_9,{STEM}_0_9\n")
    (tmp_path / "val.csv").write_text(f"id,labels\n{STEM}_1_9,x\n")
    (tmp_path / "benv1_train_val.csv").write_text(f"{STEM}_0_9\n")
    assert read_lists(tmp_path) == {f"{STEM}_0_9": "train", f"{STEM}_1_9": "val"}
    (tmp_path / "test.csv").write_text(f"{STEM}_1_9\n")
    with pytest.raises(ValueError, match="1 patches are in another part too"):
        read_lists(tmp_path)
    (tmp_path / "test.csv").write_text("S2A_MSIL2A_20170613T101031_0_9\n")
    with pytest.raises(CorruptData, match="names no patch of Sentinel-1"):
        read_lists(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"label": []}', '{"labels": "Pastures"}'])
def test_a_json_file_without_labels_is_refused(v1, tmp_path, text):
    folder, entry = write_v1(tmp_path, 1), load_entry("bigearthnet_s1_v1")
    next(folder.rglob("*.json")).write_text(text)
    (source,) = V1.scenes(entry, folder).values()
    with pytest.raises(CorruptData, match=r"_labels_metadata.json.*fetch it again"):
        V1.open_scene(entry, source)


def test_the_catalogue_opens_it_and_lists_its_files(v1):
    scenes = open_dataset("bigearthnet_s1_v1", v1)
    assert len(scenes) == 3 and len(entry_files(load_entry("bigearthnet_s1_v1"), v1)) == 9
    scene = scenes[f"{STEM}_1_9"]
    assert scene.attrs["licence"] == "CDLA-Permissive-1.0" and "Copernicus" in scene.attrs["attribution"]
    assert scene.land_cover.attrs["target_kind"] == "tags"


# ---- contracts and archives ---------------------------------------------------------------------------------------


def test_published_constants_are_as_stated():
    assert PUBLISHED["v2"] == ((-19.1966, -12.5144), (5.4501, 5.0019))
    assert PUBLISHED["v1"] == ((-19.2309, -12.5951), (3.1672, 2.9644))
    contract = published_contract("v1")
    assert contract.channels == ["vh", "vv"] and contract.mean == [-19.2309, -12.5951] and contract.crop_px == 128
    with pytest.raises(ValueError, match="edition is one of"):
        published_contract("v3")


def test_an_archive_that_was_cut_off_is_refused(tmp_path, monkeypatch):
    path, packed = tmp_path / "BigEarthNet-S1-v1.0.tar.gz", io.BytesIO(np.random.default_rng(0).bytes(100_000))
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("BigEarthNet-S1-v1.0/a_VV.tif")
        member.size = len(packed.getvalue())
        archive.addfile(member, packed)
    with pytest.raises(CorruptData, match=r"published is 94ced73440dea8c7b9645ee738c5a172: it was cut off or changed"):
        check_archive(path, progress=False)
    import hashlib

    monkeypatch.setattr(
        "sarfm.land.bigearthnet.ARCHIVES", ARCHIVES | {path.name: hashlib.md5(path.read_bytes()).hexdigest()}
    )
    assert check_archive(path, progress=False) and len(unpack(path, tmp_path / "whole")) == 1
    path.write_bytes(path.read_bytes()[:50_000])
    for ask in (lambda: check_archive(path, progress=False), lambda: unpack(path, tmp_path / "cut")):
        with pytest.raises(CorruptData, match=r"BigEarthNet-S1-v1.0.tar.gz.*fetch it again"):
            ask()
    assert not list((tmp_path / "cut").iterdir())
    with pytest.raises(ValueError, match="no md5 is known of other.tar"):
        check_archive(tmp_path / "other.tar", progress=False)


# ---- real patches -------------------------------------------------------------------------------------------------


def test_real_patches_are_read_to_the_bit_and_their_map_makes_their_labels(shared):
    folder = shared / "multilabel/bigearthnet_s1"
    listed = {row["file"]: row["labels"] for row in json.loads((folder / "labels.json").read_text())}
    for path in sorted(folder.glob("*.tif")):
        if path.name not in listed:
            continue
        scene = patch_scene(read_bands(path), bigearthnet_tags(listed[path.name]), {"source": path.name})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as file:
                for k, name in enumerate(file.descriptions, start=1):
                    assert np.array_equal(scene[name.lower()].values, file.read(k)), path.name
        assert sorted(CLASSES_19[k] for k in scene.land_cover.values.nonzero()[0]) == sorted(listed[path.name])
    stem = "S1B_IW_GRDH_1SDV_20170612T165809_33UUP_26_57"
    with rasterio.open(folder / f"{stem}_reference_map_clc.tif") as file:
        of_map = bigearthnet_tags(corine_names(np.unique(file.read(1))))
    assert np.array_equal(of_map, bigearthnet_tags(listed[f"{stem}.tif"]))


# ---- the sample that is carried -----------------------------------------------------------------------------------


def test_the_sample_is_the_source_to_the_bit(shared):
    folder, scenes = shared / "multilabel/bigearthnet_s1", open_dataset("bigearthnet_sample")
    listed = {row["file"]: row for row in json.loads((folder / "labels.json").read_text())}
    assert len(scenes) == 24 and {f"{name}.tif" for name in scenes} <= set(listed)
    for name in scenes:
        scene = scenes[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(folder / f"{name}.tif") as file:
                for k, pol in enumerate(file.descriptions, start=1):
                    assert scene[pol.lower()].values.tobytes() == file.read(k).tobytes(), name
                if file.crs is not None:
                    assert scene.rio.crs == file.crs and scene.rio.transform() == file.transform
                else:
                    assert "spatial_ref" not in scene.coords and scene.attrs["spacing_m"] == 10
        assert sorted(CLASSES_19[k] for k in scene.land_cover.values.nonzero()[0]) == sorted(
            listed[f"{name}.tif"]["labels"]
        )
        assert listed[f"{name}.tif"]["country"] in (None, scene.attrs["country"] or None)


def test_the_sample_is_carried_with_its_terms_and_small():
    path, entry = carried("data_catalogs") / "bigearthnet_sample.nc", load_entry("bigearthnet_sample")
    assert path.stat().st_size <= 2 * 1024**2 and check("bigearthnet_sample").ok.all()
    scenes = open_dataset("bigearthnet_sample")
    found = [scenes[name] for name in scenes]
    assert {scene.attrs["country"] for scene in found} >= {"Austria", "Finland", "Ireland", "Portugal"}
    for scene in found:
        assert scene.attrs["licence"] == "CDLA-Permissive-1.0"
        assert (
            "Sumbul" in scene.attrs["attribution"] and "modified Copernicus Sentinel data" in scene.attrs["attribution"]
        )
    assert entry.target("land_cover").names == load_entry("bigearthnet_s1_v2").target("land_cover").names


def test_the_samples_parts_do_not_touch(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    store = Cut("bigearthnet_sample", patch_px=120).store(progress=False)
    parts = Split().parts(store)
    assert parts.value_counts().to_dict() == {"train": 12, "test": 7, "val": 5}
    report = leak_report(store, parts)
    assert not report.filter(regex="shared|overlap").select_dtypes("number").to_numpy().any(), report


def test_a_damaged_sample_is_refused(tmp_path):
    entry, path = load_entry("bigearthnet_sample"), tmp_path / "bigearthnet_sample.nc"
    path.write_bytes((carried("data_catalogs") / path.name).read_bytes()[:100_000])
    with pytest.raises(CorruptData, match="bigearthnet_sample.nc.*is no whole NetCDF-4 file"):
        bigearthnet_sample.scenes(entry, tmp_path)
