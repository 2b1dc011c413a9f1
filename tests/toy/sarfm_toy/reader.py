"""A reader: scenes in files of NumPy's .npz, which say nothing; the catalogue entry says it for them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr


def scenes(
    entry: object,  # the catalogue entry
    folder: Path,  # where its files are
) -> Mapping[str, Path]:  # scene to its file
    """Find the scenes."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.npz"))}


def open_scene(
    entry: object,  # the catalogue entry
    path: Path,  # one of `scenes`
) -> xr.Dataset:  # a Scene
    """Open one."""
    from sarfm.scenes.scene import make_scene

    with np.load(path) as held:
        scene = make_scene({"vv": held["vv"], "vh": held["vh"]}, units="dB", quantity="sigma0")
        stage = {"target_kind": "classes", "target_of": "pixel", "flag_values": np.array([1, 2, 3])}
        stage["flag_meanings"] = "low middle high"
        return scene.assign(stage=(("y", "x"), held["stage"], stage))
