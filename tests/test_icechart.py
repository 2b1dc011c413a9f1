"""`sarfm.ice.charts`: polygon codes become charts exactly as in the source, quirks included."""

import itertools

import dask.array
import numpy as np
import pandas as pd
import pytest

from sarfm.datasets.entries import load_entry
from sarfm.ice.charts import CHARTS, chart_label, chart_of, classify, draw_charts, parse_codes

HEADER = "id;CT;CA;SA;FA;CB;SB;FB;CC;SC;FC;CN;CD;CF;POLY_TYPE"


def egg(ct, a=(-9, -9, -9), b=(-9, -9, -9), c=(-9, -9, -9), kind="I", number=1):
    """Write one row of the table."""
    return ";".join(map(str, (number, ct, *a, *b, *c, -9, -9, -9, kind)))


def charts(*rows, **options):
    """Classify rows, as lists of sic, sod, floe."""
    return classify(parse_codes([HEADER, *rows]), **options).to_numpy().tolist()


# ---------------------------------------------------------------- tables

SIC = {0: 0, 1: 0, 2: 0, 55: 0, 10: 1, 20: 2, 30: 3, 40: 4, 50: 5, 60: 6, 70: 7, 80: 8, 90: 9, 91: 10, 92: 10}
SOD = {0: 0, 80: 0, 81: 1, 82: 1, 83: 2, 84: 2, 85: 2, 87: 3, 88: 3, 89: 3, 86: 4, 91: 4, 93: 4, 95: 5, 96: 5, 97: 5, 98: 255, 99: 255}  # fmt: skip
FLOE = {0: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 5, 9: 6, 10: 6, 1: 255, 8: 255, 21: 255, 22: 255}


@pytest.mark.parametrize(("code", "expected"), SIC.items())
def test_every_concentration_code(code, expected):
    assert charts(egg(code))[0][0] == expected


@pytest.mark.parametrize(("code", "expected"), SOD.items())
def test_every_stage_code(code, expected):
    assert charts(egg(91, (91, code, 4)))[0] == [10, expected, 3]


@pytest.mark.parametrize(("code", "expected"), FLOE.items())
def test_every_form_code(code, expected):
    assert charts(egg(91, (91, 95, code)))[0] == [10, 5, expected]


def test_tables_are_those_of_the_source():
    assert [CHARTS[n].codes for n in ("sic", "sod", "floe")] == [SIC, SOD, FLOE]
    assert [len(c.classes) for c in CHARTS.values()] == [11, 6, 7]
    assert [c.variable for c in CHARTS.values()] == ["SIC", "SOD", "FLOE"]


@pytest.mark.parametrize("name", ["ai4arctic_raw", "ai4arctic_rtt", "ai4arctic_simulated"])
def test_the_catalogue_states_the_same_classes_and_colours(name):
    entry = load_entry(name)
    assert list(entry.targets)[:3] == list(CHARTS)
    for chart in CHARTS.values():
        assert entry.target(chart.name) == chart.target and len(chart.colors) == len(chart.classes)


# ---------------------------------------------------------------- rules and quirks


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # one kind: CA not filled takes the total
        (egg(80, (-9, 87, 4)), [8, 3, 3]),
        (egg(92, (-9, 91, 5)), [10, 4, 4]),
        # thresholds, >= at the boundary: 7/10 is enough for a stage, 5/10 for a form, 6/10 is not and 4/10 is not
        (egg(91, (70, 95, 5), (30, 84, 4)), [10, 5, 4]),
        (egg(91, (60, 95, 5), (40, 84, 4)), [10, 255, 4]),
        (egg(91, (50, 95, 5), (50, 84, 4)), [10, 255, 4]),
        (egg(91, (40, 95, 5), (40, 84, 4), (20, 81, 3)), [10, 255, 255]),
        (egg(90, (60, 95, 5), (30, 84, 4)), [9, 255, 4]),
        # a = b: medium and thick first-year ice are one class, 3 + 4 of 10
        (egg(91, (30, 93, 5), (40, 91, 4), (30, 84, 3)), [10, 4, 255]),
        # a = c, and b = c (a has 4, b gets 3 + 3 = 6 of 10: no stage, but the form)
        (egg(91, (50, 93, 4), (20, 84, 3), (30, 91, 4)), [10, 4, 3]),
        (egg(91, (40, 95, 5), (30, 84, 4), (30, 85, 4)), [10, 255, 3]),
        (egg(91, (10, 95, 5), (50, 84, 4), (40, 85, 4)), [10, 2, 3]),
        # a = b = c: assigned, so that a gets c's share only: 4 + 2 = 6 of 10 although all ice is of one stage
        (egg(91, (40, 93, 4), (40, 91, 4), (20, 86, 4)), [10, 255, 3]),
        (egg(91, (50, 93, 4), (20, 91, 4), (30, 86, 4)), [10, 4, 3]),
        # not filled never matches
        (egg(91, (60, -9, -9), (40, -9, -9)), [10, 255, 255]),
        # fast ice, and what shares its number, in any of the kinds
        *((egg(92, (91, 91, code)), [10, 4, 255]) for code in (8, 1, 21, 22)),
        (egg(91, (90, 91, 5), (10, 84, 8)), [10, 4, 255]),
        (egg(91, (80, 91, 5), (10, 84, 4), (10, 81, 22)), [10, 4, 255]),
        # unknown and not filled
        (egg(99), [255, 255, 255]),
        (egg(-9), [255, 255, 255]),
        (egg(91, (91, 99, 99)), [10, 255, 255]),
        (egg(91, (91, -9, -9)), [10, 255, 255]),
        # an unknown share is compared as the number it is, 99 tenths, and dominates (as in the source)
        (egg(91, (30, 95, 5), (99, 84, 4)), [10, 2, 3]),
        # codes in no table
        (egg(46, (46, 95, 5)), [255, 5, 4]),
        (egg(5, (-9, 95, 5)), [255, 5, 4]),
        (egg(91, (91, 94, 11)), [10, 255, 255]),
        (egg(91, (91, 3, 91)), [10, 255, 255]),
        # water: by concentration, with any code for the kinds, and by type
        (egg(0), [0, 0, 0]),
        (egg(1, (10, 95, 8)), [0, 0, 0]),
        (egg(55, kind="W"), [0, 0, 0]),
        (egg(91, (91, 95, 5), kind="W"), [0, 0, 0]),
        (egg(99, (99, 99, 99), kind="w"), [0, 0, 0]),
    ],
)
def test_polygons(row, expected):
    assert charts(row)[0] == expected


def test_thresholds_are_parameters():
    row = egg(91, (60, 95, 5), (40, 84, 4))
    assert charts(row, sod_threshold=0.6)[0] == [10, 5, 4] and charts(row, sod_threshold=0.61)[0] == [10, 255, 4]
    assert charts(row, floe_threshold=0.65)[0] == [10, 255, 255]
    assert charts(egg(30, (20, 95, 5), (10, 84, 4)), sod_threshold=0.65)[0] == [3, 5, 4]
    for wrong in ({"sod_threshold": 70}, {"floe_threshold": -0.1}, {"merge": "summed"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            charts(row, **wrong)


def test_shares_can_be_added_instead():
    row = egg(91, (40, 93, 4), (40, 91, 4), (20, 86, 4))
    assert charts(row)[0][1] == 255 and charts(row, merge="added")[0] == [10, 4, 3]
    two = egg(91, (30, 93, 5), (40, 91, 4), (30, 84, 3))
    assert charts(two) == charts(two, merge="added")


def transcribed(fields, kind, sod_threshold, floe_threshold):
    """Follow the specification literally, one polygon at a time."""
    at = lambda table, code: table.get(code, code)
    ct, part = at(SIC, fields[0]), [at(SIC, fields[k]) for k in (1, 4, 7)]
    if ct > 0 and part[0] == -9:
        part[0] = ct
    found = {"sic": ct if fields[0] in SIC else 255}
    if kind.lower() == "w":
        found["sic"] = 0
    tables = (("sod", SOD, (2, 5, 8), sod_threshold, range(6)), ("floe", FLOE, (3, 6, 9), floe_threshold, range(7)))
    for chart, table, places, threshold, classes in tables:
        of = [table.get(fields[k], ("unknown", fields[k]) if fields[k] != -9 else -9) for k in places]
        more = [0, 0, 0]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            if of[i] == of[j] and of[i] != -9:
                more[i] = part[j]
        shares = [p + m for p, m in zip(part, more, strict=True)]
        ratio = np.divide(float(max(shares)), ct) if ct else (np.inf if max(shares) > 0 else -np.inf)
        value = of[shares.index(max(shares))] if ratio * 100 >= threshold * 100 else -9
        if chart == "floe" and 255 in of:
            value = 255
        value = 0 if found["sic"] == 0 else value
        found[chart] = value if value in classes else 255
    return list(found.values())


@pytest.mark.parametrize("seed", range(4))
def test_random_tables_agree_with_the_specification(seed):
    generator = np.random.default_rng(seed)
    draw = lambda codes, odd: generator.choice(odd) if generator.random() < 0.1 else generator.choice(codes)
    odd, rows, expected = [-9, 99, 13, 46, 5, 77], [], []
    thresholds = (0.7, 0.5) if seed % 2 else (0.65, 0.65)
    for number in range(1500):
        fields = [draw(list(SIC), odd)]
        for _ in range(3):
            filled = generator.random() < 0.7
            fields += [draw(list(t), odd) if filled else -9 for t in (SIC, SOD, FLOE)]
        kind = generator.choice(["I", "I", "I", "W", "w", "O"])
        rows.append(egg(fields[0], fields[1:4], fields[4:7], fields[7:10], kind, number))
        expected.append(transcribed(list(map(int, fields)), kind, *thresholds))
    found = charts(*rows, sod_threshold=thresholds[0], floe_threshold=thresholds[1])
    wrong = [(r, f, e) for r, f, e in zip(rows, found, expected, strict=True) if f != e]
    assert not wrong, wrong[:3]


def test_all_small_mixtures_keep_the_quirk():
    for a, b, c in itertools.product(range(1, 9), repeat=3):
        if a + b + c == 10:
            same = egg(91, (10 * a, 93, 4), (10 * b, 91, 4), (10 * c, 86, 4))
            assert charts(same)[0][1] == (4 if max(a + c, b + c, c) >= 7 else 255)
            assert charts(same, merge="added")[0] == [10, 4, 3]


# ---------------------------------------------------------------- the table


def test_rows_as_files_hold_them():
    rows = [HEADER, "33;92;-9;91; 8;-9;-9;-9;-9;-9;-9;-9;-9;-9;I"]
    for given in (rows, np.array(rows), np.array(rows, object), [row.encode() for row in rows]):
        table = parse_codes(given)
        assert table.index.tolist() == [33] and table.FA[33] == 8 and table.poly_type[33] == "I"
    short = parse_codes(
        [HEADER.replace("CN;CD;", ""), "7;91;-9;95;5;-9;-9;-9;-9;-9;-9;x;W"]
    )  # the last two before the type are ignored
    assert short.CT[7] == 91
    assert parse_codes([HEADER]).empty and classify(parse_codes([HEADER])).empty


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "header"),
        (["nothing"], "header"),
        ([egg(91)], "header"),
        ([HEADER, "1;2;3"], r"row 1 .*3 fields"),
        ([HEADER, egg(91), egg("many", number=2)], r"row 2 .*many"),
        ([HEADER, egg(91).replace(";", ",")], "row 1"),
    ],
)
def test_tables_of_wrong_form_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        parse_codes(rows)


# ---------------------------------------------------------------- drawing


def test_drawing_unknown_ids_and_duplicates():
    rows = [egg(91, (91, 95, 5), number=3), egg(50, (50, 84, 4), number=8), egg(30, (30, 81, 3), number=3)]
    classes = classify(parse_codes([HEADER, *rows]))
    polygons = np.array([[3, 8, np.nan], [5, 2.5, -1], [1e9, 0, 3]], np.float32)
    drawn = draw_charts(polygons, classes)
    assert drawn["sic"].tolist() == [[3, 5, 255], [255, 255, 255], [255, 255, 3]], "the last of two rows counts"
    assert drawn["sod"].tolist() == [[1, 2, 255], [255, 255, 255], [255, 255, 1]]
    assert {v.dtype for v in drawn.values()} == {np.dtype(np.uint8)}
    lazy = draw_charts(dask.array.from_array(polygons, chunks=2), classes)
    assert all(isinstance(v, dask.array.Array) and v.dtype == np.uint8 for v in lazy.values())
    assert all(np.array_equal(lazy[n].compute(), drawn[n]) for n in drawn)
    nothing = draw_charts(polygons, classes.iloc[:0])
    assert all((v == 255).all() for v in nothing.values())
    whole = draw_charts(np.array([[3, 8], [4, 3]]), classes)
    assert whole["floe"].tolist() == [[2, 3], [255, 2]]


def test_labels_are_cf_flags():
    for name, chart in CHARTS.items():
        label = chart_label(np.zeros((2, 3), np.uint8), name)
        assert label.dims == ("y", "x") and label.attrs["flag_values"].tolist() == list(chart.classes)
        assert label.attrs["flag_values"].dtype == np.uint8 and 255 not in label.attrs["flag_values"]
        assert (
            len(label.attrs["flag_meanings"].split()) == len(label.attrs["flag_colors"].split()) == len(chart.classes)
        )
    with pytest.raises(ValueError, match="lower case"):
        chart_of("SIC")
    with pytest.raises(ValueError, match="uint8"):
        chart_label(np.zeros((2, 3)), "sic")


def test_classes_are_a_frame_by_polygon():
    frame = classify(parse_codes([HEADER, egg(91, number=12)]))
    assert isinstance(frame, pd.DataFrame) and frame.index.tolist() == [12] and frame.dtypes.eq(np.uint8).all()
    assert frame.columns.tolist() == ["sic", "sod", "floe"]
