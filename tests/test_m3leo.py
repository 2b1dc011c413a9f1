"""`sarfm.land.m3leo`: tiles of both editions become Scenes, and what is wrong with a file is said by its name."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import xarray as xr
import yaml
from patience import PATIENCE_S

from sarfm.datasets.catalog import check, open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.io.files import CorruptData
from sarfm.land.m3leo import (
    ASCENDING,
    BANDS,
    DESCENDING,
    GSSIC,
    INTERFEROGRAMS,
    M3LEO,
    PUBLISHED_CHANNELS,
    decibels,
    land_cover_form,
    pair_days,
    split_lists,
)
from sarfm.land.m3leo_files import PARTITIONS, outline, pack_tables, tile_identifier, write_standins
from sarfm.land.m3leo_tiles import TileFile, joined_tiles, table_files, tile_files, tile_parts
from sarfm.land.scaling import DB_RANGE, decode_db, encode_db
from sarfm.land.simulated import simulate_place
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split
from sarfm.scenes.scene import stack_channels

EUROPE = f"europe_partitions_aschips_{PARTITIONS['europe']}"
SOUTH = f"southamerica_partitions_aschips_{PARTITIONS['southamerica']}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write six tiles of two regions in both editions."""
    root, options = tmp_path_factory.mktemp("m3leo"), {"tiles": 6, "size_px": 64, "progress": False}
    return {edition: write_standins(root / edition, edition=edition, **options) for edition in ("miniset", "full")}


@pytest.fixture
def mini(written, tmp_path, monkeypatch):
    """Lend a copy of the miniset, as the catalogue finds it."""
    monkeypatch.setenv("SARFM_DATA", str(tmp_path))
    return shutil.copytree(written["miniset"], tmp_path / "m3leo_s1grd")


@pytest.fixture(scope="module")
def entry():
    """Read the entry."""
    return load_entry("m3leo_s1grd")


def truth(name: str) -> xr.Dataset:
    """Simulate the tile of a name again."""
    region, _, identifier = name.partition("/")
    as_simulated = {"southamerica": "south_america"}.get(region, region)
    scenes = (simulate_place(n, 64, region=as_simulated) for n in range(6))
    return next(scene for scene in scenes if tile_identifier(outline(scene)) == identifier)


# ---- bytes --------------------------------------------------------------------------------------------------------


def test_bands_and_channels_are_ordered_as_published():
    assert list(BANDS) == [
        f"{s}_{b}" for s in ("winter", "spring", "summer", "fall") for b in ("vvasc", "vvdes", "vhasc", "vhdes")
    ]
    assert list(PUBLISHED_CHANNELS[:5]) == ["ratio@winter", "ratio@spring", "ratio@summer", "ratio@fall", "vv@winter"]
    assert PUBLISHED_CHANNELS[-1] == "vh@fall" and len(PUBLISHED_CHANNELS) == 12


def test_the_ratio_is_the_difference_of_bytes_as_integers():
    stored = {"vv": np.uint8([[[10, 200]]] * 4), "vh": np.uint8([[[20, 30]]] * 4)}
    assert np.array_equal(decibels(stored)["ratio"][0, 0], np.float32([-10, 170]) / np.float32(8.5))
    step = (DB_RANGE[1] - DB_RANGE[0]) / 255
    assert step == pytest.approx(1 / 8.5)
    unseen = decibels({"vv": np.uint8([[[0, 0]]] * 4), "vh": np.uint8([[[0, 9]]] * 4)})
    assert np.isnan(unseen["vv"][0, 0]).tolist() == [True, False]


# ---- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edition", ["miniset", "full"])
@pytest.mark.parametrize("region", ["europe", "southamerica"])
def test_scene_is_what_was_written(written, entry, edition, region):
    sources = ASCENDING.scenes(entry, written[edition])
    assert len(sources) == 12
    name = next(name for name in sources if name.startswith(region))
    scene, known = ASCENDING.open_scene(entry, sources[name]), truth(name)
    for pol in ("vv", "vh"):
        assert np.array_equal(scene[pol].values, decode_db(encode_db(known[pol].values, wrap=True)))
        inside = (known[pol].values > -30) & (known[pol].values < 0)
        assert inside.mean() > 0.5 and abs(scene[pol].values - known[pol].values)[inside].max() < 0.0601
    assert np.abs(scene.ratio - (scene.vv - scene.vh)).max() < 1e-4
    assert np.array_equal(scene.land_cover, known.land_cover)
    wet = (known.land_cover == 80).values
    assert scene.tree_cover_mean == pytest.approx(float(known.tree_cover.where(~wet, 0).mean()), abs=6)
    assert float(scene.biomass.mean()) == pytest.approx(float(known.biomass.mean()), rel=0.01)
    assert float(scene.built.mean()) == pytest.approx(float(known.built.mean()), abs=2e-4)
    assert (
        scene.attrs["region"] == region and scene.attrs["part"] in ("train", "val", "test") and scene.attrs["simulated"]
    )
    west, south, east, north = outline(known)
    assert scene.x.values.mean() == pytest.approx((west + east) / 2) and scene.sizes == {"season": 4, "y": 64, "x": 64}
    assert {"elevation", "slope"} <= set(scene) and scene.elevation.attrs["units"] == "m"
    assert stack_channels(scene, PUBLISHED_CHANNELS).shape == (12, 64, 64)


def test_descending_passes_are_other_bands(written, entry):
    sources = DESCENDING.scenes(entry, written["miniset"])
    name = next(iter(sources))
    with rasterio.open(sources[name].tile.files["s1grd-2020"].path) as file:
        stored = file.read()
    scene = DESCENDING.open_scene(entry, sources[name])
    assert np.array_equal(scene.vv[2].values, decode_db(stored[9])) and np.array_equal(
        scene.vh[2].values, decode_db(stored[11])
    )
    assert scene.attrs["orbit"] == "descending"


def test_gssic_and_gunw_have_units(written, entry):
    sources = GSSIC.scenes(entry, written["miniset"])
    name = next(name for name in sources if name.startswith("europe"))
    scene, known = M3LEO("gssic", decay={"rho": 1e-3, "tau": 1.0}).open_scene(entry, sources[name]), truth(name)
    assert scene.season.values.tolist() == ["winter", "spring", "summer", "fall"]
    power = 10 * np.log10((10 ** (known.vv / 10)).mean(("y", "x")))
    assert np.allclose(10 * np.log10((10 ** (scene.vv / 10)).mean(("y", "x"))), power, atol=0.1)
    assert scene.coherence_12.attrs["quantity"] == "coherence" and 0.3 < float(scene.coherence_12.mean()) < 1
    assert float(scene.coherence_48.mean()) < float(scene.coherence_12.mean())
    assert scene.tau.attrs["units"] == "day" and scene.incidence_angle.attrs["units"] == "degree"
    assert {"land_cover", "tree_cover", "biomass"} <= set(scene) and scene.sizes["y"] < 64
    assert "rho" not in GSSIC.open_scene(entry, sources[name])
    sources = INTERFEROGRAMS.scenes(entry, written["full"])
    scene = INTERFEROGRAMS.open_scene(entry, sources[name])
    assert scene.attrs["pairs"] == "20200205_20200124" and scene.phase.attrs["units"] == "rad" and scene.vv.ndim == 2
    assert pair_days("20200124_20191231") == 24
    with pytest.raises(ValueError, match="YYYYMMDD"):
        pair_days("2020-01-24")


def test_indices_are_told_from_codes(tmp_path, entry):
    folder = write_standins(tmp_path, ["europe"], tiles=5, size_px=48, land_cover="indices", progress=False)
    sources = ASCENDING.scenes(entry, folder)
    assert {source.land_cover for source in sources.values()} == {"indices"}
    for name in list(sources)[:2]:
        identifier = name.partition("/")[2]
        known = next(s for n in range(5) if tile_identifier(outline(s := simulate_place(n, 48))) == identifier)
        assert np.array_equal(ASCENDING.open_scene(entry, sources[name]).land_cover, known.land_cover)


def test_land_cover_that_does_not_tell_is_asked(mini, entry):
    for path in (mini / EUROPE / "esaworldcover-2020").glob("*.tif"):
        with rasterio.open(path, "r+") as file:
            file.write(np.full((1, 64, 64), 10, np.uint8))
    with pytest.raises(ValueError, match=r"may be codes or indices; get more tiles, or register"):
        ASCENDING.scenes(entry, mini)
    sources = M3LEO(land_cover="codes").scenes(entry, mini)
    assert (M3LEO().open_scene(entry, next(iter(sources.values()))).land_cover == 10).all()
    assert callable(land_cover_form)


# ---- what is missing or wrong -------------------------------------------------------------------------------------


def test_missing_tiles_are_left_out_and_counted(mini, entry):
    first = sorted((mini / SOUTH / "modis44b006veg").iterdir())[0]
    first.unlink()
    next((mini / EUROPE / "s1grd-2020").iterdir()).unlink()
    with pytest.warns(UserWarning) as said:
        sources = ASCENDING.scenes(entry, mini)
    text = str(said[0].message)
    assert "modis44b006veg 5" in text and "s1grd-2020 6" in text and first.stem in text and "5 are in all" in text
    assert len(sources) == 10 and f"southamerica/{first.stem}" not in sources


def test_a_region_without_labels_keeps_its_tiles(mini, entry):
    for name in ("esaworldcover-2020", "modis44b006veg"):
        shutil.rmtree(mini / SOUTH / name)
    sources = ASCENDING.scenes(entry, mini)
    assert len(sources) == 12
    scenes = {n: ASCENDING.open_scene(entry, s) for n, s in sources.items()}
    unlabelled = next(s for n, s in scenes.items() if n.startswith("south"))
    assert (unlabelled.land_cover == 255).all() and np.isnan(unlabelled.tree_cover_mean)
    assert len({tuple(s.sar.targets) for s in scenes.values()}) == 1


def test_constant_channels_are_named_and_never_valid(mini, entry):
    path = sorted((mini / EUROPE / "s1grd-2020").iterdir())[0]
    with rasterio.open(path, "r+") as file:
        stored = file.read()
        stored[BANDS.index("spring_vhasc")] = 77
        file.write(stored)
    scene = ASCENDING.open_scene(entry, ASCENDING.scenes(entry, mini)[f"europe/{path.stem}"])
    assert scene.attrs["constant_channels"] == "vh@spring" and np.isnan(scene.vh[1]).all()
    assert not scene.valid[1].any() and scene.valid[0].any()
    with rasterio.open(path, "r+") as file:
        file.write(np.zeros_like(stored))
    empty = ASCENDING.open_scene(entry, ASCENDING.scenes(entry, mini)[f"europe/{path.stem}"])
    assert not empty.valid.any() and len(empty.attrs["constant_channels"].split()) == 12
    store = Cut("m3leo_s1grd", patch_px=64, targets=("land_cover",)).store(progress=False)
    row = store.index.set_index("place").loc[f"europe/{path.stem}"]
    assert row["valid_fraction"] == 0 and (store.index["valid_fraction"] > 0).sum() == 11


def test_malformed_files_are_refused_by_name(mini, entry):
    images, labels = (sorted((mini / EUROPE / name).iterdir()) for name in ("s1grd-2020", "biomass-2020"))
    content = images[0].read_bytes()
    images[0].write_bytes(content[: len(content) // 2])
    with rasterio.open(images[1]) as file:
        profile, bands = file.profile, file.read()
    with rasterio.open(images[1], "w", **(profile | {"count": 12})) as file:
        file.write(bands[:12])
    with rasterio.open(images[2], "r+") as file:
        file.descriptions = ("B1", *file.descriptions[1:])
    labels[3].write_bytes(b"no NetCDF")
    sources = ASCENDING.scenes(entry, mini)
    wrong = {
        images[0]: "no whole GeoTIFF",
        images[1]: "expected 16 bands of uint8, got 12",
        images[2]: "expected the bands",
    }
    for path, text in (wrong | {labels[3]: "no whole NetCDF"}).items():
        with pytest.raises(CorruptData, match=text) as error:
            ASCENDING.open_scene(entry, sources[f"europe/{path.stem}"])
        assert str(path) in str(error.value)


def test_names_that_are_no_tiles_and_links_that_lead_out(mini, entry, tmp_path):
    (mini / EUROPE / "s1grd-2020/notes.tif").touch()
    with pytest.warns(UserWarning, match="notes.tif"):
        tile_files(mini)
    (mini / EUROPE / "s1grd-2020/notes.tif").unlink()
    outside = tmp_path / "secret.tif"
    outside.touch()
    (mini / EUROPE / "s1grd-2020/0123456789abc.tif").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        tile_files(mini)


def test_splits_that_name_what_is_not_there(mini):
    path = next(mini.glob("europe_*_splits_*.csv"))
    table = pd.read_csv(path)
    pd.concat([table, pd.DataFrame({"identifier": ["0123456789abc"], "split": ["train"]})]).to_csv(path, index=False)
    with pytest.warns(UserWarning, match=r"1 tiles of the split's table have no file, \['0123456789abc'\]"):
        joined_tiles(mini, "s1grd-2020")
    table.assign(split="training").to_csv(path, index=False)
    with pytest.raises(CorruptData, match="training"):
        tile_parts(mini)
    table.assign(identifier="../../x").to_csv(path, index=False)
    with pytest.raises(CorruptData, match=r"\.\./\.\./x"):
        tile_parts(mini)
    table.drop(columns="split").to_csv(path, index=False)
    with pytest.raises(CorruptData, match="no column"):
        tile_parts(mini)


def test_tables_that_are_cut_or_tampered_with(written, tmp_path):
    table = pq.read_table(written["full"] / EUROPE / "s1grd-2020/00000.zstd.parquet")
    path = tmp_path / "t.parquet"

    def rewritten(name: str, column: pa.Array) -> list[tuple[str, str, TileFile]]:
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)
        return table_files(path)

    pq.write_table(table.drop_columns(["aoi"]), path)
    with pytest.raises(CorruptData, match=r"no column \['aoi'\]"):
        table_files(path)
    for bad in ("../../etc/0123456789abc.tif", "europe/x/s1grd-2020/readme.txt"):
        with pytest.raises(CorruptData, match="13 hexadecimal digits"):
            rewritten("path", pa.array([bad] * len(table)))
    files = rewritten("content", pa.array([b"short"] * len(table)))
    with pytest.raises(CorruptData, match="it holds 5"):
        files[0][2].read()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptData, match="no whole Parquet file"):
        table_files(path)


def test_a_tile_in_both_editions_is_an_error(mini):
    pack_tables(mini / EUROPE, mini / "tables")
    with pytest.raises(ValueError, match="keep one of them"):
        tile_files(mini)


def test_a_file_without_a_place_takes_the_outline(mini, entry):
    path = sorted((mini / EUROPE / "s1grd-2020").iterdir())[0]
    before = ASCENDING.open_scene(entry, ASCENDING.scenes(entry, mini)[f"europe/{path.stem}"])
    with rasterio.open(path) as file:
        profile, bands, names = file.profile, file.read(), file.descriptions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", **{k: v for k, v in profile.items() if k not in ("crs", "transform")}) as file:
            file.write(bands)
            file.descriptions = names
    after = ASCENDING.open_scene(entry, ASCENDING.scenes(entry, mini)[f"europe/{path.stem}"])
    assert np.allclose(after.x, before.x, atol=1e-9) and np.allclose(after.y, before.y, atol=1e-9)
    assert np.array_equal(after.land_cover, before.land_cover)
    for outlines in mini.glob("*.geojson"):
        outlines.unlink()
    with pytest.raises(CorruptData, match="no CRS and no outline"):
        ASCENDING.open_scene(entry, ASCENDING.scenes(entry, mini)[f"europe/{path.stem}"])


# ---- through the house --------------------------------------------------------------------------------------------


def test_catalogue_store_and_split(mini):
    scenes = open_dataset("m3leo_s1grd")
    assert len(scenes) == 12 and check("m3leo_s1grd")["ok"].all()
    assert scenes[next(iter(scenes))].attrs["licence"] == "CC0-1.0", (
        "simulated files don't carry the terms of the real ones"
    )
    store = Cut("m3leo_s1grd", channels=PUBLISHED_CHANNELS, patch_px=64).store(progress=False)
    assert [f"{c.variable}@{c.at}" for c in store.channels] == list(PUBLISHED_CHANNELS)
    lists = split_lists(store)
    assert {n: len(p) for n, p in lists.items() if "_" not in n} == {"val": 2, "test": 2}
    assert len(lists["train_100"]) == 8 and len(lists["europe_train"]) == 4
    parts = Split().parts(store)
    assert parts.value_counts().to_dict() == {"train": 8, "val": 2, "test": 2}
    tables = Cut("m3leo_s1grd", channels=PUBLISHED_CHANNELS, patch_px=64).store(progress=False, jobs=2)
    assert tables.path == store.path


def test_both_editions_make_one_store(written):
    stores = [
        Cut("m3leo_s1grd", str(written[edition]), patch_px=64).store(progress=False) for edition in ("miniset", "full")
    ]
    for k in range(12):
        first, other = (
            s.read(int(s.index.set_index("place").loc[stores[0].index["place"][k], "patch"]), "image") for s in stores
        )
        assert np.array_equal(first, other, equal_nan=True)


@pytest.mark.soak
def test_pretraining_from_a_folder_by_environment(mini, tmp_path):
    words = [
        "-p",
        "data.dataset=m3leo_s1grd",
        "-p",
        "data.patch_px=64",
        "-p",
        "data.targets=[]",
        "-p",
        "encoder=vit-nano",
    ]
    words += ["-p", "split.by=entry", "-p", "learn.steps=5", "-p", "learn.batch_size=4", "--out", tmp_path / "out"]
    call = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in (["data", "check", "m3leo_s1grd"], ["run", "pretrain", *words]):
        done = subprocess.run(
            [*call, *map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
    contract = json.loads((tmp_path / "out/model.json").read_text())["contract"]
    assert len(contract["channels"]) == 12


def test_an_entry_of_ones_own_takes_the_other_passes(mini, tmp_path):
    text = yaml.safe_load((load_entry.__globals__["carried"]("data_catalogs") / "m3leo_s1grd.yaml").read_text())
    text |= {"id": "descending", "read": {"reader": "m3leo_descending", "scenes": "{scene}.tif"}}
    (mini / "descending.yaml").write_text(yaml.safe_dump(text))
    scenes = open_dataset(mini / "descending.yaml")
    assert scenes[next(iter(scenes))].attrs["orbit"] == "descending"
