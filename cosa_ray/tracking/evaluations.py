"""Evaluations made after the fact, logged to the run they are of."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from cosa_ray.tracking.store import Store, find_run

log = logging.getLogger(__name__)
_METRICS_A_REQUEST = 500


def log_evaluation(
    store: Store,
    run: str,
    folder: str,
    *,
    run_id: str | None,
    metrics: Mapping[str, float],
    step: int,
    artifacts: Path,
    place: str,
    tags: Mapping[str, str] | None = None,
) -> str | None:
    """Log metrics at a step, tags, and a local folder's files under `place`, to an MLflow run; returns its id.

    run_id: the run's MLflow id where it is known; else it is found by its name and folder. The same evaluation logged
    again adds no second point. None, with a warning, when MLflow does not have the run or does not answer: the
    evaluation stays in the run's folder.
    """
    from mlflow.entities import Metric

    try:
        client = store.client()
        run_id = run_id or find_run(client, store.experiment_id(client), run, folder)
        if run_id is None:
            log.warning("MLflow at %s has no run %s; its evaluation is not logged there", store.shown, run)
            return None
        now = time.time_ns() // 1_000_000
        latest = {point.key: point for point in client.get_run(run_id).to_proto().data.metrics}

        def is_there(key: str, value: float) -> bool:
            point = latest.get(key)
            if point is None or point.step <= step:
                return point is not None and (point.step, point.value) == (step, value)
            history = client.get_metric_history(run_id, key)  # an older checkpoint, evaluated after a newer one
            return any((each.step, each.value) == (step, value) for each in history)

        new = [Metric(key, value, now, step) for key, value in metrics.items() if not is_there(key, value)]
        for start in range(0, len(new), _METRICS_A_REQUEST):
            client.log_batch(run_id, metrics=new[start : start + _METRICS_A_REQUEST])
        for key, content in (tags or {}).items():
            client.set_tag(run_id, key, content)
        client.log_artifacts(run_id, str(artifacts), place)
        return run_id
    except Exception as error:
        log.warning("the evaluation of run %s is not in MLflow at %s: %s", run, store.shown, store.said(error))
        return None
