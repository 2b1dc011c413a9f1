"""Seasons of real stacks, held against NumPy alone: which dates, which numbers, which place, how many."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr

from sarfm.land.composites import (
    PUBLISHED_CHANNELS,
    SEASONS,
    dates_of_orbit,
    orbit_directions,
    season_channels,
    season_dates,
    season_of,
    seasonal_composites,
)
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import write_store
from sarfm.scenes.open import make_scene, open_scene, save_scene
from sarfm.scenes.scene import channel_names, channels_of

LAND = Path(__file__).parents[2] / "shared/data/land"


@pytest.fixture(scope="module")
def land() -> Path:
    """Find the real stacks, which are not shipped."""
    if not LAND.is_dir():
        pytest.skip(f"the real stacks are not here ({LAND})")
    return LAND


def stack(days, values=None, **more) -> xr.Dataset:
    """Make a dated Scene of VV and VH, 4 x 5 px."""
    draw = np.random.default_rng(len(days))
    vv = draw.normal(-10, 2, (len(days), 4, 5)).astype("float32") if values is None else values
    place = {"crs": "EPSG:32631", "transform": (10, 0, 5e5, 0, -10, 5.6e6)}
    return make_scene({"vv": vv, "vh": vv - 7}, units="dB", quantity="sigma0", times=days, **{**place, **more})


# ---------------------------------------------------------------- real stacks

BELGIUM = {"winter": ["2020-12", "2021-01", "2021-02"], "spring": ["2021-03", "2021-04", "2021-05"]}
BELGIUM |= {"summer": ["2021-06", "2021-07", "2021-08"], "fall": ["2021-09", "2021-10"]}
FLORIDA = {"winter": ["2017-01", "2017-02"], "spring": ["2017-03", "2017-04", "2017-05"]}
FLORIDA |= {"summer": ["2017-06", "2017-07", "2017-08"], "fall": ["2017-09", "2017-10", "2017-11"]}
REAL = {
    "belgium": ("worldcereal_belgium_monthly/S1_sigma0_{}_monthly.tif", {}, 2021, BELGIUM, 32631, "sigma0"),
    "florida": (
        "nd_florida_monthly/S1_{}_monthly_2017.tif",
        {"units": "dB", "quantity": "intensity"},
        2017,
        FLORIDA,
        3086,
        "intensity",
    ),
    "california": ("opera_rtc_california/137-292325-IW1_{}.tif", {}, "all", {}, 32611, "gamma0"),
}


def opened(land: Path, name: str, **more) -> xr.Dataset:
    """Open a real stack as a user would."""
    pattern, answers = REAL[name][:2]
    return open_scene({p.lower(): land / pattern.format(p) for p in ("VV", "VH")}, **answers, **more)


def by_numpy(
    land: Path, name: str, statistic: str, domain: str
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compose with rasterio and NumPy alone: season to VV, VH and counts."""
    pattern, _, year, _, _, _ = REAL[name]
    with rasterio.open(land / pattern.format("VV")) as vv, rasterio.open(land / pattern.format("VH")) as vh:
        days = [text.replace("-", "") for text in vv.descriptions]  # YYYYMM, and perhaps the day
        images = np.stack([vv.read(), vh.read()]).astype("float64")
    seen = np.isfinite(images).all(0)
    images[:, ~seen] = np.nan
    months = {"winter": (12, 1, 2), "spring": (3, 4, 5), "summer": (6, 7, 8), "fall": (9, 10, 11)}
    out = {}
    for season, of in months.items():
        used = [
            k
            for k, day in enumerate(days)
            if int(day[4:6]) in of and (year == "all" or int(day[:4]) + (day[4:6] == "12") == year)
        ]
        numbers = 10 ** (images[:, used] / 10) if domain == "power" else images[:, used]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = (np.nanmedian if statistic == "median" else np.nanmean)(numbers, axis=1)
        out[season] = (*(10 * np.log10(image) if domain == "power" else image), seen[used].sum(0))
    return out


@pytest.mark.parametrize("domain", ["power", "db"])
@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("name", REAL)
def test_real_stacks_are_composed_as_numpy_does(land, name, statistic, domain):
    _, _, year, _, epsg, quantity = REAL[name]
    seasons = ("winter", "fall") if name == "california" else SEASONS
    scene = opened(land, name)
    cube = seasonal_composites(scene, year=year, orbit="mixed", statistic=statistic, domain=domain, seasons=seasons)
    assert cube.rio.crs.to_epsg() == epsg and (cube.y == scene.y).all() and (cube.x == scene.x).all()
    assert cube.season.values.tolist() == list(seasons)
    assert {cube[p].attrs["units"] for p in ("vv", "vh", "ratio")} == {"dB"}
    assert {cube[p].attrs["quantity"] for p in ("vv", "vh")} == {quantity} and cube.ratio.attrs["quantity"] == "ratio"
    for season, (vv, vh, count) in by_numpy(land, name, statistic, domain).items():
        if season not in seasons:
            assert not count.any()
            continue
        here = cube.sel(season=season)
        np.testing.assert_array_equal(here.observations, count)
        np.testing.assert_array_equal(here.valid, np.isfinite(vv) & np.isfinite(vh))
        for image, expected in ((here.vv, vv), (here.vh, vh), (here.ratio, vv - vh)):
            np.testing.assert_allclose(image, np.where(here.valid, expected, np.nan), atol=2e-4)


@pytest.mark.parametrize("name", ["belgium", "florida"])
def test_real_seasons_hold_the_months_of_their_year(land, name):
    scene, expected = opened(land, name), REAL[name][3]
    dates = season_dates(scene.time.values, REAL[name][2])
    assert {s: [str(t)[:7] for t in scene.time.values[numbers]] for s, numbers in dates.items()} == expected
    with pytest.raises(ValueError, match="year='all'"):
        seasonal_composites(scene, orbit="mixed")


def test_california_has_no_spring_and_says_so(land):
    with pytest.warns(UserWarning, match=r"137-292325-IW1.* no date in spring, summer"):
        cube = seasonal_composites(opened(land, "california"), year="all", orbit="mixed")
    assert not cube.valid.sel(season=["spring", "summer"]).any() and cube.vv.sel(season="spring").isnull().all()
    assert int(cube.observations.max("season").max()) + int(cube.observations.max(("y", "x")).min()) <= 22
    assert cube.observations.max(("y", "x")).sum() == 22


def test_a_lazy_stack_stays_lazy_and_comes_out_equal(land):
    eager = seasonal_composites(opened(land, "belgium"), year=2021, orbit="mixed")
    lazy = seasonal_composites(opened(land, "belgium", chunks=32), year=2021, orbit="mixed")
    assert all(lazy[n].chunks for n in ("vv", "vh", "ratio", "observations", "valid"))
    xr.testing.assert_equal(lazy.compute(), eager)


# ---------------------------------------------------------------- nothing is read early


@pytest.mark.parametrize("chunks", [{"time": 1}, {"time": 5, "y": 2}, {"time": -1, "x": 3}])
def test_nothing_is_computed_before_it_is_asked_for(chunks):
    import dask

    scene = stack([f"2021-{m:02d}-01" for m in range(1, 12)])
    lazy = scene.chunk(chunks)

    def refuse(*_, **__):
        raise AssertionError("computed early")

    with dask.config.set(scheduler=refuse):
        cube = seasonal_composites(lazy, orbit="ascending")
    xr.testing.assert_equal(cube.compute(), seasonal_composites(scene, orbit="ascending"))


def test_a_lazy_season_without_dates_stays_lazy():
    scene = stack(["2021-01-01", "2021-03-01"]).chunk(time=1)
    with pytest.warns(UserWarning, match="summer, fall"):
        cube = seasonal_composites(scene, orbit="ascending")
    assert cube.vv.chunks and cube.sizes["season"] == 4
    assert not cube.compute().valid.sel(season="fall").any()


# ---------------------------------------------------------------- rules


def test_seasons_of_every_month():
    names, years = season_of([f"2019-{m:02d}-15" for m in range(1, 13)])
    assert names.tolist() == ["winter"] * 2 + ["spring"] * 3 + ["summer"] * 3 + ["fall"] * 3 + ["winter"]
    assert years.tolist() == [2019] * 11 + [2020]
    assert season_of(["2020-02-29"])[0].tolist() == ["winter"]


@pytest.mark.parametrize("times", [["before", "after"], ["2020-01-01", None]])
def test_what_is_no_date_is_refused(times):
    with pytest.raises(ValueError, match="expected"):
        season_of(times)


def test_invalid_pixels_never_enter():
    values = np.full((3, 4, 5), -10, "float32")
    values[1] = -20
    values[2, 0, 0] = np.nan
    valid = np.ones((3, 4, 5), bool)
    valid[1, 1, 1] = False
    scene = stack(["2021-06-01", "2021-07-01", "2021-08-01"], values, valid=valid)
    cube = seasonal_composites(scene, orbit="ascending", statistic="mean", seasons=["summer"]).isel(season=0)
    power = lambda *db: 10 * np.log10(np.mean([10 ** (d / 10) for d in db]))
    assert cube.observations.values[0, :2].tolist() == [2, 3] and cube.observations.values[1, 1] == 2
    np.testing.assert_allclose(
        cube.vv.values[[0, 0, 1], [0, 1, 1]], [power(-10, -20), power(-10, -20, -10), -10], atol=1e-5
    )
    assert cube.valid.all()


def test_a_median_of_an_odd_number_is_the_same_on_both_scales_and_of_an_even_one_is_not():
    days = [f"2021-06-{d:02d}" for d in range(1, 6)]
    scene = stack(days)
    both = lambda scene: [
        seasonal_composites(scene, orbit="ascending", seasons=["summer"], domain=d).vv for d in ("power", "db")
    ]
    np.testing.assert_allclose(*both(scene), atol=1e-5)
    power, db = both(scene.isel(time=slice(0, 4)))
    assert (power > db).all()


@pytest.mark.parametrize("units, quantity", [("1", "gamma0"), ("1", "amplitude"), ("dB", "intensity")])
def test_every_stack_comes_out_in_decibels(units, quantity):
    db = np.random.default_rng(0).normal(-10, 2, (3, 4, 5))
    given = {"1": 10 ** (db / (20 if quantity == "amplitude" else 10)), "dB": db}[units]
    days = ["2021-06-01", "2021-07-01", "2021-08-01"]
    scene = make_scene(
        {"hh": given, "hv": given / 2 if units == "1" else given - 6}, units=units, quantity=quantity, times=days
    )
    cube = seasonal_composites(scene, orbit="descending", seasons=["summer"])
    np.testing.assert_allclose(cube.hh[0], np.median(db, 0), atol=1e-4)
    assert cube.hh.attrs["units"] == "dB" and set(cube.data_vars) == {"hh", "hv", "ratio", "observations", "valid"}


def test_digital_numbers_are_refused_in_power():
    scene = make_scene(
        {"vv": np.ones((2, 3, 3))}, units="1", quantity="digital_number", times=["2021-06-01", "2021-07-01"]
    )
    with pytest.raises(ValueError, match="calibrate"):
        seasonal_composites(scene, orbit="ascending", seasons=["summer"])


def test_a_phase_has_no_mean():
    scene = stack(["2021-06-01", "2021-07-01"])
    scene["fringe"] = scene.vv.copy(data=np.zeros_like(scene.vv)).assign_attrs(units="rad", quantity="phase")
    with pytest.raises(ValueError, match="phase"):
        seasonal_composites(scene, orbit="ascending", seasons=["summer"])


def test_what_has_no_date_stays_and_what_has_one_is_composed():
    scene = stack(["2021-06-01", "2021-07-01"])
    scene["height"] = (
        scene.vv[0]
        .drop_vars("time")
        .copy(data=np.full((4, 5), 7, "float32"))
        .assign_attrs(units="m", quantity="elevation")
    )
    scene["angle"] = scene.vv.copy(data=np.full(scene.vv.shape, 40, "float32")).assign_attrs(
        units="degree", quantity="incidence_angle"
    )
    scene["cover"] = (
        ("y", "x"),
        np.ones((4, 5), "uint8"),
        {"flag_values": np.array([1], "uint8"), "flag_meanings": "crops"},
    )
    cube = seasonal_composites(scene, orbit="ascending", seasons=["summer"])
    assert cube.height.dims == ("y", "x") and cube.angle.dims == ("season", "y", "x") and (cube.angle == 40).all()
    assert (cube.cover == 1).all() and [str(c) for c in channels_of(cube)][-1] == "height"
    assert channel_names(cube) == ["vv@summer", "vh@summer", "ratio@summer"]


# ---------------------------------------------------------------- orbits


@pytest.mark.parametrize("name", ["orbit_direction", "orbit_state", "sat:orbit_state"])
@pytest.mark.parametrize(
    "words", [("ascending", "descending"), ("A", "D"), ("ASCENDING", "DESCENDING"), ("asc", "des")]
)
def test_orbits_are_read_however_they_are_written(name, words):
    scene = stack(["2021-06-01", "2021-06-02"]).assign_coords({name: ("time", list(words))})
    assert orbit_directions(scene).tolist() == ["ascending", "descending"]
    assert orbit_directions(stack(["2021-06-01"]).assign_attrs({name: words[1]})).tolist() == ["descending"]


def test_orbits_are_composed_apart_and_never_mixed_silently():
    days = [f"2021-06-{d:02d}" for d in range(1, 5)]
    values = np.repeat([-10, -14, -10, -14], 20).reshape(4, 4, 5).astype("float32")
    scene = stack(days, values).assign_coords(orbit_direction=("time", ["ascending", "descending"] * 2))
    level = lambda orbit: float(seasonal_composites(scene, orbit=orbit, seasons=["summer"], domain="db").vv.mean())
    assert level("ascending") == pytest.approx(-10, abs=1e-5) and level("descending") == pytest.approx(-14, abs=1e-5)
    assert level("mixed") == pytest.approx(-12, abs=1e-5)
    with pytest.raises(ValueError, match=r"'ascending': 2, 'descending': 2"):
        seasonal_composites(scene, seasons=["summer"])
    one = seasonal_composites(scene.isel(time=[0, 2]), seasons=["summer"])
    assert one.attrs["orbit_direction"] == "ascending"


@pytest.mark.parametrize(
    "stated, orbit", [(None, None), (["ascending", ""], "ascending"), (["ascending"] * 2, "descending")]
)
def test_an_unknown_orbit_is_asked_for(stated, orbit):
    scene = stack(["2021-06-01", "2021-06-02"])
    scene = scene if stated is None else scene.assign_coords(orbit_direction=("time", stated))
    with pytest.raises(ValueError, match="orbit"):
        dates_of_orbit(scene, orbit)


@pytest.mark.parametrize(
    "wrong",
    [
        {"statistic": "mode"},
        {"domain": "dB"},
        {"seasons": ["autumn"]},
        {"seasons": []},
        {"seasons": "summer"},
        {"orbit": "up"},
        {"year": 1999},
    ],
)
def test_words_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        seasonal_composites(stack(["2021-06-01"]), **({"orbit": "ascending"} | wrong))


# ---------------------------------------------------------------- files, store, contract


def test_twelve_channels_come_out_of_file_store_and_contract_in_order(tmp_path):
    scene = stack([f"2021-{m:02d}-01" for m in range(1, 12)])
    cube = seasonal_composites(scene, orbit="ascending")
    saved = open_scene(save_scene(cube, tmp_path / "cube.nc"))
    xr.testing.assert_identical(saved.drop_attrs(), cube.drop_attrs())
    assert saved.attrs["season_dates"].startswith("winter: 2021-01-01 2021-02-01; spring: 2021-03-01")
    assert season_channels() == channel_names(saved)
    store = write_store({"cube": saved}, tmp_path / "a.zarr", size=4, progress=False)
    assert store.channel_names == season_channels() and len(store.channels) == 12
    contract = InputContract.fit(store, [0], patch_size=2)
    assert contract.channels == season_channels() and set(contract.quantity) == {"sigma0", "ratio"}
    published = write_store({"cube": saved}, tmp_path / "b.zarr", size=4, channels=PUBLISHED_CHANNELS, progress=False)
    assert published.channel_names == [f"{v}@{s}" for v in ("ratio", "vv", "vh") for s in SEASONS]
    np.testing.assert_array_equal(published.read(0, "image")[4], cube.vv.sel(season="winter")[:, :4])


def test_zero_power_is_no_date_in_either_domain():
    power = np.array([[0, 0], [0.1, 0], [0.2, 0.2]], "float32").reshape(3, 1, 2)
    days = ["2020-12-01", "2020-12-10", "2020-12-20"]
    place = {"crs": "EPSG:32631", "transform": (10, 0, 0, 0, -10, 0)}
    scene = make_scene({"vv": power, "vh": power}, units="1", quantity="sigma0", times=days, **place)
    options = {"year": 2021, "orbit": "mixed", "seasons": ["winter"], "statistic": "mean"}
    for domain, mean in (("power", 10 * np.log10(0.15)), ("db", np.mean(10 * np.log10([0.1, 0.2])))):
        made = seasonal_composites(scene, domain=domain, **options).isel(season=0)
        np.testing.assert_allclose(made["vv"].values, [[mean, 10 * np.log10(0.2)]], atol=1e-5)
        assert made["observations"].values.tolist() == [[2, 1]] and made["valid"].all()
