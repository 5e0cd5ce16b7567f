"""A promotion on a real cluster: trained, evaluated, registered, written down; and nothing of it a second time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cosa_ray.config.load import apply_overrides, dump_config, load_config
from cosa_ray.config.schema import Config
from cosa_ray.tuning.promote import promote_sweep
from cosa_ray.tuning.promotion import Promotion
from cosa_ray.tuning.results import SweepResult, TrialResult, write_result
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
Make = Callable[..., Config]


def write_sweep(base: Config) -> Path:
    """The folder of a sweep of three short trials, as it leaves it; its runs themselves are not needed."""
    from cosa_ray.training.storage import RunFolder

    sweep = {
        "base": "tiny",
        "set": {"training.steps": 12},
        "space": {"losses.cam_to_seg": {"uniform": [0.05, 0.4]}, "optimiser.lr": {"loguniform": [1e-4, 1e-2]}},
        "trials": 3,
    }
    short = apply_overrides(base, {"training.steps": 12})
    folder = RunFolder(f"{base.storage}/first")
    folder.write_text("sweep.yaml", dump_sweep(Sweep.model_validate(sweep)))
    folder.write_text("base.yaml", dump_config(short))
    trials = []
    for number, (weight, rate, score) in enumerate([(0.1, 1e-3, 0.20), (0.3, 2e-3, 0.25), (0.2, 5e-4, 0.15)]):
        values: dict[str, Any] = {"losses.cam_to_seg": weight, "optimiser.lr": rate}
        trials.append(
            TrialResult(
                id=f"{number:03d}",
                name=f"first-{number:03d}",
                state="finished",
                values=values,
                step=12,
                score=score,
                metrics={"val/miou": score},
                folder=f"{base.storage}/first-{number:03d}",
                mlflow_run_id=None,
                cause=None,
                config=apply_overrides(short, values).model_dump(mode="json"),
                scores={"val/miou": score},
                configuration=number,
            )
        )
    result = SweepResult(
        "first", folder.uri, "finished", "val/miou", "max", None, None, trials, trials[1], None, {"val/miou": "max"}
    )
    write_result(folder, result)
    return Path(folder.path)


class Promoted(NamedTuple):
    """A sweep's folder, what became of its best configuration, the base experiment, and what was said meanwhile."""

    sweep: Path
    done: Promotion
    base: Config
    said: list[str]

    def written(self) -> dict[str, int]:
        """When every file was written, but those that a promotion writes each time with the same content."""
        own = ("promoted.json", "results.md")
        kept = [file for file in self.sweep.parent.rglob("*") if file.is_file() and file.name not in own]
        return {str(file): file.stat().st_mtime_ns for file in kept}


@pytest.fixture
def promoted(ray_cluster: str, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> Promoted:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    base, said = tiny(), []
    sweep = write_sweep(base)
    given: dict[str, Any] = {"seeds": 2, "overrides": ["training.steps=20"], "storage": str(sweep.parent)}
    done = promote_sweep("first", protocols=["single_scale"], say=said.append, **given)
    return Promoted(sweep, done, base, said)


def test_from_sweep_to_result_and_once_only(promoted: Promoted) -> None:
    from mlflow import MlflowClient

    from cosa_ray.tracking.registry import open_registered

    sweep, done, base, said = promoted
    assert done.state == "finished"
    assert done.metric == "val/single_scale/miou"
    names = {f"first-promoted-{number:03d}" for number in range(2)}
    runs = {run.name: run for each in done.configurations for run in each.runs}
    assert set(runs) == names
    assert {(run.state, run.step) for run in runs.values()} == {("finished", 20)}
    (winner,) = done.configurations
    assert done.winner is winner
    assert (winner.source, winner.source_score) == ("001", 0.25)
    assert winner.values == {"losses.cam_to_seg": 0.3, "optimiser.lr": 2e-3}
    assert {run.seed for run in winner.runs} == {1, 2}
    assert any("training.steps 20 (in the sweep 12)" in line for line in said)
    for run in winner.runs:
        folder = Path(run.folder)
        config = load_config(folder / "config.yaml")
        assert (config.seed, config.training.steps, config.losses.cam_to_seg) == (run.seed, 20, 0.3)
        (file,) = folder.glob("evaluations/val.single_scale/*/result.json")
        measured = json.loads(file.read_text())["metrics"]
        for name in ("val/single_scale/miou", "val/single_scale/cam_miou_best"):
            assert run.metrics[name] == measured[name]
    scores = [run.metrics[done.metric] for run in winner.runs]
    model = done.model
    assert model is not None
    assert model.metrics[done.metric] == max(scores)
    table = (sweep.parent / "first-promoted" / "results.md").read_text().splitlines()
    assert table[2] == done.markdown_row()
    assert f"| 2 | 20 | {statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} |" in table[2]
    assert json.loads((sweep.parent / "first-promoted" / "promoted.json").read_text()) == json.loads(
        json.dumps(done.as_json())
    )

    client = MlflowClient(tracking_uri=base.tracking.uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == base.tracking.experiment]
    tracked = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(tracked) == names | {"first-promoted"}
    assert {run.data.tags["cosa_ray.promoted_from"] for run in tracked.values()} == {"first"}
    parent = tracked["first-promoted"]
    assert parent.info.run_id == done.parent_run_id
    assert parent.data.tags["cosa_ray.winner"] == model.name
    assert parent.data.metrics[f"{done.metric}_mean"] == pytest.approx(statistics.mean(scores))
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "promotion")} == {
        "promotion/promoted.json",
        "promotion/results.md",
    }
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in tracked.items() if name in names} == {
        parent.info.run_id
    }

    # Registered afterwards, with nothing else done twice; and then not registered twice either.
    before = promoted.written()
    for _ in range(2):
        again = promote_sweep(
            "first",
            protocols=["single_scale"],
            register="shapes model",
            aliases=["champion"],
            resume=True,
            storage=str(sweep.parent),
        )
    assert promoted.written() == before
    assert again.configurations == done.configurations
    assert again.markdown_row() == done.markdown_row()
    assert again.registered is not None
    (version,) = client.search_model_versions("name='shapes model'")
    assert version.run_id == model.mlflow_run_id == client.get_model_version_by_alias("shapes model", "champion").run_id
    with open_registered("models:/shapes model@champion", base.tracking.uri or "") as folder:
        assert json.loads((folder / "checkpoint.json").read_text())["step"] == model.step
    after = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(after) == set(tracked)
    for name, run in after.items():
        points = client.get_metric_history(run.info.run_id, f"{done.metric}{'_mean' if name not in names else ''}")
        assert len(points) == 1


def test_another_protocol_for_the_same_runs(promoted: Promoted, tmp_path: Path) -> None:
    """The first one given decides; nothing that is there is done again, and what is registered stays so."""
    storage = str(promoted.sweep.parent)
    first = promote_sweep("first", protocols=["single_scale"], register="shapes model", resume=True, storage=storage)
    before = promoted.written()
    (tmp_path / "short_side.yaml").write_text("scales: [1.0]\nflip: true\nnetworks: [assignment]\nlabels: [none]\n")
    other = promote_sweep(
        "first",
        protocols=[str(tmp_path / "short_side.yaml"), "single_scale"],
        resume=True,
        storage=storage,
    )
    assert other.registered == first.registered
    assert other.registered is not None
    assert other.metric == "val/short_side/miou"
    assert other.columns == ["val/short_side/miou", "val/single_scale/miou", "val/short_side/cam_miou_best"]
    after = promoted.written()
    assert set(before) < set(after)
    assert {name: stamp for name, stamp in after.items() if name in before} == before
