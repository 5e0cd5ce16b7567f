"""A run in one process: trains, evaluates, checkpoints, stops, resumes bitwise, diverges honestly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.driver import train
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.runs import find_run
from cosa_ray.training.session import Progress
from tests.conftest import history

Make = Callable[..., Config]


def curve(config: Config, run_id: str | None) -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert run_id is not None
    return history(config.tracking.uri, run_id, "train/loss")


def test_a_run_leaves_everything_it_promises(tiny: Make) -> None:
    config = tiny()
    result = train(config, name="one", local=True)
    assert (result.state, result.step, result.metric) == ("finished", 20, "val/miou")
    assert 0.0 <= result.last_metrics["val/miou"] <= 1.0
    steps = [step for step, _ in curve(config, result.mlflow_run_id)]
    assert steps == list(range(1, 21))
    folder = Path(result.folder)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert "step_00000020" in kept
    assert not list(folder.glob("checkpoints/*/state.pt")), "a finished run keeps weights only"
    # The same protocol outside the run gives the same numbers.
    again = evaluate_run("one", storage=config.storage, which="last")
    for name in ("val/miou", "val/miou_online", "val/miou_labels_given", "val/cam_miou_best"):
        assert again.metrics[name] == pytest.approx(result.last_metrics[name], abs=1e-9)


def test_same_seed_same_bits_and_another_seed_other_ones(tiny: Make) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = train(tiny(seed=seed), name=name, local=True, track=False)
        assert result.last_checkpoint is not None
        weights.append(load_file(Path(result.last_checkpoint) / "online.safetensors"))
    a, b, c = weights
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_accumulation_gives_the_same_losses(tiny: Make) -> None:
    curves = []
    for name, accumulate in (("whole", 1), ("halves", 2)):
        config = tiny(training__accumulate=accumulate)
        curves.append(curve(config, train(config, name=name, local=True).mlflow_run_id))
    for (step, whole), (_, halves) in zip(*curves, strict=True):
        assert halves == pytest.approx(whole, abs=1e-4), f"step {step}"


@pytest.mark.parametrize("at", [3, 11])
def test_a_stop_leaves_a_checkpoint_that_resumes_bitwise(tiny: Make, at: int) -> None:
    """Stopped in warm-up and in co-training by a real SIGTERM; the loss curve is that of a run nobody stopped."""
    config = tiny(checkpoint__every=100, evaluation__every=100)
    undisturbed = train(config, name="undisturbed", local=True)
    sent = threading.Event()

    def show(progress: Progress) -> None:
        if progress.step >= at and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)

    import cosa_ray.training.loop as loop

    before, loop.PROGRESS_SECONDS = loop.PROGRESS_SECONDS, 0.0
    try:
        stopped = train(config, name="stopped", local=True, show=show)
    finally:
        loop.PROGRESS_SECONDS = before
    assert sent.is_set()
    assert stopped.state == "stopped"
    assert at <= stopped.step <= at + 2
    resumed = train(config, name="stopped", resume=True, local=True)
    assert resumed.state == "finished"
    assert curve(config, resumed.mlflow_run_id) == curve(config, undisturbed.mlflow_run_id)
    a, b = (load_file(Path(r.last_checkpoint or "") / "assignment.safetensors") for r in (undisturbed, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_non_finite_loss_stops_the_run_and_is_named(tiny: Make) -> None:
    config = tiny(optimiser__lr=1e30, optimiser__clip_norm=None, checkpoint__every=1)
    with pytest.raises(RunFailed, match=r"loss_cls.* not finite at step \d+"):
        train(config, name="diverged", local=True)
    run = find_run("diverged", config.storage)
    assert run.record.state == "diverged"


def test_a_gradient_that_is_not_finite_stops_the_run_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import cosa_ray.training.loop as loop

    original, calls = loop.classification_step, []

    def poisoned(online: torch.nn.Module, *rest: Any, **named: Any) -> Any:
        output = original(online, *rest, **named)
        calls.append(online)
        if len(calls) == 4:
            next(online.parameters()).grad[0] = torch.inf  # type: ignore[index]
        return output

    monkeypatch.setattr(loop, "classification_step", poisoned)
    config = tiny(checkpoint__every=1)
    with pytest.raises(RunFailed, match=r": gradient not finite at step 4"):
        train(config, name="overflow", local=True, track=False)
    latest = find_run("overflow", config.storage).checkpoints.latest()
    assert latest is not None
    assert latest.step == 3


def test_a_taken_name_is_refused_and_nothing_changes(tiny: Make) -> None:
    config = tiny(training__steps=4, training__warmup_iters=2)
    result = train(config, name="mine", local=True, track=False)
    before = {path: path.stat().st_mtime_ns for path in Path(result.folder).rglob("*")}
    with pytest.raises(UserError, match="--resume"):
        train(config, name="mine", local=True, track=False)
    with pytest.raises(UserError, match=r"losses\.contrastive"):
        train(tiny(losses__contrastive=0.9), name="mine", resume=True, local=True, track=False)
    assert {path: path.stat().st_mtime_ns for path in Path(result.folder).rglob("*")} == before


def test_init_from_starts_with_the_other_runs_weights(tiny: Make) -> None:
    first = train(tiny(), name="first", local=True, track=False)
    assert first.best_checkpoint is not None
    second = train(
        tiny(init_from="first", optimiser__lr=1e-12, training__steps=3, training__warmup_iters=1),
        name="second",
        local=True,
        track=False,
    )
    better = json.loads((Path(first.best_checkpoint) / "checkpoint.json").read_text())["better_network"]
    source = load_file(Path(first.best_checkpoint) / f"{better}.safetensors")
    after = load_file(Path(second.last_checkpoint or "") / "online.safetensors")
    assert all(torch.allclose(source[key], after[key], atol=1e-6) for key in source)


def test_trains_with_ray_and_mlflow_blocked(tiny: Make, tmp_path: Path) -> None:
    """`train --local --no-track` on a machine that has neither."""
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(tiny()))
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'mlflow'):\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from cosa_ray.cli.main import main\n"
        f"main(['train', {str(file)!r}, '--local', '--no-track', '--name', 'bare', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["state"], result["step"], result["mlflow_run_id"]) == ("finished", 20, None)


def test_json_is_one_object_and_progress_goes_to_stderr(tiny: Make, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(tiny()))
    done = subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "train", str(file), "--local", "--name", "js", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"name", "folder", "mlflow_run_id", "best_metrics", "last_metrics", "best_checkpoint"} <= set(result)
    assert "step 20/20" in done.stderr
