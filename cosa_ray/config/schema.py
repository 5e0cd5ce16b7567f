"""The typed schema of an experiment: one frozen model per component, every field with unit and default.

Defaults are the paper's VOC setting (method.md 5 of the CoSA paper, arXiv 2402.17891); the YAML files under
``experiments/`` hold only what differs from them. Assignments, pseudo-labels and losses are in `supervision`.
"""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from cosa_ray.config.credentials import holds_secret
from cosa_ray.config.section import Count, CountOrZero, Fraction, NonNegative, OpenFraction, Positive, Section
from cosa_ray.config.supervision import Assignment, Contrastive, DenseEnergy, DynamicThreshold, Losses, PseudoLabels

StrongOperation = Literal[
    "identity",
    "autocontrast",
    "equalise",
    "solarise",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "posterise",
]
Precision = Literal["auto", "fp32", "bf16"]
Sampling = Literal["even", "balanced"]
Compiled = Literal["none", "assignment", "both"]
_TAG_KEY = re.compile(r"[/\w.\- :]{1,250}")


def _compiled(value: Any) -> Any:
    """Which networks the words of earlier versions meant."""
    return {True: "both", False: "none"}[value] if isinstance(value, bool) else value


class Data(Section):
    """Which dataset, which splits, and how it is read."""

    dataset: str = Field("datasets/voc", description="Dataset folder or URI (made by `cosa-ray data import`).")
    train_split: str = Field("train", description="Split whose images and image-level labels are trained on.")
    val_split: str = Field("val", description="Split with masks that evaluation uses.")
    sampling: Sampling = Field(
        "even",
        description="even: every image once an epoch; balanced: rare classes about as often as common ones.",
    )
    loader_processes: CountOrZero = Field(2, description="Loader processes per worker; 0 loads in the worker itself.")


class Views(Section):
    """The weak and the strong view of one crop (paper section 3; release dataloaders)."""

    crop: Count = Field(448, description="Side of the square crop, pixels.")
    scale: tuple[Positive, Positive] = Field((0.5, 2.0), description="Range of the random scaling, times.")
    short_side: Count | None = Field(
        None,
        description="Shorter side before the random scaling, pixels; null leaves the image's own size.",
    )
    flip: Fraction = Field(0.5, description="Probability of the horizontal flip.")
    blur: Fraction = Field(0.5, description="Probability of the Gaussian blur.")
    blur_radius: tuple[NonNegative, NonNegative] = Field((0.1, 2.0), description="Range of the blur radius, pixels.")
    strong: tuple[StrongOperation, ...] = Field(
        get_args(StrongOperation),
        min_length=1,
        description="Operations of which the strong view draws one.",
    )
    magnitude: Fraction = Field(1.0, description="Upper end of the strong operations' strength, 0 (none) to 1 (full).")

    @model_validator(mode="after")
    def _ordered(self) -> Views:
        for key in ("scale", "blur_radius"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"views.{key} must be [low, high] with low <= high, got [{low}, {high}]")
        return self


class Model(Section):
    """Backbone, taps and heads (paper section 3.1)."""

    backbone: str = Field("vit_base_patch16_224.orig_in21k_ft_in1k", description="timm model name.")
    backbone_args: dict[str, Any] = Field(
        default_factory=dict, description="Extra keyword arguments of timm.create_model (embed_dim, depth, ...)."
    )
    stem: Literal["patch", "convolutional"] = Field(
        "patch",
        description="Plain ViTs: linear patch embedding, or four 3x3 convolutions (learns faster from scratch).",
    )
    pretrained: bool = Field(
        True, description="Load timm's pretrained weights (needs the model hub unless `checkpoint` is set)."
    )
    checkpoint: str | None = Field(
        None,
        description="Backbone weights, .safetensors or .pth, path or URI; replaces `pretrained`'s download.",
    )
    aux: int = Field(
        -3,
        description="Auxiliary tap: block of a plain ViT, else feature stage; negative counts from the end.",
    )
    output_stride: Literal[8, 16, 32] | None = Field(
        None,
        description="Stride of a convolutional backbone's last map, where timm can dilate; null is timm's own.",
    )
    pooling: Literal["max", "average"] = Field("max", description="Global pooling before the classifiers.")
    decoder_width: Count = Field(512, description="Channels of the LargeFOV segmentation head.")
    decoder_dilation: Count = Field(5, description="Dilation of the LargeFOV segmentation head.")
    freeze_position_embeddings: bool = Field(True, description="Keep position embeddings at their pretrained values.")
    mean: tuple[float, float, float] | None = Field(
        None, description="Channel means in 0..1; null takes the backbone's own."
    )
    std: tuple[Positive, Positive, Positive] | None = Field(
        None, description="Channel deviations in 0..1; null takes the backbone's own."
    )

    @property
    def has_weights(self) -> bool:
        """True when the backbone starts from trained weights."""
        return self.pretrained or self.checkpoint is not None


class Optimiser(Section):
    """AdamW and its schedule (paper 4.1; release PolyWarmupAdamW)."""

    lr: Positive = Field(6e-5, description="Learning rate of the encoder.")
    head_lr_factor: Positive = Field(10.0, description="Classifiers and decoder: times lr.")
    betas: tuple[OpenFraction, OpenFraction] = Field((0.9, 0.999), description="AdamW betas.")
    weight_decay: NonNegative = Field(0.01, description="AdamW weight decay.")
    warmup_steps: CountOrZero = Field(1500, description="Linear learning-rate warm-up, steps.")
    warmup_ratio: NonNegative = Field(1e-6, description="Learning rate at step 0, times lr.")
    power: NonNegative = Field(0.9, description="Exponent of the polynomial decay (1 - t/T)^power.")
    clip_norm: Positive | None = Field(None, description="Clip the gradient's global norm to this; null does not clip.")


class Training(Section):
    """Length, batch and arithmetic of a run."""

    steps: Count = Field(32_000, description="Optimiser steps T.")
    stop_at: Count | None = Field(
        None, description="Step to end at, while the schedule is laid out for T steps; null is T."
    )
    warmup_iters: CountOrZero = Field(6_000, description="Steps of classification only before co-training starts.")
    batch_size: Count = Field(4, description="Global batch: images a step over all workers and micro-batches.")
    accumulate: Count = Field(1, description="Micro-batches a worker splits its slice of the global batch into.")
    loss_stride: Literal[1, 2, 4] = Field(
        1, description="Losses on maps of crop/loss_stride pixels (1 = full size, as the paper)."
    )
    decoder_in_warmup: bool = Field(
        False,
        description="Feed the decoder zero gradients during warm-up, its last step included, as the release does.",
    )
    precision: Precision = Field("auto", description="auto: bf16 mixed where the hardware has it, fp32 elsewhere.")
    compile: Annotated[Compiled, BeforeValidator(_compiled)] = Field(
        "none",
        description="Networks given to torch.compile: none, the assignment network (no backward pass), or both.",
    )
    threads: Count | None = Field(
        None, description="CPU threads a worker; null leaves torch's (Ray: the worker's CPUs)."
    )


class Evaluation(Section):
    """Evaluation inside a run; `cosa-ray evaluate` uses the same protocol unless told otherwise."""

    every: Count = Field(2_000, description="Steps between evaluations; the last step is always evaluated.")
    subset: Count | None = Field(
        None, description="First n images of a seeded shuffle of the split; null is all. Named in the metric."
    )
    size: Count | None = Field(None, description="Side the image is resized to, pixels; null is the crop.")
    scales: tuple[Positive, ...] = Field(
        (1.0, 0.5, 1.5, 0.75, 1.25), min_length=1, description="Scales whose logits are summed."
    )
    flip: bool = Field(True, description="Add the horizontal flip of every scale.")
    batch_size: Count = Field(8, description="Images a forward pass and worker.")
    asynchronous: bool = Field(
        False, description="Evaluate in a task of Ray's beside the workers, which needs room for one worker more."
    )
    cam_threshold: OpenFraction = Field(0.5, description="Fixed background threshold of cam_miou_at_*.")
    presence: OpenFraction | None = Field(
        None,
        description="Also score segmentations without the classes that the classifier gives less than this probability "
        "(miou_labels_predicted); null does not.",
    )
    panel_images: CountOrZero = Field(6, description="Validation images drawn in the panel of every evaluation.")


class Checkpoint(Section):
    """What is kept, and how often it is written."""

    every: Count = Field(
        1_000, description="Steps between checkpoints; also at the end, at a stop, and at every evaluation."
    )
    keep_full_state: bool = Field(
        False, description="Keep the last full state (optimiser, rings) after a run has finished."
    )


class Tracking(Section):
    """Where and how often a run is logged. MLFLOW_TRACKING_URI overrides `uri`."""

    uri: str | None = Field(
        None, description="MLflow tracking URI; null is MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here."
    )
    experiment: str = Field("cosa-ray", min_length=1, description="MLflow experiment.")
    log_every: Count = Field(50, description="Steps between logged training metrics.")
    tags: dict[str, str] = Field(default_factory=dict, description="Extra MLflow tags.")

    @model_validator(mode="after")
    def _can_be_written_down(self) -> Tracking:
        if self.uri is not None and holds_secret(self.uri):
            raise ValueError(
                "tracking.uri holds a password, and a config is copied into every run and checkpoint; leave it out and "
                "set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment"
            )
        for key in self.tags:
            # MLflow refuses a whole batch of tags for one of them.
            if (
                not _TAG_KEY.fullmatch(key)
                or posixpath.normpath(key) != key
                or key.startswith(("..", "/"))
                or key == "."
            ):
                raise ValueError(
                    f"tracking.tags.{key}: MLflow takes up to 250 letters, digits, '_', '-', '.', ' ', ':' and '/' "
                    "that read as a relative path; rename the tag"
                )
        return self


class Elastic(Section):
    """A number of workers that follows the machines there are; results do not depend on it."""

    min: Count = Field(1, description="Fewest workers; with fewer machines than that, the run waits.")
    max: Count = Field(description="Most workers.")
    look_every: Positive = Field(60.0, description="Seconds between looks at whether more workers have room.")

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"workers.min ({self.min}) is above workers.max ({self.max}); swap them")
        return self


# Told apart by what was written, so that a mistake in one is not reported as two.
WorkerCount = Annotated[
    Annotated[Count, Tag("number")] | Annotated[Elastic, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, dict | Elastic) else "number"),
]


class Resources(Section):
    """What one worker is given by Ray. null CPUs: the cluster's CPUs shared out evenly."""

    cpus_per_worker: Positive | None = Field(
        None, description="Logical CPUs a worker; null derives it from the cluster."
    )
    gpus_per_worker: NonNegative = Field(
        0.0, description="GPUs a worker; runs of one worker may share one by fractions."
    )
    max_failures: CountOrZero = Field(
        3, description="Restarts without a new checkpoint in between before the run is given up."
    )
    hang_seconds: Positive = Field(
        1800.0,
        description="Seconds without a step, or a batch of an evaluation, until workers are started again.",
    )


class Config(Section):
    """A whole experiment. The same file trains on a laptop, on a cluster, and inside a sweep."""

    seed: CountOrZero = Field(0, description="Seed of weights, data order and every draw.")
    workers: WorkerCount = Field(1, description="Training workers (processes), or a range {min, max} of them.")
    storage: str = Field("runs", description="Folder or URI under which every run has its folder.")
    init_from: str | None = Field(None, description="Run (name or folder) whose best weights this one starts from.")
    continue_from: str | None = Field(
        None,
        description="Run (name or folder) from whose last checkpoint this one goes on, whole: networks, optimiser, "
        "step. Settings that act later may differ; it has to have kept its full state (checkpoint.keep_full_state).",
    )
    data: Data = Field(default_factory=Data)
    views: Views = Field(default_factory=Views)
    model: Model = Field(default_factory=Model)
    assignment: Assignment = Field(default_factory=Assignment)
    pseudo_labels: PseudoLabels = Field(default_factory=PseudoLabels)
    dynamic_threshold: DynamicThreshold = Field(default_factory=DynamicThreshold)
    losses: Losses = Field(default_factory=Losses)
    contrastive: Contrastive = Field(default_factory=Contrastive)
    dense_energy: DenseEnergy = Field(default_factory=DenseEnergy)
    optimiser: Optimiser = Field(default_factory=Optimiser)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    resources: Resources = Field(default_factory=Resources)

    @property
    def least_workers(self) -> int:
        """Fewest workers it runs with."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """Most workers it runs with."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def last_step(self) -> int:
        """The step a run ends at."""
        return self.training.stop_at or self.training.steps

    @model_validator(mode="after")
    def _can_be_written_down(self) -> Config:
        for key, uri in (
            ("storage", self.storage),
            ("data.dataset", self.data.dataset),
            ("model.checkpoint", self.model.checkpoint),
            ("init_from", self.init_from),
            ("continue_from", self.continue_from),
        ):
            if uri is not None and holds_secret(uri):
                raise ValueError(
                    f"{key} holds a password, and a config is copied into every run and checkpoint; leave it out and "
                    "set the store's credentials in the environment (for s3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
                )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Config:
        training, most = self.training, self.most_workers
        if training.batch_size < most * training.accumulate:
            raise ValueError(
                f"training.batch_size ({training.batch_size}) gives less than one image to each of {most} "
                f"workers x {training.accumulate} micro-batches; raise it or lower workers or training.accumulate"
            )
        if self.init_from is not None and self.continue_from is not None:
            raise ValueError("init_from takes a run's weights and continue_from all of it; give one of them")
        if self.last_step > training.steps:
            raise ValueError(f"training.stop_at ({self.last_step}) is beyond training.steps ({training.steps})")
        if training.warmup_iters > training.steps:
            raise ValueError(
                f"training.warmup_iters ({training.warmup_iters}) is beyond training.steps ({training.steps}); "
                "set warmup_iters = steps for a classifier-only run"
            )
        if self.optimiser.warmup_steps >= training.steps:
            raise ValueError(
                f"optimiser.warmup_steps ({self.optimiser.warmup_steps}) must be below "
                f"training.steps ({training.steps})"
            )
        gpus = self.resources.gpus_per_worker
        if isinstance(self.workers, Elastic) and not gpus and self.resources.cpus_per_worker is None:
            raise ValueError(
                "workers as a range needs resources.cpus_per_worker (or gpus_per_worker), because it says how many "
                "workers have room on the machines there are"
            )
        if isinstance(self.workers, Elastic) and self.evaluation.asynchronous:
            raise ValueError(
                "evaluation.asynchronous needs a number of workers, because a range of them takes the room that the "
                "evaluation beside them would have; set workers to a number, or evaluation.asynchronous to false"
            )
        if gpus % 1 and (most > 1 or gpus > 1):
            raise ValueError(
                f"resources.gpus_per_worker ({gpus:g}) must be whole with {most} workers, because each needs a "
                "GPU of its own; set it to 1, or workers to 1 for runs that share a GPU"
                if most > 1
                else f"resources.gpus_per_worker ({gpus:g}) must be whole or below 1, because Ray splits one GPU only"
            )
        two = self.pseudo_labels.policy == "two_threshold"
        if two and self.losses.contrastive > 0 and self.contrastive.threshold is None:
            raise ValueError(
                "losses.contrastive > 0 with pseudo_labels.policy two_threshold needs contrastive.threshold, "
                "because two thresholds leave no single one to tell pairs apart; set it, or losses.contrastive to 0"
            )
        if self.views.crop % training.loss_stride:
            raise ValueError(
                f"views.crop ({self.views.crop}) must be a multiple of training.loss_stride ({training.loss_stride})"
            )
        return self
