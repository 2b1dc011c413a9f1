"""Channels and targets: units by quantity, codes to class numbers, attributes and back."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import xarray as xr

from sarfm.scenes.channels import (
    QUANTITIES,
    Channel,
    Target,
    channels_of,
    find_channels,
    stack_channels,
    tags_present,
    targets_of,
)


@pytest.mark.parametrize("quantity, units", [(q, u) for q, us in QUANTITIES.items() for u in us])
def test_every_quantity_has_its_units(quantity, units):
    channel = Channel("a", units, quantity, 3)
    assert str(channel) == "a@3" and channel.decibels == ("dB" in QUANTITIES[quantity])


@pytest.mark.parametrize(
    "units, quantity, says",
    [("dB", "coherence", "'1' for coherence"), ("1", "elevation", "'m' for elevation"), ("dB", "x", "expected one of")],
)
def test_a_unit_that_its_quantity_has_not_is_refused(units, quantity, says):
    with pytest.raises(ValueError, match=says):
        Channel("a", units, quantity)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32])
def test_class_numbers_agree_with_a_table(dtype):
    codes = [90, 10, 50, 40]  # in no order
    target = Target("c", "classes", classes={c: f"n{c}" for c in codes})
    values = np.random.default_rng(0).choice([0, 10, 20, 40, 50, 90, 100], (40, 30)).astype(dtype)
    expected = np.array([[codes.index(v) if v in codes else 255 for v in row] for row in values.astype(int)])
    found = target.encode(values)
    assert found.dtype == np.uint8 and (found == expected).all() and target.size == 4
    assert target.names == ["n90", "n10", "n50", "n40"]


def test_codes_that_are_missing_or_no_codes():
    target = Target("c", "classes", of="tile", classes={-1: "a", 300: "b"})
    assert target.encode(np.array([np.nan, -1.0, 300.0])).tolist() == [255, 0, 1]
    assert target.encode(300).shape == () and int(target.encode(300)) == 1
    with pytest.raises(ValueError, match="nearest neighbour"):
        target.encode([0.5])


def test_a_number_outside_its_limits_is_unknown():
    found = Target("t", "number", units="%", limits=(0, 100)).encode(np.array([-1, 0, 100, 101, np.nan, np.inf]))
    assert found.dtype == np.float32 and np.isnan(found).tolist() == [True, False, False, True, True, True]
    assert Target("t", "number").encode([-1e9, 7]).tolist() == [-1e9, 7]


def test_tags():
    target = Target("t", "tags", of="tile", classes={5: "a b", 7: "c", 9: "d"})
    assert tags_present(target, ["d", 5]).tolist() == [1, 0, 1] and tags_present(target, []).tolist() == [0, 0, 0]
    assert target.encode([[1, 0, 255], [0, 0, 1]]).dtype == np.uint8
    for wrong in ([1, 0], [2, 0, 0], 1):
        with pytest.raises(ValueError, match="tags_present"):
            target.encode(wrong)
    with pytest.raises(ValueError, match=r"no tag \['e'\]"):
        tags_present(target, ["e"])


TARGETS = [
    Target("a", "classes", classes={1: "open water", 9: "ice"}, colors={1: "#0000ff", 9: "#ffffff"}),
    Target("b", "classes", of="tile", classes={-5: "x", 700: "y"}),
    Target("c", "number", units="%", limits=(0, 100)),
    Target("d", "number", of="tile"),
    Target("e", "tags", of="tile", classes={0: "dry", 1: "flooded"}),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_attributes_and_json_bring_a_target_back(target, tmp_path):
    assert Target.from_attrs(target.name, target.attrs()) == target
    assert Target(**json.loads(json.dumps(asdict(target)))) == target
    shape = {"pixel": (2, 2), "tile": ()}[target.of] if target.kind != "tags" else (2,)
    dims = {(2, 2): ("y", "x"), (2,): ("tag",), (): ()}[shape]
    scene = xr.Dataset({target.name: xr.DataArray(np.ones(shape, np.uint8), dims=dims, attrs=target.attrs())})
    scene.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    with xr.open_dataset(tmp_path / "a.nc", engine="netcdf4", mask_and_scale=False) as back:
        assert targets_of(back) == {target.name: target}


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"kind": "class"}, "expected kind"),
        ({"kind": "classes"}, "1 to 255 codes"),
        ({"kind": "classes", "classes": {i: "c" for i in range(256)}}, "got 256"),
        ({"kind": "number", "classes": {1: "a"}}, "no classes"),
        ({"kind": "tags", "classes": {1: "a"}}, "tags: 'tile'"),
        ({"kind": "number", "limits": (1, 1)}, "swap them"),
        ({"kind": "classes", "classes": {1: "a"}, "colors": {2: "#000000"}}, "colors has codes"),
    ],
)
def test_an_impossible_target_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Target("t", **wrong)


def test_flags_without_their_meanings_are_refused():
    with pytest.raises(ValueError, match="flag_meanings"):
        Target.from_attrs("t", {"flag_values": [1, 2], "flag_meanings": "one"})


def seasons():
    rng = np.random.default_rng(1)
    dated = [("vv", "dB", "gamma0"), ("ratio", "dB", "ratio"), ("coh", "1", "coherence")]
    scene = xr.Dataset(coords={"season": ["winter", "spring"]})
    for name, units, quantity in dated:
        values = rng.normal(size=(2, 3, 4)).astype("f4")
        scene[name] = ("season", "y", "x"), values, {"units": units, "quantity": quantity}
    scene["height"] = ("y", "x"), rng.normal(size=(3, 4)).astype("f4"), {"units": "m", "quantity": "elevation"}
    scene["valid"] = ("season", "y", "x"), rng.random((2, 3, 4)) > 0.5
    return scene


def test_channels_date_by_date_and_single_ones_last():
    scene = seasons()
    texts = ["vv@winter", "ratio@winter", "coh@winter", "vv@spring", "ratio@spring", "coh@spring", "height"]
    assert [str(c) for c in channels_of(scene)] == texts
    dated = scene.rename(season="time").assign_coords(time=np.array(["2020-01", "2020-04"], "datetime64[ns]"))
    assert [str(c) for c in channels_of(dated)][:4] == ["vv@0", "ratio@0", "coh@0", "vv@1"]


@pytest.mark.parametrize("lazy", [False, True])
def test_stacked_channels_keep_their_units_and_their_holes(lazy):
    scene = seasons()
    stack = stack_channels(scene.chunk() if lazy else scene, ["coh@spring", "height", "vv@winter"])
    expected = [
        np.where(scene.valid[1], scene.coh[1], np.nan),
        np.where(scene.valid.any("season"), scene.height, np.nan),
        np.where(scene.valid[0], scene.vv[0], np.nan),
    ]
    np.testing.assert_array_equal(stack.values, np.array(expected))
    assert stack.dtype == np.float32 and stack.units.values.tolist() == ["1", "m", "dB"] and stack.attrs == {}
    assert stack_channels(scene, ["vv@winter", "vv@spring"]).attrs == {"units": "dB", "quantity": "gamma0"}


def test_a_channel_in_another_unit_is_not_the_one_wanted():
    scene = seasons()
    held = find_channels(scene)
    assert find_channels(scene, held[::-1]) == held[::-1]
    with pytest.raises(ValueError, match="convert one of them"):
        find_channels(scene, [Channel("vv", "1", "gamma0", "winter")])
    with pytest.raises(ValueError, match=r"has no 'vv', 'hh@winter'; it holds \['vv@winter'"):
        find_channels(scene, ["vv", "hh@winter"])
    with pytest.raises(ValueError, match="has no 'channel'"):
        find_channels(scene, [])
