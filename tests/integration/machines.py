"""Several machines for tests: raylets with resources of their own, which can be taken away as a machine fails."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.team_server import START_SECONDS, Process


class Machines:
    """A head and the machines added to it; ids are Ray's."""

    def __init__(self, head_cpus: float) -> None:
        import ray
        from ray.cluster_utils import Cluster

        # The dashboard stays on: without it Ray leaks the placement groups of stopped trials.
        head = {"num_cpus": head_cpus, "include_dashboard": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def add(self, cpus: float) -> Any:
        """A machine more; returns when the cluster has it."""
        node = self.cluster.add_node(num_cpus=cpus)
        self.cluster.wait_for_nodes(START_SECONDS)
        return node

    def start(self, cpus: float, log: Path) -> Process:
        """A machine more, as an operator starts one: `ray start --block`, which SIGTERM tells to go in a while."""
        import ray

        # By their ids: one that was killed a moment ago counts as alive for a while.
        before = {node["NodeID"] for node in ray.nodes()}
        command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={self.cluster.address}"]
        command += [f"--num-cpus={cpus}", "--block", "--disable-usage-stats"]
        process = Process(command, log, os.environ)
        try:
            process.wait_until(lambda: any(node["Alive"] and node["NodeID"] not in before for node in ray.nodes()))
        except RuntimeError:
            process.kill()  # no test after this one expects it
            raise
        return process

    def kill(self, node: Any) -> None:
        """Take a machine away at once, as kill -9 of its raylet does."""
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@contextmanager
def machines(head_cpus: float = 2) -> Iterator[Machines]:
    """A cluster for the block, with the settings that a run under Ray Train has."""
    from cosa_ray.training.ray_train import RAY_TRAIN_SETTINGS

    with pytest.MonkeyPatch.context() as patch:
        for key, value in RAY_TRAIN_SETTINGS.items():
            patch.setenv(key, value)
        made = Machines(head_cpus)
        try:
            yield made
        finally:
            made.close()


def workers() -> list[psutil.Process]:
    """Processes of Ray Train's workers on this host."""
    titled = ((each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))
    return [each for each, words in titled if any("RayTrainWorker" in word for word in words)]


class Seen:
    """Watches actors of a class from a thread: on which machines there were any, and how many at a time."""

    def __init__(self, name: str) -> None:
        self._name, self._done = name, threading.Event()
        self.nodes: set[str] = set()
        self.sizes: list[int] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Seen:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        from ray.util.state import list_actors

        while not self._done.wait(0.5):
            try:
                alive = list_actors(filters=[("state", "=", "ALIVE")], limit=200, timeout=10)
            except Exception:
                continue
            mine = [each for each in alive if self._name in each.class_name]
            self.nodes |= {each.node_id for each in mine}
            if not self.sizes or self.sizes[-1] != len(mine):
                self.sizes.append(len(mine))
