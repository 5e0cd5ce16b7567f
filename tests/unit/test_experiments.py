"""Every experiment file validates, and takes two co-training steps with its own views, policy and losses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cosa_ray.ablation.plan import load_ablation, plan_ablation
from cosa_ray.config.load import SHIPPED, apply_overrides, load_config, shipped_experiments
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset
from cosa_ray.training.driver import train
from cosa_ray.tuning.check import check_sweep
from cosa_ray.tuning.sweepfile import load_sweep

EXPERIMENTS = [name for name in shipped_experiments() if not name.startswith(("sweeps/", "ablations/"))]
SWEEPS = [name for name in shipped_experiments() if name.startswith("sweeps/")]
ABLATIONS = [name for name in shipped_experiments() if name.startswith("ablations/")]
DOCS = Path(__file__).parents[2] / "docs"
HEAD = ("Purpose:", "Hardware:", "Expected:", "Command:")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Noise photographs of 20 and 80 classes with masks, imported from a folder: what VOC and COCO look like, small."""
    import csv

    import numpy as np
    from PIL import Image

    places = {}
    for classes in (5, 20, 80):
        folder = tmp_path_factory.mktemp(f"source{classes}")
        (folder / "images").mkdir()
        (folder / "masks").mkdir()
        rng = np.random.default_rng(classes)
        rows = []
        for number in range(12):
            size = (int(rng.integers(60, 90)), int(rng.integers(60, 90)))
            present = sorted(rng.choice(classes, size=2, replace=False).tolist())
            mask = np.zeros(size, np.uint8)
            mask[:20, :20], mask[30:50, 30:50], mask[-3:] = present[0] + 1, present[1] + 1, 255
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.jpg")
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
            split = "train" if number < 8 else "val"
            rows.append([f"{number}.jpg", ";".join(f"class{index}" for index in present), split])
        with (folder / "labels.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["image", "labels", "split"], *rows])
        (folder / "classes.txt").write_text("".join(f"class{index}\n" for index in range(classes)))
        places[classes] = str(tmp_path_factory.mktemp(f"data{classes}") / "set")
        import_dataset("folder", str(folder), places[classes], local=True)
        assert open_dataset(places[classes]).num_classes == classes
    return places


def shrunk(config: Config, name: str, datasets: dict[int, str], storage: Path) -> Config:
    """The experiment with its real views, policy and losses; only sizes and lengths are small."""
    classes = 80 if "coco" in name else 5 if "shapes" in name else 20
    changes = {
        "workers": 1,
        "storage": str(storage),
        "data.dataset": datasets[classes],
        "data.loader_processes": 0,
        "views.crop": 64,
        "views.short_side": None if config.views.short_side is None else 72,
        "training.steps": 4,
        "training.warmup_iters": 1,
        "training.batch_size": 2,
        "training.precision": "fp32",
        "optimiser.warmup_steps": 1,
        "evaluation.every": 4,
        "evaluation.subset": 2,
        "evaluation.batch_size": 2,
        "evaluation.panel_images": 1,
        "tracking.log_every": 1,
        "resources.gpus_per_worker": 0,
    }
    if config.model.backbone.startswith("vit"):
        changes |= {
            "model.backbone_args": {**config.model.backbone_args, "embed_dim": 48, "depth": 5, "num_heads": 4},
            "model.decoder_width": 16,
            "model.checkpoint": None,
            "model.pretrained": False,
        }
        if config.model.aux >= 0:
            changes["model.aux"] = 1
    return apply_overrides(config, changes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains(name: str, photographs: dict[int, str], tmp_path: Path) -> None:
    config = load_config(name)
    small = shrunk(config, name, photographs, tmp_path / "runs")
    assert (small.pseudo_labels, small.losses) == (config.pseudo_labels, config.losses)
    assert small.views.strong == config.views.strong
    if small.model.has_weights and small.model.checkpoint is None:
        # Batch norm needs trained statistics: the architecture's own initial ones stand in for the download.
        import timm
        from safetensors.torch import save_file

        torch.manual_seed(0)
        weights = timm.create_model(small.model.backbone, pretrained=False).state_dict()
        save_file(weights, tmp_path / "backbone.safetensors")
        small = apply_overrides(small, {"model.checkpoint": str(tmp_path / "backbone.safetensors")})
    result = train(small, name="two-steps", local=True, track=False)
    assert (result.state, result.step) == ("finished", 4)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_validates(name: str) -> None:
    sweep, base = load_sweep(name)
    check_sweep(sweep, base, name)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_validates(name: str) -> None:
    plan = plan_ablation(*load_ablation(name), "study", 3)
    check_sweep(plan.sweep, plan.base, name)
    assert plan.warm_ups


@pytest.mark.parametrize(("page", "below"), [("sweeps.md", "space:"), ("ablations.md", "rows:")])
def test_the_example_of_a_page_is_a_file_that_is_taken(page: str, below: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    (example,) = [each for each in blocks if "base:" in each and below in each]
    file = tmp_path / "example.yaml"
    file.write_text(example.replace("../shapes.yaml", "shapes"))
    if below == "rows:":
        plan = plan_ablation(*load_ablation(file), "study", 3)
        check_sweep(plan.sweep, plan.base, "study")
    else:
        check_sweep(*load_sweep(file), "study")


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS + SWEEPS + ABLATIONS if not name.startswith("presets/")])
def test_experiment_says_what_it_is_for(name: str) -> None:
    head = "".join(line for line in (SHIPPED / name).read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in HEAD:
        assert word in head, f"{name} lacks `{word}` in its head"
