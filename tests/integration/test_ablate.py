"""A study on a real cluster: one warm-up a seed, rows that go on from it, last checkpoints compared, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cosa_ray.ablation.plan import Ablation, plan_ablation
from cosa_ray.ablation.study import run_ablation
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.driver import resolve, train
from cosa_ray.training.runs import find_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
Make = Callable[..., Config]
ROWS = [
    {"name": "base"},
    {"name": "+ CSC", "set": {"losses.contrastive": 0.3}},
    {"name": "+ fixed", "set": {"dynamic_threshold.enabled": False}},
]


def test_a_study(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    base = tiny(losses__contrastive=0.0, checkpoint__keep_full_state=True)
    ablation = Ablation.model_validate({"base": "tiny", "rows": ROWS})
    said: list[str] = []
    with pytest.raises(UserError, match=r"no study study in .* to resume"):
        run_ablation(ablation, base, name="study", seeds=2, resume=True)
    given = tmp_path / "given.yaml"
    given.write_text("labels: [given]\n")
    with pytest.raises(UserError, match="plain mIoU, which it does not score"):
        run_ablation(ablation, base, name="study", seeds=2, protocol=str(given))
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text("split: test\n")
    with pytest.raises(UserError, match="no split 'test'"):
        run_ablation(ablation, base, name="study", seeds=2, protocol=str(elsewhere))
    assert not list(Path(base.storage).glob("study*")), "all of that before anything is trained"
    # Stopped after its first warm-up, it is resumed.
    first = plan_ablation(ablation, resolve(base, True), "study", 2).warm_ups[0]
    train(first.config, name=first.name)
    study = run_ablation(ablation, base, name="study", seeds=2, resume=True, say=said.append)
    assert (study.state, study.headline, study.seeds, study.failed) == ("finished", "val/miou", [0, 1], [])
    assert any("one warm-up of 4 steps a seed for all 3" in line for line in said)
    assert [row.name for row in study.rows] == [row["name"] for row in ROWS]
    # The rows are as if each had been trained whole.
    for seed in (0, 1):
        alone = train(
            tiny(losses__contrastive=0.3, seed=seed, checkpoint__keep_full_state=True),
            name=f"alone-{seed}",
            local=True,
            track=False,
        )
        run = find_run(study.rows[1].runs[seed], base.storage)
        assert run.last().metrics["val/miou"] == pytest.approx(alone.last_metrics["val/miou"], abs=1e-6)
        assert run.config().continue_from == f"study-warm-up-seed{seed}"
        assert run.last().step == 20
    for row in study.rows[1:]:
        found, above = row.differences["val/miou"], study.rows[0 if row.after == "base" else 1]
        assert row.after == above.name
        for seed in (0, 1):
            expected = row.metrics["val/miou"].by_seed[seed] - above.metrics["val/miou"].by_seed[seed]
            assert found.by_seed[seed] == pytest.approx(expected)
        assert found.over == "2 seeds and 11 images"
    # On the way, as MLflow has it; at the end the same as the evaluation afterwards.
    client = MlflowClient(base.tracking.uri)
    points = study.during["val/miou"]
    assert [at.step for at in points] == [10, 20]
    for row in study.rows:
        for seed in (0, 1):
            run_id = find_run(row.runs[seed], base.storage).record.mlflow_run_id
            logged = {each.step: each.value for each in client.get_metric_history(run_id, "val/miou")}
            for at in points:
                assert at.values[row.name].by_seed[seed] == logged[at.step]
        if row.after is not None:
            assert points[-1].differences[row.name].mean == pytest.approx(row.differences["val/miou"].mean, abs=1e-6)
    folder = Path(study.folder) / "ablation"
    files = {"ablation.json", "ablation.md", "differences.png", "courses.png", "during.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert {Path(each.path).name for each in client.list_artifacts(study.parent_run_id, "ablation")} == files
    assert json.loads((folder / "ablation.json").read_text())["rows"][2]["sets"] == ROWS[2]["set"]
    assert "## val/miou" in (folder / "ablation.md").read_text()
    page = client.get_run(study.parent_run_id).data.tags["mlflow.note.content"]
    assert page.startswith("**Study study**: val/miou of last checkpoints, 2 seeds")
    for row in study.rows:
        assert f"| {row.name} | {row.metrics['val/miou'].mean:.4f} ±" in page
    assert "**Best**" not in page, "what its sweep had written"
    with pytest.raises(UserError, match="--resume"):
        run_ablation(ablation, base, name="study", seeds=2)
    # Under another protocol: its numbers at the end, the runs' own on the way.
    single = run_ablation(ablation, base, name="study", seeds=2, protocol="single_scale", resume=True)
    assert single.headline == "val/single_scale/miou"
    assert (folder / "single_scale" / "ablation.json").exists()
    assert json.loads((folder / "ablation.json").read_text())["headline"] == "val/miou", "what was there is kept"
    assert single.during == study.during
    assert single.rows[1].metrics.keys().isdisjoint(study.rows[1].metrics)
    before = {path: path.stat().st_mtime_ns for path in Path(base.storage).rglob("*.safetensors")}
    again = run_ablation(ablation, base, name="study", seeds=2, resume=True)
    assert again.rows == study.rows
    assert {path: path.stat().st_mtime_ns for path in Path(base.storage).rglob("*.safetensors")} == before
