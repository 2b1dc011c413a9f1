"""`sarfm.ice.ai4arctic`: both editions become the same Scenes, and what is wrong with a file is said."""

import pickle

import dask
import dask.array
import numpy as np
import pytest
import xarray as xr
from pyproj import Transformer

from sarfm.cli import main
from sarfm.datasets.catalog import check, entry_files, list_table, open_dataset, show_entry
from sarfm.datasets.entries import load_entry
from sarfm.ice.ai4arctic import STATISTICS, SYSTEM_1_STATISTICS, open_ai4arctic, parse_name, upsample
from sarfm.ice.charts import CHARTS
from sarfm.io.files import CorruptData
from sarfm.scenes.scene import check_scene, label_names

RAW = "S1A_EW_GRDM_1SDH_20190430T101830_20190430T101930_027018_030AD3_9C47_icechart_cis_SGRDIEA_20190430T1020Z_pl_a.nc"
RAW_DMI = (
    "S1B_EW_GRDM_1SDH_20180124T194759_20180124T194859_020301_022AA4_1F75_icechart_dmi_201801241950_SouthEast_RIC.nc"
)
READY = "20190430T101830_cis_prep.nc"
CODES = [
    "id;CT;CA;SA;FA;CB;SB;FB;CC;SC;FC;CN;CD;CF;POLY_TYPE",
    "1;55;-9;-9;-9;-9;-9;-9;-9;-9;-9;-9;-9;-9;W",
    "2;91;70;95;5;20;91;4;-9;-9;-9;-9;-9;-9;I",
    "3;91;60;95;5;40;84;3;-9;-9;-9;-9;-9;-9;I",
]
SIZE = (200, 250)
IMAGE, FLAT, COARSE = ("sar_lines", "sar_samples"), ("sar_grid_points",), ("2km_grid_lines", "2km_grid_points")
NODES = ("sar_sample_2dgrid_points", "sar_line_2dgrid_points")
POLAR = Transformer.from_crs("EPSG:3413", "EPSG:4326", always_xy=True)


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    """Keep the tests out of the user's data folder."""
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "sarfm-data"))


@pytest.fixture
def raw():
    """Make the content of a small raw file."""
    generator = np.random.default_rng(0)
    hh, hv = (generator.normal(m, 2, SIZE).astype("f4") for m in (-14, -24))
    hh[:20], hv[:20, :100] = np.nan, np.nan
    polygons = generator.integers(1, 5, SIZE).astype("f8")  # 4 is in no row
    polygons[-30:] = np.nan
    line, sample = np.meshgrid(np.linspace(0, SIZE[0] - 1, 4), np.linspace(0, SIZE[1] - 1, 5), indexing="ij")
    lon, lat = POLAR.transform(600e3 + 40 * sample, -1500e3 - 40 * line)
    grids = dict(line=line, sample=sample, latitude=lat, longitude=lon, incidenceangle=19 + 0.1 * sample + 0.01 * line)
    content = {"nersc_sar_primary": (IMAGE, hh), "nersc_sar_secondary": (IMAGE, hv)}
    content |= {"polygon_icechart": (IMAGE, polygons), "distance_map": (IMAGE, generator.integers(0, 41, SIZE))}
    content |= {"polygon_codes": (("polygons",), np.array(CODES, object))}
    content |= {f"sar_grid_{n}": (FLAT, v.ravel()) for n, v in grids.items()}
    content |= {"sar_grid_height": (FLAT, np.zeros(20))}
    content |= {
        "btemp_18_7h": (COARSE, generator.normal(170, 20, (4, 5))),
        "t2m": (COARSE, generator.normal(260, 5, (4, 5))),
    }
    return xr.Dataset(content | {"amsr2_swath_map": (COARSE, np.ones((4, 5)))})


@pytest.fixture
def ready():
    """Make the content of a small ready-to-train file."""
    generator = np.random.default_rng(1)
    scaled = lambda: generator.normal(0, 1, SIZE).astype("f4")
    content = {n: (IMAGE, scaled(), {"variable_fill_value": 0.0}) for n in ("nersc_sar_primary", "nersc_sar_secondary")}
    content["nersc_sar_primary"][1][:20] = 0
    content |= {"sar_incidenceangle": (IMAGE, scaled()), "distance_map": (IMAGE, scaled())}
    content |= {
        c.variable: (IMAGE, generator.choice([*c.classes, 255], SIZE).astype("u1"), {"chart_fill_value": 255})
        for c in CHARTS.values()
    }
    line, sample = np.meshgrid(
        np.linspace(0, 2 * SIZE[0] - 1, 4), np.linspace(0, 2 * SIZE[1] - 1, 5), indexing="ij"
    )  # of 40 m
    lon, lat = POLAR.transform(600e3 + 40 * sample, -1500e3 - 40 * line)
    content |= {"sar_grid2d_latitude": (NODES, lat), "sar_grid2d_longitude": (NODES, lon)}
    content |= {n: (COARSE, generator.normal(0, 1, (8, 10)).astype("f4")) for n in ("btemp_18_7h", "t2m")}
    return xr.Dataset(content)


def put(data, path):
    """Write a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_netcdf(path, engine="h5netcdf", encoding={"nersc_sar_primary": {"zlib": True}})
    return path


# ---------------------------------------------------------------- names and numbers


def test_names():
    name = parse_name(f"some/folder/{RAW}")
    assert name == ("S1A", np.datetime64("2019-04-30T10:18:30"), np.datetime64("2019-04-30T10:19:30"), "cis",
                    "20190430T101830_cis", "SGRDIEA_20190430T1020Z_pl_a")  # fmt: skip
    assert name.scene == RAW[17:32] + "_" + RAW[77:80]
    assert parse_name(RAW_DMI)[3:] == ("dmi", "20180124T194759_dmi", "201801241950_SouthEast_RIC")
    short = parse_name("20180607T184326_dmi_prep.nc")
    assert short[0] == short.chart == "" and short.service == "dmi" and np.isnat(short.end)


@pytest.mark.parametrize(
    "name", ["train_00.nc", RAW[:-3], RAW.replace("cis", "aari"), RAW.replace("EW", "IW"), "", "a_cis_prep.nc"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="no name of an AI4Arctic file"):
        parse_name(name)
    with pytest.raises(ValueError, match="time that does not exist"):
        parse_name("20191330T101830_cis_prep.nc")


def test_statistics_are_the_published_ones():
    assert len(STATISTICS) == 28 and STATISTICS["nersc_sar_primary"] == (-14.5082551552228, 5.6597459193818676)
    assert STATISTICS["btemp_6_9h"] == (148.8469796145295, 61.64846862537627)
    assert STATISTICS["btemp_36_5v"] == (228.20590185866286, 17.652645265307164)
    assert (
        STATISTICS["tclw"] == (0.041245511364735726, 0.07112806794202754) and STATISTICS["day"][1] == 99.55635507719892
    )
    assert SYSTEM_1_STATISTICS["nersc_sar_secondary"] == (-24.701211250236728, 4.746759336539111)


# ---------------------------------------------------------------- both editions


def test_raw_is_read_as_it_was_written(raw, tmp_path):
    path = put(raw, tmp_path / "ai4arctic_raw_train_v3" / RAW)
    scene = check_scene(open_ai4arctic(path))
    assert np.array_equal(scene.hh, raw.nersc_sar_primary, equal_nan=True) and scene.hh.dtype == np.float32
    assert np.array_equal(scene.hv, raw.nersc_sar_secondary, equal_nan=True)
    assert scene.hh.attrs == {"units": "dB", "quantity": "sigma0", "long_name": "HH sigma0"}
    assert np.array_equal(scene.valid, np.isfinite(raw.nersc_sar_primary) & np.isfinite(raw.nersc_sar_secondary))
    expected = {"sic": [0, 10, 10, 255], "sod": [0, 5, 255, 255], "floe": [0, 4, 4, 255]}
    number = np.nan_to_num(raw.polygon_icechart.values, nan=4).astype(int) - 1
    for name, classes in expected.items():
        assert np.array_equal(scene[name], np.array(classes, np.uint8)[number]) and scene[name].dtype == np.uint8
    assert label_names(scene) == ["sic", "sod", "floe"]
    assert np.allclose(scene.incidence_angle, np.add.outer(0.01 * np.arange(200), 19 + 0.1 * np.arange(250)), atol=1e-4)
    assert scene.incidence_angle.dtype == scene.distance_map.dtype == np.float32
    assert np.array_equal(scene.distance_map, raw.distance_map)
    for name in ("btemp_18_7h", "t2m"):
        assert scene[name].dims == ("y_2km", "x_2km") and np.allclose(scene[name], raw[name], rtol=1e-6)
    assert scene.y_2km.values.tolist() == [25, 75, 125, 175] and scene.y.values[:2].tolist() == [0.5, 1.5]
    assert {"amsr2_swath_map", "sar_grid_height"}.isdisjoint(scene.variables)
    said = {k: scene.attrs[k] for k in ("scene", "service", "time", "spacing_m", "edition", "sensor", "part", "source")}
    assert said == {
        "scene": "20190430T101830_cis", "service": "cis", "time": "2019-04-30T10:18:30", "spacing_m": 40.0, "edition": "raw",
        "sensor": "Sentinel-1A EW GRDM", "part": "train", "source": RAW,
    }  # fmt: skip
    assert "Copernicus Sentinel data 2019" in scene.attrs["attribution"] and scene.attrs["licence"]


def test_raw_pixels_are_where_they_should_be(raw, tmp_path):
    scene = open_ai4arctic(put(raw, tmp_path / RAW))
    assert scene.gcp_row.values[[0, -1]].tolist() == [0.5, 199.5] and scene.gcp_col.values[4] == 249.5
    x, y = POLAR.transform(*scene.sar.lonlat(), direction="INVERSE")
    assert np.allclose(x, 600e3 + 40 * np.arange(250)[None], atol=0.2)
    assert np.allclose(y, -1500e3 - 40 * np.arange(200)[:, None], atol=0.2)
    assert abs(scene.sar.spacing_m - 40) < 1.5  # EPSG:3413 is not true to scale there
    order = np.random.default_rng(0).permutation(20)
    shuffled = raw.assign({n: (FLAT, raw[n].values[order]) for n in raw.data_vars if n.startswith("sar_grid_")})
    again = open_ai4arctic(put(shuffled, tmp_path / "b" / RAW))
    assert np.array_equal(again.incidence_angle, scene.incidence_angle) and np.array_equal(again.gcp_lon, scene.gcp_lon)


def test_thresholds_reach_the_charts(raw, tmp_path):
    path = put(raw, tmp_path / RAW)
    loose, strict = (
        open_ai4arctic(path, sod_threshold=0.6),
        open_ai4arctic(path, sod_threshold=0.71, floe_threshold=0.8),
    )
    third = raw.polygon_icechart.values == 3
    assert (loose.sod.values[third] == 5).all() and (strict.floe.values[third] == 255).all()
    assert (strict.sod.values[raw.polygon_icechart.values == 2] == 255).all()
    assert strict.attrs["floe_threshold"] == 0.8
    with pytest.raises(ValueError, match="sod_threshold"):
        open_ai4arctic(path, sod_threshold=65)


def test_ready_to_train_is_scaled_back(ready, tmp_path):
    scene = check_scene(open_ai4arctic(put(ready, tmp_path / "ai4arctic_rtt_train" / READY)))
    scale = lambda name: ready[name] * STATISTICS[name][1] + STATISTICS[name][0]
    assert np.allclose(scene.hh[20:], scale("nersc_sar_primary")[20:], atol=1e-4) and np.isnan(scene.hh[:20]).all()
    assert not scene.valid[:20].any() and scene.valid[20:].all()
    assert scene.hv.attrs["units"] == "dB" and np.allclose(
        scene.incidence_angle, scale("sar_incidenceangle"), atol=1e-4
    )
    assert np.allclose(scene.t2m, scale("t2m"), atol=1e-3) and np.allclose(
        scene.distance_map, scale("distance_map"), atol=1e-4
    )
    for name, chart in CHARTS.items():
        assert np.array_equal(scene[name], ready[chart.variable])
    assert scene.y_2km.values[:2].tolist() == [12.5, 37.5] and scene.attrs["spacing_m"] == 80.0
    x, y = POLAR.transform(*scene.sar.lonlat(), direction="INVERSE")
    assert np.allclose(x, 600e3 + 20 + 80 * np.arange(250)[None], atol=0.2), "the centre of two columns of 40 m"
    assert np.allclose(y, -1500e3 - 20 - 80 * np.arange(200)[:, None], atol=0.2)


@pytest.mark.parametrize("names", [("sar_2dgrid_latitude", "sar_2dgrid_longitude"), None])
def test_ready_to_train_grids_of_other_names(ready, raw, tmp_path, names):
    grids = ["sar_grid2d_latitude", "sar_grid2d_longitude"]
    if names:
        other = ready.rename(dict(zip(grids, names, strict=True)))
    else:  # tie points with lines and samples, at their 40 m positions
        tie = {n: raw[n] for n in raw.data_vars if n.startswith("sar_grid_") and n != "sar_grid_incidenceangle"}
        tie |= {n: (FLAT, 2 * raw[n].values + 1) for n in ("sar_grid_line", "sar_grid_sample")}
        other = ready.drop_vars(grids).assign(tie)
    scene = open_ai4arctic(put(other, tmp_path / READY))
    assert scene.attrs["edition"] == "ready_to_train"
    assert scene.gcp_row.values[0] == (0.25 if names else 0.75) and scene.gcp_col.values[-1] == 249.75


def test_ready_to_train_values_that_are_no_class_are_unlabelled(ready, tmp_path):
    ready["SOD"][0, :4] = np.uint8([6, 7, 99, 254])
    ready["SIC"][0, :2] = np.uint8([11, 10])
    scene = open_ai4arctic(put(ready, tmp_path / READY))
    assert scene.sod.values[0, :4].tolist() == [255] * 4 and scene.sic.values[0, :2].tolist() == [255, 10]


@pytest.mark.parametrize("end", ["_reference.nc", "_prep_reference.nc"])
def test_charts_of_test_scenes_lie_beside_them(ready, tmp_path, end):
    charts = [c.variable for c in CHARTS.values()]
    path = put(ready.drop_vars(charts), tmp_path / "ai4arctic_rtt_test" / READY)
    assert label_names(open_ai4arctic(path)) == []
    ready[charts].to_netcdf(path.with_name(READY.replace("_prep.nc", end)), engine="h5netcdf")
    scene = open_ai4arctic(path, chunks=64)
    assert scene.attrs["part"] == "test" and np.array_equal(scene.floe, ready.FLOE)
    assert len(open_dataset("ai4arctic_rtt", path.parent)) == 1


@pytest.mark.parametrize(("folders", "part"), [("x/ai4arctic_raw_test_v3", "test"), ("test/ai4arctic_raw_train_v3", "train"),
                                               ("train/test_files/a", "test")])  # fmt: skip
def test_official_test_scenes_are_told_by_the_folder(raw, tmp_path, folders, part):
    assert open_ai4arctic(put(raw, tmp_path / folders / RAW)).attrs["part"] == part


# ---------------------------------------------------------------- lazily


@pytest.mark.parametrize("edition", ["raw", "ready"])
def test_lazy_is_the_same(request, tmp_path, edition):
    path = put(request.getfixturevalue(edition), tmp_path / (RAW if edition == "raw" else READY))
    whole, lazy = open_ai4arctic(path), open_ai4arctic(path, chunks=64)
    images = [n for n in lazy.data_vars if lazy[n].dims == ("y", "x")]
    assert len(images) == 8 and all(isinstance(lazy[n].data, dask.array.Array) for n in images)
    assert {lazy[n].chunks for n in images} == {lazy.hh.chunks} and 32 < max(lazy.hh.chunks[0]) <= 64
    assert all(lazy[n].dtype == whole[n].dtype for n in images)
    xr.testing.assert_identical(lazy.compute(), whole)
    xr.testing.assert_identical(
        pickle.loads(pickle.dumps(lazy)).isel(y=slice(30, 99)).compute(), whole.isel(y=slice(30, 99))
    )


def test_lazy_reads_only_what_is_asked(raw, tmp_path, monkeypatch):
    path, read = put(raw, tmp_path / RAW), []
    import sarfm.ice.ai4arctic as module

    original = module._read
    monkeypatch.setattr(module, "_read", lambda p, n, *w: read.append((n, *w)) or original(p, n, *w))
    lazy = open_ai4arctic(path, chunks=50)
    assert not [
        n for n, *_ in read if n in ("nersc_sar_primary", "nersc_sar_secondary", "polygon_icechart", "distance_map")
    ]
    read.clear()
    with dask.config.set(scheduler="synchronous"):
        lazy.hh[60:90, 10:40].compute()
    assert read == [("nersc_sar_primary", (slice(50, 100), slice(0, 50)))]


def test_upsampling_only_when_asked(raw, tmp_path):
    path = put(raw, tmp_path / RAW)
    scene, lazy = open_ai4arctic(path), open_ai4arctic(path, chunks=64)
    fine = upsample(scene, ["t2m"])
    assert fine.t2m.shape == SIZE and fine.t2m.dtype == np.float32 and fine.btemp_18_7h.dims == ("y_2km", "x_2km")
    torch = pytest.importorskip("torch")
    wanted = torch.nn.functional.interpolate(
        torch.tensor(raw.t2m.values)[None, None], SIZE, mode="bilinear", align_corners=False
    )
    assert np.allclose(fine.t2m, wanted[0, 0], atol=1e-3)
    later = upsample(lazy, ["t2m"])
    assert isinstance(later.t2m.data, dask.array.Array) and np.array_equal(later.t2m, fine.t2m)
    part = upsample(scene.isel(y=slice(60, 90)), ["t2m"])
    assert np.array_equal(part.t2m, fine.t2m[60:90])
    with pytest.raises(ValueError, match=r"has no \['hh'\] on the 2 km grid; it holds \['btemp_18_7h', 't2m'\]"):
        upsample(scene, ["hh"])


# ---------------------------------------------------------------- what is wrong is said


@pytest.mark.parametrize(
    "name",
    ["nersc_sar_primary", "nersc_sar_secondary", "sar_grid_line", "sar_grid_longitude", "sar_grid_incidenceangle",
     "distance_map", "polygon_icechart", "polygon_codes"],
)  # fmt: skip
def test_missing_variables_are_named(raw, tmp_path, name):
    path = tmp_path / RAW
    raw.drop_vars(name).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=rf"9C47.*lacks \['{name}'\].*it holds"):
        open_ai4arctic(path)


def test_another_file_is_no_scene(tmp_path):
    xr.Dataset({"sea_ice": (("a", "b"), np.ones((3, 3)))}).to_netcdf(tmp_path / READY, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"ready-to-train edition has; it holds \['sea_ice'\]"):
        open_ai4arctic(tmp_path / READY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nersc_sar_secondary": (("a", "b"), np.zeros((200, 249), "f4"))}, "images of one shape.*249"),
        ({"polygon_icechart": (("a", "b"), np.zeros((100, 250)))}, "images of one shape"),
        (
            {"t2m": (("a", "b"), np.zeros((4, 9)))},
            r"nersc_sar_primary, \(200, 250\) px, and t2m, \(4, 9\) cells of 50 px",
        ),
        ({"btemp_18_7h": (("a", "b"), np.zeros((2, 5)))}, "btemp_18_7h"),
        ({"polygon_codes": (("p",), np.array(["a;b"], object))}, "9C47.*row|9C47.*header"),
        ({"polygon_codes": (("p",), np.array([CODES[0], "1;2"], object))}, r"9C47.*row 1 of polygon_codes"),
        ({"sar_grid_latitude": (FLAT, np.full(20, np.nan))}, "sar_grid_latitude.*finite"),
        ({"sar_grid_line": (FLAT, np.arange(20.0))}, "20 lines x 5 samples"),
        ({"nersc_sar_primary": (IMAGE, np.full(SIZE, np.nan, "f4"))}, "9C47.*not one pixel is valid"),
    ],
)
def test_wrong_variables_are_named(raw, tmp_path, change, said):
    path = tmp_path / RAW
    raw.drop_vars(list(change)).assign(change).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=said):
        open_ai4arctic(path)


def test_a_coarse_grid_may_be_short_by_a_cell(raw, tmp_path):
    for shape in ((4, 5), (3, 5), (5, 6)):
        data = raw.drop_vars(["btemp_18_7h", "amsr2_swath_map"]).assign(t2m=(("a", "b"), np.ones(shape)))
        assert open_ai4arctic(put(data, tmp_path / str(shape) / RAW)).t2m.shape == shape


def test_a_whole_scene_needs_its_name(raw, ready, tmp_path):
    for data, name in ((raw, "scene.nc"), (ready, "20190430_cis.nc")):
        with pytest.raises(ValueError, match="no name of an AI4Arctic file"):
            open_ai4arctic(put(data, tmp_path / name))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_ai4arctic(tmp_path / RAW)


@pytest.mark.parametrize("keep", [0, 10, 5_000, 200_000, -1_000])
def test_a_cut_file_is_damage(raw, tmp_path, keep):
    path = put(raw, tmp_path / RAW)
    path.write_bytes(path.read_bytes()[:keep])
    for chunks in (None, 64):
        with pytest.raises(CorruptData, match=r"9C47.*\.nc.*cut or damaged"):
            open_ai4arctic(path, chunks=chunks)


def test_damage_inside_names_the_variable(raw, tmp_path):
    path = put(raw, tmp_path / RAW)
    content = bytearray(path.read_bytes())
    import h5py

    with h5py.File(path) as file:
        chunk = file["nersc_sar_primary"].id.get_chunk_info(0)
    for k in range(chunk.byte_offset + 500, chunk.byte_offset + 600):
        content[k] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CorruptData, match=r"9C47.*variable 'nersc_sar_primary'"):
        open_ai4arctic(path)
    lazy = open_ai4arctic(path, chunks=64)
    with pytest.raises(CorruptData, match=r"9C47.*variable 'nersc_sar_primary'"):
        lazy.hh.compute()


# ---------------------------------------------------------------- by name


def test_the_catalogue_opens_both_editions(raw, ready, tmp_path):
    folder = tmp_path / "both"
    put(raw, folder / "ai4arctic_raw_train_v3" / RAW)
    put(raw, folder / "ai4arctic_raw_test_v3" / RAW_DMI)
    put(ready, folder / "rtt" / READY)
    put(raw, folder / "notes.nc")
    (folder / "truth").mkdir()
    (folder / "truth" / "20190430T101830_cis.nc").write_bytes(b"no AI4Arctic file")
    scenes = open_dataset("ai4arctic_raw", folder)
    assert list(scenes) == ["20180124T194759_dmi", "20190430T101830_cis"]
    first, second = scenes.values()
    assert [s.attrs["part"] for s in (first, second)] == ["test", "train"] and first.attrs[
        "sensor"
    ] == "Sentinel-1B EW GRDM"
    assert isinstance(first.hh.data, np.ndarray) and first.attrs["licence"] == load_entry("ai4arctic_raw").license
    prepared = open_dataset("ai4arctic_rtt", folder)
    assert list(prepared) == ["20190430T101830_cis"] and prepared["20190430T101830_cis"].attrs["spacing_m"] == 80
    assert entry_files(load_entry("ai4arctic_rtt"), folder) == [f"rtt/{READY}"]
    table = check("ai4arctic_raw", folder)
    assert len(table) == 2 and table.ok.all() and set(table.compared_with) == {"recorded now"}
    put(raw, folder / "copy" / RAW)
    with pytest.raises(ValueError, match="is in 2 files"):
        open_dataset("ai4arctic_raw", folder)["20190430T101830_cis"]


def test_the_command_line_knows_them(raw, tmp_path, capsys):
    put(raw, tmp_path / "sarfm-data" / "ai4arctic_raw" / "train" / RAW)
    table = list_table().set_index("name")
    assert table.readable["ai4arctic_raw"] and table.readable["ai4arctic_rtt"]
    assert table.here["ai4arctic_raw"] and not table.here["ai4arctic_rtt"]
    assert "readable: yes" in show_entry("ai4arctic_rtt")
    for command in (["list"], ["show", "ai4arctic_raw"], ["check", "ai4arctic_raw"]):
        assert main(["data", *command]) in (None, 0)
    told = capsys.readouterr().out
    assert "ai4arctic_raw" in told and "thick first-year ice" in told and RAW[:40] in told


def test_nothing_there_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="DTU Data"):
        open_dataset("ai4arctic_raw", tmp_path)


# ---------------------------------------------------------------- real data that is not shipped


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("chunks", [None, 100])
def test_real_patches(shared, number, chunks):
    path = shared / f"sea_ice/ai4arctic_patches/train_{number:02}.nc"
    scene, data = check_scene(open_ai4arctic(path, chunks=chunks)), xr.load_dataset(path, engine="h5netcdf")
    assert scene.attrs["scene"] == path.stem and scene.attrs["part"] == "train" and scene.attrs["spacing_m"] == 80
    assert scene.attrs["edition"] == "ready_to_train" and "clipped to -2…1" in scene.attrs["note"]
    assert scene.hh.attrs["units"] == "dB" and label_names(scene) == ["ice"] and "gcp_row" not in scene.coords
    assert np.array_equal(scene.ice, data.ICE_BINARY)
    seen = scene.valid.values
    assert np.array_equal(seen, ((data.nersc_sar_primary != 0) & (data.nersc_sar_secondary != 0)).values)
    assert np.allclose(scene.hh.values[seen], data.nersc_sar_primary.values[seen] * 5.6597 - 14.5083, atol=1e-3)
    assert -26 < float(scene.hh.min()) and float(scene.hh.max()) < -8.8 and "CC BY" in scene.attrs["licence"]


@pytest.mark.parametrize("chunks", [None, 100])
def test_real_scene_of_low_resolution(shared, chunks):
    path = shared / "sea_ice/ai4arctic_scene_lowres/20180607T184326_dmi_lowres.nc"
    scene, data = check_scene(open_ai4arctic(path, chunks=chunks)), xr.load_dataset(path, engine="h5netcdf")
    assert scene.hh.attrs["units"] == "1" and scene.hh.attrs["quantity"] == "digital_number"
    assert "no backscatter" in scene.attrs["note"] and scene.attrs["edition"] == "display"
    assert scene.attrs["scene"] == "20180607T184326_dmi" and scene.attrs["spacing_m"] == 1250.0
    assert np.array_equal(scene.hv, data.nersc_sar_secondary, equal_nan=True) and "incidence_angle" not in scene
    for name, chart in CHARTS.items():
        assert np.array_equal(scene[name], data[chart.variable])
    assert 0.4 < float(scene.valid.mean()) < 0.5
