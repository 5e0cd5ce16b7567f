"""A trial: it waits for its turn, goes on with the right settings, and how it ended is read from its run's record."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.exceptions
import torch
from ray import tune

from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.description import Description
from cosa_ray.training.loop import Job, Outcome
from cosa_ray.training.runs import Run, create_run, read_run
from cosa_ray.training.session import Monitor
from cosa_ray.training.state import TrainState
from cosa_ray.training.storage import FULL_STATE
from cosa_ray.tuning import trial as trial_module
from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.trial import (
    BUDGET,
    STORE,
    Trials,
    cause_of,
    copy_trial,
    end_trial,
    failure_kind,
    generation,
    given_up_by,
    mark_given_up,
    reports,
    run_trial,
    settle,
)

Make = Callable[..., Config]


class Handle:
    """The real monitor, called as an actor would be but in this process."""

    def __init__(self, slots: int | None = None) -> None:
        self.monitor = Monitor(slots)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.monitor, name))


@pytest.fixture
def make(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trials]:
    """Make the trials of a sweep with so many slots."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(trial_module, "POLL_SECONDS", 0.01)

    def trials(slots: int | None = None, track: bool = False, **more: Any) -> Trials:
        return Trials("s", tiny(), "val/miou", Handle(slots), track, None, **more)

    return trials


class Work:
    """What stands for the training of trials: called with a run's name, its settings and the step to pause at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, dict[str, Any], int | None]] = []
        self.reported: list[dict[str, Any]] = []
        self.does: Callable[[str], Outcome] = lambda name: Outcome("finished", 20)
        monkeypatch.setattr(trial_module, "reports", lambda metric: metric)
        monkeypatch.setattr(trial_module, "open_trial", self.open)
        monkeypatch.setattr(trial_module, "fit", self.fit)
        monkeypatch.setattr(trial_module, "end_trial", lambda run, job, outcome: None)
        monkeypatch.setattr(tune, "report", self.reported.append)

    def open(self, trials: Trials, number: str, values: Any, seed: int | None, run: Run | None) -> tuple[Run, Job]:
        run = run or create_run(trials.name(number), trials.config, "val/miou")
        self.values = dict(values)
        return run, Job(trials.name(number), run.folder.uri, trials.config, None)

    def fit(self, job: Job, monitor: Any, callbacks: list[Any]) -> Outcome:
        self.seen.append((job.name, self.values, job.pause_at))
        return self.does(job.name)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def given(number: int, **values: Any) -> dict[str, Any]:
    return {"trial": f"{number:03d}", "values": values, "seed": None}


def test_no_more_trials_run_at_once_than_there_are_places(make: Any, work: Work) -> None:
    """Seven drivers, as of a population, on a cluster that was divided for two."""
    inside, most, done = 0, 0, []
    lock = threading.Lock()

    def train(name: str) -> Outcome:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.03)
        with lock:
            inside -= 1
        done.append(name)
        return Outcome("finished", 20)

    work.does = train
    made = make(2)
    drivers = [threading.Thread(target=run_trial, args=(made, given(number))) for number in range(7)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(20)
    assert sorted(done) == [f"s-{number:03d}" for number in range(7)]
    assert most == 2


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (OSError("disk full"), "OSError: disk full"),
        (UserError("views.crop is too large"), "views.crop is too large"),
        (RunFailed("no checkpoint"), "no checkpoint"),
        (None, None),
    ],
)
def test_a_trial_that_comes_to_nothing_says_why_and_gives_its_place_back(
    make: Any, work: Work, error: Exception | None, left: str | None
) -> None:
    def train(name: str) -> Outcome:
        if error is not None:
            raise error
        return Outcome("failed", 3, "not finite")

    work.does = train
    made = make(1)
    run_trial(made, given(4))
    assert made.monitor.monitor.kept(cause_of("004")) == left
    assert made.monitor.monitor.acquire("somebody else")


@pytest.mark.parametrize("early", [True, False])
def test_a_trial_that_waits_ends_when_the_sweep_is_to_stop(make: Any, work: Work, early: bool) -> None:
    made = make(1)
    assert made.monitor.monitor.acquire("somebody")
    if early:
        made.monitor.monitor.stop()
    driver = threading.Thread(target=run_trial, args=(made, given(0)))
    driver.start()
    if not early:
        time.sleep(0.1)
        assert driver.is_alive()
        made.monitor.monitor.stop("s-000")
    driver.join(10)
    assert not driver.is_alive()
    assert work.seen == []
    assert made.monitor.monitor.kept(cause_of("000")) is None


def test_a_trial_tracks_where_the_sweep_does(make: Any, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own machine names another store, or none; the sweep's address comes through the monitor."""
    from cosa_ray.tracking.store import tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    seen: list[str] = []
    made = make(track=True)
    work.does = lambda name: seen.append(tracking_uri(made.config)) or Outcome("finished", 20)
    made.monitor.monitor.keep(STORE, "http://me:secret@sweep:5000")
    run_trial(made, given(0))
    assert seen == ["http://me:secret@sweep:5000"]
    assert "secret" not in repr(made)


def test_an_evaluation_without_the_metric_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.integration.ray_train import TuneReportCallback

    got: list[dict[str, float]] = []
    monkeypatch.setattr(TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(
        TuneReportCallback, "after_report", lambda self, context, metrics, checkpoint: got.append(metrics[0])
    )
    callback = reports("val/iou/disc")
    callback.after_report(None, [{"val/miou": 0.1}], None)
    callback.after_report(None, [{"val/miou": 0.2, "val/iou/disc": 0.3}], None)
    assert got == [{"val/miou": 0.2, "val/iou/disc": 0.3}]


def checkpoint(trials: Trials, number: int, step: int, **metrics: float) -> Run:
    """Register a checkpoint without content in a trial's run, which is made where there is none."""
    name = trials.name(f"{number:03d}")
    run = read_run(trials.folder(f"{number:03d}")) or create_run(name, trials.config, "val/miou")
    folder = Path(run.folder.join(f"checkpoints/step_{step:08d}"))
    folder.mkdir(parents=True)
    (folder / FULL_STATE).write_text("state")
    run.checkpoints.register(
        f"checkpoints/{folder.name}", step, {key.replace("__", "/"): v for key, v in metrics.items()}
    )
    return run


def test_what_is_done_is_not_done_again(make: Any, work: Work) -> None:
    """A run that finished or was given up before the journal heard of it: its metrics are all the sweep wants."""
    made = make()
    checkpoint(made, 0, 20, val__miou=0.5).update(state="finished")
    checkpoint(made, 1, 10, val__miou=0.4).update(state="running")
    mark_given_up(made.folder("001"), "asha")
    for number in (0, 1):
        run_trial(made, given(number))
    assert work.reported == [{"val/miou": 0.5, "step": 20}, {"val/miou": 0.4, "step": 10}]
    assert work.seen == []
    # One that the budget ended goes on.
    mark_given_up(made.folder("001"), BUDGET)
    run_trial(made, given(1, seed=3))
    assert work.seen == [("s-001", {"seed": 3}, None)]
    assert given_up_by(made.folder("001")) is None


def test_a_journal_that_is_behind_hears_of_every_evaluation_there_is(make: Any, work: Work) -> None:
    made = make()
    checkpoint(made, 0, 10, val__miou=0.5)
    checkpoint(made, 0, 20, val__miou=0.4).update(state="finished")
    run_trial(made, given(0))
    assert work.reported == [{"val/miou": 0.5, "step": 10}, {"val/miou": 0.4, "step": 20}]


@pytest.fixture
def population(make: Any, work: Work) -> Iterator[tuple[Trials, Work, Monitor]]:
    """Trials that stand still at steps 5 and 10 of 20, and reach the step they are told to."""
    made = make(pauses=(5, 10))

    def train(name: str) -> Outcome:
        pause_at = work.seen[-1][2]
        if pause_at is None:
            return Outcome("finished", 20)
        checkpoint(made, int(name[-3:]), pause_at, val__miou=0.5)
        return Outcome("paused", pause_at)

    work.does = train
    return made, work, made.monitor.monitor


def test_a_population_goes_on_when_a_generation_is_decided(population: tuple[Trials, Work, Monitor]) -> None:
    trials, work, monitor = population
    driver = threading.Thread(target=run_trial, args=(trials, given(3, seed=1)))
    driver.start()
    for step, plan in (
        (5, {"3": {"donor": 1, "values": {"seed": 2}}}),
        (10, {"2": {"donor": 1, "values": {"seed": 9}}}),
    ):
        time.sleep(0.15)
        assert [pause for *_, pause in work.seen][-1] == step
        assert monitor.acquire("somebody else")  # who waits holds no place
        monitor.keep(generation(step), plan)
    driver.join(10)
    assert work.seen == [("s-003", {"seed": 1}, 5), ("s-003", {"seed": 2}, 10), ("s-003", {"seed": 2}, None)]
    # After a kill the sweep may not have heard of an evaluation it waits for.
    assert work.reported == [{"val/miou": 0.5, "step": 5}, {"val/miou": 0.5, "step": 10}]


def test_a_population_that_is_to_stop_waits_no_more(population: tuple[Trials, Work, Monitor]) -> None:
    trials, work, monitor = population
    driver = threading.Thread(target=run_trial, args=(trials, given(3, seed=1)))
    driver.start()
    time.sleep(0.15)
    monitor.stop()
    driver.join(10)
    assert not driver.is_alive()
    assert work.seen == [("s-003", {"seed": 1}, 5)]


@pytest.mark.parametrize("step", [7, 10])
def test_a_copy_whose_driver_is_killed_keeps_its_settings(population: tuple[Trials, Work, Monitor], step: int) -> None:
    """Tune hands the driver it starts again what the search proposed; the copy at step 5 came after that."""
    trials, work, monitor = population
    monitor.keep(generation(5), {"3": {"donor": 1, "values": {"seed": 2}}})
    monitor.keep(generation(10), {})
    checkpoint(trials, 3, step, val__miou=0.5)
    run_trial(trials, given(3, seed=1))
    assert {values["seed"] for _, values, _ in work.seen} == {2}


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError


CUDA = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 11.25 MiB is free."
)
MEMORY_KILL = (
    "The actor is dead because its worker process has died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: 1 "
    "worker(s) were killed due to the node running low on memory."
)
# What Ray 2.60 says of a worker that was killed by kill -9.
SYSTEM_KILL = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error. If the process was killed by the kernel OOM killer "
    "(verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation"
)


@pytest.mark.parametrize(
    ("state", "cause", "kind"),
    [
        ("failed", CUDA, "out_of_memory"),
        ("failed", "CUDA error: out of memory", "out_of_memory"),
        ("failed", raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)), "out_of_memory"),
        ("failed", raised(lambda: np.empty(1 << 60, dtype=np.uint8)), "out_of_memory"),
        ("failed", raised(lambda: bytearray(1 << 62)), "out_of_memory"),
        ("failed", "Worker died: killed due to memory running low (OOM)", "out_of_memory"),
        ("failed", str(ray.exceptions.WorkerCrashedError()), "died"),
        ("failed", str(ray.exceptions.ActorDiedError()), "died"),
        ("failed", "its process was killed", "died"),
        ("failed", "ValueError: split val has no masks", "error"),
        ("failed", None, "error"),
        ("diverged", "train/loss is not finite", "diverged"),
        ("finished", None, None),
        ("stopped", CUDA, None),
        ("failed", SYSTEM_KILL, "died"),  # Ray's text on any kill names the OOM killer
        ("failed", MEMORY_KILL, "out_of_memory"),
        ("failed", "OSError: [Errno 12] Cannot allocate memory", "out_of_memory"),
    ],
)
def test_kinds_of_failures(state: str, cause: str | None, kind: str | None) -> None:
    assert failure_kind(state, cause) == kind


def settled(trials: Trials, entry: Entry, *, killed: bool = False, interrupted: bool = False, left: str = "") -> Entry:
    return settle(trials, entry, killed=killed, interrupted=interrupted, said=lambda key: left or None)


@pytest.mark.parametrize(
    ("record", "by", "how", "expected"),
    [
        ({"state": "finished"}, None, {}, {"state": "finished"}),
        ({"state": "finished"}, None, {"killed": True}, {"state": "finished"}),
        ({"state": "stopped"}, "asha", {}, {"state": "stopped_early", "ended_by": "asha"}),
        ({"state": "stopped"}, BUDGET, {}, {"state": "interrupted", "ended_by": BUDGET}),
        ({"state": "stopped"}, None, {"interrupted": True}, {"state": "interrupted"}),
        (
            {"state": "diverged", "cause": "train/loss is not finite"},
            None,
            {},
            {"state": "failed", "kind": "diverged", "cause": "train/loss is not finite"},
        ),
        ({"state": "failed", "cause": CUDA}, None, {}, {"state": "failed", "kind": "out_of_memory", "cause": CUDA}),
        ({"state": "failed", "cause": "x"}, None, {}, {"state": "failed", "kind": "error", "cause": "x"}),
        # Its own process was killed: the record does not know yet.
        (
            {"state": "running"},
            None,
            {"killed": True},
            {"state": "failed", "kind": "died", "cause": "its process was killed"},
        ),
        ({"state": "running"}, "median", {"killed": True}, {"state": "stopped_early", "ended_by": "median"}),
        ({"state": "running"}, None, {"killed": True, "interrupted": True}, {"state": "interrupted"}),
        # It never had a record.
        (None, None, {"killed": True}, {"state": "failed", "kind": "died", "cause": "its process was killed"}),
        (None, None, {}, {"state": "failed", "kind": "error", "cause": "it never started"}),
        (None, None, {"left": CUDA}, {"state": "failed", "kind": "out_of_memory", "cause": CUDA}),
        (None, None, {"interrupted": True}, {"state": "interrupted"}),
        # What failed before a Ctrl-C has failed.
        (
            {"state": "diverged", "cause": "train/loss is not finite"},
            None,
            {"interrupted": True},
            {"state": "failed", "kind": "diverged", "cause": "train/loss is not finite"},
        ),
    ],
)
def test_how_a_trial_ended(
    make: Any, record: dict[str, str] | None, by: str | None, how: dict[str, Any], expected: dict[str, Any]
) -> None:
    trials = make()
    if record is not None:
        checkpoint(trials, 7, 10).update(**record)
    if by is not None:
        mark_given_up(trials.folder("007"), by)
    entry = Entry(7, {}, 7, state="running", hours=0.5)
    assert settled(trials, entry, **how) == replace(entry, step=10 if record else 0, **expected)
    run = read_run(trials.folder("007"))
    assert run is None or run.record.state not in ("created", "running")


@pytest.mark.parametrize(("by", "kept"), [("asha", False), (BUDGET, True), (None, True)])
def test_who_was_given_up_for_good_needs_no_optimiser_any_more(make: Any, by: str | None, kept: bool) -> None:
    trials = make()
    run = checkpoint(trials, 0, 10, val__miou=0.5)
    if by is not None:
        mark_given_up(run.folder.uri, by)
    end_trial(run, Job("s-000", run.folder.uri, trials.config, None), Outcome("stopped", 10))
    assert run.folder.exists(f"checkpoints/step_00000010/{FULL_STATE}") == kept


def trained(trials: Trials, number: int, values: dict[str, Any], steps: int, tmp_path: Path) -> TrainState:
    """A trial's run with a real checkpoint after some steps of its own; returns the state it holds."""
    config = trials.trial_config(values)
    run = create_run(trials.name(f"{number:03d}"), config, "val/miou")
    dataset = open_dataset(config.data.dataset)
    state = TrainState(config, dataset.num_classes, torch.device("cpu"))
    for place in range(steps):
        train_step(state, 0.1 * (number + place + 1))
    folder = tmp_path / f"made{number}"
    folder.mkdir()
    state.save(folder, dataset.card, Description(run.record.name, steps, [], {}, "online", 1.0, {}))
    run.checkpoints.register(run.checkpoints.upload(folder, steps), steps, {"val/miou": 0.1 * number})
    return state


def train_step(state: TrainState, gradient: float) -> None:
    for parameter in state.online.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, gradient)
    counts = torch.full((2, state.config.dynamic_threshold.bins), int(100 * gradient))
    ready = torch.ones(())
    proposal = state.thresholds.propose(counts)
    state.optimise(ready, state.gradient_norm())
    state.thresholds.commit(proposal, ready)


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    found = {f"online {name}": value for name, value in state.online.state_dict().items()}
    found |= {f"assignment {name}": value for name, value in state.assignment.state_dict().items()}
    found |= {f"thresholds {name}": value for name, value in state.thresholds.state_dict().items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        found |= {f"optimiser {index} {name}": value for name, value in moments.items()}
    return {name: value.detach().clone() for name, value in found.items()}


DONOR = {"optimiser.lr": 1e-3, "optimiser.weight_decay": 0.01, "optimiser.betas": [0.9, 0.999]}
TAKER = {"optimiser.lr": 4e-3, "optimiser.weight_decay": 0.2, "optimiser.betas": [0.8, 0.99]}


def test_a_copy_is_the_donor_bit_for_bit_with_settings_of_its_own(make: Any, tmp_path: Path) -> None:
    trials = make()
    classes = open_dataset(trials.config.data.dataset).num_classes
    donor = trained(trials, 2, DONOR, 3, tmp_path)
    trained(trials, 1, {"optimiser.lr": 2e-3}, 3, tmp_path)
    taker, entry = Entry(1, {}, 1), Entry(2, DONOR, 2)
    for _ in range(2):  # a kill between the copy and its note does it again
        copy_trial(trials, taker, entry, 3, TAKER)
    run, source = read_run(trials.folder("001")), read_run(trials.folder("002"))
    assert run.config() == trials.trial_config(TAKER)
    (copied,) = run.checkpoints.entries()
    assert (copied.step, copied.metrics) == (3, {"val/miou": 0.2})
    assert run.checkpoints.sweep_orphans() == []
    assert run.folder.folders("checkpoints") == [copied.name.rpartition("/")[2]]
    (original,) = source.checkpoints.entries()
    folder, before = Path(run.folder.join(copied.name)), Path(source.folder.join(original.name))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in before.iterdir()
    }
    state, fresh = (TrainState(run.config(), classes, torch.device("cpu")) for _ in range(2))
    state.load(folder)
    whole, wanted = tensors(state), tensors(donor)
    assert whole.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(whole[name], wanted[name])] == []
    assert (state.step, donor.step) == (3, 3)
    for group, own, other in zip(*(s.optimiser.param_groups for s in (state, fresh, donor)), strict=True):
        assert [group[key] for key in ("base_lr", "weight_decay", "betas")] == [
            own[key] for key in ("base_lr", "weight_decay", "betas")
        ]
        assert group["base_lr"] == pytest.approx(4 * other["base_lr"])
    # And it goes on with them: the schedule's rate, four times the donor's.
    for each in (state, donor):
        train_step(each, 0.1)
    rates = [[group["lr"] for group in each.optimiser.param_groups] for each in (state, donor)]
    assert rates[0] == pytest.approx([4 * rate for rate in rates[1]])
    assert not torch.equal(tensors(state)["online classifier.weight"], tensors(donor)["online classifier.weight"])


@pytest.mark.parametrize(
    ("donor", "step", "sentence"),
    [(2, 4, "it has no checkpoint of step 4"), (9, 3, "a run's folder is gone")],
)
def test_a_copy_that_cannot_be(make: Any, donor: int, step: int, sentence: str) -> None:
    trials = make()
    for number in (1, 2):
        checkpoint(trials, number, 3)
    with pytest.raises(RunFailed, match=sentence):
        copy_trial(trials, Entry(1, {}, 1), Entry(donor, {}, donor), step, {})
