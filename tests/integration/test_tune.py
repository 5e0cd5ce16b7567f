"""Real sweeps on a real cluster: how trials end, what MLflow shows of them, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cosa_ray.config.load import dump_config, flatten, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.tuning.sweep import Sweep, run_sweep

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
Make = Callable[..., Config]


def idle(ray_cluster: str, cpus: float = 2.0, seconds: float = 60.0) -> bool:
    """True once the cluster has all its CPUs back and no placement group is left."""
    import ray
    from ray.util import placement_group_table

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU", 0.0) == cpus:
            return True
        time.sleep(0.5)
    return False


def tracked(uri: str) -> dict[str, object]:
    """MLflow runs of the store by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(experiments)}


def test_a_sweep_from_start_to_best(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """One learning rate makes every run diverge, the other works: one trial of three fails, and is told apart."""
    base = tiny(training__steps=16, evaluation__every=4)
    sweep = Sweep.model_validate(
        {
            "base": "tiny",
            "space": {"optimiser.lr": {"choice": [1e-3, 1e30]}, "losses.cam_to_seg": {"uniform": [0.1, 0.2]}},
            "search": "random",
            "search_seed": 6,
            "trials": 3,
            "scheduler": "asha",
        }
    )
    shown: list = []
    result = run_sweep(sweep, base, name="first", show=shown.append)

    assert result.state == "finished"
    assert idle(ray_cluster)
    assert len(result.trials) == len({trial.id for trial in result.trials}) == 3
    good = [trial for trial in result.trials if trial.values["optimiser.lr"] == 1e-3]
    bad = [trial for trial in result.trials if trial.values["optimiser.lr"] == 1e30]
    assert good
    assert bad
    assert {(trial.state, trial.kind) for trial in bad} == {("failed", "diverged")}
    assert all("not finite" in (trial.cause or "") for trial in bad)
    assert {trial.state for trial in good} <= {"finished", "stopped_early"}
    assert result.best in good
    assert result.best.score == max(trial.score for trial in good)
    assert result.best.score == result.best.metrics["val/miou"]

    runs = tracked(base.tracking.uri or "")
    assert set(runs) == {"first", *(trial.name for trial in result.trials)}
    assert runs["first"].info.run_id == result.parent_run_id
    assert runs["first"].info.status == "FINISHED"
    assert runs["first"].data.tags["cosa_ray.best_trial"] == result.best.name
    for trial in result.trials:
        run = runs[trial.name]
        assert run.info.run_id == trial.mlflow_run_id
        assert run.data.tags["mlflow.parentRunId"] == result.parent_run_id
        assert run.info.status == ("FAILED" if trial in bad else "FINISHED")
        assert ("cosa_ray.stopped_by" in run.data.tags) == (trial.state == "stopped_early")
        assert run.data.tags.get("cosa_ray.failure") == ("diverged" if trial in bad else None)
        assert float(run.data.params["losses.cam_to_seg"]) == pytest.approx(trial.values["losses.cam_to_seg"])
        settings = yaml.safe_load((Path(trial.folder) / "config.yaml").read_text())
        assert trial.config == json.loads(json.dumps(settings))
    assert runs["first"].data.metrics["val/miou"] == result.best.score

    best = load_config(result.best_file)
    changed = {key: value for key, value in flatten(best).items() if value != flatten(base)[key]}
    assert changed == {k: pytest.approx(v) for k, v in result.best.values.items() if flatten(base)[k] != v}
    kept = {trial.name for trial in result.trials if (Path(trial.folder) / "checkpoints.json").exists()}
    assert kept == {result.best.name}
    assert json.loads((Path(result.folder) / "sweep.json").read_text())["best"]["id"] == result.best.id
    assert shown[-1].ended == 3
    assert any(row.state == "running" and row.step for progress in shown for row in progress.rows)

    # Cut between Tune's end and the writing of the result: everything is found again, without a step of Tune.
    files = Path(result.folder)
    written = (files / "best.yaml").read_text()
    (files / "best.yaml").unlink()
    (files / "sweep.json").unlink()
    resumed = run_sweep(sweep, base, name="first", resume=True)
    assert resumed.state == "finished"
    assert (files / "best.yaml").read_text() == written
    outcomes = [(trial.id, trial.state, trial.score, trial.config) for trial in result.trials]
    assert [(t.id, t.state, t.score, t.config) for t in resumed.trials] == outcomes
    assert resumed.best.id == result.best.id
    assert resumed.parent_run_id == result.parent_run_id
    assert tracked(base.tracking.uri or "")["first"].info.status == "FINISHED"

    with pytest.raises(UserError, match="exists already"):
        run_sweep(sweep, base, name="first")
    with pytest.raises(UserError, match=r"other settings .*search_seed"):
        run_sweep(sweep.model_copy(update={"search_seed": 5}), base, name="first", resume=True)


@pytest.mark.timeout(120)
def test_a_sweep_that_cannot_fit_is_refused_not_waited_for(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    sweep = Sweep.model_validate({"base": "tiny", "space": {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}, "trials": 2})
    with pytest.raises(UserError, match=r"3 workers x 1 .* = 3.001 CPUs, and there are 2 CPUs"):
        run_sweep(sweep, tiny(workers=3, resources__cpus_per_worker=1.0), name="large")
    assert not (tmp_path / "runs").exists(), "the name is free for the next attempt"


@pytest.mark.slow
def test_when_every_trial_fails_the_sweep_fails_with_the_cause(ray_cluster: str, tiny: Make) -> None:
    sweep = Sweep.model_validate({"base": "tiny", "space": {"optimiser.lr": {"choice": [1e30]}}, "trials": 1})
    with pytest.raises(RunFailed, match="not finite"):
        run_sweep(sweep, tiny(), name="hopeless")
    assert idle(ray_cluster)
    assert {run.info.status for run in tracked(tiny().tracking.uri or "").values()} == {"FAILED"}


@pytest.mark.slow
def test_when_tune_breaks_down_nothing_stays_open(
    ray_cluster: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error out of Tune's own loop, at the first report of a trial that runs."""
    from cosa_ray.training.runs import read_run
    from cosa_ray.tuning.hooks import Follow

    def broken(self: Follow, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(Follow, "on_trial_result", broken)
    base = tiny(training__steps=400)
    with pytest.raises(Exception, match="broken"):
        run_sweep(sweep_of_one(), base, name="broken")
    runs = tracked(base.tracking.uri or "")
    assert runs.pop("broken").info.status == "FAILED"
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    records = [read_run(str(folder)) for folder in Path(base.storage).glob("broken-*")]
    assert [run.record.state for run in records if run] == ["stopped"] * len(runs)
    assert runs
    assert idle(ray_cluster)


def sweep_of_one() -> Sweep:
    return Sweep.model_validate({"base": "tiny", "space": {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}, "trials": 1})


@pytest.mark.slow
def test_ctrl_c_then_resume(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """Interrupted trials write a checkpoint; resumed, the same trials go on from there and all end."""
    (tmp_path / "base.yaml").write_text(dump_config(tiny(training__steps=400, evaluation__every=200)))
    (tmp_path / "sweep.yaml").write_text(
        "base: base.yaml\nspace: {losses.cam_to_seg: {uniform: [0.1, 0.2]}}\ntrials: 3\nsearch: tpe\n"
    )
    command = [sys.executable, "-m", "cosa_ray.cli.main", "tune", "sweep.yaml", "--name", "again", "--json"]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = tmp_path / "runs"

    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (moving := list(runs.glob("again-*/checkpoints.json"))) and time.monotonic() < end:
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    stopped = json.loads(first.communicate(timeout=300)[0])
    assert first.returncode == 0
    assert stopped["state"] == "stopped"
    states = {trial["name"]: (trial["state"], trial["step"]) for trial in stopped["trials"]}
    cut = moving[0].parent.name
    assert states[cut][0] == "interrupted"
    assert 0 < states[cut][1] < 400
    assert idle(ray_cluster)
    uri = tiny().tracking.uri or ""
    assert tracked(uri)[cut].info.status == "KILLED"
    assert tracked(uri)["again"].info.status == "KILLED"

    second = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    resumed = json.loads(second.stdout)
    assert resumed["state"] == "finished"
    assert resumed["parent_run_id"] == stopped["parent_run_id"]
    assert {trial["state"] for trial in resumed["trials"]} == {"finished"}
    assert {trial["step"] for trial in resumed["trials"]} == {400}
    assert len(resumed["trials"]) == 3
    again = {trial["name"]: trial["mlflow_run_id"] for trial in resumed["trials"]}
    assert again[cut] == next(trial["mlflow_run_id"] for trial in stopped["trials"] if trial["name"] == cut)
    assert {run.info.status for run in tracked(uri).values()} == {"FINISHED"}
    assert tracked(uri)["again"].data.metrics["val/miou"] == resumed["best"]["score"]
    # The run went on where it had stopped: no step of the first session was logged again.
    from tests.conftest import history

    steps = [step for step, _ in history(uri, again[cut], "train/loss")]
    assert steps == sorted(set(steps))
    assert idle(ray_cluster)
