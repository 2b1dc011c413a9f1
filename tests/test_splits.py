"""Splits divide places, never patches; label subsets are nested."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from sarfm.data.splits import (
    assert_disjoint,
    label_subset,
    make_split,
    split_by_block,
    split_by_region,
    split_by_scene,
)


def an_index(scenes=1, height=200, width=400, size=64, stride=16):
    """Lay out patches without a store."""
    rows = [
        (s, r, c)
        for s in range(scenes)
        for r in range(0, height - size + 1, stride)
        for c in range(0, width - size + 1, stride)
    ]
    index = pd.DataFrame(rows, columns=["scene", "row", "col"]).assign(height=size, width=size)
    index["scene"] = index["scene"].map("{:04d}".format)
    index.insert(0, "patch", np.arange(len(index)))
    return index


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("gap", [0, 16])
def test_regions_share_no_pixel_and_keep_the_gap(axis, gap):
    index = an_index(scenes=2, height=500, width=500)
    split = split_by_region(index, axis=axis, gap_px=gap)
    start, length = ("col", "width") if axis == "x" else ("row", "height")
    ends = [
        (index[start][split == part].min(), (index[start] + index[length])[split == part].max())
        for part in ("train", "val", "test")
    ]
    assert ends[0][1] + gap <= ends[1][0] and ends[1][1] + gap <= ends[2][0]
    assert set(split) == {"train", "val", "test", ""}
    covered = np.zeros((3, 500), bool)
    for k, part in enumerate(("train", "val", "test")):
        for p in index[split == part].itertuples():
            covered[k, getattr(p, start) : getattr(p, start) + getattr(p, length)] = True
    assert (covered.sum(0) <= 1).all()
    assert_disjoint(index, split)


def test_scenes_stay_whole_and_every_part_has_one():
    for scenes in (3, 4, 10, 33):
        index = an_index(scenes, 64, 128)
        split = split_by_scene(index, seed=1)
        assert (split.groupby(index["scene"]).nunique() == 1).all() and set(split) == {"train", "val", "test"}
        assert split.equals(split_by_scene(index, seed=1))
    assert not split.equals(split_by_scene(index, seed=2))


def test_blocks_are_contiguous_and_dates_stay_together():
    index = an_index(100, 64, 64)
    by_scene = split_by_block(index, blocks=20).to_numpy()
    assert (by_scene[1:] != by_scene[:-1]).sum() <= 19 and set(by_scene) == {"train", "val", "test"}
    dated = pd.concat([index.assign(scene=index["scene"] + f"@{t}") for t in range(2)], ignore_index=True)
    for split in (split_by_block(dated), split_by_scene(dated)):
        place = dated["scene"].str.split("@").str[0]
        assert (split.groupby(place).nunique() == 1).all()


def test_label_subsets_are_nested_and_seeded():
    index, rows = an_index(), np.arange(5, 105)
    subsets = [label_subset(index, rows, f, seed=3) for f in (0.01, 0.1, 0.5, 1.0)]
    assert [len(s) for s in subsets] == [1, 10, 50, 100]
    for small, large in pairwise(subsets):
        assert set(small) <= set(large) <= set(rows)
    assert not np.array_equal(subsets[1], label_subset(index, rows, 0.1, seed=4))
    assert np.array_equal(subsets[1], label_subset(index, rows[::-1], 0.1, seed=3))


def test_overlap_between_parts_is_found():
    index = an_index()
    split = split_by_region(index)
    stray = split.copy()
    stray[index.index[(split == "")][0]] = "val"
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(index, stray)
    dates = pd.concat([index.assign(scene=f"a@{t}") for t in range(2)], ignore_index=True)
    dates["patch"] = np.arange(len(dates))
    leak = pd.Series(np.where(dates["scene"] == "a@0", "train", "test"))
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(dates, leak)


def test_make_split_knows_its_kinds_and_refuses_empty_parts():
    index = an_index(20)
    for kind in ("region", "scene", "block"):
        assert (make_split(index, kind) == "train").any()
    with pytest.raises(ValueError, match="region, scene, block"):
        make_split(index, "random")
    with pytest.raises(ValueError, match=r"no patch for \['val'\]"):
        make_split(an_index(), "region", fractions={"train": 0.65, "val": 0.1, "test": 0.25})
    with pytest.raises(ValueError, match="got 1; split by region"):
        make_split(an_index(), "scene")
    for fractions in ({"train": 0.5}, {"train": 1.2, "val": -0.2}, {"train": 0.5, "holdout": 0.5}):
        with pytest.raises(ValueError, match="sum to 1"):
            make_split(an_index(), "region", fractions=fractions)
    with pytest.raises(ValueError, match="from 1 to the 1 scenes"):
        split_by_block(an_index(), blocks=20)
    with pytest.raises(ValueError, match="fraction"):
        label_subset(an_index(), [1], 0)
    with pytest.raises(ValueError, match="axis is"):
        split_by_region(an_index(), axis="time")
