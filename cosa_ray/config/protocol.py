"""Evaluation protocols as data: how a network is run and scored, so that a number can say what it means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cosa_ray.config.load import PROTOCOLS, SHIPPED, explain, read_yaml
from cosa_ray.config.schema import Config, Count, NonNegative, OpenFraction, Positive, Section
from cosa_ray.errors import UserError

NetworkName = Literal["assignment", "online"]
LabelUse = Literal["none", "given", "predicted"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")


class Crf(Section):
    """Fully connected CRF after the network (Krähenbühl and Koltun 2011); defaults are the release's."""

    iterations: Count = Field(1, description="Mean-field iterations.")
    gaussian_weight: NonNegative = Field(1.0, description="Weight of the smoothness kernel.")
    gaussian_sigma: Positive = Field(1.0, description="Its standard deviation, pixels.")
    bilateral_weight: NonNegative = Field(4.0, description="Weight of the appearance kernel.")
    bilateral_sigma_xy: Positive = Field(121.0, description="Its standard deviation in the plane, pixels.")
    bilateral_sigma_rgb: Positive = Field(5.0, description="Its standard deviation in colour, of 0..255.")
    networks: tuple[NetworkName, ...] = Field(("assignment",), min_length=1, description="Networks it is run for.")
    labels: tuple[LabelUse, ...] = Field(("none", "given"), min_length=1, description="Predictions it is run for.")


class Protocol(Section):
    """How images are brought in, which passes are summed, and which predictions are scored (method.md 6)."""

    name: str = Field("", description="Part of every metric's name; empty for the protocol inside a run.")
    split: str | None = Field(None, description="Split evaluated; null is the run's data.val_split.")
    subset: Count | None = Field(None, description="First n images of a seeded shuffle of the split; null is all.")
    resize: Literal["square", "short_side", "own"] = Field(
        "square",
        description="square: size x size; short_side: shorter side = size, ratio kept; own: the image's own size.",
    )
    size: Count | None = Field(None, description="Side the image is resized to, pixels; null is the run's crop.")
    scales: tuple[Positive, ...] = Field(
        (1.0, 0.5, 1.5, 0.75, 1.25), min_length=1, description="Scales whose logits are summed."
    )
    flip: bool = Field(True, description="Add the horizontal flip of every scale.")
    networks: tuple[NetworkName, ...] = Field(
        ("assignment", "online"), min_length=1, description="Networks whose segmentation is scored."
    )
    labels: tuple[LabelUse, ...] = Field(
        ("none", "given"),
        min_length=1,
        description="none: plain; given: classes the image does not have are masked out, as in the paper's headline; "
        "predicted: classes that the network's own classifier gives less than `presence` are.",
    )
    presence: OpenFraction = Field(0.1, description="Probability below which `labels: predicted` masks a class out.")
    crf: Crf | None = Field(None, description="CRF afterwards, scored besides; null runs none.")
    cam_threshold: OpenFraction = Field(0.5, description="Fixed background threshold of cam_miou_at_*.")
    batch_size: Count = Field(8, description="Images a forward pass and worker; 1 unless resize is square.")

    @model_validator(mode="after")
    def _possible(self) -> Protocol:
        if self.resize == "own" and self.size is not None:
            raise ValueError("resize own keeps the image's own size, but size is set; leave one of them out")
        if self.crf is not None:
            for key in ("networks", "labels"):
                extra = set(getattr(self.crf, key)) - set(getattr(self, key))
                if extra:
                    raise ValueError(
                        f"crf.{key} asks for {', '.join(sorted(extra))}, which {key} does not hold; add it"
                    )
        return self

    @property
    def scores_plain(self) -> bool:
        """Whether it scores the assignment network's plain segmentation, by which runs are compared."""
        return "assignment" in self.networks and "none" in self.labels

    def sides(self, crop: int) -> list[float]:
        """Sides in pixels, before rounding, of the square inputs of a network trained at `crop`; none if not square."""
        return [(self.size or crop) * scale for scale in self.scales] if self.resize == "square" else []


def in_run_protocol(config: Config) -> Protocol:
    """The protocol of a run's own evaluations (`config.evaluation`), which has no name."""
    settings = config.evaluation
    predicted: dict[str, Any] = {}
    if settings.presence is not None:
        predicted = {"labels": ("none", "given", "predicted"), "presence": settings.presence}
    return Protocol(
        **predicted,
        subset=settings.subset,
        size=settings.size,
        scales=settings.scales,
        flip=settings.flip,
        cam_threshold=settings.cam_threshold,
        batch_size=settings.batch_size,
    )


def own_protocol(config: Config) -> Protocol:
    """That of a run's own evaluations, over the whole split: what a finished run is evaluated with."""
    return in_run_protocol(config).model_copy(update={"subset": None})


def shipped_protocols() -> list[str]:
    """Names of the protocols that come with the package."""
    return sorted(path.stem for path in (SHIPPED / PROTOCOLS).glob("*.yaml"))


def find_protocol(given: str | Path) -> Path:
    """Path of the file of a protocol. Raises UserError naming the protocols there are."""
    word = Path(given)
    candidates = [word, SHIPPED / PROTOCOLS / f"{word}.yaml", Path(PROTOCOLS) / f"{word}.yaml"]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UserError(f"no protocol {given}: not a file, and not one of {', '.join(shipped_protocols())}.")
    return file


def load_protocol(given: str | Path) -> Protocol:
    """A protocol by the name of a shipped one or the path of a YAML file, named after its file.

    Raises UserError naming the protocols there are, or the key that is wrong.
    """
    file = find_protocol(given)
    if not _NAME.fullmatch(file.stem):
        raise UserError(f"{file}: the file's name names every metric; use letters, digits, '_', '.' and '-' only.")
    content = read_yaml(file)
    if "name" in content:
        raise UserError(f"{file}: a protocol is named after its file; remove `name`.")
    try:
        return Protocol.model_validate({**content, "name": file.stem})
    except ValidationError as error:
        raise UserError(explain(error, str(file), Protocol)) from None
