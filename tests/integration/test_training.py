"""A run in one process: trains, evaluates, checkpoints, stops, resumes bitwise, diverges honestly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training import driver
from cosa_ray.training.driver import conclude, prepare, train
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.loop import Outcome, run_worker
from cosa_ray.training.runs import find_run
from cosa_ray.training.session import LocalSession, Progress
from tests.conftest import history

Make = Callable[..., Config]


# What a bare machine with a GPU has; with the requirements of these, and nothing else.
BARE = {
    "torch",
    "timm",
    "torchvision",
    "numpy",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "pillow",
    "safetensors",
    "typer",
    "rich",
}


def curve(config: Config, run_id: str | None, key: str = "train/loss") -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert run_id is not None
    return history(config.tracking.uri, run_id, key)


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


@pytest.mark.parametrize("wish", [4, 5, 9, 10])
def test_a_stop_at_an_evaluation_loses_no_evaluation(tiny: Make, monkeypatch: pytest.MonkeyPatch, wish: int) -> None:
    """Wished in the step of an evaluation or the one before it, the last step's too: the curve has every point."""
    config = tiny(training__steps=10, training__warmup_iters=3, evaluation__every=5, checkpoint__every=100)
    undisturbed = train(config, name="undisturbed", local=True)

    class Stopping(LocalSession):
        steps = 0

        def stop_wished(self) -> bool:
            self.steps += 1
            return self.steps == wish

    with monkeypatch.context() as patch:
        patch.setattr(driver, "LocalSession", Stopping)
        stopped = train(config, name="stopped", local=True)
    at = 5 if wish <= 5 else 10
    assert (stopped.state, stopped.step) == ("finished" if at == 10 else "stopped", at)
    assert "val/miou" in stopped.last_metrics, "the checkpoint has the evaluation of its step"
    resumed = train(config, name="stopped", resume=True, local=True)
    assert resumed.state == "finished"
    expected = curve(config, undisturbed.mlflow_run_id, "val/miou")
    assert [step for step, _ in expected] == [5, 10]
    assert curve(config, resumed.mlflow_run_id, "val/miou") == expected
    assert resumed.last_metrics["val/miou"] == undisturbed.last_metrics["val/miou"]


def test_a_restart_reports_the_evaluation_of_its_checkpoint(tiny: Make) -> None:
    """Killed between a checkpoint and its report, a scheduler would never hear of that evaluation."""
    reported: list[dict[str, float]] = []

    class Listening(LocalSession):
        def report(self, metrics: dict[str, float]) -> None:
            reported.append(metrics)
            raise KeyboardInterrupt  # the end of the process, as far as the run can tell

    config = tiny(training__steps=10, training__warmup_iters=3, evaluation__every=5)
    _, job = prepare(config, "killed", track=False)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_worker(job, Listening(lambda progress: None, threading.Event()))
    assert [metrics["step"] for metrics in reported] == [5, 5]
    assert reported[0]["val/miou"] == reported[1]["val/miou"]


def test_workers_that_died_leave_no_run_open(tiny: Make) -> None:
    from mlflow import MlflowClient

    from cosa_ray.tracking.tracker import open_tracker

    config = tiny()
    run, job = prepare(config, "died", parent_run_id=None)
    tracker = open_tracker(job.tracking)
    tracker.log({"train/loss": 1.0}, 1)
    assert tracker.flush(60)
    client = MlflowClient(tracking_uri=config.tracking.uri)
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    result = conclude(run, job, Outcome("failed", 0, "killed for good"))
    ended = client.get_run(tracker.run_id)
    assert result.mlflow_run_id == tracker.run_id
    assert (ended.info.status, ended.data.tags["cosa_ray.cause"]) == ("FAILED", "killed for good")


def test_resuming_a_finished_run_delivers_what_waits(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from cosa_ray.tracking.spool import Spool

    config = tiny(training__steps=4, training__warmup_iters=2)
    first = train(config, name="one", local=True)
    Spool(f"{first.folder}/spool").write(
        "0000abcd", "metrics", [{"kind": "metrics", "time": 1, "step": 3, "values": {"late": 0.5}}]
    )
    again = train(config, name="one", local=True, resume=True)
    assert (again.state, again.step) == ("finished", 4)
    assert curve(config, first.mlflow_run_id, "late") == [(3, 0.5)]
    assert not list(Path(first.folder, "spool").glob("*.jsonl"))

    def broken(*_: object, **__: object) -> None:
        raise OSError("no store today")

    Spool(f"{first.folder}/spool").write("0000abcd", "metrics", [])
    monkeypatch.setattr("cosa_ray.tracking.store.check_store", broken)
    assert train(config, name="one", local=True, resume=True).state == "finished"


@pytest.mark.parametrize(
    ("which", "networks"),
    # AN; ON's classifiers for warm-up, ON.
    [("assignment", ["Network"]), ("both", ["Network", "ClassificationView", "Network"])],
)
def test_compile_takes_the_networks_it_names_and_leaves_the_checkpoint_as_it_is(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, which: str, networks: list[str]
) -> None:
    """With a backend that only counts: each network is compiled once and used compiled, and nothing else changes."""
    plain = train(tiny(), name="plain", local=True, track=False)
    compiled: list[torch.nn.Module] = []
    calls: dict[int, int] = {}

    def count(module: torch.nn.Module, *_: object, **__: object) -> None:
        compiled.append(module)
        calls[id(module)] = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[id(module)] += 1
            return module._call_impl(*args, **kwargs)

        module._compiled_call_impl = call  # type: ignore[assignment]

    monkeypatch.setattr(torch.nn.Module, "compile", count)
    result = train(tiny(training__compile=which), name="compiled", local=True, track=False)
    assert [type(module).__name__ for module in compiled] == networks
    assert not any(p.requires_grad for p in compiled[0].parameters()), "the assignment network"
    assert all(count > 0 for count in calls.values())
    for file in ("online.safetensors", "assignment.safetensors"):
        a, b = (load_file(Path(r.last_checkpoint or "") / file) for r in (plain, result))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_name_is_usable_after_a_kill_while_its_folder_was_made(tiny: Make) -> None:
    config = tiny(training__steps=2, training__warmup_iters=1, optimiser__warmup_steps=1)
    folder = Path(config.storage) / "again"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("half")
    (folder / ".run.json.abc").write_text("{")
    assert train(config, name="again", local=True, track=False).state == "finished"
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "notes.txt").write_text("somebody's")
    with pytest.raises(UserError, match="exists already"):
        train(config, name="other", local=True, track=False)


def test_a_non_finite_loss_stops_the_run_and_is_named(tiny: Make) -> None:
    config = tiny(optimiser__lr=1e30, optimiser__clip_norm=None, checkpoint__every=1)
    with pytest.raises(RunFailed, match=r"loss_cls.* not finite at step \d+"):
        train(config, name="diverged", local=True)
    run = find_run("diverged", config.storage)
    assert run.record.state == "diverged"


def test_a_gradient_that_is_not_finite_stops_the_run_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import cosa_ray.training.stepping as stepping

    original, calls = stepping.classification_step, []

    def poisoned(online: torch.nn.Module, *rest: Any, **named: Any) -> Any:
        output = original(online, *rest, **named)
        calls.append(online)
        if len(calls) == 4:
            next(online.parameters()).grad[0] = torch.inf  # type: ignore[index]
        return output

    monkeypatch.setattr(stepping, "classification_step", poisoned)
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


@pytest.mark.parametrize("stop", [2, 12])
def test_continued_from_another_run_is_as_if_it_had_never_stopped(tiny: Make, stop: int) -> None:
    whole = train(tiny(), name="whole", local=True, track=False)
    warm_up = train(
        tiny(training__stop_at=stop, checkpoint__keep_full_state=True), name="warm-up", local=True, track=False
    )
    assert (warm_up.state, warm_up.step) == ("finished", stop)
    rest = train(tiny(continue_from="warm-up"), name="rest", local=True, track=False)
    assert rest.step == whole.step > stop
    for file in ("online.safetensors", "assignment.safetensors"):
        ours, theirs = (load_file(Path(one.last_checkpoint or "") / file) for one in (rest, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_goes_on_from_a_warm_up_starts_at_its_own_threshold(tiny: Make) -> None:
    train(tiny(training__stop_at=1, checkpoint__keep_full_state=True), name="warm-up", local=True, track=False)
    config = tiny(
        continue_from="warm-up",
        pseudo_labels__policy="single",
        pseudo_labels__threshold=0.7,
        dynamic_threshold__enabled=False,
    )
    result = train(config, name="rest", local=True, track=False)
    said = json.loads((Path(result.last_checkpoint or "") / "checkpoint.json").read_text())
    assert list(said["thresholds"].values()) == pytest.approx([0.7, 0.7])


def test_only_a_whole_and_earlier_state_can_be_continued_from(tiny: Make) -> None:
    train(tiny(), name="weights", local=True, track=False)
    with pytest.raises(UserError, match="weights only"):
        train(tiny(continue_from="weights"), name="rest", local=True, track=False)
    train(tiny(checkpoint__keep_full_state=True), name="whole", local=True, track=False)
    with pytest.raises(UserError, match="continue from an earlier run"):
        train(tiny(continue_from="whole"), name="rest", local=True, track=False)
    with pytest.raises(UserError, match="give one of them"):
        tiny(continue_from="whole", init_from="whole")
    with pytest.raises(UserError, match=r"training\.stop_at"):
        tiny(training__stop_at=100_000)


def plain_name(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def with_requirements(names: set[str], installed: set[str]) -> set[str]:
    """Distributions and all they require without extras, as far as they are installed, by their metadata."""
    found: set[str] = set()
    pending = set(names)
    while pending:
        found.add(name := pending.pop())
        needed = {plain_name(re.split(r"[^\w.-]", line)[0]) for line in requires(name) or [] if "extra ==" not in line}
        pending |= (needed & installed) - found
    return found


def test_trains_where_nothing_else_is_installed(tiny: Make, tmp_path: Path) -> None:
    """`train --local --no-track` on a machine with torch and little more: no Ray, MLflow, matplotlib, ..."""
    packages = {package: set(map(plain_name, names)) for package, names in packages_distributions().items()}
    allowed = with_requirements(BARE, set().union(*packages.values())) | {"cosa-ray"}
    blocked = {package for package, names in packages.items() if not names & allowed}
    assert {"ray", "mlflow", "matplotlib", "skimage", "optuna", "pycocotools", "torchmetrics"} <= blocked
    assert not {"torch", "numpy", "typing_extensions", "PIL", "yaml"} & blocked
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(tiny()))
    script = (
        "import sys\n"
        "finders = sys.meta_path[:]\n"
        "class Bare:\n"  # finds nothing of what is blocked, as if it were not there
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {sorted(blocked)!r}:\n"
        "            return None\n"
        "        return next((s for f in finders if (s := f.find_spec(name, path, target))), None)\n"
        "sys.meta_path[:] = [Bare()]\n"
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
