"""The files for `ray up`: through Ray's own preparation and validation, and through what matters to us."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.unit.cluster_files import CLUSTER, RAY_UP

Config = dict[str, Any]


def read(name: str) -> Config:
    config: Config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return config


def prepared(config: Config) -> Config:
    """What `ray up` makes of a file, defaults included, and accepts."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready: Config = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def problems(config: Config) -> list[str]:
    """What is wrong with a prepared cluster: authentication, what listens where, bounds, spot, pins."""
    found = []
    mounts = config["file_mounts"]
    for role in ("head", "worker"):
        starts = [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        if len(starts) != 1:
            found.append(f"{role}: {len(starts)} ray start")
        for command in starts:
            before = command.partition("ray start")[0]
            if "RAY_AUTH_MODE=token" not in before:
                found.append(f"{role}: no token")
            path = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+?)/auth_token;", before)
            if not path or path[1].replace("$HOME", "~") not in mounts:
                found.append(f"{role}: token file is not mounted")
            if "mlflow.env" not in before:
                found.append(f"{role}: no account for MLflow")
            if role == "head" and "--dashboard-host=127.0.0.1" not in command:
                found.append("head: dashboard is not on loopback")
    every = (*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"])
    if any("pip install" in command for command in every):
        found.append("Ray's default installs Ray")
    for name, kind in config["available_node_types"].items():
        if config["provider"]["type"] == "local":
            if not kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"]):
                found.append(f"{name}: bounds")
            continue
        node, head = kind["node_config"], name == config["head_node_type"]
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot" or any(
            each.get("provisioningModel") == "SPOT" for each in node.get("scheduling", [])
        )
        if spot is head:
            found.append(f"{name}: {'spot' if head else 'not spot'}")
        if head and kind["resources"].get("CPU") != 0:
            found.append("head: takes workers")
        # From nothing, cosa-ray would refuse every run: it plans with the nodes that are up.
        if not head and not 1 <= kind["min_workers"] <= kind["max_workers"] <= config["max_workers"]:
            found.append(f"{name}: bounds")
        if config["provider"]["type"] == "aws" and not (node.get("SecurityGroupIds") and node.get("ImageId")):
            found.append(f"{name}: Ray would choose an image of 2023, or open SSH to everybody")
    if config["provider"]["type"] != "local" and "@sha256:" not in config["docker"]["image"]:
        found.append("image is not pinned")
    return found


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_the_file_and_it_is_as_we_want_it(name: str) -> None:
    assert problems(prepared(read(name))) == []


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_refuses_a_misspelt_key(name: str) -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        prepared({**read(name), "idle_timeout_minute": 5})


def test_ray_refuses_more_workers_at_least_than_at_most() -> None:
    config = read("aws")
    config["available_node_types"]["gpu"]["min_workers"] = 9
    with pytest.raises(ValueError, match="max_workers"):
        prepared(config)


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("aws", replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"), "no token"),
        ("onprem", replace("~/cosa-ray-secrets: ~", "~/secrets: ~"), "token file is not mounted"),
        ("gcp", replace("/home/cosa/secrets/mlflow.env; set", "/dev/null; set"), "no account for MLflow"),
        ("onprem", replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"), "dashboard is not on loopback"),
        ("aws", replace("head_setup_commands: []\n", ""), "Ray's default installs Ray"),
        ("aws", replace("      InstanceMarketOptions: {MarketType: spot}\n", ""), "not spot"),
        ("gcp", replace("        - provisioningModel: SPOT\n", ""), "not spot"),
        (
            "aws",
            replace("m6i.2xlarge\n", "m6i.2xlarge\n      InstanceMarketOptions: {MarketType: spot}\n"),
            "head: spot",
        ),
        ("gcp", replace("min_workers: 1", "min_workers: 0"), "bounds"),
        ("onprem", replace("min_workers: 2\nmax", "min_workers: 1\nmax"), "bounds"),
        ("gcp", replace('resources: {"CPU": 0}', "resources: {}"), "takes workers"),
        ("aws", replace("      SecurityGroupIds: [sg-YOUR-GROUP]\n", ""), "open SSH"),
        ("gcp", replace("cosa-ray@sha256:YOUR-DIGEST", "cosa-ray:latest"), "not pinned"),
    ],
)
def test_each_check_finds_its_defect(name: str, change: Callable[[str], str], problem: str) -> None:
    broken = yaml.safe_load(change((CLUSTER / f"{name}.yaml").read_text()))
    assert any(problem in each for each in problems(prepared(broken)))
