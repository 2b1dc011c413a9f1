"""Stand-in scenes and files: the same for a seed, charts true to the pixels, read back as they were written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from patience import PATIENCE_S

from sarfm.datasets.catalog import entry_files, fetch, open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.ice import simulated_files as standin_files
from sarfm.ice.ai4arctic import open_ai4arctic, parse_name
from sarfm.ice.charts import CHARTS, classify, draw_charts, parse_codes
from sarfm.ice.sea_ice import simulate_ice
from sarfm.ice.simulated import AMSR2, ERA5, HEADER, REGIMES, draw_polygons, egg_code, season_of, simulate_region
from sarfm.ice.simulated_files import halve, standin_name, write_raw, write_ready, write_standins
from sarfm.io.files import carried
from sarfm.scenes.scene import check_scene, label_names

SEASONS = {"winter": "2019-03-15T10:18:30", "melt": "2020-08-01T00:00:00", "freeze-up": "2021-10-31T23:59:30"}


@pytest.fixture(scope="module", params=SEASONS)
def drawn(request):
    """Draw a scene of each season and its polygons."""
    seed = 3 + list(SEASONS).index(request.param)
    scene = simulate_region((420, 530), seed, time=SEASONS[request.param], service="cis", place=(-95.0, 74.0))
    return scene, *draw_polygons(scene, seed)


# ---- the same for a seed -------------------------------------------------------------------------------------------


def test_the_simulator_of_ice_draws_what_it_always_drew():
    ice = simulate_ice((120, 90), seed=2, open_water=0.3, concentration=0.6)
    truth = ice.ice_class.values.tobytes() + ice.floe.values.tobytes()
    assert hashlib.sha256(truth).hexdigest()[:16] == "877ec5ed122af898"
    assert np.allclose(
        ice.hh.values[::40, ::30],
        [[-15.5031, -19.7521, -16.9354], [-18.2027, -18.66, -9.4368], [-18.4866, -16.1316, -15.4465]],
        atol=1e-3,
    )
    assert np.allclose(ice.hv.values[::60, ::45], [[-27.6267, -25.7143], [-26.896, -29.2182]], atol=1e-3)


def test_a_seed_gives_the_same_scene_and_polygons_and_another_seed_other_ones():
    first, again, other = (simulate_region((150, 120), seed=s) for s in (1, 1, 2))
    for name in first.variables:
        assert first[name].to_numpy().tobytes() == again[name].to_numpy().tobytes(), name
    assert first.attrs == again.attrs and not first.sod.equals(other.sod)
    polygons, codes = draw_polygons(first, 4)
    assert codes == draw_polygons(again, 4)[1] and np.array_equal(polygons, draw_polygons(again, 4)[0], equal_nan=True)


# ---- the scene -----------------------------------------------------------------------------------------------------


def test_scene_keeps_the_contract_and_says_that_it_is_simulated(drawn):
    scene = check_scene(drawn[0])
    assert label_names(scene) == ["sic", "sod", "floe"] and scene.lead.dtype == bool
    assert scene.attrs["simulated"].startswith("yes") and "simulated" in scene.attrs["sensor"]
    assert scene.attrs["spacing_m"] == 40 and scene.attrs["scene"].endswith("_cis")
    land = scene.sod.values == 255
    assert np.isnan(scene.hh.values[land]).all() and (scene.valid.values == ~land).all() and land.any()
    assert (scene.distance_map.values == 0)[land].all() and (scene.distance_map.values >= 1)[~land].all()
    for name in (*AMSR2, *ERA5):
        assert scene[name].shape == (9, 11) and np.isfinite(scene[name]).all()
    assert ((scene.btemp_6_9h > 70) & (scene.btemp_6_9h < 270)).all() and ((scene.t2m > 230) & (scene.t2m < 290)).all()


def test_truths_agree_with_each_other(drawn):
    scene = drawn[0]
    sea = scene.valid.values
    sod, floe, sic = (scene[n].values[sea] for n in ("sod", "floe", "sic"))
    assert ((floe == 0) == (sod == 0)).all() and set(np.unique(floe)) <= {0, 2, 3, 4, 5, 255} and sic.max() <= 10
    assert np.isin(sod[scene.lead.values[sea]], (0, 1)).all(), "a lead is water or new ice"
    assert abs(sic.mean() / 10 - (sod > 0).mean()) < 0.03
    if season_of(scene.attrs["time"]) == "melt":
        assert not (sod == 1).any() or "new ice" in scene.attrs["regimes"] or (sod == 1).mean() < 0.05


def test_incidence_angle_and_place():
    scene = simulate_region((100, 400), seed=1, place=(20.0, 89.995), heading_deg=190, incidence_deg=30.0, land=0)
    assert abs(float(scene.incidence_angle.mean()) - 30) < 1e-3 and float(scene.incidence_angle[0].diff("x").min()) > 0
    lon, lat = scene.sar.lonlat()
    assert lat.max() > 89.9 and np.ptp(np.asarray(lon)) > 180, "the pole is inside"
    assert abs(scene.sar.spacing_m - 40) < 0.4
    assert scene.valid.all() and (scene.distance_map == 41).all()


def test_all_regimes_and_seasons_occur():
    names = set()
    for k, time in enumerate(SEASONS.values()):
        names |= set(
            json.loads(simulate_region((500, 500), seed=k, time=time, region_m=3000).attrs["regimes"]).values()
        )
    assert names >= {r.name for r in REGIMES}
    assert [season_of(f"2020-{m:02d}-01") for m in (1, 5, 6, 9, 10, 11, 12)] == ["winter"] * 2 + ["melt"] * 2 + [
        "freeze-up"
    ] * 2 + ["winter"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"shape": (50, 900)}, "at least 100"), ({"land": 1.5}, "land in"), ({"service": "nsidc"}, "'cis' or 'dmi'")],
)
def test_what_cannot_be_drawn_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        simulate_region(**({"shape": (100, 100)} | wrong))


# ---- polygons ------------------------------------------------------------------------------------------------------


def test_polygons_cover_the_sea_with_ids_of_the_table(drawn):
    scene, polygons, codes = drawn
    assert polygons.dtype == np.float32 and (np.isnan(polygons) == ~scene.valid.values).all() and codes[0] == HEADER
    ids = [int(line.split(";")[0]) for line in codes[1:]]
    assert set(np.unique(polygons[~np.isnan(polygons)])) == set(ids) and len(set(ids)) == len(ids)
    assert all(len(line.split(";")) == 15 for line in codes)


def test_charts_hold_what_lies_in_the_polygons(drawn):
    scene, polygons, codes = drawn
    sod = scene.sod.values
    table, classes = parse_codes(codes), classify(parse_codes(codes))
    for number in table.index:
        inside = polygons == number
        assert abs(classes.sic[number] - 10 * (sod[inside] > 0).mean()) <= 0.51
        parts = [c for c in table.loc[number, ["CA", "CB", "CC"]] if c != -9]
        tenths = {91: 10, 92: 10}
        if parts:
            assert sum(tenths.get(c, c // 10) for c in parts) == classes.sic[number]
        if classes.sod[number] not in (0, 255):
            share = (sod[inside] == classes.sod[number]).sum() / (sod[inside] > 0).sum()
            assert share > 0.5, "a dominant stage covers more than half of the ice"
    charts = draw_charts(polygons, classes)
    assert charts["sic"].shape == sod.shape and all((charts[n][~scene.valid.values] == 255).all() for n in CHARTS)


def test_mixed_unknown_and_fast_polygons_occur():
    lines = []
    for seed, time in enumerate(list(SEASONS.values()) * 2):
        lines += draw_polygons(simulate_region((400, 400), seed, time=time, region_m=5000), seed)[1][1:]
    classes = classify(
        parse_codes([HEADER, *(";".join([str(k), *line.split(";")[1:]]) for k, line in enumerate(lines))])
    )
    fields = [line.split(";") for line in lines]
    assert (
        any(f[4] == "8" for f in fields) and any("99" in f[1:11] for f in fields) and any(f[2] == "-9" for f in fields)
    )
    assert any(f[8] != "-9" for f in fields) and {f[-1] for f in fields} == {"I", "W"}
    assert (classes.sod == 255).any() and set(classes.sod) >= {0, 1, 2, 3, 4, 5} and (classes.floe == 255).any()


def test_egg_codes_of_counts():
    counts, draw = np.zeros((6, 7), int), np.random.default_rng(1)
    counts[0, 0] = 100
    assert egg_code(1, counts, False, draw) == "1;0;" + "-9;" * 12 + "W"
    counts[5, 5] = 300
    field = egg_code(2, counts, False, draw).split(";")
    assert (
        field[:3] == ["2", "80", "-9"]
        and field[3] in ("95", "96", "97")
        and field[4] == "6"
        and field[5:14] == ["-9"] * 9
    )
    counts[0, 0], counts[3, 3] = 0, 100
    field = egg_code(3, counts, True, draw).split(";")
    assert field[1] == "92" and {field[4], field[7]} <= {"8", "99"} and int(field[2]) + int(field[5]) == 100


# ---- files ---------------------------------------------------------------------------------------------------------


def test_raw_files_have_the_names_dimensions_and_types_of_ai4arctic(drawn, tmp_path):
    scene, polygons, codes = drawn
    path = write_raw(scene, polygons, codes, tmp_path / standin_name(scene))
    assert path.name[17:32] + "_" + path.name[77:80] == scene.attrs["scene"] == parse_name(path).scene
    with xr.open_dataset(path, engine="h5netcdf") as file:
        assert (
            file.nersc_sar_primary.dims == ("sar_lines", "sar_samples") and file.nersc_sar_primary.dtype == np.float32
        )
        assert file.polygon_icechart.shape == (420, 530) and file.polygon_codes.values[0] == HEADER
        ties = [file[f"sar_grid_{n}"] for n in ("line", "sample", "latitude", "longitude", "incidenceangle", "height")]
        assert all(t.shape == (441,) for t in ties) and int(ties[0].max()) == 419 and int(ties[1].max()) == 529
        assert all(file[n].dims == ("2km_grid_lines", "2km_grid_samples") for n in (*AMSR2, *ERA5))
        assert {"distance_map", "amsr2_swath_map", "swath_segmentation"} <= set(file.variables)
        assert file.attrs["simulated"].startswith("yes") and file.attrs["pixel_spacing"] == "40 m"


def test_raw_files_read_back_equal(drawn, tmp_path):
    scene, polygons, codes = drawn
    read = open_ai4arctic(write_raw(scene, polygons, codes, tmp_path / standin_name(scene)))
    for name in ("hh", "hv", "valid", "distance_map", *AMSR2, *ERA5):
        assert np.array_equal(read[name], scene[name], equal_nan=True), name
    assert np.allclose(read.incidence_angle, scene.incidence_angle, atol=1e-3)
    charts = draw_charts(polygons, classify(parse_codes(codes)))
    assert all(np.array_equal(read[name], charts[name]) for name in CHARTS)
    assert all(np.allclose(a, b, atol=1e-9) for a, b in zip(read.sar.lonlat(), scene.sar.lonlat(), strict=True))
    assert {k: read.attrs[k] for k in ("scene", "service", "time", "spacing_m")} == {
        k: scene.attrs[k] for k in ("scene", "service", "time", "spacing_m")
    }


def test_ready_files_read_back_equal(drawn, tmp_path):
    scene, polygons, codes = drawn
    path = write_ready(scene, polygons, codes, tmp_path / standin_name(scene, "ready"))
    with xr.open_dataset(path, engine="h5netcdf") as file:
        assert np.isfinite(file.nersc_sar_primary).all() and file.SOD.dtype == np.uint8
        assert file.SOD.attrs["chart_fill_value"] == 255 and file.nersc_sar_primary.attrs["variable_fill_value"] == 0
        assert file.attrs["chart_fill_value"] == 255 and file.sar_grid2d_latitude.shape == (21, 21)
    read = open_ai4arctic(path)
    assert path.name == scene.attrs["scene"] + "_prep.nc" and read.attrs["spacing_m"] == 80
    assert np.allclose(read.hh, halve(scene.hh.values), atol=1e-4, equal_nan=True)
    assert np.allclose(read.incidence_angle, halve(scene.incidence_angle.values), atol=1e-3)
    assert all(np.allclose(read[n], scene[n], atol=1e-3) for n in (*AMSR2, *ERA5))
    charts = draw_charts(polygons, classify(parse_codes(codes), 0.65, 0.65))
    assert all(np.array_equal(read[n], halve(charts[n], "max")) for n in CHARTS)
    middle = scene.sar.lonlat()[1][200:202, 300:302].mean()
    assert abs(read.sar.lonlat()[1][100, 150] - middle) < 3e-4


def test_halve():
    image = np.array([[1.0, 3, 9], [5, 7, 9], [0, 0, 0]])
    assert halve(image).tolist() == [[4.0]] and halve(image, "max").tolist() == [[7.0]]
    assert np.isnan(halve(np.array([[np.nan, 1], [1, 1]]))).all()


def test_a_failed_write_leaves_nothing(drawn, tmp_path, monkeypatch):
    scene, polygons, codes = drawn
    monkeypatch.setattr(xr.Dataset, "to_netcdf", lambda self, path, **_: Path(path).touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_raw(scene, polygons, codes, tmp_path / "a.nc")
    assert not list(tmp_path.iterdir())


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_continued_where_it_stopped(tmp_path, monkeypatch):
    whole = write_standins(tmp_path / "a", 3, 2, 120, editions=("raw", "ready"), progress=False)
    assert [p.parent.name for p in whole[::2]] == ["ai4arctic_raw_train_v3"] * 3 + ["ai4arctic_raw_test_v3"] * 2
    assert {open_ai4arctic(p).attrs["part"] for p in whole[:6]} == {"train"}
    assert {open_ai4arctic(p).attrs["part"] for p in whole[6:]} == {"test"}
    made, stamps = [], {p: p.stat().st_mtime_ns for p in whole}
    whole[2].unlink()
    simulate = standin_files.simulate_region
    monkeypatch.setattr(standin_files, "simulate_region", lambda **k: made.append(k) or simulate(**k))
    assert write_standins(tmp_path / "a", 3, 2, 120, editions=("raw", "ready"), progress=False) == whole
    assert len(made) == 1 and [p for p in whole if p.stat().st_mtime_ns == stamps[p]] == whole[:2] + whole[4:]
    more = write_standins(tmp_path / "a", 4, 2, 120, editions=("raw", "ready"), progress=False)
    assert set(whole) < set(more) and len(made) == 2
    truth = sorted((tmp_path / "a/truth").glob("*.nc"))
    assert len(truth) == 6 and truth[0].stem in {open_ai4arctic(p).attrs["scene"] for p in more}
    with xr.open_dataset(truth[0]) as known:
        assert {n: known[n].dtype for n in known.data_vars} == dict.fromkeys(("sic", "sod", "floe", "lead"), np.uint8)
        assert known.sod.dims == ("y", "x") and known.sod.shape == (120, 120)


def test_processes_make_the_same_files(tmp_path):
    one = write_standins(tmp_path / "one", 2, 1, 110, progress=False)
    two = write_standins(tmp_path / "two", 2, 1, 110, jobs=2, progress=False)
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name and open_ai4arctic(a).drop_attrs().equals(open_ai4arctic(b).drop_attrs())


def test_folders_spread_over_years_services_and_places():
    asked = [standin_files.standin_request(standin_files.Standin("", "train", k, 500, 0, ())) for k in range(24)]
    assert {r["service"] for r in asked} == {"cis", "dmi"} and {season_of(r["time"]) for r in asked} == set(SEASONS)
    assert len({r["time"] for r in asked}) == len({r["seed"] for r in asked}) == 24
    assert {r["time"][:4] for r in asked} == {"2018", "2019", "2020", "2021"} and standin_files.POLE in [
        r["place"] for r in asked
    ]


@pytest.mark.parametrize("wrong", [{"editions": ("rtt",)}, {"editions": ()}, {"jobs": 0}, {"train": -1}])
def test_wrong_folders_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        write_standins(tmp_path, **wrong, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_parameters_is_not_mixed(tmp_path):
    write_standins(tmp_path, 1, 0, 100, progress=False)
    with pytest.raises(ValueError, match="Choose another folder"):
        write_standins(tmp_path, 1, 0, 110, progress=False)


def test_renamed_files_open_by_the_name_that_they_state_or_say_why_not(tmp_path):
    raw, ready = write_standins(tmp_path / "made", 1, 0, 120, editions=("raw", "ready"), progress=False)
    whole = open_ai4arctic(ready)
    (tmp_path / "own").mkdir()
    ready.rename(tmp_path / "own/mine.nc")
    entry = {"id": "own", "title": "Own", "read": {"reader": "ai4arctic", "scenes": "{scene}.nc"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(entry))
    scene = open_dataset(tmp_path / "own.yaml", tmp_path / "own")["mine"]
    assert np.array_equal(scene.hh, whole.hh, equal_nan=True) and scene.attrs["time"] == whole.attrs["time"]
    with xr.open_dataset(raw) as data:
        data.load().drop_attrs(deep=False).to_netcdf(tmp_path / "own/other.nc")
    with pytest.raises(ValueError, match=r"other\.nc is no name of an AI4Arctic file"):
        open_dataset(tmp_path / "own.yaml", tmp_path / "own")["other"]
    raw.rename(tmp_path / "own" / raw.name)
    with pytest.warns(UserWarning, match=r"'mine', 'other'.*left out"):
        assert len(open_dataset(tmp_path / "own.yaml", tmp_path / "own")) == 1


# ---- as a data set -------------------------------------------------------------------------------------------------

FEW = {"with": "ai4arctic", "scenes": 3, "test": 1, "side_px": 100, "seed": 4}


def simulated_entry(path, **change):
    """Write the entry of the simulated data set with fewer scenes."""
    entry = yaml.safe_load((carried("data_catalogs") / "ai4arctic_simulated.yaml").read_text())
    path.write_text(yaml.safe_dump(entry | {"simulate": FEW | change}))
    return path


def test_the_data_set_has_the_numbers_of_the_small_sweeps():
    made = load_entry("ai4arctic_simulated").simulate
    assert made.simulator == "ai4arctic" and made.arguments == {"scenes": 60, "test": 12, "side_px": 1000, "seed": 0}


def test_a_simulated_data_set_is_made_when_it_is_opened(tmp_path):
    entry = simulated_entry(tmp_path / "few.yaml")
    scenes = open_dataset(entry, tmp_path / "made")
    direct = write_standins(tmp_path / "direct", 2, 1, 100, seed=4, progress=False)
    for path in direct:  # bit for bit
        assert (tmp_path / "made" / path.relative_to(tmp_path / "direct")).read_bytes() == path.read_bytes()
    assert len(scenes) == 3 and entry_files(scenes.entry, tmp_path / "made") == sorted(
        p.relative_to(tmp_path / "direct").as_posix() for p in direct
    )
    for scene in scenes.values():
        known = xr.open_dataset(tmp_path / f"direct/truth/{scene.attrs['scene']}.nc")
        assert all(np.array_equal(scene[f"true_{n}"], known[n]) for n in ("sic", "sod", "floe", "lead"))
        assert scene.sar.targets["true_sod"].names[1] == "new ice" and "Nothing" not in scene.attrs["title"]
    with pytest.raises(ValueError, match="was made with .*choose another folder"):
        open_dataset(simulated_entry(tmp_path / "other.yaml", seed=5), tmp_path / "made")
    with pytest.raises(ValueError, match="the simulator takes .*side_px"):
        fetch(simulated_entry(tmp_path / "wrong.yaml", side=5), tmp_path / "wrong", progress=False)


def test_an_interrupted_simulation_is_continued(tmp_path, monkeypatch):
    entry, simulate, made = simulated_entry(tmp_path / "few.yaml"), standin_files.simulate_region, []

    def until_killed(**request):
        made.append(request)
        if len(made) == 2:
            raise KeyboardInterrupt
        return simulate(**request)

    monkeypatch.setattr(standin_files, "simulate_region", until_killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(entry, tmp_path / "made", progress=False)
    assert not (tmp_path / "made/simulated.json").exists()
    fetch(entry, tmp_path / "made", progress=False)
    assert len(made) == 4, "one before, the one that was cut off, and the two that were left"
    open_dataset(entry, tmp_path / "made")
    assert len(made) == 4


def test_two_runs_at_once_make_the_files_once(tmp_path):
    entry = simulated_entry(tmp_path / "few.yaml")
    code = (
        "import sys, sarfm.ice.simulated_files as s; from sarfm.datasets.catalog import open_dataset; real = s.simulate_region\n"
        "def counted(**k): print('made'); return real(**k)\n"
        "s.simulate_region = counted; print(len(open_dataset(sys.argv[1], sys.argv[2])), 'scenes')"
    )
    command = [sys.executable, "-c", code, str(entry), str(tmp_path / "made")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE_S)[0].splitlines() for process in both]
    assert sorted(lines.count("made") for lines in said) == [0, 3] and all(lines[-1] == "3 scenes" for lines in said)
