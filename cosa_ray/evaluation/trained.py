"""A trained model on disk: both networks with the config, classes and thresholds they were trained with.

A checkpoint's folder without its optimiser state is one, and so is a model that MLflow holds. Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cosa_ray.config.protocol import NetworkName, Protocol, in_run_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD, DatasetCard
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import ASSIGNMENT, MODEL_FILES, ONLINE, Description, read_config
from cosa_ray.method.network import Network, build_network


def read_weights(folder: Path, network: Network, file: str) -> None:
    """Load one network's weights from a checkpoint folder; UserError lists what does not fit."""
    try:
        state = load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / file}: cannot be read as safetensors ({error}); copy the checkpoint again."
        ) from None
    own = network.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [
        key for key in own if key in state and own[key].shape != state[key].shape
    ]
    if wrong:
        raise UserError(
            f"{folder / file}: does not fit the network of this config ({len(wrong)} tensors missing, unexpected or of "
            f"another shape: {', '.join(wrong[:3])}...); use the model and classes the checkpoint was trained with."
        )
    network.load_state_dict(state)


@dataclass(frozen=True)
class Trained:
    """A trained model on one device; its networks are in evaluation mode and take no gradient."""

    config: Config
    card: DatasetCard
    description: Description
    online: Network
    assignment: Network

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background left out."""
        return self.card.classes

    @property
    def segments(self) -> bool:
        """True once the decoder has been trained; before, only CAMs mean something."""
        return self.description.step > self.config.training.warmup_iters

    def network(self, name: NetworkName | None = None) -> Network:
        """One of the networks; None is the one that was better when the checkpoint was written."""
        return self.online if (name or self.description.better_network) == "online" else self.assignment


def load_trained(folder: Path, device: torch.device | str = "cpu", protocol: Protocol | None = None) -> Trained:
    """Load a trained model from a local folder.

    protocol: by which it will be given images; None is its run's own. Raises UserError when files are missing or do
    not fit.
    """
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: is no trained model ({', '.join(missing)} missing); give a run or a checkpoint of one."
        )
    config = read_config(folder)
    sides = (protocol or in_run_protocol(config)).sides(config.views.crop)
    card = DatasetCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))

    def network(file: str) -> Network:
        built = build_network(
            config.model, len(card.classes), image_size=config.views.crop, initialise=False, sides=sides
        )
        read_weights(folder, built, file)
        return built.to(device).requires_grad_(False).eval()

    return Trained(config, card, Description.read(folder), network(ONLINE), network(ASSIGNMENT))
