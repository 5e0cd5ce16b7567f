"""The machines that a cluster's autoscaler may add: said in no one place by Ray, and needed before anything starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosa_ray.training.room import Node

log = logging.getLogger(__name__)

# A machine of which nothing is known, as all are where the bounds cannot be read (KubeRay's autoscaler is in another
# container): it fits anything.
UNKNOWN = Node(1e9, 1e9)
Kind = tuple[Node, int]  # a machine and how many of it there may be


def to_come(alive: Sequence[Node]) -> list[Node]:
    """What the autoscaler of the cluster that this process is attached to could add to the machines there are.

    Machine by machine where the bounds are known, UNKNOWN where they are not; nothing without an autoscaler.
    """
    if (kinds := _planned()) is None:  # Ray's control store has a place for it, which Ray leaves empty
        return [UNKNOWN] if _autoscaled() else []
    return missing(kinds, alive)


def missing(kinds: Sequence[Kind], alive: Sequence[Node]) -> list[Node]:
    """The machines of a plan that are not up; those that are count by their size, whatever they were started as.

    For machines of unknown size those count that are left then, all but one, which is the head.
    """
    left, coming = list(alive), []
    for node, most in sorted(kinds, key=lambda kind: kind[0] == UNKNOWN):
        up = min(most, max(0, len(left) - 1) if node == UNKNOWN else left.count(node))
        for _ in range(up):
            left.remove(left[-1] if node == UNKNOWN else node)
        coming += [node] * (most - up)
    return coming


def planned(config: Mapping[str, Any]) -> list[Kind]:
    """The worker machines of a file for `ray up`, with what each has and the most of it that there may be."""
    total = int(config.get("max_workers", 0))
    head = config.get("head_node_type")
    kinds = []
    for name, kind in config.get("available_node_types", {}).items():
        resources = kind.get("resources") or {}
        sized = "CPU" in resources or "GPU" in resources  # else what Ray finds on the machine
        node = Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))) if sized else UNKNOWN
        most = min(total, int(kind.get("max_workers", 0 if name == head else total)))
        if most:
            kinds.append((node, most))
    return kinds


def _planned() -> list[Kind] | None:
    """The plan that this machine's autoscaler was started with, when it is the one of this cluster."""
    import ray
    import yaml

    address = ray.get_runtime_context().gcs_address
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if not any(word.endswith(("_private/monitor.py", "v2/monitor.py")) for word in words):
            continue
        given = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if given.get("gcs-address") != address or not given.get("autoscaling-config"):
            continue
        try:
            return planned(yaml.safe_load(Path(given["autoscaling-config"]).expanduser().read_text()))
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            log.warning("the autoscaler's plan cannot be read (%s); its bounds are not checked", error)
            return None
    return None


def _autoscaled() -> bool:
    """True when an autoscaler looks after the cluster, by the status that it keeps in Ray's control store.

    A cluster started by hand keeps one, too, in which every machine is of a kind of its own.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        kinds = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    else:
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report")
        if report is None:
            return False
        kinds = [*report["active_nodes"], *(report["idle_nodes"] or {})]
    return not any(kind.startswith("node_") for kind in kinds)
