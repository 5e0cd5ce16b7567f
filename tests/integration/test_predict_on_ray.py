"""Evaluation and prediction on Ray's workers: the same numbers and masks as in one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_ray.errors import UserError
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.predicting import predict

pytestmark = pytest.mark.ray


def test_ray_workers_count_what_one_process_counts(trained_run: Path, ray_cluster: str) -> None:
    """Two actors, one of them killed while it works: its part is done again, and the counts are the same."""
    import psutil
    import ray

    alone = evaluate_run(str(trained_run), protocol="single_scale", local=True, track=False)
    killed: list[int] = []

    def show(done: int, total: int) -> None:
        if killed:
            return
        for process in psutil.process_iter(["cmdline"]):
            if any("_Part" in word for word in process.info["cmdline"] or ()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    together = evaluate_run(str(trained_run), protocol="single_scale", workers=2, track=False, show=show)
    assert killed, "no worker was there to be killed"
    assert together.metrics == pytest.approx(alone.metrics, abs=1e-9)
    assert together.worst == alone.worst
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "the workers gave their CPUs back"


@pytest.mark.slow
def test_crf_tasks_stream_counts(trained_run: Path, ray_cluster: str) -> None:
    pytest.importorskip("pydensecrf")
    here = evaluate_run(str(trained_run), protocol="release", local=True, track=False)
    tasks = evaluate_run(str(trained_run), protocol="release", workers=1, track=False)
    assert tasks.metrics == pytest.approx(here.metrics, abs=1e-9)
    assert "val/release/miou_labels_given_crf" in here.metrics
    assert here.metrics["val/release/miou_crf"] != here.metrics["val/release/miou"]


def test_the_pipeline_on_ray_gives_the_same_masks(
    trained_run: Path, pictures: Path, tmp_path: Path, ray_cluster: str
) -> None:
    shown: list[tuple[int, int, int]] = []
    here = predict(str(trained_run), [str(pictures)], out=str(tmp_path / "here"), local=True)
    there = predict(
        str(trained_run), [str(pictures)], out=str(tmp_path / "there"), workers=1, show=lambda *at: shown.append(at)
    )
    assert sorted(there.skipped) == sorted(here.skipped)
    assert shown[-1] == (5, 5, 2)
    for name in ("a", "b", "below/c"):
        mine, theirs = (tmp_path / where / "masks" / f"{name}.png" for where in ("here", "there"))
        assert (np.asarray(Image.open(mine)) == np.asarray(Image.open(theirs))).mean() > 0.999
    with pytest.raises(UserError, match="lower --workers"):
        predict(str(trained_run), [str(pictures)], out=str(tmp_path / "many"), workers=40)
