"""The workers of a run: devices, what they agree on, and a mean of gradients that no bucket layout changes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.distributed import StepStatus, Workers, join_workers, torch_settings
from cosa_ray.training.loop import Job
from cosa_ray.training.ray_train import worker_device

Make = Callable[..., Config]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that says it has two GPUs; yields the devices that were taken."""
    taken: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    return taken


def test_without_a_gpu_from_ray_a_worker_stays_on_the_cpu(two_gpus: list[torch.device], tiny: Make) -> None:
    """Ray hides no GPUs from a worker that asked for none: it must not take one of them."""
    assert join_workers(worker_device(tiny())).device == torch.device("cpu")
    assert two_gpus == []


def test_a_local_process_takes_the_gpu_of_its_rank(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert join_workers().device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_workers().device == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most one process a GPU"):
        join_workers()


def test_torch_is_left_as_it_was(tiny: Make) -> None:
    def settings() -> tuple[int, bool, bool]:
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), fill

    before = settings()
    with torch_settings(tiny(training__threads=before[0] + 1), None, torch.device("cpu")):
        assert settings() == (before[0] + 1, True, False)
    assert settings() == before


HELD = """
import sys, torch
from cosa_ray.training.distributed import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
def pages():
    return int(open("/proc/self/statm").read().split()[1])
tensors = [torch.ones(2**20) for _ in range(20)]
held = pages()
del tensors
print(held - pages())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_freed_memory_stays_with_the_process() -> None:
    def given_back(way: str) -> int:
        done = subprocess.run([sys.executable, "-c", HELD, way], capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip("not glibc")
        return int(done.stdout)

    assert 10 * given_back("keep") < given_back("default")  # of 80 MiB


class Meeting(Workers):
    """One of two workers in threads, which add their tensors up when both have come."""

    shared: list[Tensor | None]
    barrier: threading.Barrier

    @classmethod
    def pair(cls) -> list[Meeting]:
        shared: list[Tensor | None] = [None, None]
        barrier = threading.Barrier(2, timeout=30)
        pair = [cls(rank, 2, torch.device("cpu")) for rank in range(2)]
        for worker in pair:
            object.__setattr__(worker, "shared", shared)
            object.__setattr__(worker, "barrier", barrier)
        return pair

    def sum(self, tensor: Tensor) -> Tensor:
        self.shared[self.rank] = tensor
        self.barrier.wait()
        first, second = self.shared
        assert first is not None
        assert second is not None
        total = first + second
        self.barrier.wait()
        return total


def test_one_bad_rank_of_two_tells_both_and_names_the_term() -> None:
    good = {"loss_cls": torch.tensor(1.0), "gradient": torch.tensor(2.0)}
    seen: dict[int, list[object]] = {0: [], 1: []}

    def work(worker: Meeting) -> None:
        status = StepStatus(worker)
        bad = good | {"gradient": torch.tensor(float("nan"))} if worker.rank else good
        first, second = worker.rank == 0, worker.rank == 1
        for step, values, stop, leaving in ((1, good, False, second), (2, bad, False, False), (3, good, first, False)):
            finite = status.share(step, values, stop, leaving)
            seen[worker.rank] += [finite.item(), status.read()]
        assert status.read() is None, "read once"

    threads = [threading.Thread(target=work, args=(worker,)) for worker in Meeting.pair()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = [(1, [], False, True), (2, ["gradient"], False, False), (3, [], True, False)]
    assert seen[0] == [1.0, told[0], 0.0, told[1], 1.0, told[2]]
    assert seen[1] == seen[0]


WORK = """
import pickle, sys
import torch.distributed as dist
from cosa_ray.training.loop import run_worker

class Session:
    def __init__(self, stop_at):
        self.left = stop_at
    def alive(self): ...
    def leaving(self): return False
    def progress(self, progress): ...
    def report(self, metrics): ...
    def close(self): ...
    def stop_wished(self):
        self.left -= 1
        return self.left == 0

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
whole, cut = pickle.load(open(f"{folder}/jobs", "rb"))
assert run_worker(whole, Session(0)).state == "finished"
assert run_worker(cut, Session(7 if rank == 1 else 0)).state == "stopped"
dist.barrier()  # rank 0 is the last to end: it writes
assert run_worker(cut, Session(0)).state == "finished"
"""


@pytest.mark.slow
def test_three_workers_resume_bitwise(tiny: Make, tmp_path: Path) -> None:
    """DDP lays its buckets out anew after a process's first step; with three addends their order must not follow."""
    config = tiny(
        workers=3,
        training__steps=12,
        training__warmup_iters=3,
        training__batch_size=3,
        evaluation__every=100,
        evaluation__subset=3,
        checkpoint__every=100,
        data__loader_processes=0,
    )
    jobs = [Job(name, str(tmp_path / name), config, None) for name in ("whole", "cut")]
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(3)
    ]
    try:
        said = [worker.communicate(timeout=500)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(said)
    for file in ("online.safetensors", "assignment.safetensors"):
        a, b = (load_file(tmp_path / name / "checkpoints" / "step_00000012" / file) for name in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a), file
