"""Channels state what they are, targets turn what files hold into what losses take."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from sarfm.sar import QUANTITIES as SAR_QUANTITIES
from sarfm.scenes.channels import BACKSCATTER, QUANTITIES, Channel, Target


def test_backscatter_is_what_the_arithmetic_of_sar_knows():
    assert set(BACKSCATTER) == set(SAR_QUANTITIES) and set(BACKSCATTER) < set(QUANTITIES)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_channel_takes_its_quantitys_units_and_no_others(quantity):
    every = {units for options in QUANTITIES.values() for units in options}
    for units in every:
        if units in QUANTITIES[quantity]:
            assert str(Channel("x", units, quantity, at=2)) == "x@2"
        else:
            with pytest.raises(ValueError, match=f"expected units.*{QUANTITIES[quantity][0]}"):
                Channel("x", units, quantity)


@given(
    st.dictionaries(
        st.integers(0, 300), st.text("abc ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=12
    ),
    st.data(),
)
def test_codes_become_class_numbers_in_their_order(classes, data):
    target = Target("t", classes=classes)
    codes = np.array(data.draw(st.lists(st.integers(-5, 400), min_size=1)))
    wanted = [sorted(classes).index(c) if c in classes else 255 for c in codes.tolist()]
    assert target.encode(codes).tolist() == wanted and target.encode(codes).dtype == np.uint8


def test_unsigned_and_large_codes_do_not_wrap():
    target = Target("t", classes={10: "a", 200: "b"})
    assert target.encode(np.array([10, 200, 255, 0], np.uint8)).tolist() == [0, 1, 255, 255]
    assert target.encode(np.array([10, 200, 2**40, -1])).tolist() == [0, 1, 255, 255]


def test_numbers_outside_their_limits_are_unknown():
    trees = Target("trees", kind="number", units="%", limits=(0, 100))
    found = trees.encode(np.array([0, 55, 100, 200, 253, -1], np.int16))
    assert found.dtype == np.float32 and np.isnan(found[3:]).all() and found[:3].tolist() == [0, 55, 100]
    assert np.isnan(Target("n", kind="number").encode([np.inf, np.nan])).all()


@pytest.mark.parametrize(
    "target",
    [
        Target("ice", classes={0: "open water", 4: "thin first year ice"}, colors={0: "#000000", 4: "#ffffff"}),
        Target("agb", kind="number", units="Mg/ha", limits=(0, 600)),
        Target("use", kind="tags", of="tile", classes={0: "a", 1: "b"}),
        Target("crop", of="tile", classes={7: "rice"}),
    ],
    ids=lambda t: t.name,
)
def test_attributes_survive_a_file(target, tmp_path):
    xr.Dataset({target.name: ((), 0, target.attrs())}).to_netcdf(tmp_path / "t.nc")
    with xr.open_dataset(tmp_path / "t.nc", decode_cf=False) as data:
        assert Target.from_attrs(target.name, data[target.name].attrs) == target


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "class", "classes": {1: "a"}}, "expected a kind of"),
        ({}, "name each code"),
        ({"classes": {1: "a"}, "colors": {2: "#000000"}}, "all or none"),
        ({"classes": {1: "a"}, "colors": {1: "red"}}, "#rrggbb"),
        ({"kind": "number", "classes": {1: "a"}}, "leave one out"),
        ({"kind": "tags", "classes": {1: "a"}}, "of='tile'"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Target("t", **given)


def test_rounded_floats_are_not_taken_for_codes():
    with pytest.raises(ValueError, match="round or cast"):
        Target("t", classes={1: "a"}).encode(np.array([1.0]))
