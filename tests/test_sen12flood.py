"""`sarfm.flood`: the layout of SEN12-FLOOD becomes pairs in decibels on one grid, and what is wrong with files is said."""

import itertools
import json
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as warp_points

from sarfm.datasets.catalog import check, list_table, open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.flood.alignment import Grid, onto_grid, read_power, sequence_grid
from sarfm.flood.sen12flood import (
    ANY_SIZE,
    IMAGES,
    PAIRS,
    SEN12Flood,
    Survey,
    find_root,
    flood_scene,
    parts_of_sequences,
    sequence_lists,
)
from sarfm.flood.sequences import Acquisition, image_pairs, read_names, read_sequences, sequence_parts
from sarfm.flood.simulated_files import Place, simulate_dataset
from sarfm.io.files import CorruptData, carried, unpack
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split

ENTRY = load_entry("sen12flood")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write four sequences of four images."""
    return simulate_dataset(tmp_path_factory.mktemp("flood"), 4, 4, 48, progress=False).parent


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """Lend a copy that a test may damage."""
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "notes"))
    return shutil.copytree(written, tmp_path / "data")


def scenes(folder, reader=ANY_SIZE):
    """Find pairs and what is said about the others."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = reader.scenes(ENTRY, folder)
    return found, " ".join(str(each.message) for each in said)


def any_size_entry(path):
    """Write the entry with the reader for grids of any size."""
    text = (carried("data_catalogs") / "sen12flood.yaml").read_text()
    path.write_text(text.replace("reader: sen12flood,", "reader: sen12flood_any_size,"))


def edit_list(folder, change):
    """Change S1list.json."""
    path = folder / "SEN12FLOOD/S1list.json"
    every = json.loads(path.read_text())
    change(every)
    path.write_text(json.dumps(every))


# ---------------------------------------------------------------- lists and pairs


def test_only_numbers_are_images(folder):
    before, _ = scenes(folder)
    edit_list(
        folder,
        lambda every: every["0001"].update({"1.5": {"filename": "x"}, "-1": 3, "geo": {"FLOODING": True}, "²": {}}),
    )
    assert list(scenes(folder)[0]) == list(before)


def test_pairs_are_those_of_a_plain_enumeration():
    draw = np.random.default_rng(0)
    for _ in range(50):
        names = draw.integers(0, 7, draw.integers(0, 8)).astype(str)  # a name may occur twice
        images = [Acquisition("s", k, name, bool(draw.integers(2))) for k, name in enumerate(names)]
        made = image_pairs(images)
        wanted = {frozenset((a.filename, b.filename)) for a, b in itertools.permutations(images, 2) if not a.flooded}
        wanted = {pair for pair in wanted if len(pair) == 2}
        assert {frozenset((p.first.filename, p.second.filename)) for p in made} == wanted and len(made) == len(wanted)
        assert all(not p.first.flooded and p.flooded == p.second.flooded for p in made)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"filename": "a"}, "0001, image 2: expected filename and FLOODING"),
        ({"filename": "a", "FLOODING": "maybe"}, "0001, image 2: expected true or false, got 'maybe'"),
        ({"filename": "a", "FLOODING": None}, "expected true or false"),
        (["a"], "0001, image 2"),
    ],
)
def test_a_list_that_says_too_little_is_refused(folder, said, expected):
    edit_list(folder, lambda every: every["0001"].update({"2": said}))
    with pytest.raises(CorruptData, match=f"S1list.json: sequence .*{expected}"):
        ANY_SIZE.scenes(ENTRY, folder)


def test_the_text_false_is_false(folder):
    edit_list(
        folder,
        lambda every: [
            image.update(FLOODING=str(image["FLOODING"]))
            for image in every["0000"].values()
            if isinstance(image, dict) and "FLOODING" in image
        ],
    )
    flooded = [image.flooded for image in read_sequences(folder / "SEN12FLOOD/S1list.json")["0000"]]
    assert flooded[0] is False and flooded[-1] is True


def test_a_list_that_was_cut_off_is_refused(folder):
    path = folder / "SEN12FLOOD/S1list.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(CorruptData, match=r"S1list\.json: is no whole JSON"):
        ANY_SIZE.scenes(ENTRY, folder)


def test_a_sequence_with_one_image_makes_no_pair_and_is_named(folder):
    edit_list(folder, lambda every: every.update({"0001": {"1": every["0001"]["1"], "count": 1}}))
    found, said = scenes(folder)
    assert not [name for name in found if name.startswith("0001/")] and "no pair to be made (0001)" in said


def test_lists_that_do_not_fit_the_folder_are_said_once(folder):
    root = folder / "SEN12FLOOD"
    assert "don't fit" not in scenes(folder)[1]
    train = read_names(root / "sen12_train.csv")
    assert "0001" in train
    names = [name for name in train if name != "0001"] + ["9001", "9002", "9003", "9004"]
    (root / "sen12_train.csv").write_text("\n".join(names))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ANY_SIZE.scenes(ENTRY, folder)
    (only,) = [str(each.message) for each in said if "don't fit the folder" in str(each.message)]
    assert "4 of their 7 names have no sequence here (9001, 9002, 9003 …)" in only
    assert "1 sequences here are in no list and in no part (0001)" in only
    shutil.rmtree(root / "0003")
    assert "5 of their 7 names have no sequence here (0003, 9001, 9002 …)" in scenes(folder)[1]


# ---------------------------------------------------------------- files


def test_a_missing_file_is_named_and_its_pairs_are_left_out(folder):
    whole, _ = scenes(folder)
    gone = next(source for name, source in whole.items() if name.startswith("0001/")).images[0]
    gone.path(folder / "SEN12FLOOD", "vh").unlink()
    found, said = scenes(folder)
    assert f"images: 1, a file missing (0001/{gone.filename})" in said
    assert set(found) == {n for n, s in whole.items() if gone not in s.images} and len(found) < len(whole)


def test_a_file_cut_off_is_refused_by_name(folder):
    path = next(iter(scenes(folder)[0].values())).paths[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CorruptData, match=f"{path.name}: is no whole GeoTIFF"):
        ANY_SIZE.scenes(ENTRY, folder)


@pytest.mark.parametrize("whole", [True, False])
def test_a_zip_is_not_taken_for_an_empty_folder(tmp_path, whole):
    with zipfile.ZipFile(tmp_path / "SEN12FLOOD.zip", "w") as file:
        file.writestr("SEN12FLOOD/S1list.json", json.dumps({}) * 100)
    archive = tmp_path / "SEN12FLOOD.zip"
    archive.write_bytes(archive.read_bytes() if whole else archive.read_bytes()[:-30])
    with pytest.raises(
        FileNotFoundError if whole else CorruptData,
        match="not unpacked" if whole else r"is cut off.*; download it again$",
    ):
        find_root(tmp_path)
    if not whole:
        with pytest.raises(CorruptData, match="it was cut"):
            unpack(archive, tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*.json"))


def test_an_empty_folder_says_how_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    (tmp_path / "sen12flood").mkdir()
    with pytest.raises(FileNotFoundError, match="IEEE DataPort"):
        open_dataset("sen12flood")


def test_only_full_images_enter(folder):
    with pytest.raises(FileNotFoundError, match=r"not 512 x 512 px .*48 x 48 px in EPSG:32631.*sen12flood_any_size"):
        scenes(folder, PAIRS)
    with pytest.raises(FileNotFoundError, match="holds images, but none that can be used"):
        open_dataset("sen12flood", folder)
    for name in ("0001", "0002", "0003"):
        shutil.rmtree(folder / "SEN12FLOOD" / name)
    with pytest.raises(FileNotFoundError, match="a file missing .*not 512 x 512 px"):
        scenes(folder, PAIRS)


def test_the_catalogue_is_listed_where_a_reader_refuses_its_files(folder, tmp_path):
    where = shutil.copytree(folder, tmp_path / "notes/sen12flood")
    with pytest.raises(FileNotFoundError, match="none that can be used"):
        open_dataset("sen12flood", where)
    assert not list_table().set_index("name").here["sen12flood"]


def test_grids_of_the_side_that_is_asked_for_enter(folder):
    assert len(scenes(folder, SEN12Flood(side_px=48))[0]) == len(scenes(folder)[0]) > 0


def write(path, values, grid):
    """Write a GeoTIFF."""
    profile = {"driver": "GTiff", "count": 1, "dtype": "float32", "crs": grid.crs, "transform": Affine(*grid.transform)}
    with rasterio.open(path, "w", height=values.shape[0], width=values.shape[1], **profile) as file:
        file.write(values.astype("float32"), 1)


def rewrite(path, change):
    """Change the pixels of a file."""
    with rasterio.open(path, "r+") as file:
        values = file.read(1)
        change(values)
        file.write(values, 1)


def test_nan_zero_and_negative_power_are_no_data(folder):
    found, _ = scenes(folder)
    name, source = next((n, s) for n, s in found.items() if n.startswith("0001/"))
    before = flood_scene(source)

    def damage(values):
        rows, columns = values.shape[0] // 2, values.shape[1] // 2
        for k, wrong in enumerate((np.nan, 0.0, -0.01, np.inf)):
            values[rows : rows + 4, columns + 4 * k : columns + 4 * k + 4] = wrong

    rewrite(source.paths[0], damage)
    after = flood_scene(scenes(folder)[0][name])
    lost = before.valid & ~after.valid
    assert not lost.sel(time="after").any() and 40 < int(lost.sel(time="before").sum()) < 110
    assert np.isnan(after.vv.values[lost.values]).all() and np.isfinite(after.vv.values[after.valid.values]).all()
    same = after.valid & before.valid
    assert float(abs(after.vv - before.vv).where(same).max()) < 10, "no number of the damage leaks into its neighbours"


def replaced(folder, change, dtype="float32", nodata=None):
    """Write the first file of a sequence anew with other numbers."""
    path = next(s for n, s in scenes(folder)[0].items() if n.startswith("0001/")).paths[0]
    with rasterio.open(path) as file:
        values, profile = change(file.read(1).astype(np.float64)), file.profile
    path.unlink()
    with rasterio.open(path, "w", **profile | {"dtype": dtype, "nodata": nodata}) as file:
        file.write(values.astype(dtype), 1)
    return path


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "complex64"])
def test_numbers_that_cannot_be_power_are_refused_by_name(folder, dtype):
    path = replaced(folder, lambda values: values * 1000, dtype)
    with pytest.raises(CorruptData, match=f"{path.name}: holds {dtype}, expected float32: SEN12-FLOOD is linear power"):
        ANY_SIZE.scenes(ENTRY, folder)


def test_decibels_are_refused_by_name(folder):
    path = replaced(folder, lambda values: 10 * np.log10(np.where(values > 0, values, np.nan)))
    with pytest.raises(CorruptData, match=f"{path.name}: holds negative values, as decibels have.*is linear power"):
        ANY_SIZE.scenes(ENTRY, folder)


def gaps(values):
    """Fill a tenth of the rows, as some programs do."""
    values[: len(values) // 10] = -9999
    return values


def test_what_fills_gaps_is_no_data_where_the_file_says_so(folder):
    path = replaced(folder, gaps, nodata=-9999)
    power, _ = read_power(path)
    assert np.isnan(power[: len(power) // 10]).all() and np.isfinite(power[len(power) // 2]).any()
    path = replaced(folder, gaps)
    with pytest.raises(CorruptData, match=r"down to -9999; .*or state what fills the gaps as the file's nodata"):
        read_power(path)


@pytest.mark.parametrize(("share", "kept"), [(0.2, True), (0.3, False)])
@pytest.mark.parametrize("wrong", [0.0, np.nan])
@pytest.mark.parametrize("polarisation", ["vv", "vh"])
def test_a_quarter_without_data_drops_all_pairs_of_an_image(folder, share, kept, wrong, polarisation):
    whole, _ = scenes(folder)
    image = next(s for n, s in whole.items() if n.startswith("0001/")).images[1]
    grid = Place(1, 48, 0).grid()
    values = np.full(grid.shape, 0.1, np.float32)
    values[: round(48 * share)] = wrong
    path = image.path(folder / "SEN12FLOOD", polarisation)
    path.unlink()
    write(path, values, grid)
    found, said = scenes(folder)
    assert set(found) == {n for n, s in whole.items() if kept or image not in s.images}
    assert ("25 % or more of its pixels missing" in said and image.filename in said) or kept


def test_an_image_elsewhere_has_no_overlap(folder):
    whole, _ = scenes(folder)
    image = next(s for n, s in whole.items() if n.startswith("0001/")).images[1]
    path = image.path(folder / "SEN12FLOOD", "vh")
    path.unlink()
    write(path, np.full((48, 48), 0.1), Place(7, 48, 0).grid())
    found, said = scenes(folder)
    assert f"no overlap with the grid of its sequence (0001/{image.filename})" in said
    assert not [n for n, s in found.items() if image in s.images] and found


# ---------------------------------------------------------------- pixels


def by_hand(power, u, v, stretch):
    """Interpolate between pixels at column u and row v, in float64; the kernel is 2 / stretch pixels wide."""
    found = []
    for column, row in zip(u, v, strict=True):
        k, m = np.arange(int(column) - 3, int(column) + 5), np.arange(int(row) - 3, int(row) + 5)
        weights = np.clip(1 - abs(m - row), 0, None)[:, None] * np.clip(1 - abs(k - column) * stretch, 0, None)
        found.append((weights * power[np.ix_(m, k)].astype(np.float64)).sum() / weights.sum())
    return np.array(found)


def test_alignment_is_bilinear_in_power_as_computed_by_hand(folder):
    source = next(s for n, s in scenes(folder)[0].items() if n.startswith("0001/"))
    power, there = read_power(source.paths[0])
    rows, columns = (v.ravel() for v in np.mgrid[5:43:4, 5:43:4])
    a, _, c, _, e, f = there.transform
    shifted = there._replace(transform=(a, 0.0, c + 5.37 * a, 0.0, e, f + 6.72 * e), shape=(48, 48))
    got = onto_grid(power, there, shifted)[rows, columns]
    assert np.allclose(got, by_hand(power, columns + 5.37, rows + 6.72, 1), rtol=1e-4), "shifted by parts of a pixel"
    got = onto_grid(power, there, source.grid)[rows, columns]
    across, _, left, _, down, top = source.grid.transform
    xy = warp_points(source.grid.crs, there.crs, left + across * (columns + 0.5), top + down * (rows + 0.5))
    u, v = (np.array(xy[0]) - c) / a - 0.5, (np.array(xy[1]) - f) / e - 0.5
    finer = np.ptp(columns) / np.ptp(u)  # degrees of longitude are short: more pixels than the grid has
    assert finer < 0.9 and np.allclose(got, by_hand(power, u, v, finer), rtol=0.03), "from degrees to UTM"


def test_a_scene_holds_the_decibels_of_both_files_by_name(folder):
    source = next(s for n, s in scenes(folder)[0].items() if s.images[1].flooded)
    scene = ANY_SIZE.open_scene(ENTRY, source)
    for k, (time, image) in enumerate(zip(("before", "after"), source.images, strict=True)):
        for polarisation in ("vv", "vh"):
            laid = onto_grid(*read_power(image.path(source.root, polarisation)), source.grid)
            held = scene[polarisation].sel(time=time).values
            assert np.allclose(held, 10 * np.log10(laid.astype(float)), atol=1e-4), (k, polarisation)
    assert float(scene.vv.mean()) > float(scene.vh.mean()) + 3 and int(scene.flooding) == 1
    assert scene.vv.attrs["units"] == "dB" and scene.rio.crs.to_epsg() == 32631


def test_without_sentinel_2_the_first_radar_image_gives_the_grid(folder):
    for path in (folder / "SEN12FLOOD").rglob("S2_*.tif"):
        path.unlink()
    found, _ = scenes(folder)
    source = next(iter(found.values()))
    assert source.grid.text().endswith("EPSG:4326") and source.grid == sequence_grid(
        source.paths[0].parent, source.paths[0]
    )
    assert ANY_SIZE.open_scene(ENTRY, source).rio.crs.to_epsg() == 4326


def test_what_was_surveyed_is_not_read_again_and_what_changed_is(folder, monkeypatch):
    first, _ = scenes(folder)
    looked = []
    real = Survey.share
    from sarfm.flood import sen12flood

    monkeypatch.setattr(sen12flood, "missing_share", lambda power: looked.append(1) or 0.0)
    assert list(scenes(folder)[0]) == list(first) and not looked and Survey.share is real
    path = next(iter(first.values())).paths[0]
    rewrite(path, lambda values: values.__imul__(2))
    scenes(folder)
    assert len(looked) == 1


def test_the_published_floor_is_an_option(folder):
    source = next(iter(scenes(folder)[0].values()))
    half = next(i for i in read_sequences(source.root / "S1list.json")["0000"] if i.number == 2)
    scene = flood_scene(source._replace(images=(half,)), floor=1e-6)
    assert (
        scene.valid.all() and np.isclose(scene.vv.min(), -60, atol=1e-4) and (scene.vv == scene.vv.min()).mean() > 0.3
    )


def test_single_images_carry_their_own_label(folder):
    found, _ = scenes(folder, IMAGES)
    listed = read_sequences(folder / "SEN12FLOOD/S1list.json")
    for name, source in found.items():
        scene = IMAGES.open_scene(ENTRY, source)
        image = next(i for i in listed[name[:4]] if i.filename == name[5:])
        assert (
            int(scene.flooding) == image.flooded and scene.vv.dims == ("y", "x") and scene.attrs["time"] == image.date
        )


# ---------------------------------------------------------------- who learns from what


def test_lists_are_text_one_name_per_line(tmp_path):
    (tmp_path / "sen12_train.csv").write_text("0063\n\n1201,\r\n\ufeff".replace("\ufeff", ""))
    assert read_names(tmp_path / "sen12_train.csv") == ["0063", "1201"]
    with pytest.raises(ValueError, match="only one of the lists"):
        sequence_parts(tmp_path)
    (tmp_path / "sen12_test.csv").write_text("1201\n")
    with pytest.raises(ValueError, match="1201 is for train too"):
        sequence_parts(tmp_path)
    (tmp_path / "sen12_test.csv").write_text("0001\n0001\n")
    with pytest.raises(ValueError, match="each once"):
        sequence_parts(tmp_path)


@pytest.mark.parametrize("paper", [False, True])
def test_parts_hold_whole_sequences_and_the_test_is_the_authors(paper):
    stated = {f"{k:04d}": "train" if k % 4 else "test" for k in range(40)}
    for seed in range(5):
        parts = parts_of_sequences(stated, seed, paper)
        assert {n for n, p in parts.items() if p == "test"} == {n for n, p in stated.items() if p == "test"}
        assert sum(p == "val" for p in parts.values()) == (0 if paper else 5)
        assert parts == parts_of_sequences(dict(reversed(stated.items())), seed, paper), "order doesn't matter"
    assert parts_of_sequences(stated, 0) != parts_of_sequences(stated, 1)


def test_the_simulated_set_is_cut_and_split_by_sequence(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    any_size_entry(tmp_path / "mine.yaml")
    root = simulate_dataset(tmp_path, 9, 4, 48, progress=False)
    with pytest.warns(UserWarning, match="25 % or more"):
        store = Cut(dataset=str(tmp_path / "mine.yaml"), patch_px=48).store(progress=False)
    assert [str(channel) for channel in store.channels] == ["vv@0", "vh@0", "vv@1", "vh@1"]
    assert {"sequence", "date_before", "date_after"} <= set(store.index.columns)
    label = [int(store.read(k, "target_flooding")) for k in range(len(store))]
    flooded = {
        f"{s}/{i.filename}": i.flooded for s, images in read_sequences(root / "S1list.json").items() for i in images
    }
    seconds = [f"{place.partition('/')[0]}/{place.rpartition('__')[2]}" for place in store.index["place"]]
    assert label == [flooded[name] for name in seconds] and 0 < sum(label) < len(label)
    store.dataset = "sen12flood"  # whose lists these are
    by = {
        n: Split(**o).parts(store)
        for n, o in {
            "honest": {},
            "paper": dict(train_list="paper_train", val_list="paper_val", test_list="paper_test"),
        }.items()
    }
    for name, parts in by.items():
        sequences = {part: set(store.index["sequence"][parts == part]) for part in ("train", "val", "test")}
        assert not sequences["train"] & sequences["test"] and not sequences["val"] & (
            sequences["train"] | sequences["test"]
        )
        assert bool(sequences["val"]) == (name == "honest") and sequences["test"] == {"0002", "0005", "0008"}


def test_without_lists_the_division_by_chance_is_said():
    from types import SimpleNamespace

    import pandas as pd

    rows = pd.DataFrame({"place": [f"{k:04d}/a__b" for k in range(20)], "part": ""})
    with pytest.warns(UserWarning, match="divided by chance"):
        lists = sequence_lists(SimpleNamespace(index=rows, path="a store"))
    assert {n: len(p) for n, p in lists.items()} == {
        "train_100": 14,
        "val": 3,
        "test": 3,
        "paper_train": 17,
        "paper_val": 0,
        "paper_test": 3,
    }


def test_stand_ins_know_their_truth(folder):
    """The water that rose is dark in the radar, on the grid on which the reader puts it."""
    changes = {True: [], False: []}
    for source in scenes(folder)[0].values():
        if source.images[1].flooded:
            scene = ANY_SIZE.open_scene(ENTRY, source)
            with rasterio.open(source.paths[-1].with_name(f"{source.images[1].filename}_truth.tif")) as file:
                wet = file.read(1) == 1
            change = (scene.vv.sel(time="after") - scene.vv.sel(time="before")).values
            changes[True].append(change[wet])
            changes[False].append(change[~wet])
    flooded, dry = (np.concatenate(changes[wet]) for wet in (True, False))
    assert np.median(flooded) < np.median(dry) - 3 and len(flooded) > 1000


def test_files_of_pairs_are_checked_once_each(folder):
    any_size_entry(folder / "mine.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = check(folder / "mine.yaml")
    assert table.file.is_unique and set(table.compared_with) == {"recorded now"} and len(table) >= 20


def test_a_grid_says_what_it_is():
    grid = Grid(CRS.from_epsg(32631).to_wkt(), tuple(from_origin(5e5, 5e6, 10, 10))[:6], (512, 512))
    assert grid.text() == "512 x 512 px in EPSG:32631"
    with pytest.raises(ValueError, match="resampling is one of"):
        onto_grid(np.ones((512, 512), np.float32), grid, grid, "cubic")
