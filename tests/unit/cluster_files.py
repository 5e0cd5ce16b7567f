"""Reading what lies in cluster/, for the tests of it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
GUIDE = ROOT / "docs" / "cluster.md"
RAY_UP = ("aws", "gcp", "onprem")
BIN = Path(sys.executable).parent


def files() -> list[Path]:
    """Every file of cluster/ that is part of the project."""
    own = {"current.yaml", ".env"}
    return sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.name not in own)


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def manifests() -> list[dict[str, Any]]:
    """Every Kubernetes object of cluster/kubernetes, the kustomization aside."""
    found = [each for path in sorted((CLUSTER / "kubernetes").glob("*.yaml")) for each in documents(path)]
    return [each for each in found if each["kind"] != "Kustomization"]


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The cluster that a RayCluster or a RayJob asks for."""
    spec: dict[str, Any] = manifest.get("spec", {})
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}.get(manifest["kind"])


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod templates by owner and role, as `RayCluster/cosa-ray/head`."""
    found = {}
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if cluster := ray_cluster(each):
            found[f"{name}/head"] = cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                found[f"{name}/{group['groupName']}"] = group["template"]
        if each["kind"] == "RayJob":
            found[f"{name}/submitter"] = each["spec"]["submitterPodTemplate"]
        if each["kind"] in ("Deployment", "StatefulSet"):
            found[name] = each["spec"]["template"]
    return found


def shell_words(command: str) -> list[str]:
    """A shell command's words, whatever the shell would put in for a variable written as 1."""
    flat = re.sub(r"\\\n", " ", command)
    return shlex.split(re.sub(r"\$\(\([^)]*\)\)|\$\{[^}]*\}|\$\w+", "1", flat), comments=True)


def shell_blocks(markdown: str) -> list[str]:
    """The commands of a page's `sh` blocks, one each, continued lines put together."""
    blocks = re.findall(r"^```sh\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
