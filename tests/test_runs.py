"""Runs: what is refused before a kernel starts, what survives a kill, and the run notebooks themselves."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from patience import PATIENCE_S, until

from sarfm.cli import main
from sarfm.io.files import StoreLocked, lock
from sarfm.runs.folders import RunFolder, read_run, read_run_parameters
from sarfm.runs.notebooks import RunFailed, run_notebook
from sarfm.runs.parameters import (
    check_parameters,
    declared_parameters,
    group_class,
    notebook_path,
    parse_value,
    run_names,
)
from sarfm.runs.sweeps import read_sweep, run_sweep
from sarfm.train.checkpoints import load_checkpoint

PARAMETERS = """out: str = "runs/toy"  # folder of the run
steps: int = 4  # steps, >= 1
ratio: float = 0.75  # fraction hidden, in (0, 1)
share: float = 1.0  # of the labels, in (0, 1]
masking: str = "random"  # how, one of random | block
text: str = ""  # anything
many: list[int] = [0]  # seeds, each >= 0
names: list[str] = []  # channels
flag: bool = False  # a switch
seconds: float = 0.0  # of each step, s, >= 0
fail: bool = False  # stop in the middle"""

BODY = """import json, os, time
from pathlib import Path
from sarfm.runs.notebooks import open_run
run = open_run("NOTEBOOK", globals())
(run.path / "kernel.pid").write_text(str(os.getpid()))
progress = run.path / "progress.json"
done = json.loads(progress.read_text()) if progress.exists() else []"""

LOOP = """for step in range(len(done), steps):
    time.sleep(seconds)
    done.append([step, os.getpid()])
    part = progress.with_suffix(".part")
    part.write_text(json.dumps(done))
    os.replace(part, progress)  # killed in between, it holds the last state
    assert not (fail and step == 1), "a cell that fails"
print("done", steps)"""

END = 'run.finish({"steps": len(done), "text": text, "ratio": ratio})'


def write_toy(path, parameters=PARAMETERS, then=(LOOP, END)):
    """Write a run notebook that counts, slowly where asked, and continues where it stopped."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(s) for s in (BODY.replace("NOTEBOOK", str(path)), *then)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def toy(tmp_path):
    """The toy in a folder of its own."""
    return write_toy(tmp_path / "toy.ipynb")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ration": 0.5}, "did you mean 'ratio'"),
        ({"zzz": 1}, "it has out, steps"),
        ({"ratio": 1.0}, "in (0, 1)"),
        ({"ratio": 0}, "in (0, 1)"),
        ({"ratio": float("nan")}, "in (0, 1)"),
        ({"share": 0.0}, "in (0, 1]"),
        ({"ratio": "0.5"}, "type float"),
        ({"steps": 2.5}, "type int"),
        ({"steps": True}, "type int"),
        ({"steps": 0}, ">= 1"),
        ({"masking": "checker"}, "one of random | block"),
        ({"many": [0, -1]}, ">= 0"),
        ({"many": 3}, "list[int]"),
        ({"names": ["vv", 1]}, "list[str]"),
        ({"flag": 1}, "type bool"),
        ({"text": None}, "type str"),
        ({"text": object()}, "type str"),
        ({"text": {"a": 1}}, "no parameter 'text.a'"),
        ({"text": {}}, "type str"),
    ],
)
def test_wrong_parameters_are_refused_before_a_kernel_starts(toy, tmp_path, given, expected):
    with pytest.raises(ValueError) as error:
        run_notebook(toy, given, tmp_path / "out")
    assert expected in str(error.value)
    assert not (tmp_path / "out").exists()


def test_everything_wrong_is_said_at_once(toy):
    with pytest.raises(ValueError) as error:
        check_parameters(toy, {"ration": 1, "steps": 0, "masking": "x"})
    assert all(word in str(error.value) for word in ("ration", "steps", "masking"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "200", 200),
        ("ratio", "2.5e-1", 0.25),
        ("flag", "True", True),
        ("text", "1", "1"),
        ("many", "0,1,2", [0, 1, 2]),
        ("many", "[0, 1]", [0, 1]),
        ("names", "vv,vh", ["vv", "vh"]),
        ("names", "[vv, vh]", ["vv", "vh"]),
        ("names", "[]", []),
    ],
)
def test_text_is_read_by_the_declared_type(toy, name, text, value):
    parsed = parse_value(declared_parameters(toy)[name], text)
    assert parsed == value and type(parsed) is type(value)


def test_a_finished_run_is_not_repeated_and_other_parameters_are_refused(toy, tmp_path):
    done = run_notebook(toy, {"steps": 2}, tmp_path / "out", progress=False)
    record = read_run(tmp_path / "out")
    assert record["status"] == "done" and record["metrics"]["steps"] == 2 and record["parameters"]["steps"] == 2
    assert {"versions", "commit", "seed", "device", "timings_s", "attempts"} <= set(record)
    changed = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert run_notebook(toy, {"steps": 2}, tmp_path / "out", progress=False) == done
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="steps=2, now 3"):
        run_notebook(toy, {"steps": 3}, tmp_path / "out")


@pytest.mark.row(14)
def test_a_failing_cell_keeps_the_notebook_and_can_be_tried_again(toy, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RunFailed, match="a cell that fails"):
        run_notebook(toy, {"fail": True}, out, progress=False)
    assert read_run(out)["status"] == "failed" and "a cell that fails" in read_run(out)["error"]
    assert (out / "toy.running.ipynb").exists() and not (out / "toy.ipynb").exists()
    run_notebook(toy, {"fail": True}, out, progress=False)  # continues behind the step that failed
    assert read_run(out)["status"] == "done" and "error" not in read_run(out)


def start(toy, out, seconds=0.3, steps=12):
    """Start the toy as the command line does, in a process of its own."""
    pairs = ["-p", f"seconds={seconds}", "-p", f"steps={steps}", "--out", str(out)]
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", "run", str(toy), *pairs]
    # a background job of a shell ignores Ctrl-C, and so do the processes that it starts
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def wait_for_steps(out, steps):
    """Wait until the toy has done some steps."""
    path = out / "progress.json"
    until(lambda: path.exists() and path.stat().st_size and len(json.loads(path.read_text())) >= steps)


def alive(pid):
    """Say whether a process runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.row(14)
def test_kill_9_of_the_command_then_the_same_command_continues(toy, tmp_path):
    out = tmp_path / "out"
    process = start(toy, out)
    wait_for_steps(out, 2)
    kernel = int((out / "kernel.pid").read_text())
    process.kill()
    process.wait()
    until(lambda: not alive(kernel))
    assert read_run(out)["status"] == "running" and not (out / "toy.ipynb").exists()
    again = start(toy, out)
    assert again.wait(PATIENCE_S) == 0, again.stderr.read()
    steps = json.loads((out / "progress.json").read_text())
    assert [step for step, _ in steps] == list(range(12)) and len({pid for _, pid in steps}) == 2
    assert read_run(out)["attempts"] == 2 and not list(out.glob("*.running.ipynb"))


def test_two_commands_on_one_folder_do_not_mix(toy, tmp_path):
    with lock(tmp_path / "out"), pytest.raises(StoreLocked, match="being written"):
        run_notebook(toy, {}, tmp_path / "out", progress=False)


def test_a_kernel_that_is_not_there_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="no Jupyter kernel 'nowhere'.*python3"):
        run_notebook(toy, {}, tmp_path / "out", kernel="nowhere")
    assert not (tmp_path / "out").exists()


def test_run_folder_writes_null_for_a_score_that_does_not_exist(tmp_path):
    RunFolder(tmp_path, {}).finish({"iou": float("nan"), "x": {"value": 1.0, "low": float("nan"), "high": 2.0}})
    text = (tmp_path / "run.json").read_text()
    assert "NaN" not in text and json.loads(text)["metrics"] == {
        "iou": None,
        "x": {"value": 1.0, "low": None, "high": 2.0},
    }


def sweep_file(toy, tmp_path, text):
    """Write a sweep file for the toy."""
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace("TOY", str(toy)))
    return path


def test_a_sweep_makes_every_combination_skips_what_is_done_and_keeps_failures(toy, tmp_path):
    path = sweep_file(
        toy, tmp_path, "notebook: TOY\nparameters: {steps: 2}\nsweep:\n  ratio: [0.25, 0.5]\n  fail: [false, true]\n"
    )
    table = run_sweep(path, tmp_path / "out", jobs=2, progress=False)
    assert list(table["status"]) == ["done", "failed", "done", "failed"] and list(table["ratio"]) == [
        0.25,
        0.25,
        0.5,
        0.5,
    ]
    assert pd.read_parquet(tmp_path / "out" / "table.parquet").equals(table)
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 6
    assert "a cell that fails" in (tmp_path / "out" / "ratio=0.5,fail=true" / "run.log").read_text()
    changed = (tmp_path / "out" / "ratio=0.5,fail=false" / "run.json").stat().st_mtime_ns
    again = run_sweep(path, tmp_path / "out", progress=False)
    assert list(again["status"]) == ["done"] * 4  # the toy goes on behind the step at which it failed
    assert (tmp_path / "out" / "ratio=0.5,fail=false" / "run.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("notebook: TOY\nsweep: {ration: [1]}\n", "did you mean 'ratio'"),
        ("notebook: TOY\nsweep: {ratio: [0.5, 1.0]}\n", "in (0, 1)"),
        ("notebook: TOY\nsweep: {ratio: 0.5}\n", "one list of values"),
        ("notebook: TOY\nsweep: {}\n", "one list of values"),
        ("notebook: TOY\nsweep: {out: [a, b]}\n", "--out"),
        ("notebook: TOY\nlists: {ratio: [0.5]}\n", "expected notebook, sweep"),
        ("- 1\n", "got a list"),
        ("notebook: TOY\nparameters: {ratio: 0.5}\nsweep: {ratio: [0.1]}\n", "swept or fixed"),
    ],
)
def test_a_wrong_sweep_is_refused_before_it_starts(toy, tmp_path, text, expected):
    with pytest.raises(ValueError) as error:
        read_sweep(sweep_file(toy, tmp_path, text))
    assert expected in str(error.value) and "sweep.yaml" in str(error.value)


@pytest.mark.row(9)
def test_a_sweep_file_runs_no_code(toy, tmp_path):
    with pytest.raises(ValueError, match="nothing is executed"):
        read_sweep(
            sweep_file(
                toy, tmp_path, "notebook: !!python/object/apply:os.system ['touch canary']\nsweep: {ratio: [0.5]}\n"
            )
        )


def test_values_that_do_not_fit_a_file_name_get_one_of_their_own(toy, tmp_path):
    path = sweep_file(toy, tmp_path, 'notebook: TOY\nsweep: {text: ["../../a", "a/b", "a:b", ".."]}\n')
    names = list(read_sweep(path).runs)
    assert len(set(names)) == 4 and not any("/" in name or name.startswith(".") for name in names)


@pytest.mark.parametrize("name", run_names())
def test_run_notebooks_keep_their_form(name):
    cells = [c for c in nbformat.read(notebook_path(name), 4).cells if c.cell_type == "code"]
    declared = declared_parameters(name)
    assert check_parameters(name, {n: p.default for n, p in declared.items() if p.default != {}}), "a default fails"
    assert all(len(p.comment.split()) >= 2 for p in declared.values()), "every parameter says what it is"
    assert {"out", "device" if "learn.steps" in declared else "out"} <= set(declared)
    assert {"seed", "seeds", "learn.seed"} & set(declared) or name in ("predict", "embed"), "only what is trained draws"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [n for c in cells for n in ast.walk(ast.parse(c.source)) if isinstance(n, kinds)], (
        "no function definitions"
    )
    assert "run.finish(" in cells[-1].source


def test_run_notebooks_agree_about_what_they_share():
    declared = [declared_parameters(name) for name in ("pretrain", "finetune")]
    apart = {"out", "data.stride_px", "split.by", "split.train_list", "learn.steps", "learn.batch_size"}
    apart |= {"learn.betas", "learn.layer_decay", "checkpoint_every"}
    for name in set.intersection(*map(set, declared)) - apart:
        assert len({json.dumps(d[name].default) for d in declared}) == 1, name


STAGED = """first:
  start: {notebook: TOY, parameters: {steps: 2}, sweep: {ratio: [0.25, 0.5]}}
  next: {notebook: TOY, parameters: {steps: 1, text: "@start"}}
notebook: TOY
parameters: {steps: 1, text: "@next"}
sweep: {fail: [false]}
"""


def test_runs_come_before_those_that_need_them(toy, tmp_path):
    two_stages = "".join(line for line in STAGED.splitlines(True) if "next:" not in line).replace("@next", "@start")
    path = sweep_file(toy, tmp_path, two_stages)
    table = run_sweep(path, tmp_path / "out", jobs=2, progress=False)
    assert list(table["start.ratio"]) == [0.25, 0.5] and list(table["status"]) == ["done", "done"]
    assert list(table["text"]) == [str(tmp_path / f"out/start/ratio={ratio}") for ratio in (0.25, 0.5)]
    first = tmp_path / "out/start/ratio=0.5/run.json"
    before = first.stat().st_mtime_ns
    run_sweep(path, tmp_path / "out", progress=False)
    assert first.stat().st_mtime_ns == before


def test_a_last_run_may_report_on_the_whole_sweep(toy, tmp_path):
    text = (
        'first:\n  start: {notebook: TOY, parameters: {steps: 1}}\nnotebook: TOY\nparameters: {steps: 1, text: "@"}\n'
    )
    table = run_sweep(sweep_file(toy, tmp_path, text), tmp_path / "out", progress=False)
    assert list(table["status"]) == ["done"] and list(table["text"]) == [str(tmp_path / "out")]
    assert (tmp_path / "out/toy/run.json").exists() and (tmp_path / "out/start/run.json").exists()


def test_the_report_waits_for_all_others(toy, tmp_path):
    text = "first:\n  start: {notebook: TOY, parameters: {steps: 2}, sweep: {fail: [false, true]}}\nnotebook: TOY\n"
    text += 'parameters: {steps: 1, text: "@"}\n'
    table = run_sweep(sweep_file(toy, tmp_path, text), tmp_path / "out", progress=False)
    assert list(table["status"]) == ["not started"] and not (tmp_path / "out/toy").exists()


def test_a_failed_run_holds_up_only_those_that_need_it(toy, tmp_path):
    text = STAGED.replace("sweep: {ratio: [0.25, 0.5]}", "sweep: {fail: [false, true]}")
    table = run_sweep(sweep_file(toy, tmp_path, text), tmp_path / "out", progress=False)
    assert list(table["status"]) == ["done", "not started"] and list(table["next.start.fail"]) == [False, True]
    assert (tmp_path / "out/start/fail=true/run.log").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"@next"', '"@later"', "@later is no run"),
        ('text: "@start"', 'text: "@next"', "@next is no run"),
        ("steps: 2", "stepps: 2", "did you mean 'steps'"),
        ("  next: {notebook: TOY", "  next: {notes: TOY", "expected notebook"),
        ("  next:", "  ../next:", "first holds names"),
        ("steps: 2}", "steps: 2, out: x}", "--out"),
    ],
)
def test_what_stands_under_first_is_checked_before_anything_starts(toy, tmp_path, old, new, expected):
    assert old in STAGED
    with pytest.raises(ValueError, match=re.escape(expected)):
        run_sweep(sweep_file(toy, tmp_path, STAGED.replace(old, new)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_lists_of_words_name_folders_plainly(toy, tmp_path):
    path = sweep_file(toy, tmp_path, 'notebook: TOY\nsweep: {text: ["a", "b+c"], ratio: [0.5]}\n')
    assert list(read_sweep(path).runs) == ["text=a,ratio=0.5", "text=b+c,ratio=0.5"]


def test_sweeps_that_come_with_sarfm_are_sound():
    files = sorted(notebook_path("pretrain").parent.glob("sweeps/*.yaml"))
    assert files and all(len([*read_sweep(path).first, *read_sweep(path).runs]) > 1 for path in files)
    assert any(read_sweep(path).first for path in files)


@pytest.mark.slow
def test_the_chain_from_pretraining_to_comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    run_notebook(
        "pretrain",
        {"learn.steps": 6, "learn.devices": 2, "checkpoint_every": 3, "data.stride_px": 24, "device": "cpu"},
        tmp_path / "p",
        progress=False,
    )
    assert load_checkpoint(tmp_path / "p/checkpoints/last.ckpt")["devices"] == 2
    history = pd.read_parquet(tmp_path / "p" / "history.parquet")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    run_notebook("finetune", {"pretrained": str(tmp_path / "p"), "learn.steps": 3}, tmp_path / "f", progress=False)
    assert 0 <= read_run(tmp_path / "f")["metrics"]["cover.mean_iou"]["value"] <= 1
    given = {"pretrained": str(tmp_path / "p"), "learn.steps": 2, "contestants": ["pretrained", "scratch", "unet"]}
    run_notebook("finetune", given, tmp_path / "c", progress=False)
    named = {"pretrained@1", "scratch@1", "unet@1", "labelled_patches", "train_list", "train_test_m", "leaks"}
    assert set(read_run(tmp_path / "c")["metrics"]) == named
    assert not list(tmp_path.rglob("cells/*/checkpoints")) and (tmp_path / "c/models/unet/model.safetensors").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("cells/*/tallies.parquet")}
    (tmp_path / "c/finetune.ipynb").unlink()  # as if it had been stopped after its trainings
    run_notebook("finetune", given, tmp_path / "c", progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 3
    run_notebook("report", {"runs": str(tmp_path / "c"), "draws": 50}, tmp_path / "r", progress=False)
    assert main(["evaluate", str(tmp_path / "c"), "--contestant", "unet", "-p", "draws=50", "--quiet"]) == 0
    assert json.loads((tmp_path / "c/evaluate-unet/evaluate.json").read_text())["model"] == str(
        tmp_path / "c/models/unet"
    )
    assert main(["predict", str(tmp_path / "c"), "--contestant", "vgg", "--scenes", "borneo", "--out", "x"]) == 2
    differences = pd.read_parquet(tmp_path / "r/differences.parquet")
    assert set(differences["over"]) == {"scratch", "unet"} and (differences["low"] <= differences["high"]).all()
    page = (tmp_path / "p" / "figures" / "map.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "https://unpkg" not in page


def test_threads_of_a_kernel_sleep_while_they_wait_unless_the_user_has_said_how(tmp_path, monkeypatch):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    path = tmp_path / "told.ipynb"
    told = new_code_cell(f'out: str = "{tmp_path}"  # folder of this run', metadata={"tags": ["parameters"]})
    asked = new_code_cell('import os\nprint([os.environ.get(n) for n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")])')
    nbformat.write(new_notebook(cells=[told, asked]), path)

    def said(folder):
        done = nbformat.read(run_notebook(path, out=tmp_path / folder, progress=False), 4)
        return done.cells[-1].outputs[0].text.strip()

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert said("default") == "['1000', None]"
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert said("active") == "[None, 'ACTIVE']"


@pytest.mark.parametrize(
    ("slip", "expected"),
    [
        ("notebook: TOY\nsweep:\n\tratio: [0.5]\n", r"line 3: .*Indent with spaces"),
        ("notebook: TOY\nsweep: {ratio: [0.5]}\nsweep: {ratio: [0.1]}\n", "line 3: 'sweep' is given twice"),
        ("notebook: TOY\nsweep:\n  ratio: [0.5]\n  ratio: [0.1]\n", "line 4: 'ratio' is given twice"),
        ("notebook: TOY\nsweep\n  ratio: [0.5]\n", "line 2: .*colon"),
        ("notebook: TOY\nsweep: {ratio: *values}\n", "line 2: found undefined alias 'values'"),
        ("notebook: TOY\nsweep: {ratio: [0.5}\n", "line 2: .*Close the bracket"),
        ("notebook: TOY\nparameters: [steps]\nsweep: {ratio: [0.5]}\n", "parameters are names with values"),
        ("notebook: [TOY]\nsweep: {ratio: [0.5]}\n", "notebook is a name or a path"),
        ("notebook: TOY\nsweep: [ratio]\n", "one list of values"),
        ("notebook: TOY\nsweep: {1: [0.5]}\n", "'1' is not a name"),
        ("notebook: TOY\nsweep: {text: [2020-13-45]}\n", "is not plain YAML"),
        ("notebook: pretrian\nsweep: {learn.seed: [0]}\n", "'pretrian' is not a run of sarfm"),
        ("first: [TOY]\nnotebook: TOY\n", "first holds names"),
        ("", "got nothing"),
        ("just words\n", "got a text"),
    ],
)
def test_slips_in_a_sweep_or_preset_are_words_with_file_and_line(toy, tmp_path, slip, expected, capsys):
    path = sweep_file(toy, tmp_path, slip)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(expected, said, re.S) and "sweep.yaml" in said and "Traceback" not in said
    assert main(["run", str(toy), "--preset", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "sweep.yaml" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_that_changed_a_parameter_in_place_continues_after_it_was_killed(tmp_path):
    """Fine-tuning wrote the rates that it had found into its parameter, and then refused to continue."""
    grown = "names.append('found')\nwith run.timed('search'):\n    pass"
    path, out = write_toy(tmp_path / "grown.ipynb", then=(grown, LOOP, END)), tmp_path / "out"
    with pytest.raises(RunFailed, match="a cell that fails"):
        run_notebook(path, {"fail": True}, out, progress=False)
    assert read_run(out)["parameters"]["names"] == []
    run_notebook(path, {"fail": True}, out, progress=False)  # two steps are done, so it ends
    assert read_run(out)["attempts"] == 2


def test_a_run_that_never_began_does_not_block_its_folder(tmp_path):
    out = tmp_path / "out"
    path = write_toy(tmp_path / "early.ipynb", then=())
    cells = nbformat.read(path, 4)
    cells.cells[1].source = f'from sarfm.runs.notebooks import open_run\nrun = open_run("{path}", globals())'
    cells.cells.append(nbformat.v4.new_code_cell(f"assert not fail, 'no data'\n{END.replace('len(done)', 'steps')}"))
    nbformat.write(cells, path)
    with pytest.raises(RunFailed, match="no data"):
        run_notebook(path, {"fail": True}, out, progress=False)
    run_notebook(path, {"fail": False}, out, progress=False)
    assert read_run(out)["parameters"]["fail"] is False
    with pytest.raises(ValueError, match="fail=False, now True"):
        run_notebook(path, {"fail": True}, out, progress=False)


@pytest.mark.parametrize(
    ("notebook", "given", "expected"),
    [
        ("pretrain", {"data.dataset": "borneoo"}, "Did you mean 'borneo'"),
        ("pretrain", {"data.dataset": "mine.yaml"}, "mine.yaml does not exist"),
        ("pretrain", {"data.folder": "nowhere"}, "there is no folder nowhere"),
        ("pretrain", {"data.dataset": "ombria"}, "with files of ombria"),
        ("pretrain", {"device": "gpu"}, "device is auto, cpu, cuda"),
        ("finetune", {"pretrained": "nowhere"}, "there is no nowhere/model.json"),
        ("evaluate", {"finetuned": "nowhere"}, "there is no nowhere/model.json"),
        ("predict", {"finetuned": "nowhere"}, "there is no nowhere/model.json"),
        ("report", {"runs": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_what_a_run_starts_from_is_looked_at_before_a_kernel_starts(notebook, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("sarfm.runs.notebooks._execute", lambda *_: pytest.fail("a kernel started"))
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        run_notebook(notebook, given, tmp_path / "out")
    assert str(error.value).startswith(f"{notebook}: ") and not (tmp_path / "out").exists()


def test_a_checked_run_imports_no_torch(tmp_path):
    code = "import sys; from sarfm.runs.parameters import check_parameters; from sarfm.runs.inputs import check_inputs"
    code += "; check_inputs(check_parameters('pretrain', {})); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_parameters_lead_where_they_led_when_the_run_was_made(tmp_path, monkeypatch):
    (tmp_path / "there/files").mkdir(parents=True)
    (tmp_path / "there/mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "there")
    RunFolder("run", {"data": {"dataset": "mine.yaml", "folder": "files", "patch_px": 48}, "dataset": "borneo"})
    monkeypatch.chdir(tmp_path)
    found = read_run_parameters("there/run")
    assert found["data"]["dataset"] == str(tmp_path / "there/mine.yaml") and found["dataset"] == "borneo"
    assert found["data"]["folder"] == str(tmp_path / "there/files") and found["data"]["patch_px"] == 48


@pytest.mark.parametrize("name", run_names())
def test_every_choice_that_a_run_offers_is_accepted(name):
    offered = 0
    for parameter in declared_parameters(name).values():
        if match := re.search(r"one of ((?:[^ ,;|]+ \| )+[^ ,;|)]+)", parameter.comment):
            for choice in match[1].split(" | "):
                value = check_parameters(name, {parameter.name: choice})
                group, _, field = parameter.name.rpartition(".")
                assert (value[group] if group else value)[field] == choice
                if point := group_class(group.capitalize().replace("Data", "Cut").replace("Learn", "Recipe")):
                    point.load()(**{field: choice})
                offered += 1
    assert offered or name in ("predict", "embed", "report", "compare")


def test_every_loss_that_finetune_offers_is_a_loss():
    from sarfm.evaluation.contestants import choose_tasks
    from sarfm.scenes.channels import Target

    class Store:
        path = "a store"
        targets = {"ice": Target("ice", classes={0: "no", 1: "yes"}), "depth": Target("depth", "number", units="m")}

    classes, numbers = declared_parameters("finetune")["losses"].comment.split(": ")[1].split("; ")
    assert "cross_entropy+dice" in classes
    for target, losses in (("ice", classes), ("depth", numbers)):
        for loss in losses.split(", "):
            given = check_parameters("finetune", {"losses": {target: loss}})["losses"]
            assert loss in vars(choose_tasks(Store(), losses=given)[target]).values()
