"""sarfm.sar: what a reader of the notebook would not want to read."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sarfm import sar


def band(values, units="dB", quantity="sigma0", name="vv"):
    dims = ("time", "y", "x")[-np.ndim(values) :]
    return xr.DataArray(values, dims=dims, name=name, attrs={"units": units, "quantity": quantity})


finite_db = hnp.arrays(
    "float64", hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12), elements=st.floats(-60, 30)
)


@settings(max_examples=50, deadline=None)
@given(finite_db)
def test_round_trips_and_order_of_means(values):
    x = band(values)
    assert np.allclose(sar.to_db(sar.to_power(x)), x) and np.allclose(sar.to_db(sar.to_amplitude(x)), x)
    power_mean, db_mean = float(sar.mean_power(x)), float(x.mean())
    assert power_mean >= db_mean - 1e-9  # Jensen
    assert values.min() - 1e-9 <= power_mean <= values.max() + 1e-9


def test_results_keep_kind_dtype_and_attributes():
    x = band(np.full((4, 4), -12, "float32"))
    for out in (sar.to_power(x), sar.to_db(x), sar.to_amplitude(x), sar.multilook(x, 2), sar.mean_power(x, "x")):
        assert isinstance(out, xr.DataArray) and out.dtype == np.float32 and out.name == "vv"
    assert isinstance(sar.to_power(np.zeros(3), "dB"), np.ndarray)
    assert x.attrs == {"units": "dB", "quantity": "sigma0"}  # the input is never changed
    assert sar.to_power(sar.to_amplitude(x)).attrs["quantity"] == "sigma0"
    assert sar.to_power(band([2.0, 3.0], "1", "amplitude")).attrs["quantity"] == "intensity"
    assert np.allclose(sar.to_power(band([2.0, 3.0], "1", "amplitude")), [4, 9])


def test_nan_stays_nan_and_floor_is_declared():
    power = np.array([np.nan, 0.0, -1.0, 1e-9, 1.0])
    db = sar.to_db(power, units="1")
    assert np.isnan(db[:3]).all() and np.allclose(db[3:], [-90, 0])
    floored = sar.to_db(band(power, "1"), floor_db=-40)
    assert np.isnan(floored[0]) and np.allclose(floored[1:], [-40, -40, -40, 0]) and floored.attrs["floor_db"] == -40
    assert "floor_db" not in sar.to_db(band(power, "1")).attrs and "floor_db" not in sar.to_power(floored).attrs


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sar.to_db(np.ones(2)), sar.UnknownUnit, "units='dB'"),
        (lambda: sar.to_db(band([1.0, 2.0], "sigma nought")), sar.UnknownUnit, "sigma nought"),
        (lambda: sar.to_power(band([1.0, 2.0], "1", "digital_number")), sar.UnknownUnit, "calibrate"),
        (lambda: sar.multilook(band(np.ones((4, 4)), "1", "digital_number"), 2), sar.UnknownUnit, "calibrate"),
        (lambda: sar.to_db(band([1.0, 2.0]), units="1"), sar.MixedUnits, "vv states 'dB'"),
        (
            lambda: sar.backscatter_ratio(band([1.0, 2.0]), band([1.0, 2.0], "1", name="vh")),
            sar.MixedUnits,
            "'vh': '1'",
        ),
        (lambda: sar.speckle((4, 4), -1), ValueError, "looks"),
        (lambda: sar.speckle((4,), 1, 2.0), ValueError, "correlation_px"),
        (lambda: sar.multilook(band(np.ones((4, 4))), 0), ValueError, "block"),
    ],
)
def test_errors_ask_and_say_what_came(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()


def test_multilook_ignores_nan_and_counts_looks():
    values = np.full((5, 7), 4.0)
    values[0, 0] = np.nan
    values[2:4, 2:4] = np.nan
    out = sar.multilook(band(values, "1").assign_attrs(looks=4.4), 2)
    assert out.shape == (2, 3) and out[0, 0] == 4 and np.isnan(out[1, 1]) and out.attrs["looks"] == pytest.approx(17.6)
    assert sar.multilook(band(values, "1"), (1, 7)).shape == (5, 1)
    amplitude = sar.multilook(band([[1.0, 7.0]], "1", "amplitude"), (1, 2))
    assert float(amplitude[0, 0]) == pytest.approx(5.0) and amplitude.attrs["quantity"] == "amplitude"


@pytest.mark.parametrize("looks", [1, 3, 12.5])
@pytest.mark.parametrize("correlation", [0.0, 2.0])
def test_speckle_is_gamma(looks, correlation):
    from scipy import stats

    s = sar.speckle((300, 300), looks, correlation, np.random.default_rng(0))
    pixels = s[::10, ::10].ravel()  # far enough apart to be independent
    assert stats.kstest(pixels, stats.gamma(looks, scale=1 / looks).cdf).pvalue > 0.01
    assert s.dtype == np.float32 and np.isfinite(s).all()


def test_speckle_correlation_length_is_what_was_asked():
    from scipy import special

    s = sar.speckle((512, 512), 1, 4.0, np.random.default_rng(0)).astype("float64")
    gauss = special.ndtri(special.gammainc(1, s))
    lag = np.mean(gauss[:, :-4] * gauss[:, 4:]) / np.mean(gauss**2)
    assert lag == pytest.approx(np.exp(-1), abs=0.04)
    stack = sar.speckle((3, 64, 64), 1, 2.0, np.random.default_rng(0))
    assert abs(np.corrcoef(stack[0].ravel(), stack[1].ravel())[0, 1]) < 0.1  # images are independent


def test_noise_floor_is_exact_in_power_for_any_unit():
    x = band(np.array([-30.0, -20.0]))
    nesz = xr.DataArray([-22.0, -25.0], dims="x")
    for signal in (x, sar.to_power(x), sar.to_amplitude(x)):
        back = sar.remove_noise_floor(sar.add_noise_floor(signal, nesz), nesz)
        assert np.allclose(back, signal) and back.attrs["units"] == signal.attrs["units"]
    below = sar.remove_noise_floor(band([1e-3], "1"), -20.0)
    assert float(below[0]) < 0  # unbiased: negative power is kept


def test_dask_stays_lazy():
    x = band(da.full((64, 64), -12.0, chunks=16, dtype="float32"))
    for out in (
        sar.to_power(x),
        sar.to_db(sar.to_power(x), floor_db=-30),
        sar.multilook(x, 4),
        sar.add_noise_floor(x, -22.0),
    ):
        assert out.chunks is not None and np.isfinite(out.compute()).all()


def test_enl_of_local_windows_skips_what_is_not_observed():
    power = sar.speckle((200, 200), 3, generator=np.random.default_rng(0)).astype("float64")
    power[:50] = np.nan
    enl = sar.equivalent_number_of_looks(power, window=21, units="1")
    assert np.isnan(enl[:30]).all() and np.nanmedian(enl[60:]) == pytest.approx(3, abs=0.2)
    assert sar.equivalent_number_of_looks(power, units="1") == pytest.approx(3, abs=0.15)
    assert np.isnan(
        sar.equivalent_number_of_looks(np.ones((9, 9)), window=3, units="1")
    ).all()  # no variance: no estimate


def test_digital_numbers_become_decibels():
    dn = xr.DataArray(np.array([0, 1, 65535], "uint16"), dims="x", attrs={"quantity": "digital_number"})
    db = sar.db_from_digital_number(dn, quantity="sigma0")
    assert np.isnan(db[0]) and np.allclose(db[1:], [-83, 20 * np.log10(65535) - 83], atol=1e-4)
    assert db.attrs == {"units": "dB", "quantity": "sigma0"} and db.dtype == np.float32
