"""How much storage a sweep will take, against checkpoints as they lie on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import Description
from cosa_ray.training.driver import preflight
from cosa_ray.training.state import TrainState
from cosa_ray.training.storage import FULL_STATE, RunFolder
from cosa_ray.tuning import size as size_module
from cosa_ray.tuning.size import check_size, shown, sweep_bytes


def test_the_estimate_is_what_lies_on_the_disk(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Of two running trials and three that have ended, to within five per cent."""
    config = tiny(model__backbone_args__embed_dim=128)
    dataset = open_dataset(config.data.dataset)
    state = TrainState(config, dataset.num_classes, torch.device("cpu"))
    for parameter in state.online.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    state.optimise(torch.ones(()), state.gradient_norm())  # moments come with the first step
    for trial, copies in enumerate([3, 3, 2, 2, 2]):
        for copy in range(copies):
            folder = tmp_path / "there" / f"{trial}-{copy}"
            folder.mkdir(parents=True)
            state.save(folder, dataset.card, Description("s", 1, [], {}, "online", 1.0, {}))
            if copies == 2:
                (folder / FULL_STATE).unlink()
    there = sum(file.stat().st_size for file in (tmp_path / "there").rglob("*") if file.is_file())
    assert sweep_bytes(preflight(config), trials=5, at_once=2) == pytest.approx(there, rel=0.05)


def test_no_more_run_at_once_than_there_are_trials() -> None:
    assert sweep_bytes((10, 3), trials=2, at_once=8) == 2 * 3 * 10
    assert sweep_bytes((10, 3), trials=0, at_once=8) == 0


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "not" / "there" / "yet"))
    for free, enough in ((5999, False), (6000, True)):
        monkeypatch.setattr(size_module.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        if enough:
            assert check_size(folder, (1000, 300), trials=2, at_once=5) == "6 kB"
        else:
            with pytest.raises(UserError, match=f"take up to 6 kB, and {tmp_path} has 6 kB free"):
                check_size(folder, (1000, 300), trials=2, at_once=5)
    assert check_size(RunFolder("memory://far"), (10**15, 1), trials=9, at_once=9) == "2.7e+04 TB"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (999.9, "1 kB"), (1000, "1 kB"), (1.44e9, "1.44 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert shown(size) == words
