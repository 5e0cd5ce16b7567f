"""Sweeps whose processes are killed, whose trials fail or copy each other, and whose budget ends; all for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.tuning.sweep import Sweep, run_sweep
from tests.conftest import history
from tests.integration.test_tune import idle, tracked

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
Make = Callable[..., Config]
SPACE = {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}


def sweep_of(**more: object) -> Sweep:
    return Sweep.model_validate({"base": "tiny", "space": SPACE, "search": "random", **more})


def start(folder: Path, address: str, name: str, *words: str) -> subprocess.Popen[str]:
    """`cosa-ray tune sweep.yaml` in a process group of its own."""
    command = [sys.executable, "-m", "cosa_ray.cli.main", "tune", "sweep.yaml", "--name", name, "--json", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if address:
        environment["RAY_ADDRESS"] = address
    else:
        environment.pop("RAY_ADDRESS", None)
    with (folder / "err.log").open("a") as errors:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def write_sweep(folder: Path, base: Config, **more: object) -> None:
    (folder / "base.yaml").write_text(dump_config(base))
    (folder / "sweep.yaml").write_text(json.dumps({"base": "base.yaml", "space": SPACE, "search": "tpe", **more}))


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 240
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.1)


def checkpointed(folder: Path, name: str, count: int) -> bool:
    """True once so many trials of a sweep have a checkpoint."""
    return len(list((folder / "runs").glob(f"{name}-*/checkpoints.json"))) >= count


def assert_whole(uri: str, result: dict, steps: int) -> None:
    """Every trial is one finished MLflow run with every step once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    names = [run.info.run_name for run in runs]
    assert sorted(names) == sorted([result["name"], *(trial["name"] for trial in result["trials"])])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for trial in result["trials"]:
        points = [step for step, _ in history(uri, trial["mlflow_run_id"], "train/loss")]
        assert points == list(range(1, steps + 1)), trial["name"]


def test_a_killed_driver_loses_nothing(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """kill -9 in the middle: the sweep goes on with the trial that ran, and the one that had ended is left alone."""
    base = tiny(training__steps=40, evaluation__every=20, checkpoint__every=20)
    write_sweep(tmp_path, base, trials=2, concurrency=1, search_seed=4)
    first = start(tmp_path, ray_cluster, "cut")
    # The first has ended, the second is on its way.
    wait_until(lambda: checkpointed(tmp_path, "cut", 2), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {file.name: json.loads(file.read_text()) for file in (tmp_path / "runs/cut/trials").iterdir()}
    assert before["000.json"]["state"] == "finished"
    assert before["001.json"]["state"] == "running"
    assert idle(ray_cluster)
    weights = tmp_path / "runs/cut-000"
    untouched = {file: file.stat().st_mtime_ns for file in weights.rglob("*") if file.is_file()}

    status = subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "status", "cut", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert [row["state"] for row in json.loads(status.stdout)["progress"]["rows"]] == ["finished", "running"]

    second = start(tmp_path, ray_cluster, "cut", "--resume", "--set", "keep=all")
    result = json.loads(second.communicate(timeout=400)[0])
    assert second.returncode == 0, (tmp_path / "err.log").read_text()
    assert [(trial["id"], trial["state"], trial["step"]) for trial in result["trials"]] == [
        (number, "finished", 40) for number in ("000", "001")
    ]
    assert {file: file.stat().st_mtime_ns for file in weights.rglob("*") if file in untouched} == untouched
    assert [trial["values"] for trial in result["trials"]] == [before[f"00{n}.json"]["values"] for n in (0, 1)]
    assert_whole(base.tracking.uri or "", result, 40)
    assert idle(ray_cluster)


@pytest.mark.slow
def test_a_population_copies_weights_and_thresholds_bitwise(ray_cluster: str, tiny: Make) -> None:
    """Copied without a change of settings, the copy and its donor are one and the same run from there on."""
    base = tiny(training__steps=20, training__warmup_iters=4, evaluation__every=10, storage=tiny().storage)
    sweep = Sweep.model_validate(
        {
            "base": "tiny",
            "space": {"optimiser.lr": {"loguniform": [1e-5, 2e-3]}, "losses.cam_to_seg": {"uniform": [0.1, 0.2]}},
            "points": [{"optimiser.lr": 2e-3}, {"optimiser.lr": 1e-5}],
            "search": "points",
            "metric": "train/loss",
            "mode": "min",
            "scheduler": "pbt",
            "pbt": {"share": 0.5, "resample": 0.0, "factors": [1.0]},
            "keep": "all",
        }
    )
    result = run_sweep(sweep, base, name="herd")
    assert result.state == "finished"
    assert idle(ray_cluster)
    (copied,) = [trial for trial in result.trials if trial.lineage]
    (donor,) = [trial for trial in result.trials if not trial.lineage]
    assert copied.lineage == [{"step": 10, "donor": int(donor.id), "values": donor.values}]
    assert copied.values == donor.values

    def weights(trial: object) -> dict:
        (last,) = sorted(Path(trial.folder).glob("checkpoints/step_00000020*"))  # type: ignore[attr-defined]
        return {
            f"{net}/{key}": value
            for net in ("online", "assignment")
            for key, value in load_file(last / f"{net}.safetensors").items()
        }

    mine, theirs = weights(copied), weights(donor)
    assert mine.keys() == theirs.keys()
    assert all((mine[key] == theirs[key]).all() for key in mine)
    uri = base.tracking.uri or ""
    for metric in ("train/loss", "threshold/background"):
        one, other = (dict(history(uri, trial.mlflow_run_id, metric)) for trial in (copied, donor))
        assert list(one) == list(other) == list(range(1, 21))
        assert [one[step] for step in range(11, 21)] == [other[step] for step in range(11, 21)]
        if metric == "train/loss":
            assert [one[step] for step in range(1, 11)] != [other[step] for step in range(1, 11)]
    runs = tracked(uri)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(runs) == 3


@pytest.mark.slow
def test_failures_in_a_row_end_a_sweep_and_memory_is_named(ray_cluster: str, tiny: Make) -> None:
    """An allocation no machine has fails as such; the second in a row ends the sweep, before the other four run."""
    sweep = Sweep.model_validate(
        {
            "base": "tiny",
            "space": {"model.decoder_width": {"choice": [2_000_000_000, 1_999_999_999]}},
            "search": "random",
            "trials": 6,
            "concurrency": 1,
            "failures": 2,
        }
    )
    base = tiny(resources__max_failures=0)
    with pytest.raises(RunFailed, match=r"2 trials in a row failed, the last \(001\) because of: .*memory"):
        run_sweep(sweep, base, name="greedy")
    entries = [json.loads(file.read_text()) for file in sorted((Path(base.storage) / "greedy/trials").iterdir())]
    assert [(entry["state"], entry["kind"]) for entry in entries] == [("failed", "out_of_memory")] * 2
    runs = tracked(base.tracking.uri or "")
    assert runs["greedy-000"].data.tags["cosa_ray.failure"] == "out_of_memory"
    assert {run.info.status for run in runs.values()} == {"FAILED"}
    assert idle(ray_cluster)


@pytest.mark.slow
def test_a_killed_trial_goes_on_by_itself(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """kill -9 of a trial's own process: it is started again from its checkpoint, in the same MLflow run."""
    base = tiny(training__steps=200, evaluation__every=100, checkpoint__every=20)
    write_sweep(tmp_path, base, trials=1)
    driver = start(tmp_path, ray_cluster, "hit")
    wait_until(lambda: checkpointed(tmp_path, "hit", 1), driver)
    (victim,) = [process for process in psutil.process_iter(["cmdline"]) if _is_trial(process)]
    victim.kill()
    result = json.loads(driver.communicate(timeout=400)[0])
    assert driver.returncode == 0, (tmp_path / "err.log").read_text()
    assert [(trial["state"], trial["step"]) for trial in result["trials"]] == [("finished", 200)]
    assert_whole(base.tracking.uri or "", result, 200)
    assert idle(ray_cluster)


def _is_trial(process: psutil.Process) -> bool:
    """True for the process of a Tune trial's driver."""
    return "ImplicitFunc" in " ".join(process.info["cmdline"] or [])


@pytest.mark.slow
def test_a_budget_ends_trials_that_a_larger_one_goes_on_with(ray_cluster: str, tiny: Make) -> None:
    base = tiny(training__steps=400, evaluation__every=20, checkpoint__every=20, training__warmup_iters=8)
    small = sweep_of(trials=2, concurrency=1, budget={"steps": 60})
    first = run_sweep(small, base, name="thrifty")
    assert first.state == "finished"
    assert "budget.steps 60 is spent" in (first.cause or "")
    (cut,) = first.trials
    assert (cut.state, cut.stopped_by) == ("interrupted", "budget")
    assert 60 <= cut.step < 400
    assert first.best is not None
    assert idle(ray_cluster)
    large = small.model_copy(update={"budget": small.budget.model_copy(update={"steps": None})})
    second = run_sweep(large, base, name="thrifty", resume=True)
    assert [(trial.state, trial.step) for trial in second.trials] == [("finished", 400)] * 2
    assert second.parent_run_id == first.parent_run_id
    assert_whole(base.tracking.uri or "", second.as_json(), 400)
