"""CoSA at scale: weakly supervised semantic segmentation on Ray and MLflow.

What a verb of `cosa-ray` does is one function here; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Config": "cosa_ray.config.schema",
    "load_config": "cosa_ray.config.load",
    "import_dataset": "cosa_ray.data.importing",
    "open_dataset": "cosa_ray.data.dataset",
    "add_subset": "cosa_ray.data.subsets",
    "check_dataset": "cosa_ray.data.check",
    "train": "cosa_ray.training.driver",
    "evaluate_run": "cosa_ray.training.evaluating",
    "predict": "cosa_ray.training.predicting",
    "register_run": "cosa_ray.training.models",
    "import_release": "cosa_ray.training.release",
    "run_sweep": "cosa_ray.tuning.sweep",
    "load_sweep": "cosa_ray.tuning.sweepfile",
    "promote_sweep": "cosa_ray.tuning.promote",
    "run_demo": "cosa_ray.tuning.demo",
    "run_ablation": "cosa_ray.ablation.study",
    "load_ablation": "cosa_ray.ablation.plan",
    "compare_runs": "cosa_ray.reporting.compare",
    "submit_job": "cosa_ray.jobs.submit",
    "UserError": "cosa_ray.errors",
    "RunFailed": "cosa_ray.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'cosa_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
