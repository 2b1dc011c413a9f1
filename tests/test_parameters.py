"""Parameters in groups: what is declared, what is refused before a kernel starts, and what comes back as dataclasses."""

import dataclasses
import subprocess
import sys

import nbformat
import pytest

from sarfm.models.sizes import encoder_size
from sarfm.runs.folders import check_same_run, flatten, nest
from sarfm.runs.parameters import (
    check_parameters,
    class_parameters,
    declared_parameters,
    describe_parameters,
    group_class,
    has_type,
    known_type,
    parse_texts,
    read_namespace,
)
from sarfm.train.steps import Recipe

CELL = """out: str = "runs/toy"  # folder of the run
encoder: Size = "vit-nano"  # size of the encoder
tasks: dict[str, str] = {}  # how targets are learnt, each one of plain | ordered
weights: dict[str, float] = {"sic": 1.0}  # of losses, each >= 0
learn: Recipe = Recipe(steps=7, betas=(0.9, 0.99))  # how it learns
method: str = "mae"  # one that is installed
settings: Settings = {"masking": "block"}  # of the method"""


@pytest.fixture
def toy(tmp_path):
    """A run notebook of groups."""
    return write(tmp_path / "toy.ipynb", CELL)


def write(path, cell):
    """Write a notebook with one cell of parameters."""
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})]), path
    )
    return path


def test_the_fields_of_a_group_are_read_as_python_has_them():
    read = {p.name: p for p in class_parameters(group_class("Recipe"))}
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    assert list(read) == list(fields)
    for name, field in fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert read[name].default == default and has_type(read[name].type, default) and read[name].comment


@pytest.mark.parametrize("group", ["sarfm.groups", "sarfm.methods"])
def test_everything_registered_can_be_given_in_a_run(group):
    from importlib.metadata import entry_points

    for point in entry_points(group=group):
        for p in class_parameters(point):
            assert len(p.comment.split()) >= 2, f"{point.name}.{p.name} says nothing"
            assert known_type(p.type)


def test_the_cell_stands_above_the_class_and_what_is_given_above_both(toy):
    values = check_parameters(toy, {"learn.batch_size": 3, "settings": {"mask_ratio": 0.5}})
    assert values["learn"]["steps"] == 7 and values["learn"]["betas"] == [0.9, 0.99]
    assert values["learn"]["batch_size"] == 3 and values["learn"]["weight_decay"] == Recipe().weight_decay
    assert values["settings"]["masking"] == "block" and values["settings"]["mask_ratio"] == 0.5


def test_a_size_brings_what_is_sensible_and_what_is_said_stands_above_it(toy, tmp_path):
    for size in ("vit-nano", "vit-base", "swin-tiny"):
        values, sensible = check_parameters(toy, {"encoder": size}), encoder_size(size).sensible()
        given = flatten(values)  # a method takes what it knows: the toy's has no head
        assert {name: given[name] for name in sensible if name in given} == {
            n: v for n, v in sensible.items() if n in given
        }
        assert {"learn.rate", "learn.batch_size", "settings.decoder_width"} <= sensible.keys() & given.keys()
    assert check_parameters(toy, {"encoder": "vit-base", "learn.rate": 0.5})["learn"]["rate"] == 0.5
    said = write(tmp_path / "said.ipynb", CELL.replace("steps=7", "steps=7, rate=0.25"))
    assert check_parameters(said, {"encoder": "vit-base"})["learn"]["rate"] == 0.25
    with pytest.raises(ValueError, match="no encoder 'vit-giant'"):
        check_parameters(toy, {"encoder": "vit-giant"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learn.stpes": 1}, "did you mean 'learn.steps'"),
        ({"steps": 1}, "did you mean 'learn.steps'"),
        ({"learn.steps": 0}, ">= 1"),
        ({"learn": {"steps": "9"}}, "learn.steps is of type int"),
        ({"learn": 3}, "no parameter 'learn'"),
        ({"learn.steps": 1, "learn": {"steps": 2}}, "learn.steps is given twice"),
        ({"learn.betas": [0.9]}, "type tuple[float, float]"),
        ({"learn.betas": [0.9, 1.0]}, "in [0, 1)"),
        ({"learn.precision": "16"}, "one of 32-true | bf16-mixed"),
        ({"settings.mask_ratio": 1.0}, "in (0, 1)"),
        ({"settings.encoder": "x"}, "no parameter 'settings.encoder'"),
        ({"method": "mae\nimport os"}, "no method"),
        ({"method": ["mae"]}, "no method"),
        ({"tasks.stage": "sideways"}, "one of plain | ordered"),
        ({"tasks.stage": 1}, "type str"),
        ({"weights.sod": -1.0}, ">= 0"),
        ({"tasks.a.b": "plain"}, "no parameter 'tasks.a.b'"),
        ({"learn.__class__": 1}, "no parameter"),
        ({"learn.steps;import os": 1}, "is not a name"),
        ({"learn": {"steps=1\nimport os": 1}}, "is not a name"),
        ({".steps": 1}, "is not a name"),
        ({"lеarn.steps": 1}, "is not a name"),  # a Cyrillic letter
    ],
)
def test_wrong_fields_are_refused(toy, given, expected):
    with pytest.raises(ValueError) as error:
        check_parameters(toy, given)
    assert expected in str(error.value) and str(error.value).startswith("toy: ")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Recipe(steps=7,", "Recipe(stpes=7,", "Recipe has no stpes"),
        ("Recipe(steps=7,", "Recipe(7,", "expected Recipe(name=value"),
        ("Recipe(steps=7,", "Recipe(steps=int(7),", "a default is written out"),
        ("learn: Recipe", "learn: Recipes", "has type Recipes"),
        ('method: str = "mae"', 'way: str = "mae"', "belong to what the line above names"),
        ('{"masking": "block"}', '{"maskin": "block"}', "has no maskin"),
    ],
)
def test_a_wrong_cell_is_refused(tmp_path, old, new, expected):
    assert old in CELL
    with pytest.raises(ValueError) as error:
        check_parameters(write(tmp_path / "wrong.ipynb", CELL.replace(old, new)), {})
    assert expected in str(error.value)


def test_named_values_are_added_to_those_of_the_notebook_and_its_defaults_stay_as_they_are(toy):
    texts = {"tasks.stage": "ordered", "weights.sod": "3"}
    values = check_parameters(toy, parse_texts(toy, texts))
    assert values["tasks"] == {"stage": "ordered"} and values["weights"] == {"sic": 1.0, "sod": 3}
    assert check_parameters(toy, {})["tasks"] == {}


def test_dataclasses_come_back_and_what_was_typed_in_a_notebook_is_checked(toy):
    names = {"out": "x", "encoder": "vit-nano", "tasks": {}, "weights": {}, "method": "mae", "settings": {}}
    names["learn"] = Recipe(steps=3, betas=(0.8, 0.9))
    values = read_namespace(toy, names)
    assert names["learn"] == Recipe(steps=3, betas=(0.8, 0.9)) and values["learn"]["betas"] == [0.8, 0.9]
    assert read_namespace(toy, {**names, "learn": values["learn"]}) == values
    with pytest.raises(ValueError, match=r"settings.mask_ratio must be in \(0, 1\)"):
        read_namespace(toy, {**names, "settings": {"mask_ratio": 2.0}})


def test_a_run_with_other_fields_is_another_run(toy, tmp_path):
    from sarfm.runs.folders import RunFolder

    values = check_parameters(toy, {"out": str(tmp_path / "out")})
    RunFolder(tmp_path / "out", values)
    check_same_run(tmp_path / "out", values)
    with pytest.raises(ValueError, match="learn.steps=7, now 8"):
        check_same_run(tmp_path / "out", check_parameters(toy, {"learn.steps": 8}))


def test_flat_and_nested_are_the_same():
    nested = {"a": {"b": {"c": 1, "d": {}}}, "e": [], "f": None}
    assert flatten(nested) == {"a.b.c": 1, "a.b.d": {}, "e": [], "f": None} and nest(flatten(nested)) == nested


def test_a_description_holds_every_parameter_and_needs_no_torch(toy):
    text = describe_parameters(toy, {"learn.steps": 99})
    assert "learn: Recipe, how it learns" in text and "learn.steps: int = 99" in text
    assert all(f"{name}: " in text for name in declared_parameters(toy))
    code = f"import sys; from sarfm.runs.parameters import check_parameters; check_parameters({str(toy)!r}, {{}})"
    code += "; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
