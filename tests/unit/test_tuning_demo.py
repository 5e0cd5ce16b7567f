"""The demo's own promises: it shows every step, and it compares whole curves or nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosa_ray.errors import RunFailed
from cosa_ray.tuning import demo


class Store:
    """An MLflow client that knows the losses of some steps."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(step=step, value=step / 7, timestamp=0) for step in self.steps]


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The demo with everything that takes long replaced; returns (run it, what was shown)."""
    mlflow = pytest.importorskip("mlflow")
    shown: list[str] = []

    def play(state: str = "finished", steps: range = range(1, demo.STEPS + 1)) -> demo.DemoResult:
        @contextlib.contextmanager
        def display(name: str) -> Iterator[Any]:
            shown.append(f"open {name}")
            yield lambda at: shown.append(f"{name} {at}")
            shown.append(f"close {name}")

        def fake_import(kind: str, source: None, out: str, progress: Any) -> None:
            progress("100 of 200")

        def fake_sweep(sweep: Any, base: Any, *, name: str, show: Any) -> SimpleNamespace:
            show("2/4 trials")
            return SimpleNamespace(state="finished", best="best", best_file="shapes", folder="x", as_json=dict)

        def fake_train(config: Any, *, name: str, show: Any) -> SimpleNamespace:
            show(f"{config.workers} workers")
            return SimpleNamespace(state=state, step=30, mlflow_run_id="id")

        for name, fake in (
            ("ray_cluster", contextlib.nullcontext),
            ("import_dataset", fake_import),
            ("open_dataset", lambda uri: SimpleNamespace(card=SimpleNamespace(splits={}))),
            ("run_sweep", fake_sweep),
            ("train", fake_train),
        ):
            monkeypatch.setattr(demo, name, fake)
        monkeypatch.setattr(mlflow, "MlflowClient", lambda tracking_uri: Store(steps))
        displays = demo.Displays(*(lambda n=n: display(n) for n in ("import", "sweep", "train")))
        return demo.run_demo(str(tmp_path), say=lambda text: None, displays=displays)

    return play, shown


def test_each_step_shows_its_progress(staged) -> None:
    play, shown = staged
    result = play()
    assert shown == [
        *("open import", "import 100 of 200", "close import"),
        *("open sweep", "sweep 2/4 trials", "close sweep"),
        *("open train", "train 1 workers", "close train"),
        *("open train", "train 2 workers", "close train"),
    ]
    assert len(result.losses) == demo.STEPS
    assert ": equal" in result.verdict()


def test_losses_that_differ_are_called_so(staged, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = itertools.cycle((1.0, 1.0 + 3 * demo.TOLERANCE))
    whole = Store.get_metric_history

    def scaled(self: Store, run_id: str, key: str) -> list[SimpleNamespace]:
        factor = next(curves)
        return [SimpleNamespace(step=p.step, value=factor * p.value, timestamp=0) for p in whole(self, run_id, key)]

    monkeypatch.setattr(Store, "get_metric_history", scaled)
    result = staged[0]()
    assert ": NOT equal" in result.verdict()
    assert result.largest_difference == pytest.approx(3 * demo.TOLERANCE, rel=0.01)


def test_a_run_that_was_stopped_is_not_compared(staged) -> None:
    with pytest.raises(RunFailed, match="stopped at step 30"):
        staged[0](state="stopped", steps=range(1, 31))


def test_a_curve_with_a_hole_is_not_compared(staged) -> None:
    with pytest.raises(RunFailed, match=f"no loss of {demo.STEPS - 40} steps .* the first 41"):
        staged[0](steps=range(1, 41))


def test_the_json_has_the_whole_comparison(staged) -> None:
    found = staged[0]().as_json()["workers_1_and_2"]
    assert len(found["losses"]) == demo.STEPS
    assert found["largest_relative_difference"] == 0.0
