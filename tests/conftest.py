"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real SAR data that is not shipped, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("SARFM_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "README.md").exists():
        pytest.skip(f"no real data in {folder}; set SARFM_SHARED to the folder that holds them")
    return folder
