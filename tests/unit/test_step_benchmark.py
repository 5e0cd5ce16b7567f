"""The step benchmark: what it compares gives the same numbers, and it needs no more than a bare GPU machine has."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cosa_ray.config.load import load_config
from cosa_ray.method.assignment import assign
from cosa_ray.method.ema import MovingAverage
from cosa_ray.method.network import Network, build_network
from cosa_ray.training.distributed import join_workers, torch_settings

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from step_time import Bench, Clock, Unwatched, convolution_backward_operations  # noqa: E402
from straightforward import AverageByParameter, PlainAdamW, assign_one_by_one  # noqa: E402

TINY = [
    "views.crop=48",
    "model.backbone_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, class_token: false, global_pool: ''}",
    "model.aux=0",
    "model.decoder_width=16",
    "training.batch_size=2",
    "training.precision=fp32",
]


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return build_network(load_config("shapes", TINY).model, 3, image_size=48)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_by_one_gives_the_same_assignments(flip: bool, stride: int, network: Network) -> None:
    images = torch.randn(2, 3, 48, 48)
    mine = assign(network, images, (1.0, 0.5, 1.5), flip, stride=stride)
    plain = assign_one_by_one(network, images, (1.0, 0.5, 1.5), flip, stride=stride)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_parameter_by_parameter_is_the_same_average(network: Network) -> None:
    online = deepcopy(network)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
    mine, plain = deepcopy(network), deepcopy(network)
    for finite in (torch.ones(()), torch.zeros(())):
        MovingAverage(mine, online).update(0.9, finite)
        AverageByParameter(plain, online).update(0.9, finite)
    for one, other in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_plain_optimiser_takes_the_same_steps(network: Network) -> None:
    networks = [network, deepcopy(network)]
    fused, plain = (torch.optim.AdamW(networks[0].parameters(), lr=1e-2, fused=True), None)
    plain = PlainAdamW([{"params": list(networks[1].parameters()), "lr": 1e-2}])
    for found in (0.0, 0.0, 1.0):
        for each, optimiser in zip(networks, (fused, plain), strict=True):
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter) if found == 0.0 else torch.full_like(parameter, torch.inf)
            optimiser.grad_scale, optimiser.found_inf = None, torch.tensor(found)
            optimiser.step()
    for one, other in zip(*(each.parameters() for each in networks), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (6, 1), (2, 2)])
def test_a_grouped_convolution_is_counted_by_group(groups: int, stride: int) -> None:
    """Twice as many operations backward as forward; where the input needs no gradient, as many."""
    layer = torch.nn.Conv2d(6, 12, 3, stride=stride, padding=1, groups=groups)
    forward = 2 * 2 * 12 * (6 // groups) * 9 * (8 // stride) ** 2
    ours = {torch.ops.aten.convolution_backward: convolution_backward_operations}
    for needed, times in ((True, 3), (False, 2)):
        with FlopCounterMode(display=False, custom_mapping=ours) as counter:
            layer(torch.randn(2, 6, 8, 8, requires_grad=needed)).sum().backward()
        assert counter.get_total_flops() == times * forward


def test_the_operations_are_those_of_every_product_and_convolution() -> None:
    """Against a count layer by layer: 2 for a multiplication and an addition, thrice for forward and backward."""
    config = load_config("shapes", [*TINY, "assignment.scales=[1.0, 0.5]", "workers=1", "training.threads=1"])
    workers = join_workers()
    with torch_settings(config, None, workers.device):
        bench = Bench(config, None, 3, workers, Unwatched())
    counted: list[int] = []
    networks = (bench.state.assignment, bench.state.online)
    attention = [layer for each in networks for name, layer in each.named_modules() if name.endswith("attn.qkv")]
    assert len(attention) == 4

    def count(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        inner = layer.weight[0].numel()  # of a linear layer and of a convolution alike
        counted.append(2 * out.numel() * inner)
        if layer in attention:  # queries by keys, and weights by values
            batch, tokens = given[0].shape[:2]
            counted.append(2 * 2 * batch * tokens**2 * layer.in_features)

    def forward(network: Network, images: torch.Tensor) -> list[int]:
        counted.clear()
        hooks = [
            layer.register_forward_hook(count)
            for layer in network.modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        ]
        with torch.no_grad():
            network(images)
        for hook in hooks:
            hook.remove()
        return list(counted)

    assigned = sum(sum(forward(bench.state.assignment, view)) for view in bench.inputs)
    online = forward(bench.state.online, bench.images)
    # The first convolution's input, the images, gets no gradient.
    assert bench.operations == assigned + 3 * sum(online) - online[0]


def _needed(*packages: str) -> set[str]:
    """Import names of packages and of all that they need, where they are installed."""
    seen: set[str] = set()
    pending = list(packages)
    while pending:
        name = re.split(r"[\[<>=~! ;(]", pending.pop())[0].lower().replace("_", "-")
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in seen:
            continue
        seen.add(name)
        pending += [one for one in distribution.requires or [] if "extra ==" not in one]
    owners = importlib.metadata.packages_distributions()
    return {root for root, names in owners.items() if seen & {n.lower().replace("_", "-") for n in names}}


def test_a_part_is_timed_without_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look moves on by one: two looks a call, and what lies between them."""
    looks = iter(range(100))
    monkeypatch.setattr("step_time.now", lambda: next(looks))
    clock = Clock()
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", lambda: (inner(), inner()))()
    assert dict(clock.spent) == {"inner": 2, "outer": 3}  # looks 0 to 5, of which 1 to 2 and 3 to 4 are within
    inner()
    assert clock.spent["inner"] == 3
    clock.looking = False
    inner()
    assert clock.spent["inner"] == 3


def test_it_runs_on_torch_timm_numpy_pyarrow_and_pydantic_alone(tmp_path: Path) -> None:
    """On a data set, straightforward step included, with every other package of this environment hidden."""
    from cosa_ray.data.importing import import_dataset

    import_dataset("shapes", None, str(tmp_path / "shapes"), train=8, val=2, size=48, local=True)
    allowed = _needed("torch", "timm", "numpy", "pyarrow", "pydantic")
    installed = set(importlib.metadata.packages_distributions())
    assert {"ray", "mlflow", "skimage", "sklearn"} <= installed - allowed
    words = ["shapes", "--rounds", "2", "--threads", "1", "--straightforward", "--dataset", str(tmp_path / "shapes")]
    for one in TINY:
        words += ["--set", one]
    script = (
        "import runpy, sys\n"
        "from importlib.machinery import PathFinder\n"
        f"hidden = {sorted(installed - allowed - {'cosa_ray'})!r}\n"
        "class Bare(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] in hidden else super().find_spec(name, path, target)\n"
        "sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]\n"
        f"sys.argv = ['step_time.py', *{words!r}, '--out', {str(tmp_path / 'out.json')!r}]\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'step_time.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["seconds"]) == {"bare", "step", "straightforward", "bare fp32"}
    for name, whole in found["seconds"].items():
        parts = found["split"][name]
        assert whole > 0
        for part in ("assignment network", "online forward", "backward", "optimiser"):
            assert parts[part] > 0, (name, part)
        for part in ("data", "scales and fusion", "pseudo-labels and losses"):
            assert (parts[part] > 0) == ("bare" not in name), (name, part)
    assert found["step / bare"] > 0
    assert "step / bare" in done.stdout
    for name in ("images a second", "most GiB held", "TFLOP of the network", "TFLOP/s of one matrix product"):
        assert found[name] > 0, name


def test_two_trials_side_by_side_and_in_a_row(tmp_path: Path) -> None:
    words = ["shapes", "--steps", "1", "--rounds", "1", "--threads", "2", "--out", str(tmp_path / "out.json")]
    for one in TINY:
        words += ["--set", one]
    script = str(ROOT / "benchmarks" / "side_by_side.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["seconds"]) == {"side by side", "one after the other"}
    assert found["one after the other / side by side"] > 0
