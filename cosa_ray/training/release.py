"""The authors' released checkpoints as runs: what `evaluate`, `predict` and `register` take."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cosa_ray.config.credentials import holds_secret, without_credentials
from cosa_ray.config.load import SHIPPED, apply_overrides, dump_config, load_config
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD, DatasetCard, Origin
from cosa_ray.data.coco import CLASSES as COCO_CLASSES
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.pictures import voc_palette
from cosa_ray.data.remote import fetch
from cosa_ray.data.voc import CLASSES as VOC_CLASSES
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import ASSIGNMENT, CONFIG, ONLINE, Description
from cosa_ray.method.network import build_network
from cosa_ray.method.threshold import DynamicThresholds
from cosa_ray.training.driver import resolve
from cosa_ray.training.runs import check_free, check_name, create_run
from cosa_ray.training.storage import CheckpointStore

HEAD = "encoder.head."  # the ImageNet classifier, which the release carries along and nothing uses
_BACKBONE = "vit_base_patch16_224.orig_in21k_ft_in1k"
_USUAL = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "patch_size": 16, "img_size": 224}
_HEAD_WIDTH = 64  # of every ViT that timm names base or large
_SHOWN = 12


@dataclass(frozen=True)
class ReleaseImport:
    """The run an imported checkpoint became, and what was read off its tensors."""

    name: str
    folder: str
    checkpoint: str
    backbone: dict[str, Any]
    classes: list[str]
    left_out: list[str]
    mlflow_run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def import_release(
    file: str,
    *,
    name: str,
    heads: int | None = None,
    aux: int = -3,
    crop: int = 448,
    dataset: str | None = None,
    allow_unknown: bool = False,
    storage: str = "runs",
    track: bool = True,
) -> ReleaseImport:
    """Make a run of a checkpoint of the authors' code, `{"model": state_dict, ...}` or a bare state dict.

    Width, depth, patch, grid, classes and decoder width are read off the tensors; what they do not say is given.
    The file holds one network, which becomes both. Nothing in the file is executed (`weights_only`).

    file: path or URI. heads: of the attention; None is the width / 64. aux: block of the auxiliary tap, -3 in the
    published VOC log. crop: side the network was trained at, pixels. dataset: names and colours of the classes; None
    takes VOC's for 20 and COCO's for 80. allow_unknown: leave out tensors that the network does not have, which are
    listed, instead of refusing them. Raises UserError listing every tensor that is missing or unknown.
    """
    check_name(name)
    tensors = _tensors(file)
    model, count = _read_off(tensors, heads, file)
    card = _card(count, dataset, file)
    config = _config(card, model, aux, crop, dataset, storage)
    check_free(name, config)
    network = build_network(config.model, count, image_size=crop, initialise=False, sides=[crop])
    own = network.state_dict()
    given = {key: value for key, value in tensors.items() if not key.startswith(HEAD)}
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    misshapen = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    if missing or misshapen or (unknown and not allow_unknown):
        parts = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        found = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in parts if keys)
        advice = "" if missing or misshapen else "; --allow-unknown leaves them out"
        raise UserError(f"{file} does not fit CoSA's network ({found}){advice}; check --heads, --aux and the file.")
    state = {key: given[key].float().contiguous() for key in own}
    run = create_run(name, config, "val/miou")
    steps = config.training.steps
    thresholds = DynamicThresholds(config.dynamic_threshold, config.pseudo_labels).values
    described = Description(
        run=name,
        step=steps,
        classes=list(card.classes),
        metrics={},
        better_network="assignment",
        worker_seconds=0.0,
        thresholds={key: value.item() for key, value in thresholds.items()},
    )
    checkpoints = CheckpointStore(run.folder, run.record.metric)
    with tempfile.TemporaryDirectory(prefix="cosa-ray-release-") as temporary:
        folder = Path(temporary)
        for network_file in (ONLINE, ASSIGNMENT):
            save_file(state, folder / network_file)
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        (folder / CARD).write_text(card.model_dump_json(), encoding="utf-8")
        described.write(folder)
        checkpoint = checkpoints.upload(folder, steps)
    checkpoints.register(checkpoint, steps, {})
    mlflow_run_id = _track(config, name, run.folder.uri) if track else None
    run.update(state="finished", mlflow_run_id=mlflow_run_id, tracking_uri=config.tracking.uri if track else None)
    left_out = sorted(tensors.keys() - own.keys())
    return ReleaseImport(
        name, run.folder.uri, f"{run.folder.uri}/{checkpoint}", model, list(card.classes), left_out, mlflow_run_id
    )


def _tensors(file: str) -> dict[str, Tensor]:
    """The state dict in a file, DDP's prefix taken off."""
    path = fetch(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{file}: not a torch checkpoint of plain tensors ({str(error).splitlines()[0][:160]}); give the .pth file "
            "that the authors released."
        ) from None
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no state dict under `model`; give the .pth file that the authors released.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _read_off(tensors: Mapping[str, Tensor], heads: int | None, file: str) -> tuple[dict[str, Any], int]:
    """(what the backbone is built with, number of classes)."""
    try:
        patches = tensors["encoder.patch_embed.proj.weight"]
        positions = tensors["encoder.pos_embed"]
        hidden = tensors["encoder.blocks.0.mlp.fc1.weight"]
        decoder, classifier = tensors["decoder.conv6.weight"], tensors["classifier.weight"]
    except KeyError as error:
        raise UserError(
            f"{file}: has no tensor {error.args[0]}, so it is no checkpoint of CoSA's network; its tensors begin with "
            f"{_listed(sorted(tensors)[:4])}."
        ) from None
    width, patch = patches.shape[0], patches.shape[-1]
    grid = math.isqrt(positions.shape[1] - 1)
    if grid * grid != positions.shape[1] - 1:
        raise UserError(f"{file}: {positions.shape[1]} position embeddings are no square grid and a class token.")
    if heads is None:
        if width % _HEAD_WIDTH:
            raise UserError(
                f"{file}: tensors of width {width} do not say how many heads the attention has; give --heads."
            )
        heads = width // _HEAD_WIDTH
    if width % heads:
        raise UserError(f"--heads {heads} does not divide the width {width} of {file}; give another number.")
    blocks = {int(key.split(".")[2]) for key in tensors if key.startswith("encoder.blocks.")}
    return {
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "num_heads": heads,
        "mlp_ratio": hidden.shape[0] / width,
        "patch_size": patch,
        "img_size": grid * patch,
        "decoder_width": decoder.shape[0],
    }, classifier.shape[0]


def _card(count: int, dataset: str | None, file: str) -> DatasetCard:
    """The classes and colours of the checkpoint, without images."""
    if dataset is not None:
        card = open_dataset(dataset).card
        if len(card.classes) != count:
            raise UserError(
                f"{file} has {count} classes and {dataset} has {len(card.classes)}; give the dataset it was trained on."
            )
        return card
    names = {20: VOC_CLASSES, 80: COCO_CLASSES}.get(count)
    if names is None:
        raise UserError(f"{file} has {count} classes, neither VOC's 20 nor COCO's 80; name them with --dataset.")
    return DatasetCard(
        classes=names,
        palette=voc_palette(count + 1),
        labels_from="the release",
        masks_from="the release",
        origin=Origin(kind="release", source=without_credentials(file) if holds_secret(file) else file),
        splits={},
    )


def _config(
    card: DatasetCard, model: Mapping[str, Any], aux: int, crop: int, dataset: str | None, storage: str
) -> Config:
    """The experiment the release was trained with, as far as the repository's files say, with this network."""
    base = {20: "voc_release_log.yaml", 80: "coco_release.yaml"}.get(len(card.classes), "voc_release_log.yaml")
    arguments = {key: model[key] for key, usual in _USUAL.items() if model[key] != usual}
    changes: dict[str, Any] = {
        "storage": storage,
        "workers": 1,
        "resources.gpus_per_worker": 0,
        "views.crop": crop,
        "model.backbone": _BACKBONE,
        "model.backbone_args": arguments,
        "model.decoder_width": model["decoder_width"],
        "model.aux": aux,
    }
    if dataset is not None:
        changes["data.dataset"] = dataset
    return resolve(apply_overrides(load_config(SHIPPED / base), changes, "the release's settings"))


def _track(config: Config, name: str, folder: str) -> str | None:
    """An MLflow run for it, so that evaluations of it can be compared with others'."""
    from cosa_ray.tracking.store import find_run_id, open_store
    from cosa_ray.tracking.tracker import open_tracker

    tracking = open_store(config, run_name=name, folder=folder, tags={"cosa_ray.kind": "release"})
    open_tracker(tracking).finish("FINISHED")
    return find_run_id(tracking)


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
