__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .datasets.catalog import open_dataset as open_dataset
    from .evaluation.predict import open_prediction as open_prediction
    from .evaluation.predict import predict_scene as predict_scene
    from .evaluation.report import collect_runs as collect_runs
    from .models.dino import DINO as DINO
    from .models.kinds import build_encoder as build_encoder
    from .models.mae import MAE as MAE
    from .models.mixmae import MixMAE as MixMAE
    from .models.weights import load_encoder as load_encoder
    from .models.weights import load_model as load_model
    from .runs.notebooks import run_notebook as run_notebook
    from .scenes.open import open_scene as open_scene
    from .scenes.open import save_scene as save_scene
    from .viz.widgets import compare_masks as compare_masks

# Where each name lies; a module is imported when its first name is asked for, so `import sarfm` itself stays light.
_HOMES = {
    "DINO": "models.dino",
    "MAE": "models.mae",
    "MixMAE": "models.mixmae",
    "build_encoder": "models.kinds",
    "collect_runs": "evaluation.report",
    "compare_masks": "viz.widgets",
    "load_encoder": "models.weights",
    "load_model": "models.weights",
    "open_dataset": "datasets.catalog",
    "open_prediction": "evaluation.predict",
    "open_scene": "scenes.open",
    "predict_scene": "evaluation.predict",
    "run_notebook": "runs.notebooks",
    "save_scene": "scenes.open",
}

__all__ = [
    "DINO",
    "MAE",
    "MixMAE",
    "__version__",
    "build_encoder",
    "collect_runs",
    "compare_masks",
    "load_encoder",
    "load_model",
    "open_dataset",
    "open_prediction",
    "open_scene",
    "predict_scene",
    "run_notebook",
    "save_scene",
]


def __getattr__(name: str) -> Any:
    """Import a name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sarfm' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(f"sarfm.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    """List what can be imported from here."""
    return sorted({*globals(), *__all__})
