"""Whether workers have room: against a brute-force packing, and in sentences."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.autoscaler import UNKNOWN, missing, planned
from cosa_ray.training.room import DRIVER_CPUS, Node, cpus_per_worker, without_cpus
from tests.conftest import ROOT


def config(**changes: object) -> Config:
    changes = {"training.batch_size": 64, **{key.replace("__", "."): value for key, value in changes.items()}}
    return apply_overrides(load_config("shapes"), changes)


def packs(nodes: list[Node], workers: int, cpus: float, gpus: float) -> bool:
    """Put workers one after the other wherever one has room."""
    room = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(workers):
        place = next((each for each in room if each[0] >= cpus - 1e-6 and each[1] >= gpus - 1e-6), None)
        if place is None:
            return False
        place[0] -= cpus
        place[1] -= gpus
    return True


machines = st.lists(
    st.builds(Node, st.integers(1, 16).map(float), st.integers(0, 4).map(float)), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(nodes=machines, workers=st.integers(1, 8), gpus=st.sampled_from([0.0, 1.0, 2.0]))
def test_a_share_fits_and_a_larger_one_does_not(nodes: list[Node], workers: int, gpus: float) -> None:
    asked = config(workers=workers, resources__gpus_per_worker=gpus)
    left = [Node(node.cpus - DRIVER_CPUS, node.gpus) for node in nodes]
    try:
        each = cpus_per_worker(asked, nodes)
    except UserError:
        assert not packs(left, workers, 0.02, gpus)
        return
    assert packs(left, workers, each, gpus)
    assert not packs(left, workers, each + 0.02, gpus)


def test_a_worker_never_spans_machines() -> None:
    two = [Node(2.0), Node(2.0)]
    assert cpus_per_worker(config(workers=3), two) == 0.95
    assert cpus_per_worker(config(workers=2), two) == 1.9
    with pytest.raises(
        UserError, match=r"1 workers x 3 CPUs = 3 do not fit the cluster's 2 \+ 2 CPUs; lower workers or"
    ):
        cpus_per_worker(config(workers=1, resources__cpus_per_worker=3.0), two)
    with pytest.raises(UserError, match=r"4 workers x 1 GPUs = 4 do not fit the cluster's 1 \+ 2 GPUs"):
        cpus_per_worker(config(workers=4, resources__gpus_per_worker=1.0), [Node(8.0, 1.0), Node(8.0, 2.0)])


def test_machines_that_an_autoscaler_may_add() -> None:
    head = [Node(2.0)]
    coming = [Node(64.0, 8.0)]
    stated = config(workers=8, resources__gpus_per_worker=1.0, resources__cpus_per_worker=4.0)
    assert cpus_per_worker(stated, head, coming) == 4.0
    with pytest.raises(UserError, match=r"do not fit the cluster's 0 GPUs"):
        cpus_per_worker(stated, head)
    with pytest.raises(UserError, match=r"still to come cannot be shared out; set resources\.cpus_per_worker"):
        cpus_per_worker(config(workers=8, resources__gpus_per_worker=1.0), head, coming)


def test_machines_of_a_plan_that_are_not_up() -> None:
    assert planned({"max_workers": 3}) == []
    file = {
        "max_workers": 4,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 48, "GPU": 4, "memory": 5}, "max_workers": 3},
            "cpu": {"resources": {"CPU": 16}},
            "none": {"max_workers": 0, "resources": {"CPU": 9}},
        },
    }
    gpu, cpu = Node(48.0, 4.0), Node(16.0)
    assert planned(file) == [(gpu, 3), (cpu, 4)]
    assert missing(planned(file), [Node(0.0), gpu, cpu, cpu, Node(7.0)]) == [gpu] * 2 + [cpu] * 2
    assert missing([(gpu, 1)], [gpu, gpu]) == []
    wide = config(workers=12, resources__gpus_per_worker=1.0, resources__cpus_per_worker=12.0)
    assert cpus_per_worker(wide, [Node(0.0)], missing(planned(file), [Node(0.0)])) == 12.0
    with pytest.raises(UserError, match=r"13 workers x 1 GPUs = 13 do not fit the cluster's 0 \+ 4 \+ 4 \+ 4"):
        cpus_per_worker(
            config(workers=13, resources__gpus_per_worker=1.0, resources__cpus_per_worker=12.0),
            [Node(0.0)],
            missing(planned(file)[:1], [Node(0.0)]),
        )
    assert cpus_per_worker(wide, [Node(0.0)], [UNKNOWN]) == 12.0


def test_machines_of_a_plan_that_does_not_say_their_size() -> None:
    from ray.autoscaler._private.util import prepare_config

    one = prepare_config(yaml.safe_load((ROOT / "cluster/onprem.yaml").read_text()))
    ((unknown, most),) = planned(one)
    assert (unknown, most) == (UNKNOWN, one["max_workers"])
    assert missing(planned(one), [Node(8.0)]) == [UNKNOWN] * most
    assert missing(planned(one), [Node(8.0, 1.0)] * most) == [UNKNOWN]
    assert missing(planned(one), [Node(8.0, 1.0)] * (most + 1)) == []


def test_a_range_of_workers() -> None:
    wide = config(workers={"min": 1, "max": 4}, resources__cpus_per_worker=1.0)
    assert (wide.least_workers, wide.most_workers) == (1, 4)
    assert cpus_per_worker(wide, [Node(1.0)]) == 1.0
    with pytest.raises(UserError, match="1 workers x 1 CPUs"):
        cpus_per_worker(wide, [Node(0.5)])
    on_gpus = config(workers={"min": 1, "max": 4}, resources__gpus_per_worker=1.0)
    assert cpus_per_worker(on_gpus, [Node(8.0, 2.0), Node(0.5), Node(16.0, 2.0)]) == 3.95
    for wrong, sentence in (
        ({"workers": {"min": 3, "max": 2}, "resources__cpus_per_worker": 1.0}, r"workers\.min \(3\) is above"),
        ({"workers": {"min": 1, "max": 2}}, r"needs resources\.cpus_per_worker"),
        ({"workers": {"max": 65}, "resources__cpus_per_worker": 1.0}, "less than one image to each of 65 workers"),
    ):
        with pytest.raises(UserError, match=sentence):
            config(**wrong)


def test_cpus_kept_free_come_from_the_largest_machine() -> None:
    assert sum(node.cpus for node in without_cpus([Node(2.0), Node(4.0)], 1)) == 5.0
    assert max(node.cpus for node in without_cpus([Node(2.0), Node(4.0)], 1)) == 3.0
