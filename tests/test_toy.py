"""A package of one's own adds a method, a reader with its entry, and a task: nothing of sarfm is changed, the run notebooks take them.

The package lies in `tests/toy`. It is installed as pip would leave it: its modules and its entry points in a folder of the path.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from patience import PATIENCE_S

pytest.importorskip("sarfm.runs.parameters", reason="run parameters are not in groups yet")
pytest.importorskip("sarfm.models.kinds", reason="methods are not found through entry points yet")
pytest.importorskip("sarfm.tasks", reason="there is no room for tasks yet")

toy = Path(__file__).with_name("toy")
TINY = {"data": {"patch_px": 32, "stride_px": 32}, "learn": {"steps": 4, "batch_size": 4}, "encoder": "vit-nano"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Install the toy package into a folder of its own, and write its data beside it."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(toy / "sarfm_toy", folder / "site/sarfm_toy")
    about = folder / "site/sarfm_toy-0.1.dist-info"
    about.mkdir()
    shutil.copy(toy / "entry_points.txt", about)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sarfm-toy\nVersion: 0.1\n")
    shutil.copy(toy / "toy_stages.yaml", folder)
    draw = np.random.default_rng(0)
    (folder / "data").mkdir()
    for number in range(6):
        stage = np.repeat(np.repeat(draw.integers(1, 4, (6, 6)), 16, 0), 16, 1).astype("uint8")
        bands = {n: (4.0 * stage - 20 + draw.normal(0, 1, stage.shape)).astype("float32") for n in ("vv", "vh")}
        np.savez(folder / f"data/scene{number}.npz", stage=stage, **bands)
    return folder


def sarfm(installed: Path, *words: object) -> None:
    """Call the command line with the toy on the path."""
    environment = os.environ | {
        "PYTHONPATH": str(installed / "site"),
        "SARFM_DATA": str(installed),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def flat(groups: dict) -> list[str]:
    """Write nested parameters as the command line takes them."""
    pairs = [
        (name, value) if not isinstance(value, dict) else (f"{name}.{field}", inner)
        for name, value in groups.items()
        for field, inner in (value.items() if isinstance(value, dict) else [("", "")])
    ]
    return [word for name, value in pairs for word in ("-p", f"{name}={json.dumps(value).strip(chr(34))}")]


@pytest.mark.slow
def test_a_package_of_ones_own_goes_through_the_run_notebooks(installed):
    data = {"data": {**TINY["data"], "dataset": str(installed / "toy_stages.yaml"), "folder": str(installed / "data")}}
    method = {"method": "token_means", "settings": {"hidden_share": 0.4}, "split": {"by": "scene"}}
    sarfm(installed, "run", "pretrain", *flat(TINY | data | method), "--out", installed / "pretrain")
    assert json.loads((installed / "pretrain/run.json").read_text())["parameters"]["method"] == "token_means"
    tasks = {"tasks": {"stage": "ordered"}, "pretrained": str(installed / "pretrain"), "split": {"by": "scene"}}
    sarfm(installed, "run", "finetune", *flat({**TINY, **data, **tasks}), "--out", installed / "finetune")
    sarfm(installed, "evaluate", installed / "finetune", "--out", installed / "evaluate")
    tallies = pd.read_parquet(installed / "evaluate/tallies.parquet")
    assert set(tallies["target"]) == {"stage"} and all(len(sums) == 2 for sums in tallies["sums"])


def test_nothing_of_sarfm_names_the_toy():
    root = Path(__file__).parents[1]
    texts = [p.read_text(encoding="utf-8") for p in [*root.glob("sarfm/**/*.py"), *root.glob("data_catalogs/*.yaml")]]
    assert not [t for t in texts if "token_means" in t or "toy_npz" in t]
