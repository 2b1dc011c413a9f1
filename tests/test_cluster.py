"""A sweep on a real Slurm: arrays, stages that wait, a run that is preempted and continues, a failed run and its dependents."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import slurm
from patience import PATIENCE_S, until

from sarfm.cli import main
from sarfm.runs.cluster import in_queue, run_on_slurm
from sarfm.runs.folders import read_run
from sarfm.runs.sweeps import read_sweep, run_sweep

PARAMETERS = """out: str = "runs/toy"  # folder of the run
kind: str = "quick"  # what happens, one of quick | slow | broken
start: str = ""  # folder of an earlier run"""

BODY = """import json, os, time
from pathlib import Path
from sarfm.runs.notebooks import open_run
run = open_run("NOTEBOOK", globals())
progress = run.path / "progress.json"
done = json.loads(progress.read_text()) if progress.exists() else []
done.append(os.getpid())
part = progress.with_suffix(".part")
part.write_text(json.dumps(done))
os.replace(part, progress)
while kind == "slow" and len(done) == 1:
    time.sleep(0.1)  # until somebody stops it; a second attempt goes on
assert kind != "broken", "a cell that fails"
run.finish({"attempts": len(done), "threads": int(os.environ["OMP_NUM_THREADS"])})"""

SWEEP = """first:
  start:
    notebook: TOY
    sweep: {kind: [slow, broken]}
    resources: {minutes: 5, memory_gb: 0.5, cpus: 1}
notebook: TOY
parameters: {start: "@start"}
resources: {memory_gb: 0.5, cpus: 1}
"""


@pytest.fixture
def sweep(tmp_path):
    """A sweep of a toy in two stages."""
    toy, path = tmp_path / "toy.ipynb", tmp_path / "sweep.yaml"
    cells = [nbformat.v4.new_code_cell(s) for s in (PARAMETERS, BODY.replace("NOTEBOOK", str(toy)))]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), toy)
    path.write_text(SWEEP.replace("TOY", str(toy)))
    return path


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ("{minuts: 5}", "did you mean 'minutes'"),
        ("{minutes: 0}", ">= 1"),
        ("{cpus: many}", "type int"),
        ("{memory_gb: 0}", "> 0"),
        ("[5]", "resources are minutes, memory_gb"),
    ],
)
def test_wrong_resources_are_refused_with_or_without_a_cluster(sweep, tmp_path, resources, expected):
    sweep.write_text(sweep.read_text().replace("{memory_gb: 0.5, cpus: 1}", resources))
    with pytest.raises(ValueError, match=expected) as error:
        run_sweep(sweep, tmp_path / "out", progress=False)
    assert "sweep.yaml" in str(error.value) and not (tmp_path / "out").exists()


def test_each_stage_has_its_own_resources(sweep):
    read = read_sweep(sweep)
    assert {run.resources.minutes for run in read.first[0].values()} == {5}
    assert {run.resources.minutes for run in read.runs.values()} == {60}


def test_without_slurm_nothing_is_begun(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "out"), "--cluster", "slurm"]) == 2
    assert "there is no Slurm here" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def cluster(tmp_path):
    """Slurm on the loopback, where it is installed."""
    if absent := slurm.absent():
        pytest.skip(f"Slurm can't be started here: no {', '.join(absent)} (Debian: slurm-wlm, munge)")
    with slurm.slurm(tmp_path / "slurm") as folder:
        yield folder


def pids(run: Path) -> list[int]:
    """List the kernels that have worked on a run."""
    path = run / "progress.json"
    return json.loads(path.read_text()) if path.exists() and path.stat().st_size else []


@pytest.mark.slow
def test_a_sweep_on_slurm(cluster, sweep, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", "sweep", str(sweep)]
    command += ["--out", str(out), "--cluster", "slurm"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a terminal
    begun = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    slow, broken = out / "start/kind=slow", out / "start/kind=broken"
    until(lambda: pids(slow) and read_run(broken).get("status") == "failed", begun)
    jobs = json.loads((out / ".slurm/jobs.json").read_text())
    assert len(jobs) == 4 and jobs["start/kind=slow"].endswith("_0")

    begun.send_signal(signal.SIGINT)  # the command stops, its jobs don't
    assert begun.wait(PATIENCE_S) == 130 and "scancel" in begun.stderr.read()
    assert jobs["start/kind=slow"] in in_queue(jobs.values())

    until(lambda: jobs["start/kind=broken"] not in in_queue(jobs.values()))
    preempted = jobs["start/kind=slow"]
    slurm.say("scancel", "--signal=TERM", preempted)
    slurm.say("scancel", "--signal=USR2", preempted)
    until(lambda: slurm.say("squeue", "-h", "-r", "-j", preempted, "-o", "%T").strip() == "PENDING")
    slurm.say(
        "scontrol", "update", f"JobId={preempted}", "StartTime=now+2"
    )  # by itself Slurm waits two minutes; a node refuses a job in the second of its end

    table = run_on_slurm(sweep, out, progress=False, every_s=0.2)
    later = json.loads((out / ".slurm/jobs.json").read_text())
    assert {name for name in jobs if later[name] != jobs[name]} == {"start/kind=broken"}, (
        "only what ended is tried again"
    )
    assert list(table["status"]) == ["done", "not started"]
    assert list(table["reason"]) == ["", "needs start/kind=broken, failed"]
    assert len(set(pids(slow))) == 2 and read_run(slow)["metrics"] == {"attempts": 2, "threads": 1}
    assert pd.read_parquet(out / "table.parquet").equals(table)
    assert "a cell that fails" in (broken / "run.log").read_text()
    assert len(set(pids(broken))) == 2
