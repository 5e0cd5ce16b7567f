"""Everything a run is at one step: networks, optimiser, thresholds with their rings, step, RNG; saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosa_ray.config.load import dump_config
from cosa_ray.config.protocol import in_run_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD, DatasetCard
from cosa_ray.data.remote import fetch
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import ASSIGNMENT, CONFIG, ONLINE, Description
from cosa_ray.evaluation.trained import read_weights
from cosa_ray.method.ema import MovingAverage
from cosa_ray.method.network import build_network
from cosa_ray.method.schedule import ema_momentum, learning_rate
from cosa_ray.method.threshold import DynamicThresholds
from cosa_ray.training.storage import FULL_STATE


def backbone_weights(config: Config) -> dict[str, Tensor] | None:
    """Tensors of `model.checkpoint` (a path or URI, fetched once a node), None when it is not set.

    Nothing is unpickled beyond tensors. Raises UserError when the file is missing or of another kind.
    """
    if config.model.checkpoint is None:
        return None
    file = fetch(config.model.checkpoint)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"model.checkpoint {config.model.checkpoint}: not a safetensors file nor a plain torch state dict "
            f"({type(error).__name__}); convert it to safetensors."
        ) from error
    nested = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not isinstance(nested, dict) or not all(isinstance(value, Tensor) for value in nested.values()):
        raise UserError(f"model.checkpoint {config.model.checkpoint}: holds no state dict; convert it to safetensors.")
    return nested


_SETTINGS = ("base_lr", "betas", "weight_decay")  # of a parameter group


@dataclass(frozen=True)
class Snapshot:
    """A state as it was after a step, on the CPU, for a checkpoint that is written while the run goes on.

    `ready`: the event on a GPU after which its copies are there; None where they are.
    """

    step: int
    online: dict[str, Tensor]
    assignment: dict[str, Tensor]
    rest: dict[str, Any]
    ready: torch.cuda.Event | None

    def write(self, folder: Path, config: Config, card: DatasetCard) -> None:
        """Write all of a checkpoint but its description into a local folder."""
        if self.ready is not None:
            self.ready.synchronize()
        save_file(self.online, folder / ONLINE)
        save_file(self.assignment, folder / ASSIGNMENT)
        torch.save(self.rest, folder / FULL_STATE)
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        (folder / CARD).write_text(card.model_dump_json(), encoding="utf-8")


class TrainState:
    """Both networks, the optimiser, the thresholds and the number of steps done, on one device."""

    def __init__(self, config: Config, num_classes: int, device: torch.device, *, initialise: bool = True) -> None:
        """`initialise=False` leaves out trained backbone weights, for a state that is loaded next."""
        torch.manual_seed(config.seed)
        self.config = config
        self.online = build_network(
            config.model,
            num_classes,
            weights=backbone_weights(config) if initialise else None,
            image_size=config.views.crop,
            initialise=initialise,
            sides=[config.views.crop * scale for scale in config.assignment.scales]
            + in_run_protocol(config).sides(config.views.crop),
        ).to(device)
        # An exact copy of ON, heads included (the release's own random heads were a slip; method.md 1).
        self.assignment = deepcopy(self.online).requires_grad_(False).eval()
        self.average = MovingAverage(self.assignment, self.online)
        self._parameters = list(self.online.parameters())
        self.optimiser = torch.optim.AdamW(
            self.online.parameter_groups(config.optimiser), betas=config.optimiser.betas, fused=True
        )
        for group in self.optimiser.param_groups:
            group["base_lr"] = group["lr"]
        self.thresholds = DynamicThresholds(config.dynamic_threshold, config.pseudo_labels, device)
        self.step = 0

    def threshold_values(self) -> dict[str, float]:
        """Current thresholds by name, on the host."""
        return {name: value.item() for name, value in self.thresholds.values.items()}

    def checkpoint_bytes(self) -> tuple[int, int]:
        """Size of a checkpoint as it is written, and of its weights alone, to within the thresholds' rings."""
        weights = sum(tensor.nbytes for tensor in self.online.state_dict().values())
        moments = 2 * sum(parameter.nbytes for parameter in self.online.parameters())
        return 2 * weights + moments, 2 * weights

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradient, 0-dim on the device; not finite where any part of the gradient is not."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def optimise(self, finite: Tensor, norm: Tensor) -> None:
        """One optimiser and EMA step at the scheduled rate; `finite` = 0 leaves weights and EMA untouched, on device.

        `norm` is `gradient_norm`, to clip by.
        """
        config = self.config
        factor = learning_rate(config.optimiser, config.training.steps, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor
        # As under a GradScaler: the fused kernels divide gradients by grad_scale, which clips them on the way (by the
        # coefficient of torch's clip_grad_norm_), and skip a step whose found_inf is set: no host round trip.
        clip = config.optimiser.clip_norm
        scale = None if clip is None else ((norm + 1e-6) / clip).clamp(min=1.0)
        self.optimiser.grad_scale = scale  # type: ignore[attr-defined]
        self.optimiser.found_inf = 1.0 - finite  # type: ignore[attr-defined]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(ema_momentum(config, self.step), finite)
        self.step += 1

    def snapshot(self) -> Snapshot:
        """A copy of everything that the run is, which later steps do not change; a GPU is not waited for."""
        rest = {
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "thresholds": self.thresholds.state_dict(),
            "rng": torch.get_rng_state(),
        }
        online, assignment = _copied(self.online.state_dict()), _copied(self.assignment.state_dict())
        rest, ready = _copied(rest), None
        if self.thresholds.current.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return Snapshot(self.step, online, assignment, rest, ready)

    def save(self, folder: Path, card: DatasetCard, description: Description) -> None:
        """Write weights, full state, config and description into a local folder."""
        self.snapshot().write(folder, self.config, card)
        description.write(folder)

    def load(self, folder: Path) -> None:
        """Restore everything from a checkpoint folder. Raises UserError when it holds weights only."""
        if not (folder / FULL_STATE).is_file():
            raise UserError(
                f"{folder}: holds weights only, so the run cannot be continued; start a new run with init_from, "
                "or set checkpoint.keep_full_state next time."
            )
        try:
            state: Mapping[str, Any] = torch.load(folder / FULL_STATE, map_location="cpu", weights_only=True)
        except OSError:  # of the storage, which may answer the next time it is asked
            raise
        except Exception as error:  # of the many kinds that a damaged or malicious file raises
            raise UserError(
                f"{folder / FULL_STATE}: not the state of a run ({type(error).__name__}); copy the checkpoint again, "
                "or start a new run with init_from."
            ) from None
        self.load_networks(folder)
        # The settings are the config's: a trial that took over another's checkpoint goes on with its own.
        own = [{key: group[key] for key in _SETTINGS} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, settings in zip(self.optimiser.param_groups, own, strict=True):
            group.update(settings)
        if state["thresholds"]["seen"] > 0:  # before, they are where a config starts them, and a run has its own
            self.thresholds.load_state_dict(state["thresholds"])
        torch.set_rng_state(state["rng"])
        self.step = int(state["step"])

    def load_networks(self, folder: Path) -> None:
        """Restore both networks' weights from a checkpoint folder."""
        read_weights(folder, self.online, ONLINE)
        read_weights(folder, self.assignment, ASSIGNMENT)

    def start_from(self, folder: Path) -> None:
        """Take another run's weights (its better network) for both networks; optimiser and step stay fresh."""
        better = Description.read(folder).better_network
        for network in (self.online, self.assignment):
            read_weights(folder, network, ONLINE if better == "online" else ASSIGNMENT)


def _copied(value: Any) -> Any:
    """A copy on the CPU of every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type == "cpu":
            return value.clone(memory_format=torch.contiguous_format)
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
