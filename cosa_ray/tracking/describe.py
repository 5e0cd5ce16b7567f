"""What a run is: its resolved config, dataset, code and environment, gathered once on the driver."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cosa_ray
from cosa_ray.config.credentials import redacted_diff, without_credentials
from cosa_ray.config.load import dump_config, flatten
from cosa_ray.config.schema import Config
from cosa_ray.data.card import DatasetCard

log = logging.getLogger(__name__)
DIFF_BYTES = 512 * 1024
_PLAIN_DIFF = ("--no-color", "--no-ext-diff")
# Files that hold secrets in most projects, if somebody committed one: their changes stay here.
_NOT_SHOWN = tuple(
    f":(exclude,icase,glob)**/{name}"
    for name in (
        *(
            ".env*",
            "*.env",
            ".netrc",
            ".pypirc",
            "*.pem",
            "*.key",
            "*.p12",
            "*.pfx",
            "id_rsa*",
            "id_ecdsa*",
            "id_ed25519*",
        ),
        *("credentials", "*credential*.[!p]*", "*secret*.[!p]*"),  # of settings and notes, not of Python
    )
)
GIT_FILE = "git-state.json"  # beside a copy of the package that was sent somewhere
# The columns of a shard (data/shard.py), in the only form that MLflow's pages show as a table.
_SCHEMA = tuple(
    {"name": name, "type": kind, "required": name != "mask"}
    for name, kind in (
        ("id", "string"),
        ("image", "binary"),
        ("mask", "binary"),
        ("labels", "array"),
        ("height", "integer"),
        ("width", "integer"),
    )
)
PACKAGES = ("torch", "timm", "ray", "mlflow", "numpy", "pyarrow", "torchvision")


@dataclass(frozen=True)
class RunDescription:
    """Parameters, tags, artifacts (path -> content) and datasets as MLflow gets them; picklable.

    `note` is what the run's page says of it first, in Markdown; it is written when the run is made, and not again.
    """

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict, repr=False)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def describe(config: Config, tags: Mapping[str, str] | None = None) -> RunDescription:
    """Describe a run of this config: parameters, tags, datasets, and artifacts config.yaml, dataset.json, git.diff.

    Called on the driver, where the repository is; the worker adds its own `environment`. What cannot be found out is
    left out: describing never fails.
    """
    shown = without_secrets(config)
    git, diff = git_state()
    artifacts = {"config.yaml": dump_config(shown).encode()}
    if diff:
        artifacts["git.diff"] = diff
    datasets: list[dict[str, Any]] = []
    card = _card(config.data.dataset)
    if card is not None:
        artifacts["dataset.json"] = card.model_dump_json(indent=1).encode()
        datasets = dataset_inputs(card, config)
    tags = {"cosa_ray.kind": "run", **(tags or {})}
    note = _note(config, card, tags["cosa_ray.kind"])
    return RunDescription(
        parameters(shown), {**_origin(), **git, **config.tracking.tags, **tags}, artifacts, datasets, note
    )


def _note(config: Config, card: DatasetCard | None, kind: str) -> str:
    """One sentence on what is trained on what; the name of an imported model says more than its settings."""
    if kind == "release":
        return ""
    data = f"`{_name(config.data.dataset)}`"
    if card is not None and (part := card.splits.get(config.data.train_split)) is not None:
        data += f" ({part.images} images, {len(card.classes)} classes)"
    training = config.training
    return (
        f"A {kind} on {data}: `{config.model.backbone}`, {training.steps} steps ({training.warmup_iters} of warm-up), "
        f"batches of {training.batch_size}, seed {config.seed}. All settings: `config.yaml` under Artifacts."
    )


def parameters(config: Config) -> dict[str, str]:
    """The resolved config, flattened to dotted keys; lists, mappings and null as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flatten(config).items()
    }


def dataset_inputs(card: DatasetCard, config: Config) -> list[dict[str, Any]]:
    """The splits of a run as MLflow dataset inputs: named dataset/split, told apart by their shards' checksums."""
    uri = config.data.dataset
    inputs = []
    for split, context in ((config.data.train_split, "train"), (config.data.val_split, "val")):
        subset = card.subsets.get(split)
        part = card.splits.get(split if subset is None else subset.of)
        if part is None:
            continue
        sums = [shard.sha256 for shard in part.shards] + ([] if subset is None else [subset.sha256])
        digest = hashlib.sha256("".join(sums).encode()).hexdigest()[:16]
        profile: dict[str, Any]
        if subset is None:
            counts = dict(zip(card.classes, part.images_per_class, strict=True))
            profile = {"images": part.images, "masks": part.masks, "images_per_class": counts}
        else:
            profile = {"images": subset.images, "masks": subset.masks, "of": subset.of, "chosen_by": subset.origin}
        profile |= {"classes": len(card.classes), "labels_from": card.labels_from}
        source = {"uri": uri if "://" in uri else str(Path(uri).absolute())}
        dataset = {
            "name": f"{_name(uri)}/{split}",
            "digest": digest,
            "source_type": urlsplit(uri).scheme or "local",
            "source": json.dumps(source),
            "schema": json.dumps({"mlflow_colspec": [*_SCHEMA]}),
            "profile": json.dumps(profile),
        }
        inputs.append({"dataset": dataset, "context": context})
    return inputs


def git_state(folder: Path | None = None) -> tuple[dict[str, str], bytes | None]:
    """Tags of the code's commit, and the uncommitted changes as a diff (cut at 512 KiB).

    The repository is the one the package is developed in, else that of the working folder; without one, what the file
    that came with a copy of the package says, else nothing.
    """
    for place in [folder] if folder else [Path(cosa_ray.__file__).parent, Path.cwd()]:
        # An installed package can lie in a repository's virtual environment without being part of it.
        tracked = place == Path.cwd() or place == folder or _git(place, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(place, "rev-parse", "HEAD") if tracked is not None else None
        if commit is None:
            continue
        changes = _diff(place, ":/")
        status = _git(place, "status", "--porcelain") or b""
        tags = {
            "mlflow.source.git.commit": commit.decode().strip(),
            "cosa_ray.git.dirty": "true" if status.strip() else "false",
        }
        branch = (_git(place, "rev-parse", "--abbrev-ref", "HEAD") or b"").decode().strip()
        if branch and branch != "HEAD":
            tags["mlflow.source.git.branch"] = branch
        return tags, changes or None
    return ({}, None) if folder else _sent_git_state()


def git_state_to_send() -> str | None:
    """The state of the code as the content of GIT_FILE; None without a repository.

    Its diff is of the package alone: no change to any other file of the repository leaves this machine.
    """
    tags, _ = git_state()
    if not tags:
        return None
    package = Path(cosa_ray.__file__).parent
    diff = _diff(package, ".")
    return json.dumps({"tags": tags, "diff": diff.decode(errors="replace")}, indent=1)


def _sent_git_state() -> tuple[dict[str, str], bytes | None]:
    for place in (Path(cosa_ray.__file__).parent.parent, Path.cwd()):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            said = json.loads((place / GIT_FILE).read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in said["tags"].items()}, said["diff"].encode() or None
    return {}, None


def _diff(folder: Path, part: str) -> bytes:
    """Uncommitted changes of a part of the repository (a pathspec), without secrets, not too long."""
    diff = _git(folder, "diff", "HEAD", *_PLAIN_DIFF, "--", part, *_NOT_SHOWN) or b""
    return _cut(redacted_diff(diff.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape"))


def _cut(diff: bytes) -> bytes:
    return diff if len(diff) <= DIFF_BYTES else diff[:DIFF_BYTES] + b"\n[cut here: the diff is longer]\n"


def environment() -> dict[str, Any]:
    """Versions, machine, CPUs and GPUs of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "cosa_ray": cosa_ray.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
    }
    # Asked of the driver, not of torch: naming a GPU through torch would take memory on it.
    if (
        listed := _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    ) is not None:
        found["gpus"] = listed.decode(errors="replace").strip().splitlines()
    return found


def _origin() -> dict[str, str]:
    tags = {"mlflow.source.name": "cosa-ray", "mlflow.source.type": "LOCAL", "cosa_ray.version": cosa_ray.__version__}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _card(uri: str) -> DatasetCard | None:
    from cosa_ray.data.dataset import open_dataset

    try:
        return open_dataset(uri).card
    except Exception as error:
        log.debug("no dataset card of %s: %s", uri, error)
        return None


def without_secrets(config: Config) -> Config:
    """The config without the credentials that a tracking URI may carry."""
    uri = config.tracking.uri
    if uri is None:
        return config
    tracking = config.tracking.model_copy(update={"uri": without_credentials(uri)})
    return config.model_copy(update={"tracking": tracking})


def _git(folder: Path, *words: str) -> bytes | None:
    return _output(["git", *words], folder)


def _output(command: list[str], folder: Path | None = None) -> bytes | None:
    """What a command prints; None when it fails, is not installed or takes long."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
