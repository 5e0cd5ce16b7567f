"""Everything of the project against a team's server: users and permissions, PostgreSQL, artifacts in S3."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_ray.cli.main import main
from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.reporting.compare import compare_runs
from cosa_ray.tracking.store import Store, Tracking
from cosa_ray.tracking.tracker import Tracker
from cosa_ray.training.driver import train
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.session import Progress
from tests.conftest import tiny_config
from tests.integration.team_server import CLIENT, TeamServer, wait_for

METRICS = 15


@pytest.fixture(scope="module")
def project(team: TeamServer, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run of ada's, which was stopped half way and gone on with, and evaluated."""
    import cosa_ray.training.loop as loop

    place = tmp_path_factory.mktemp("project")
    config = settings(team, tiny_dataset, place)
    (place / "tiny.yaml").write_text(dump_config(config))
    sent = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.step >= 11 and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)

    with team.client_of("ada"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PROGRESS_SECONDS", 0.0)
        assert train(config, name="first", local=True, show=stop).state == "stopped"
        assert train(config, name="first", resume=True, local=True).state == "finished"
        evaluate_run("first", storage=str(place / "runs"), protocol="single_scale", local=True)
    return place


def settings(team: TeamServer, dataset: str, place: Path, **changes: object) -> Config:
    given = {"tracking__uri": team.url, "tracking__experiment": "ada's", **changes}
    return tiny_config(dataset, place, **given)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(str(ended.value.code)), capsys.readouterr().err.strip()


def test_a_stopped_and_resumed_run_is_in_postgres_and_in_the_bucket_once(team: TeamServer, project: Path) -> None:
    (run_id,) = team.run_ids("first")
    rows = team.postgres.query("mlflow", "SELECT status, lifecycle_stage FROM runs WHERE run_uuid = %s", run_id)
    assert rows == [("FINISHED", "active")]
    assert [step for step, _ in team.points(run_id, "train/loss")] == list(range(1, 21))
    assert [step for step, _ in team.points(run_id, "val/miou")] == [10, 20]
    assert len(team.points(run_id, "val/single_scale/miou")) == 1
    (twice,) = team.postgres.query(
        "mlflow",
        "SELECT COUNT(*) FROM (SELECT 1 FROM metrics WHERE run_uuid = %s GROUP BY key, step HAVING COUNT(*) > 1) AS t",
        run_id,
    )
    assert twice == (0,)
    kept = team.objects(run_id)
    assert {"config.yaml", "environment.json", "dataset.json"} <= set(kept)
    assert min(kept.values()) > 0
    panels = sorted(int(name.split("+")[2]) for name in kept if "panel" in name and name.endswith(".png"))
    assert panels == [10, 20]
    assert any(name.startswith("evaluations/val.single_scale/") for name in kept)
    assert not (project / "mlartifacts").exists()
    assert not list((project / "runs" / "first").glob("spool/*"))


def test_compare_and_the_page_of_runs_need_read_only(
    team: TeamServer, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    with team.client_of("bob"):
        word = "mlflow:params.seed = '0'"
        found = compare_runs([word, "runs/first"], experiment="ada's").as_json()
        assert [side["runs"][0]["name"] for side in found["sides"]] == ["first", "first"]
        assert found["sides"][0]["runs"][0]["wall_seconds"] > 0
        with pytest.raises(SystemExit) as ended:
            main(["ui", "--uri", team.url])
        assert (ended.value.code, capsys.readouterr().out.strip()) == (0, team.url)
    with team.client_of(None):
        found = compare_runs(["first", "runs/first"]).as_json()
        assert found["sides"][0]["runs"][0]["wall_seconds"] is None
        assert any("asks who you are" in note for note in found["notes"])


@pytest.mark.parametrize("who", ["nobody", "a wrong password", "bob"])
def test_a_refusal_is_one_sentence_before_anything_is_written(
    team: TeamServer,
    project: Path,
    who: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training, resuming, evaluating, registering and filtering; bob may read, which is the server's default."""
    monkeypatch.chdir(project)
    said = {
        "nobody": "asks who you are; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        "a wrong password": "does not know this user with this password; check MLFLOW_TRACKING_USERNAME and",
        "bob": 'does not let bob do this; ask its administrator for the permission EDIT on the experiment "ada\'s"',
    }[who]

    def state() -> tuple[object, ...]:
        files = {file: file.stat().st_mtime_ns for file in project.rglob("*") if file.is_file()}
        counts = [team.postgres.query("mlflow", f"SELECT COUNT(*) FROM {t}") for t in ("runs", "metrics", "tags")]
        return files, counts, sum(1 for _ in team.bucket().objects.all())

    before = state()
    with team.client_of("bob" if who == "bob" else None):
        if who == "a wrong password":
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-but-secret")
        (run_id,) = team.run_ids("first")
        commands = [
            ["train", "tiny.yaml", "--name", "other", "--local"],
            ["evaluate", "first", "--local"],
            ["register", "first", "--name", "a model"],
        ]
        if who != "bob":
            commands.append(["compare", "mlflow:params.seed = '0'", "first"])
            monkeypatch.setenv("MLFLOW_TRACKING_URI", team.url)
            commands.append(["evaluate", run_id])
            commands.append(["predict", "models:/none@best", "."])
        for words in commands:
            code, sentence = told(capsys, *words)
            assert code == 2, (words, sentence)
            assert said in sentence, words
            assert "\n" not in sentence
            assert "wrong-but-secret" not in sentence
    assert state() == before


@pytest.mark.slow
def test_another_user_goes_on_with_a_run_once_permitted(
    team: TeamServer, tiny_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cosa_ray.training.loop as loop

    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0.0)
    config = settings(team, tiny_dataset, tmp_path, tracking__experiment="shared", training__warmup_iters=20)

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with team.client_of("ada"):
        assert train(config, name="passed-on", local=True, show=stop).state == "stopped"
    with team.client_of("bob"):
        with pytest.raises(UserError, match="does not let bob do this"):
            train(config, name="passed-on", local=True, resume=True)
        team.grant("bob", "experiment", "shared", "EDIT")
        assert train(config, name="passed-on", local=True, resume=True).state == "finished"
    (run_id,) = team.run_ids("passed-on")
    assert [step for step, _ in team.points(run_id, "train/loss")] == list(range(1, 21))


@pytest.mark.slow
def test_a_model_is_registered_and_used_by_the_team(
    team: TeamServer, project: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    words = ["register", "first", "--name", "ada's model", "--alias", "best"]
    with team.client_of("ada"):
        assert told(capsys, *words[:3], "model-of-ada", *words[4:])[0] == 0
    rows = team.postgres.query("mlflow", "SELECT name, version FROM model_versions")
    assert rows == [("model-of-ada", 1)]
    stored = [each.key for each in team.bucket().objects.all() if "/models/m-" in each.key]
    assert any(key.endswith("MLmodel") for key in stored)
    with team.client_of("bob"):
        out = project / "masks"
        code, said = told(capsys, "predict", "models:/model-of-ada@best", str(pictures), "--out", str(out), "--local")
        assert code in (0, 1), said  # 1: two of the pictures are broken, as is reported
        assert (out / "masks" / "a.png").exists()
        team.grant("bob", "experiment", "ada's", "EDIT")
        code, said = told(capsys, *words[:3], "model-of-ada")
        assert code == 2
        assert "does not let bob do this" in said
        assert "EDIT on the registered model 'model-of-ada'" in said
        assert len([each for each in team.bucket().objects.all() if "/models/m-" in each.key]) == len(stored)
        team.grant("bob", "registered_model", "model-of-ada", "EDIT")
        assert told(capsys, *words[:3], "model-of-ada", "--alias", "newest")[0] == 0
        team.grant("bob", "experiment", "ada's", None)


def test_no_password_is_kept_or_shown(
    team: TeamServer, project: Path, caplog: pytest.LogCaptureFixture, tiny_dataset: str, tmp_path: Path
) -> None:
    with caplog.at_level(logging.DEBUG), team.client_of("ada"):
        train(
            settings(team, tiny_dataset, tmp_path, training__steps=4, training__warmup_iters=2),
            name="secret",
            local=True,
        )
        lines = [place.read_bytes() for place in Path("/proc").glob("[0-9]*/cmdline") if place.exists()]
    places = {"a command line": b"\n".join(lines), "the log": caplog.text.encode()}
    for root in (project, tmp_path):
        places |= {str(file): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    for table in ("params", "tags", "experiment_tags", "latest_metrics", "inputs", "datasets"):
        places[table] = repr(team.postgres.query("mlflow", f"SELECT * FROM {table}")).encode()
    for each in team.bucket().objects.all():
        places[each.key] = each.get()["Body"].read()
    assert len(places) > 40
    for secret in (*team.passwords.values(), team.postgres.password):
        assert not [name for name, content in places.items() if secret.encode() in content]


# One process that imports, and then forks the writers: sixteen imports of MLflow would be most of the test.
WRITERS = """
import os, sys, time, traceback
import mlflow
from PIL import Image
from cosa_ray.tracking.store import Store, Tracking
from cosa_ray.tracking.tracker import Tracker
uri, experiment, folder, writers, steps, metrics, pause = sys.argv[1:8]

def write(name):
    place = f"{folder}/{name}"
    tracker = Tracker(Tracking(Store(uri, experiment), name, place, place + "/spool"))
    number = int(name.rpartition("-")[2])
    for step in range(1, int(steps) + 1):
        tracker.log({f"m/{n}": number + n + step / 7 for n in range(int(metrics))}, step)
        if step % 50 == 0:
            tracker.log_image("panel", Image.new("RGB", (64, 64), (number, 0, 0)), step)
        time.sleep(float(pause))
    tracker.finish("FINISHED", 300)

children = []
for number in range(int(writers)):
    child = os.fork()
    if child == 0:
        try:
            write(f"{experiment}-{number}")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def writers(team: TeamServer, folder: Path, experiment: str, count: int, steps: int, pause: float) -> subprocess.Popen:
    words = [team.url, experiment, str(folder), *map(str, (count, steps, METRICS, pause))]
    return subprocess.Popen(
        [sys.executable, "-c", WRITERS, *words], env={**os.environ, **team.environment("ada")}, start_new_session=True
    )


def finished(process: subprocess.Popen, seconds: float) -> bool:
    """True when the writers have ended well; they are made to end otherwise."""
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return False


def check(team: TeamServer, folder: Path, experiment: str, count: int, steps: int) -> None:
    """Every run is there once, with every point once and in order, its pictures, and nothing left on a spool."""
    everything = "SELECT key, step, value FROM metrics WHERE run_uuid = %s ORDER BY key, timestamp, step"
    for number in range(count):
        name = f"{experiment}-{number}"
        (run_id,) = team.run_ids(name)
        points = team.postgres.query("mlflow", everything, run_id)
        assert len(points) == steps * METRICS, name
        for n in range(METRICS):
            mine = [(step, value) for key, step, value in points if key == f"m/{n}"]
            assert [step for step, _ in mine] == list(range(1, steps + 1)), "in order, none twice"
            np.testing.assert_allclose([value for _, value in mine], [number + n + s / 7 for s in range(1, steps + 1)])
        assert team.postgres.query("mlflow", "SELECT status FROM runs WHERE run_uuid = %s", run_id) == [("FINISHED",)]
        pictures = [path for path in team.objects(run_id) if path.endswith(".png")]
        assert sorted(int(path.split("+")[2]) for path in pictures) == list(range(50, steps + 1, 50))
        assert not list((folder / name).glob("spool/*"))


@pytest.mark.timeout(600)
def test_sixteen_runs_write_at_once(team: TeamServer, as_ada: TeamServer, tmp_path: Path) -> None:
    process = writers(team, tmp_path, "sixteen", 16, 50, 0.02)
    assert finished(process, 300)
    check(team, tmp_path, "sixteen", 16, 50)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sixteen_runs_survive_a_server_that_is_killed(team: TeamServer, as_ada: TeamServer, tmp_path: Path) -> None:
    steps = 400
    process = writers(team, tmp_path, "outage", 16, steps, 0.05)
    try:
        wait_for(lambda: written(team, "outage") > 16 * METRICS * 40)
        team.kill()
        at_kill = written(team, "outage")
        assert at_kill < 16 * METRICS * steps
        # Longer than a writer needs to notice; all of them go on training meanwhile.
        wait_for(lambda: len(list(tmp_path.glob("outage-*/spool/*.jsonl"))) >= 16)
        assert written(team, "outage") == at_kill
        team.start()
        assert finished(process, 600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    check(team, tmp_path, "outage", 16, steps)


@pytest.mark.slow
def test_a_run_survives_its_postgres_and_its_bucket(team: TeamServer, as_ada: TeamServer, tmp_path: Path) -> None:
    """PostgreSQL is killed and started again; then the bucket hangs, which does not hold up the metrics."""
    folder, last = tmp_path / "below", 0
    tracker = Tracker(Tracking(Store(team.url, "below"), "below", str(folder), str(folder / "spool")))

    def log(steps: int) -> None:
        nonlocal last
        for _ in range(steps):
            last += 1
            tracker.log({"a": last / 3}, last)
            time.sleep(0.01)

    log(100)
    assert tracker.flush(60)
    team.postgres.process.kill()
    log(100)
    wait_for(lambda: any(folder.glob("spool/*")))
    team.postgres.start()
    log(50)
    team.s3.popen.send_signal(signal.SIGSTOP)
    try:
        tracker.log_image("panel", Image.new("RGB", (8, 8)), last)
        log(50)
        (run_id,) = team.run_ids("below")
        wait_for(lambda: len(team.points(run_id, "a")) == last)
    finally:
        team.s3.popen.send_signal(signal.SIGCONT)
    tracker.finish("FINISHED", 120)
    assert team.points(run_id, "a") == [(step, pytest.approx(step / 3)) for step in range(1, last + 1)]
    assert len(team.objects(run_id)) == 2
    assert not list(folder.glob("spool/*"))


def written(team: TeamServer, experiment: str) -> int:
    statement = "SELECT COUNT(*) FROM metrics JOIN runs USING (run_uuid) WHERE name LIKE %s"
    return int(team.postgres.query("mlflow", statement, f"{experiment}-%")[0][0])


def test_the_client_of_these_tests_is_nobody_by_itself() -> None:
    assert not [name for name in CLIENT[1:] if name in os.environ]
