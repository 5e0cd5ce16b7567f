"""The tracker against real MLflow: SQLite files, and a server that is killed and started again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_ray.config.schema import Config
from cosa_ray.data.importing import import_dataset
from cosa_ray.errors import UserError
from cosa_ray.tracking.store import Store, Tracking, find_run_id, folder_of_run, open_store
from cosa_ray.tracking.tracker import NoTracker, Tracker, deliver, open_tracker
from cosa_ray.tracking.ui import Pages


@pytest.fixture(scope="module", autouse=True)
def _own_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """URI of one SQLite store for the module: making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    open_store(config(uri), run_name="first", folder=str(folder / "first"))
    return uri


def config(uri: str, **changes) -> Config:
    return Config.model_validate({"tracking": {"uri": uri, "experiment": "tests"}, **changes})


def tracking(uri: str, folder: Path, name: str, **more) -> Tracking:
    """How a run of this name is tracked, without a description."""
    return Tracking(Store(uri, "tests"), name, str(folder / name), str(folder / name / "spool"), **more)


def history(target: Tracking, key: str) -> list[tuple[int, float]]:
    """Every point of a metric as MLflow has it, by step."""
    client = target.store.client()
    run_id = find_run_id(target)
    assert run_id is not None
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def run_of(target: Tracking):
    run_id = find_run_id(target)
    assert run_id is not None
    return target.store.client().get_run(run_id)


def spooled(target: Tracking) -> list[str]:
    folder = Path(target.spool)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def picture() -> Image.Image:
    return Image.fromarray(np.full((40, 60, 3), 90, np.uint8))


def test_a_run_is_described_tracked_and_ended(database, tmp_path) -> None:
    data = tmp_path / "shapes"
    import_dataset("shapes", None, str(data), local=True, train=4, val=2, size=32)
    settings = config(database, data={"dataset": str(data)})
    target = open_store(settings, run_name="whole", folder=str(tmp_path / "whole"), tags={"purpose": "test"})
    tracker = open_tracker(target)
    for step in range(1, 31):
        tracker.log({"train/loss": 1 / step, "val/iou/tv_monitor": step}, step)
    tracker.log({"bad": float("nan"), "worse": float("inf"), "name?": 1.0}, 31)
    tracker.log_image("val/panel", picture(), 30)
    tracker.log_text("notes/read.txt", "hello")
    assert tracker.flush(60)
    assert run_of(target).info.status == "RUNNING"
    tracker.finish("FINISHED", 60)
    run = run_of(target)
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.info.run_name == "whole"
    assert history(target, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 31)]
    assert [step for step, _ in history(target, "bad")] == [31]
    assert "name?" not in run.data.metrics, "what MLflow refuses is dropped alone"
    assert run.data.params["optimiser.lr"] == "6e-05"
    assert run.data.tags["purpose"] == "test"
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"shapes/train", "shapes/val"}
    assert {d.tags[0].value for d in run.inputs.dataset_inputs} == {"train", "val"}
    client = target.store.client()
    paths = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.json", "dataset.json", "notes", "images"} <= paths
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert sorted(path.rpartition(".")[2] for path in images) == ["png", "webp"]
    assert all(path.startswith("images/val~panel+step+30+timestamp+") for path in images)
    local = client.download_artifacts(run.info.run_id, "notes/read.txt", str(tmp_path))
    assert Path(local).read_text() == "hello"
    assert spooled(target) == []
    assert folder_of_run(run.info.run_id, settings) == str(tmp_path / "whole")
    artifacts = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert (artifacts / run.info.run_id).is_dir(), "artifacts lie beside the SQLite file"


WORKER = """
import os, sys
from cosa_ray.tracking.store import Store, Tracking
from cosa_ray.tracking.tracker import Tracker
from PIL import Image
uri, name, folder, first, safe, last, delivered = sys.argv[1:8]
tracker = Tracker(Tracking(Store(uri, "tests"), name, folder, folder + "/spool"))
for step in range(int(first), int(last) + 1):
    tracker.log({"a": step / 7, "b": -step}, step)
    if step % 10 == 0:
        tracker.log_image("panel", Image.new("RGB", (8, 8)), step)
    if step == int(safe):
        assert tracker.flush(60)
if delivered == "delivered":
    assert tracker.flush(60)
os._exit(9)  # as kill -9: nothing is tidied up
"""


def killed_run(target: Tracking, first: int, safe: int, last: int, delivered: bool) -> None:
    """A process that logs steps first..last, flushes at `safe` (its checkpoint), and dies."""
    words = [target.store.uri, target.run, target.folder, *map(str, (first, safe, last))]
    words.append("delivered" if delivered else "lost")
    process = subprocess.run([sys.executable, "-c", WORKER, *words], timeout=300, check=False)
    assert process.returncode == 9


def test_runs_that_start_at_once_in_a_new_folder_share_its_store(tmp_path) -> None:
    """MLflow's own first opening of a SQLite file fails when two processes do it together."""
    opens = (
        "import sys; from cosa_ray.config.schema import Config; from cosa_ray.tracking.store import open_store; "
        "import mlflow; sys.stdin.read(); "
        "print(open_store(Config.model_validate({'tracking': {'uri': sys.argv[1]}}), run_name='a', folder='b').uri)"
    )
    line = [sys.executable, "-c", opens, f"sqlite:///{tmp_path}/new/mlflow.db"]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) for _ in range(3)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()  # all go on together
    for process in started:
        said = process.stderr.read() if process.stderr else ""
        assert process.wait(300) == 0, said


@pytest.mark.parametrize("delivered", [True, False])
def test_a_killed_and_resumed_run_has_every_point_once(database, tmp_path, delivered) -> None:
    target = tracking(database, tmp_path, f"killed-{delivered}")
    killed_run(target, 1, 50, 57, delivered)
    resumed = Tracker(target)
    for step in range(51, 81):  # from the checkpoint at 50
        resumed.log({"a": step / 7, "b": -step}, step)
        if step % 10 == 0:
            resumed.log_image("panel", picture(), step)
    resumed.finish("FINISHED", 60)
    assert history(target, "a") == [(step, pytest.approx(step / 7)) for step in range(1, 81)]
    assert history(target, "b") == [(step, -step) for step in range(1, 81)]
    run = run_of(target)
    images = target.store.client().list_artifacts(run.info.run_id, "images")
    steps = sorted(int(file.path.split("+")[2]) for file in images if file.path.endswith(".png"))
    assert steps == list(range(10, 81, 10))
    assert run.info.status == "FINISHED"
    found = target.store.client().search_runs([run.info.experiment_id], f"tags.`cosa_ray.run` = '{target.run}'")
    assert len(found) == 1, "the restart reattached"


def test_a_restart_sets_the_run_running_again_and_keeps_changed_parameters_as_tags(database, tmp_path) -> None:
    target = tracking(database, tmp_path, "again")
    first = Tracker(target)
    first.log_params({"lr": "1", "steps": "10", "long": "x" * 7000})
    first.finish("FAILED", 60)
    assert run_of(target).info.status == "FAILED"
    second = Tracker(target)
    second.log_params({"lr": "1", "steps": "20", "long": "x" * 7000})
    assert second.flush(60)
    run = run_of(target)
    assert run.info.status == "RUNNING"
    assert (run.data.params["lr"], run.data.params["steps"]) == ("1", "10")
    assert run.data.tags["cosa_ray.changed.steps"] == "20"
    assert not [tag for tag in run.data.tags if tag in ("cosa_ray.changed.lr", "cosa_ray.changed.long")]
    second.finish("KILLED", 60)
    assert run_of(target).info.status == "KILLED"


def test_children_know_their_parent(database, tmp_path) -> None:
    parent = Tracker(tracking(database, tmp_path, "sweep"))
    assert parent.flush(60)
    assert parent.run_id is not None
    by_id = tracking(database, tmp_path, "trial-1", parent_run_id=parent.run_id)
    by_name = tracking(database, tmp_path, "trial-2", parent="sweep")
    for child in (by_id, by_name):
        Tracker(child).finish("FINISHED", 60)
        assert run_of(child).data.tags["mlflow.parentRunId"] == parent.run_id
    parent.finish("FINISHED", 60)


def test_same_name_elsewhere_is_another_run(database, tmp_path) -> None:
    one, two = tracking(database, tmp_path / "one", "same"), tracking(database, tmp_path / "two", "same")
    for target in (one, two):
        Tracker(target).finish("FINISHED", 60)
    assert find_run_id(one) != find_run_id(two)


def test_a_deleted_run_ends_tracking_not_training(database, tmp_path, caplog) -> None:
    target = tracking(database, tmp_path, "deleted")
    tracker = Tracker(target)
    tracker.log({"a": 1}, 1)
    assert tracker.flush(60)
    target.store.client().delete_run(tracker.run_id)
    with caplog.at_level(logging.WARNING):
        for step in range(2, 6):
            tracker.log({"a": 1, "b": 2}, step)
            tracker.flush(60)
        tracker.finish("FINISHED", 60)
    assert sum("was deleted" in message for message in caplog.messages) == 1


def test_a_store_of_another_mlflow_is_refused(database, tmp_path) -> None:
    copy = tmp_path / "old.db"
    copy.write_bytes(Path(database.removeprefix("sqlite:///")).read_bytes())
    for version in ("0a8213491aaa", "ffffffffffff"):  # an early one, and one of the future
        with sqlite3.connect(copy) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.close()
        with pytest.raises(UserError, match=r"old\.db was made by another MLflow version") as raised:
            open_store(config(f"sqlite:///{copy}"), run_name="x", folder=str(tmp_path / "x"))
        assert "\n" not in str(raised.value)


def test_a_file_that_is_no_store_and_a_deleted_experiment_are_refused(database, tmp_path) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(UserError, match=r"text\.db cannot be opened") as raised:
        open_store(config(f"sqlite:///{tmp_path}/text.db"), run_name="x", folder=str(tmp_path / "x"))
    assert "\n" not in str(raised.value)
    client = Store(database, "").client()
    client.delete_experiment(client.create_experiment("gone"))
    settings = Config.model_validate({"tracking": {"uri": database, "experiment": "gone"}})
    with pytest.raises(UserError, match=r"experiment 'gone' .* was deleted"):
        open_store(settings, run_name="x", folder=str(tmp_path / "x"))


def test_logging_never_waits_and_a_spool_that_cannot_be_written_ends_nothing(tmp_path, caplog) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spool").write_text("a file where the folder should be")
    tracker = Tracker(tracking(f"http://127.0.0.1:{free_port()}", tmp_path, "run"))
    waits = []
    with caplog.at_level(logging.WARNING):
        for step in range(300):
            before = time.perf_counter()
            tracker.log({f"m{n}": n for n in range(20)}, step)
            waits.append(time.perf_counter() - before)
        assert tracker.flush(1) is False
        tracker.log_image("panel", "not a picture", 1)  # type: ignore[arg-type]
        tracker.log({"a": "b"}, 1)  # type: ignore[dict-item]
        tracker.finish("FINISHED", 1)
    assert float(np.median(waits)) < 0.001
    assert len(caplog.messages) == len(set(caplog.messages)) >= 3, "every failure is told once"


def test_no_tracker_takes_everything() -> None:
    tracker = open_tracker(None)
    assert isinstance(tracker, NoTracker)
    tracker.log({"a": 1.0}, 1)
    tracker.log_image("panel", picture(), 1)
    assert tracker.flush()
    tracker.finish("FINISHED")
    methods = {name for name in vars(Tracker) if not name.startswith("_") and name != "warn_once"}
    assert methods <= set(dir(NoTracker))


class Server:
    """An MLflow server that can be killed like a machine that fails, and started again on its port."""

    def __init__(self, uri: str) -> None:
        self.uri, self.port = uri, free_port()
        self.pages: Pages | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.pages = Pages(self.uri, port=self.port)

    def kill(self) -> None:
        if self.pages is not None:
            os.killpg(self.pages.process.pid, signal.SIGKILL)
            self.pages.close()
            self.pages = None


@pytest.fixture
def server(database):
    made = Server(database)
    yield made
    made.kill()


def test_a_server_killed_in_the_middle_gets_every_point_once(server, tmp_path) -> None:
    server.start()
    target = tracking(server.url, tmp_path, "outage")
    tracker = Tracker(target)
    last = 0

    def train(seconds: float) -> None:
        nonlocal last
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            last += 1
            tracker.log({"a": last / 3, "b": last}, last)
            time.sleep(0.005)

    train(4)
    server.kill()  # with a batch on its way, most likely
    train(3)
    tracker.log_image("panel", picture(), last)
    assert tracker.flush(1), "what is logged is on the spool before a checkpoint"
    assert spooled(target)
    train(1)
    server.start()
    train(2)
    tracker.finish("FINISHED", 120)
    assert spooled(target) == []
    assert history(target, "a") == [(step, pytest.approx(step / 3)) for step in range(1, last + 1)]
    assert history(target, "b") == [(step, step) for step in range(1, last + 1)]
    run = run_of(target)
    assert run.info.status == "FINISHED"
    assert len(target.store.client().list_artifacts(run.info.run_id, "images")) == 2


def test_a_run_that_never_saw_its_server_is_delivered_later(server, tmp_path) -> None:
    settings = Config.model_validate({"tracking": {"uri": server.url, "experiment": "tests"}})
    target = open_store(settings, run_name="absent", folder=str(tmp_path / "absent"))  # away is no error
    killed_run(target, 1, 50, 57, delivered=False)
    resumed = Tracker(target)
    for step in range(51, 81):
        resumed.log({"a": step / 7, "b": -step}, step)
    before = time.time_ns() // 1_000_000
    resumed.finish("FINISHED", 1)
    assert resumed.run_id is None
    assert not deliver(target, timeout=0.5)
    server.start()
    assert deliver(target, timeout=120)
    assert spooled(target) == []
    assert history(target, "a") == [(step, pytest.approx(step / 7)) for step in range(1, 81)]
    run = run_of(target)
    assert run.info.status == "FINISHED"
    points = target.store.client().get_metric_history(run.info.run_id, "b")
    assert max(point.timestamp for point in points) <= before, "a point's time is when it was logged"
    assert deliver(target, timeout=1)


def test_no_password_in_what_a_run_says_while_its_server_is_away(tmp_path, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        tracker = Tracker(tracking(f"http://me:hunter2@127.0.0.1:{free_port()}", tmp_path, "secretive"))
        tracker.log({"a": 1.0}, 1)
        tracker.finish("FINISHED", 2)
        assert not deliver(tracker._tracking, timeout=0.5)
    assert "does not take records" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_sweep_delivers_what_its_trials_left(database, tmp_path) -> None:
    """The server was away when the sweep and one of its trials ended; the sweep is looked at again."""
    from dataclasses import replace

    from cosa_ray.training.runs import create_run, read_run
    from cosa_ray.tuning.parent import deliver_rest
    from cosa_ray.tuning.results import SweepResult, TrialResult

    away = f"http://127.0.0.1:{free_port()}"
    runs = config(database, storage=str(tmp_path))
    trials = []
    for name in ("s-quick", "s-late"):
        run = create_run(name, runs, "val/miou").update(state="finished")
        trials.append(
            TrialResult(name[2:], name, "finished", {}, 3, 0.5, {}, run.folder.uri, run.record.mlflow_run_id, None)
        )
    for name in ("s", "s-late"):
        target = tracking(away, tmp_path, name, parent="s" if name != "s" else None)
        tracker = Tracker(target)
        tracker.log({"val/miou": 0.5}, 3)
        tracker.finish("FINISHED", 1)
        assert spooled(target)
    parent = tracking(database, tmp_path, "s")
    result = SweepResult("s", parent.folder, "finished", "val/miou", "max", None, database, trials, trials[1], None)
    after = deliver_rest(parent, result)
    assert after.parent_run_id == find_run_id(parent)
    late = replace(parent, run="s-late", folder=str(tmp_path / "s-late"), spool=str(tmp_path / "s-late" / "spool"))
    assert not spooled(parent)
    assert not spooled(late)
    assert history(late, "val/miou") == [(3, 0.5)]
    assert run_of(late).info.status == "FINISHED"
    assert run_of(late).data.tags["mlflow.parentRunId"] == after.parent_run_id
    assert after.best is after.trials[1]
    assert after.best.mlflow_run_id == find_run_id(late)
    record = read_run(late.folder)
    assert record is not None
    assert record.record.mlflow_run_id == find_run_id(late)
    assert after.trials[0] == trials[0]
    assert deliver_rest(parent, after) == after
