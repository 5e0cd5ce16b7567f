"""Fully connected CRF after the network, by pydensecrf2 (the extra `crf`): here, or as Ray tasks that stream counts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from cosa_ray.config.protocol import Crf
from cosa_ray.data.pictures import decode_rgb
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import confusion_matrix
from cosa_ray.evaluation.scorer import CrfJob, Refined, RunCrf


def require_crf(asked_by: str) -> None:
    """Raise UserError when the library behind the CRF is not installed. asked_by: what wants it."""
    if importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            f"{asked_by} asks for a CRF, which needs pydensecrf2; install it with pip install 'cosa-ray[crf]' (it "
            "builds C++ code), or choose a protocol without crf, as multi_scale is."
        )


def crf(probabilities: np.ndarray, image: np.ndarray, settings: Crf) -> np.ndarray:
    """Class probabilities float32 (K, H, W) after mean-field inference on an RGB image uint8 (H, W, 3).

    Potts model with a Gaussian and a bilateral kernel (Krähenbühl and Koltun 2011), as in the release.
    """
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    classes, height, width = probabilities.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    if settings.gaussian_weight:
        field.addPairwiseGaussian(sxy=settings.gaussian_sigma, compat=settings.gaussian_weight)
    if settings.bilateral_weight:
        field.addPairwiseBilateral(
            sxy=settings.bilateral_sigma_xy,
            srgb=settings.bilateral_sigma_rgb,
            rgbim=np.array(image, order="C"),  # a copy: the library takes no read-only array
            compat=settings.bilateral_weight,
        )
    return np.asarray(field.inference(settings.iterations), np.float32).reshape(classes, height, width)


def refine(job: CrfJob, settings: Crf) -> Refined:
    """Refine one prediction and count it; what a task is sent, and what it sends back."""
    pixels = np.asarray(decode_rgb(job.picture))
    found = crf(job.probabilities, pixels, settings).argmax(0)
    matrix = confusion_matrix(torch.from_numpy(job.truth.copy()), torch.from_numpy(found), len(job.probabilities))
    return Refined(job.name, job.image, matrix.numpy())


def refine_here(settings: Crf) -> RunCrf:
    """The CRF in this process, one prediction after the other."""
    return partial(map, partial(refine, settings=settings))


def refine_on_ray(settings: Crf) -> RunCrf:
    """The CRF as Ray tasks of one CPU each, at most two a CPU under way, so that probabilities do not pile up."""

    def run(jobs: Iterable[CrfJob]) -> Iterator[Refined]:
        import ray

        task: Any = ray.remote(num_cpus=1, max_retries=3)(refine)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        under_way: list[Any] = []
        for job in jobs:
            under_way.append(task.remote(job, settings))
            if len(under_way) >= limit:
                (ended,), under_way = ray.wait(under_way, num_returns=1)
                yield ray.get(ended)
        for reference in under_way:
            yield ray.get(reference)

    return run
