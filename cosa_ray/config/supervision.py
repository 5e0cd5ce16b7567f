"""The settings of what a run learns from: assignments, pseudo-labels, their thresholds, and the loss terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosa_ray.config.section import Count, Fraction, NonNegative, OpenFraction, Positive, Section

Policy = Literal["single", "reliability", "two_threshold"]
Refinement = Literal["none", "pixel_adaptive"]


class Assignment(Section):
    """The assignment network and its multi-scale assignments (paper 3.2; method: EMA twin)."""

    scales: tuple[Positive, ...] = Field(
        (1.0, 0.5, 1.5), min_length=1, description="Input scales summed, times the crop."
    )
    flip: bool = Field(True, description="Add the horizontal flip of every scale.")
    momentum: Fraction = Field(0.9994, description="EMA momentum m of theta' <- m theta' + (1-m) theta, each step.")
    warmup_momentum: Fraction | None = Field(
        None, description="Momentum during classification warm-up; null is `momentum`."
    )
    ramp: bool = Field(
        False,
        description="After k steps of co-training momentum is (1+k)/(10+k), until it has reached `momentum` (ours).",
    )


class PseudoLabels(Section):
    """CAM pseudo-labels: policy, fixed thresholds, reliability weights (paper 3.3, 3.4)."""

    policy: Policy = Field(
        "reliability",
        description="single: one threshold; reliability: single with perplexity weights; two_threshold: the release's.",
    )
    threshold: OpenFraction = Field(
        0.45, description="Background threshold xi (start value when the threshold is dynamic)."
    )
    high: OpenFraction = Field(0.70, description="Upper threshold of two_threshold.")
    low: OpenFraction = Field(0.25, description="Lower threshold of two_threshold.")
    high_aux: OpenFraction | None = Field(None, description="Upper threshold for the auxiliary CAM; null is `high`.")
    low_aux: OpenFraction | None = Field(None, description="Lower threshold for the auxiliary CAM; null is `low`.")
    perplexity_scale: OpenFraction = Field(0.8, description="lambda_alpha of the perplexity.")
    perplexity_exponent: Positive = Field(1.0, description="lambda_beta of the perplexity.")
    reliability_over: Literal["image", "batch"] = Field(
        "image", description="Region R over which reliability weights average to 1."
    )
    refinement: Refinement = Field(
        "none",
        description="Of the CAMs before they become labels; pixel_adaptive (PAR): by the weak view's colours.",
    )
    refinement_iterations: Count = Field(10, description="Iterations of the refinement.")
    refinement_dilations: tuple[Count, ...] = Field(
        (1, 2, 4, 8, 12, 24), min_length=1, description="Distances of the neighbours, pixels of the half-size map."
    )
    foreground_share: Fraction = Field(
        0.5, description="alpha: weight of the foreground pixels' mean; background gets 1-alpha."
    )
    foreground_over: Literal["pixels", "regions"] = Field(
        "pixels",
        description="What weighs the same in the foreground's mean: every pixel, or every class of every image (ours).",
    )
    agreement: NonNegative = Field(
        0.0,
        description="Exponent of AN's own probability of a pixel's label in its weight; 0 leaves it out (ours).",
    )
    auxiliary_share: Fraction = Field(
        0.5, description="Share of the auxiliary CAM's pseudo-labels in the CAM->segmentation loss."
    )

    @model_validator(mode="after")
    def _ordered(self) -> PseudoLabels:
        for low, high, where in (
            (self.low, self.high, "pseudo_labels.low/high"),
            (self.low_aux or self.low, self.high_aux or self.high, "pseudo_labels.low_aux/high_aux"),
        ):
            if low >= high:
                raise ValueError(f"{where}: the lower threshold ({low}) must be below the upper one ({high})")
        return self


class DynamicThreshold(Section):
    """The threshold that moves: a mixture fitted to recent CAM confidences (paper 3.4; release `usegmm`)."""

    enabled: bool = Field(True, description="Move the thresholds; false keeps them at their fixed values.")
    batches: Count = Field(100, description="Global batches kept in the ring of histograms.")
    bins: Annotated[int, Field(ge=256)] = Field(256, description="Histogram bins over [0, 1].")
    minimum: Fraction = Field(0.05, description="CAM values below this do not count.")
    momentum: Fraction = Field(0.99, description="EMA momentum of the thresholds, each step.")
    bounds: tuple[OpenFraction, OpenFraction] = Field((0.05, 0.95), description="Range the thresholds are clamped to.")
    start: Literal["extremes", "quantiles"] = Field(
        "extremes",
        description="Start of the means: extremes = min(, median), max as the release; quantiles = spread evenly.",
    )
    tolerance: NonNegative = Field(
        1e-3, description="Stop when the mean log-likelihood moves by less (part of the method)."
    )
    max_iterations: Count = Field(100, description="Cap on the EM iterations.")
    between_means: bool = Field(False, description="Search the boundary only between the two components' means.")
    min_values: Count = Field(100, description="Fewer counted CAM values than this: keep the threshold.")

    @model_validator(mode="after")
    def _ordered(self) -> DynamicThreshold:
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"dynamic_threshold.bounds must be [low, high] with low < high, got [{low}, {high}]")
        return self


class Losses(Section):
    """Weights and constants of the loss terms (paper equation 9; release run_voc.sh)."""

    cam_to_seg: NonNegative = Field(0.1, description="Weight of the CAM->segmentation loss.")
    seg_to_cam: NonNegative = Field(0.05, description="Weight of the segmentation->CAM loss (guided CAMs).")
    contrastive: NonNegative = Field(0.1, description="Weight of contrastive separation (CSC).")
    dense_energy: NonNegative = Field(0.0, description="Weight of the dense energy (the release's reg).")
    seg_to_cam_temperature: Positive = Field(0.01, description="Softmax temperature of the segmentation pseudo-labels.")


class Contrastive(Section):
    """Contrastive separation in CAM space (paper 3.5)."""

    on: Literal["cam", "features"] = Field(
        "cam", description="Vectors compared: ON's final CAM logits or its features."
    )
    temperature: Positive = Field(0.5, description="InfoNCE temperature.")
    fade: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Share of co-training over which losses.contrastive falls to 0, linearly; null keeps it to the end "
        "(ours).",
    )
    max_perplexity: Positive = Field(1.0, description="epsilon: only pixels whose perplexity is below take part.")
    pixels: Annotated[int, Field(ge=2)] = Field(
        256, description="Pixels sampled per image, balanced over the labels present."
    )
    threshold: OpenFraction | None = Field(
        None,
        description="Background threshold of the pairs' labels; null takes the auxiliary xi (two_threshold: required).",
    )


class DenseEnergy(Section):
    """Dense energy of ON's segmentation on the strong view (release; Tang et al. 2018); weight: losses.dense_energy."""

    sigma_rgb: Annotated[float, Field(ge=1.0)] = Field(
        15.0, description="Standard deviation of the bilateral kernel in colour, of 0..255."
    )
    sigma_xy: Annotated[float, Field(ge=4.0)] = Field(
        100.0, description="Its standard deviation in the plane, pixels of the crop."
    )
    gradient: Literal["release", "autograd"] = Field(
        "release",
        description="release: gate and filtered map held fixed, as its code defines it; autograd: the true gradient.",
    )
