"""`cosa-ray status` tells from a folder alone what a sweep or run is doing, or what was last heard of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cosa_ray.errors import UserError
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.results import SweepResult, TrialResult, write_result
from cosa_ray.tuning.status import SILENT_SECONDS, read_status
from cosa_ray.tuning.watch import STATUS_FILE, SweepProgress, TrialRow

ROWS = [
    TrialRow("000", "s-000", "finished", {"losses.cam_to_seg": 0.1}, step=20, steps=20, score=0.4),
    TrialRow("001", "s-001", "running", {"losses.cam_to_seg": 0.2}, step=5, steps=20, phase="warmup"),
]


@pytest.fixture
def sweep(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "runs/s"))
    folder.write_text("sweep.yaml", "{}")
    return folder


def progress(seconds_ago: float = 0.0, **changes: object) -> str:
    now = SweepProgress("s", "val/miou", "max", 3, ROWS, seconds=100.0, updated=time.time() - seconds_ago)
    return replace(now, **changes).dump()  # type: ignore[arg-type]


def result(state: str, seconds: float) -> SweepResult:
    best = TrialResult("000", "s-000", "finished", {}, 20, 0.4, {}, "s-000", None, None)
    return SweepResult("s", "s", state, "val/miou", "max", None, None, [best], best, None, seconds=seconds)


def state(sweep: RunFolder) -> tuple[str, str]:
    found = read_status(sweep.uri)
    assert found.kind == "sweep"
    return found.state, found.sentence


def test_a_sweep_from_its_start_to_its_end(sweep: RunFolder) -> None:
    assert state(sweep)[0] == "starting"
    sweep.write_text(STATUS_FILE, progress())
    assert state(sweep)[0] == "running"
    assert "1/3 trials ended  best val/miou 0.4000 (000)  running: 001 5/20" in state(sweep)[1]
    sweep.write_text(STATUS_FILE, progress(SILENT_SECONDS + 240))
    assert state(sweep)[0] == "silent"
    assert "said nothing for 5 min" in state(sweep)[1]
    assert "--name s --resume" in state(sweep)[1]
    write_result(sweep, result("finished", 120.0))
    assert state(sweep) == ("finished", "sweep s is finished; 1 trial, best val/miou 0.4000 (000).")


def test_a_resumed_sweep_runs_although_an_earlier_result_lies_there(sweep: RunFolder) -> None:
    write_result(sweep, result("stopped", 90.0))
    sweep.write_text(STATUS_FILE, progress(0.0, seconds=130.0))
    assert state(sweep)[0] == "running"
    sweep.write_text(STATUS_FILE, progress(0.0, seconds=90.0, ending="it was stopped"))
    assert state(sweep)[0] == "stopped"


def test_a_run(trained_run: Path) -> None:
    found = read_status("trained", str(trained_run.parent))
    assert (found.kind, found.state, found.progress) == ("run", "finished", None)
    assert "checkpoint at step 20 of 20, best val/miou 0." in found.sentence


def test_an_unknown_name_names_what_there_is(trained_run: Path) -> None:
    with pytest.raises(UserError, match=r"no run trainde.*there are .*trained"):
        read_status("trainde", str(trained_run.parent))


def test_the_verb_prints_trials_and_one_json_object(sweep: RunFolder, tmp_path: Path) -> None:
    sweep.write_text(STATUS_FILE, progress())
    command = [sys.executable, "-m", "cosa_ray", "status", "s"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "running (warmup)" in shown
    assert "losses." in shown
    assert "cam_to_seg" in shown
    said = json.loads(subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True).stdout)
    assert [row["id"] for row in said["progress"]["rows"]] == ["000", "001"]
    wrong = subprocess.run([*command[:-1], "t"], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_a_look_does_not_wait_for_torch() -> None:
    """Seconds of every `cosa-ray status`; MLflow and Ray take as long."""
    script = (
        "import sys, cosa_ray.tuning.status as _; print(sorted({'torch', 'timm', 'mlflow', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
