"""The GPU path, dry: the command that runs on a CUDA machine goes the same way on the CPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from patience import PATIENCE_S

root = Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_command_goes_through_dry(tmp_path):
    command = ["bash", str(root / "tests/gpu.sh"), "--dry", str(tmp_path / "gpu.json")]
    environment = os.environ | {"SARFM_DATA": str(tmp_path / "data"), "GPU_SECONDS": str(PATIENCE_S)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == {"machine", "agreement", "steps", "pretraining", "prediction"}
    assert found["agreement"]["worst_gradient"] == 0 and found["pretraining"]["status"] == "done"
    assert all(step["ms_per_step"] > 0 for step in found["steps"].values())
