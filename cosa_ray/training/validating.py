"""Evaluations beside a run: Ray Train evaluates a checkpoint in a task of its own while the workers go on."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosa_ray.errors import RunFailed
from cosa_ray.training.storage import RunFolder, patiently
from cosa_ray.training.watchdog import Watchdog

if TYPE_CHECKING:
    from PIL.Image import Image

    from cosa_ray.evaluation.evaluate import EvaluationResult

FOLDER = "validations"
RESULT = "result.json"
_LOOK_SECONDS = 2.0


class Validated(NamedTuple):
    """What an evaluation beside the run gave: metrics by their tracked names, seconds it took, pictures by name."""

    step: int
    metrics: dict[str, float]
    seconds: float
    pictures: dict[str, Image]


def validate(
    _checkpoint: Any, *, folder: str, name: str, step: int, cpus: float | None, hang_seconds: float
) -> dict[str, float]:
    """What Ray Train's task runs: evaluates a registered checkpoint as the run would, and leaves the result beside it.

    Both networks, one process, the run's own protocol; the thresholds are those of the checkpoint. The result is
    written last, so it is there whole or not at all. The process ends itself when it makes no progress for
    `hang_seconds`, and Ray starts another.
    """
    watchdog = Watchdog(hang_seconds)
    try:
        return _validate(RunFolder(folder), name, step, cpus, watchdog.alive)
    finally:
        watchdog.close()


def _validate(run: RunFolder, name: str, step: int, cpus: float | None, alive: Callable[[], None]) -> dict[str, float]:
    began = time.perf_counter()
    target = f"{FOLDER}/step_{step:08d}"
    try:
        result = _evaluated(run, name, cpus, alive)
    except Exception as error:
        run.write_text(f"{target}/{RESULT}", json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    pictures = result.pictures()
    found = {"metrics": result.metrics, "seconds": time.perf_counter() - began, "pictures": list(pictures)}
    with tempfile.TemporaryDirectory(prefix="cosa-ray-validation-") as temporary:
        for number, picture in enumerate(pictures.values()):
            picture.save(Path(temporary) / f"{number}.png", compress_level=1)
        what = f"the evaluation of step {step}"
        patiently(lambda: run.put(Path(temporary), target), what, alive)
        patiently(lambda: run.write_text(f"{target}/{RESULT}", json.dumps(found)), what, alive)
    return result.metrics


def _evaluated(run: RunFolder, name: str, cpus: float | None, alive: Callable[[], None]) -> EvaluationResult:
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.evaluate import evaluate
    from cosa_ray.evaluation.inference import autocast_dtype
    from cosa_ray.evaluation.trained import load_trained
    from cosa_ray.training.distributed import torch_settings

    with run.local_copy(name) as local:
        trained = load_trained(local)
    config, dataset = trained.config, open_dataset(trained.config.data.dataset)
    device = torch.device("cuda" if config.resources.gpus_per_worker else "cpu")
    with torch_settings(config, cpus, device):
        return evaluate(
            trained.online.to(device),
            trained.assignment.to(device),
            dataset.split(config.data.val_split),
            config,
            classes=dataset.classes,
            palette=dataset.card.palette,
            thresholds=trained.description.thresholds,
            segment=trained.segments,
            device=device,
            autocast=autocast_dtype(config, device),
            each_batch=alive,
        )


class Awaited:
    """On rank 0: the evaluations that were asked for, and their results as they come; looking never waits."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._steps: list[int] = []
        self._thread = ThreadPoolExecutor(1, "validations")
        self._look: Future[list[Validated]] | None = None
        self._looked = 0.0

    def __bool__(self) -> bool:
        return bool(self._steps)

    def ask(self, step: int) -> None:
        """A result more to wait for; a failure of before is forgotten."""
        name = f"{FOLDER}/step_{step:08d}/{RESULT}"
        if "error" in json.loads(patiently(lambda: self._folder.read_text(name), "evaluations") or "{}"):
            self._folder.remove(name)
        self._steps.append(step)

    def arrived(self) -> list[Validated]:
        """Results that have come since, in the order of their steps. Raises what storage raises."""
        found: list[Validated] = []
        if self._look is not None and self._look.done():
            found, self._look = self._look.result(), None
            self._steps = [step for step in self._steps if step not in {each.step for each in found}]
        if self._look is None and self._steps and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._look = self._thread.submit(patiently, lambda: self._read(list(self._steps)), "evaluations")
        return found

    def rest(self, over: Callable[[], None], alive: Callable[[], None]) -> list[Validated]:
        """All results that are still to come; `over` returns once no evaluation runs any more.

        Raises RunFailed for one that has left no result.
        """
        ended = self._thread.submit(over)
        while wait([ended], _LOOK_SECONDS).not_done:
            alive()
        ended.result()
        found, self._look = patiently(lambda: self._read(self._steps), "evaluations", alive), None
        if missing := sorted(set(self._steps) - {each.step for each in found}):
            raise RunFailed(f"the evaluation of step {missing[0]} beside the run died; resume the run to have it again")
        self._steps = []
        return found

    def close(self) -> None:
        """Look no more."""
        self._thread.shutdown()

    def _read(self, steps: Sequence[int]) -> list[Validated]:
        return [found for step in sorted(steps) if (found := read_result(self._folder, step)) is not None]


def read_result(folder: RunFolder, step: int) -> Validated | None:
    """The result of the evaluation of a step's checkpoint, None while there is none. Raises RunFailed if it failed."""
    from PIL.Image import open as open_image

    name = f"{FOLDER}/step_{step:08d}"
    if (text := folder.read_text(f"{name}/{RESULT}")) is None:
        return None
    content = json.loads(text)
    if "error" in content:
        raise RunFailed(f"the evaluation of step {step} beside the run failed: {content['error']}")
    pictures: dict[str, Image] = {}
    for number, key in enumerate(content["pictures"]):
        picture = open_image(io.BytesIO(folder.fs.cat_file(folder.join(f"{name}/{number}.png"))))
        picture.load()
        pictures[key] = picture
    return Validated(step, content["metrics"], content["seconds"], pictures)
