"""The input contract: statistics of valid training pixels, exact scaling, refusals that say what to convert."""

import numpy as np
import pytest
import torch

from sarfm.patches.contract import InputContract, contract_table, streaming_statistics
from sarfm.patches.prepare import write_store
from sarfm.scenes.open import make_scene


@pytest.fixture(scope="module")
def scene():
    g = np.random.default_rng(0)
    vv = g.normal(-10, 3, (100, 140)).astype(np.float32)
    vv[:30, :50] = np.nan
    vh = g.normal(-17, 2, (100, 140)).astype(np.float32)
    grid = dict(crs="EPSG:32650", transform=(10, 0, 3e5, 0, -10, 1e6))
    return make_scene({"vv": vv, "vh": vh}, units="dB", quantity="gamma0", valid=g.random((100, 140)) < 0.8, **grid)


@pytest.fixture(scope="module")
def store(scene, tmp_path_factory):
    return write_store({"a": scene}, tmp_path_factory.mktemp("s") / "s.zarr", size=32, progress=False)


def pixels(store, rows):
    """Collect the valid pixels (C, n)."""
    return np.concatenate([store.read(r)[:, store.read(r, "valid")] for r in rows], axis=1).astype(np.float64)


@pytest.mark.parametrize("clip", [None, (-20.0, -5.0)])
def test_statistics_are_those_of_the_valid_pixels(store, scene, clip):
    rows = list(range(0, len(store), 2))
    mean, std, count = streaming_statistics(store, rows, clip)
    values = pixels(store, rows) if clip is None else pixels(store, rows).clip(*clip)
    assert np.allclose(mean, values.mean(1), rtol=1e-12) and np.allclose(std, values.std(1), rtol=1e-12)
    assert count == values.shape[1]
    assert streaming_statistics(store, range(len(store)))[2] == int(scene.valid.sum())


def test_statistics_keep_their_digits(tmp_path):
    values = np.random.default_rng(0).normal(20000, 3, (64, 64)).astype(np.float32)
    s = write_store(
        {"a": make_scene({"hh": values}, units="1", quantity="amplitude")}, tmp_path / "s.zarr", size=16, progress=False
    )
    _, std, _ = streaming_statistics(s, range(len(s)))
    assert std[0] == pytest.approx(values.astype(np.float64).std(), rel=1e-12)


def test_normalise_and_back(store):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    image, valid = store.read(1).copy(), store.read(1, "valid")
    scaled = contract.normalise(image, valid)
    assert scaled.dtype == np.float32 and (scaled[:, ~valid] == 0).all() and np.isfinite(scaled).all()
    assert np.allclose(contract.denormalise(scaled)[:, valid], image[:, valid], atol=1e-5)
    batch = torch.from_numpy(np.stack([image, image])), torch.from_numpy(np.stack([valid, valid]))
    assert np.array_equal(contract.normalise(*batch)[1].numpy(), scaled)
    assert contract.normalise(batch[0].double()).dtype == torch.float64
    every = pixels(store, range(len(store)))
    wide = contract.normalise(every[:, None].astype(np.float32))[:, 0]
    assert np.allclose(wide.mean(1), 0, atol=1e-4) and np.allclose(wide.std(1), 1, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [None, (-30.0, 0.0)])
def test_what_is_not_finite_becomes_zero(bad, clip):
    contract = InputContract(
        channels=["vv"], quantity="gamma0", units="dB", clip=clip, mean=[-10], std=[3], patch_size=8
    )
    image = np.full((1, 2, 2), -13, np.float32)
    image[0, 0, 0] = bad
    assert contract.normalise(image).tolist() == [[[0, -1], [-1, -1]]]
    assert contract.normalise(torch.from_numpy(image), torch.ones(2, 2, dtype=bool)).tolist() == [[[0, -1], [-1, -1]]]


def test_apply_is_what_training_saw(store, scene):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    image, valid = contract.apply(scene)
    assert image.dtype == torch.float32 and valid.dtype == torch.bool
    assert np.array_equal(valid.numpy(), scene.valid.to_numpy())
    first = contract.normalise(store.read(0), store.read(0, "valid"))
    assert np.array_equal(image[:, :32, :32].numpy(), first)


def test_json_round_trip_is_exact(store):
    contract = InputContract.fit(store, range(len(store)), patch_size=16, clip=(-30, 5))
    assert InputContract.model_validate_json(contract.model_dump_json()) == contract
    assert contract.spacing_m == pytest.approx(10) and contract.channels == ["vv", "vh"]
    with pytest.raises(ValueError):
        contract.mean = [0, 0]
    with pytest.raises(ValueError, match="extra"):
        InputContract(**contract.model_dump(), colour="red")


WRONG = {
    "units": (lambda s: s.sar.to_power(), r"vv is in '1', the model takes 'dB'; convert with scene\.sar\.to_db\(\)"),
    "quantity": (lambda s: s.assign(vv=s.vv.assign_attrs(quantity="sigma0")), "vv is sigma0, the model takes gamma0"),
    "channels": (lambda s: s.rename(vv="hh", vh="hv"), r"no \['vv', 'vh'\], it holds \['hh', 'hv'\]"),
    "spacing": (
        lambda s: s.isel(y=slice(None, None, 2), x=slice(None, None, 2)),
        "its pixels are 20 m, the model's 10 m",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_check_says_what_to_convert(store, scene, case):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    contract.check(scene)
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        contract.apply(change(scene))


def test_all_problems_are_listed_at_once(store, scene):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    with pytest.raises(ValueError, match="vv is in .*vh is in .*pixels are"):
        contract.check(scene.sar.to_power().isel(y=slice(None, None, 2), x=slice(None, None, 2)))


def test_contracts_that_make_no_sense(store):
    good = dict(channels=["vv"], quantity="gamma0", units="dB", mean=[0.0], std=[1.0], patch_size=8)
    for change in (
        dict(std=[0.0]),
        dict(mean=[float("nan")]),
        dict(mean=[1.0, 2.0]),
        dict(clip=(1, 0)),
        dict(channels=[]),
        dict(patch_size=0),
    ):
        with pytest.raises(ValueError):
            InputContract(**{**good, **change})
    with pytest.raises(ValueError, match="got 0 pixels"):
        InputContract.fit(store, [], patch_size=8)
    with pytest.raises(ValueError, match="dimension -3"):
        InputContract(**good).normalise(np.zeros((2, 4, 4), np.float32))


def two_scales(scene, tmp_path):
    """Cut a scene at 10 and 40 m."""
    return write_store({"a": scene}, tmp_path / "t.zarr", size=16, scales=[1, 4], progress=False)


def test_several_scales_are_accepted_from_the_finest_to_the_coarsest(scene, tmp_path):
    store = two_scales(scene, tmp_path)
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    assert (contract.spacing_m, contract.spacing_max_m) == (pytest.approx(10), pytest.approx(40))
    assert InputContract.model_validate_json(contract.model_dump_json()) == contract
    for looks in (1, 2, 3, 5):
        contract.check(scene.sar.looks(looks))
    with pytest.raises(ValueError, match="its pixels are 60 m, the model's 10 to 40 m"):
        contract.check(scene.sar.looks(6))
    coarse = np.flatnonzero(store.index["factor"] == 4)
    one = InputContract.fit(store, coarse, patch_size=8)
    assert one.spacing_max_m is None
    old = {k: v for k, v in contract.model_dump().items() if k != "spacing_max_m"}
    assert InputContract(**old).spacing_max_m is None  # models of before
    with pytest.raises(ValueError, match="spacing_m <= spacing_max_m"):
        InputContract(**{**contract.model_dump(), "spacing_max_m": 5.0})


def test_published_constants_instead_of_statistics(store):
    contract = InputContract.fit(store, range(len(store)), patch_size=8, mean=[-14.5, -24.7], std=[5.66, 4.75])
    assert contract.mean == [-14.5, -24.7] and contract.std == [5.66, 4.75]
    assert contract.spacing_m == pytest.approx(10) and contract.spacing_max_m is None
    with pytest.raises(ValueError, match="mean and std together"):
        InputContract.fit(store, [0], patch_size=8, mean=[-14.5, -24.7])
    with pytest.raises(ValueError, match="one mean and one std per channel"):
        InputContract.fit(store, [0], patch_size=8, mean=[-14.5], std=[5.66])


def mixed(scene):
    """Put a coherence beside the backscatter."""
    coherence = np.random.default_rng(1).uniform(0, 1, scene["vv"].shape).astype(np.float32)
    stated = {"units": "1", "quantity": "coherence"}
    return scene.assign(coherence=(("y", "x"), coherence, stated))


def test_channels_of_different_units_are_stated_one_by_one(scene, tmp_path):
    store = write_store({"a": mixed(scene)}, tmp_path / "s.zarr", size=32, progress=False)
    clip = [(-20.0, 0.0), None, (0.0, 0.5)]
    contract = InputContract.fit(store, range(len(store)), patch_size=8, clip=clip)
    written = contract.model_dump(mode="json")["channels"]
    assert [(c["variable"], c["units"], c["quantity"]) for c in written] == [
        ("vv", "dB", "gamma0"), ("vh", "dB", "gamma0"), ("coherence", "1", "coherence"),
    ]  # fmt: skip
    assert InputContract.model_validate_json(contract.model_dump_json()) == contract
    values = pixels(store, range(len(store)))
    values = np.stack([values[0].clip(-20, 0), values[1], values[2].clip(0, 0.5)])
    assert np.allclose(contract.mean, values.mean(1)) and np.allclose(contract.std, values.std(1))
    image, valid = contract.apply(mixed(scene))
    assert np.allclose(image[:, valid].numpy().mean(1), 0, atol=1e-4)


def test_adapt_converts_decibels_and_power_and_refuses_the_rest(scene, store):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    power = scene.sar.to_power()
    assert power["vv"].attrs["units"] == "1"
    np.testing.assert_allclose(contract.adapt(power)["vv"], scene["vv"], rtol=1e-5)
    np.testing.assert_array_equal(contract.adapt(scene)["vh"], scene["vh"])
    coarse = contract.model_copy(update={"spacing_m": 2.9 * contract.spacing_m})  # nearest whole factor: 3
    seen = power["vv"].where(power["valid"]).values[:99, :138].reshape(33, 3, 46, 3)
    made = coarse.adapt(power)["vv"].values[:33, :46]
    there = np.isfinite(made)
    assert there.mean() > 0.6
    np.testing.assert_allclose(made[there], 10 * np.log10(np.nanmean(seen, (1, 3)))[there], rtol=1e-4)
    with pytest.raises(ValueError, match="resample or multilook it"):
        coarse.check(scene)
    with pytest.raises(ValueError, match="vv is sigma0, the model takes gamma0"):
        contract.adapt(scene.assign(vv=scene["vv"].assign_attrs(quantity="sigma0")))
    with pytest.raises(ValueError, match="has no"):
        contract.adapt(scene.drop_vars("vh"))


def test_the_product_is_stated_kept_and_compared(scene, tmp_path):
    stated = {"mode": "IW", "processing": "GRD", "licence": "CC-BY-4.0"}
    store = write_store({"a": scene.assign_attrs(stated)}, tmp_path / "p.zarr", size=32, progress=False)
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    again = InputContract.model_validate_json(contract.model_dump_json())
    assert again == contract and {key: getattr(again, key) for key in stated} == stated
    assert (contract_table(contract)[list(stated)] == list(stated.values())).all(axis=None)
    contract.check(scene)  # a scene that says nothing is taken
    with pytest.raises(ValueError, match="its mode is EW, the model's IW; choose a product of that mode"):
        contract.check(scene.assign_attrs(mode="EW"))


def test_a_changed_copy_is_checked_like_any_other(store):
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    assert contract.model_copy(update={"units": "1"}).units == ["1", "1"]
    assert contract.model_copy(update={"channels": ["vv"]}).mean == contract.mean[:1]
    with pytest.raises(ValueError, match="extra|Extra"):
        contract.model_copy(update={"colour": "red"})


def test_seasons_travel_in_columns_of_their_own():
    stated = InputContract(channels=["vv@winter"], units="dB", quantity="sigma0", mean=[-12], std=[4], patch_size=8)
    (channel,) = stated.model_dump(mode="json")["channels"]
    assert (channel["variable"], channel["at"]) == ("vv", "winter") and stated.channels == ["vv@winter"]
