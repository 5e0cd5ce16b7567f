"""Trained models in MLflow: logged with a signature, registered under a name, and found again.

What MLflow holds is the folder of a trained model (weights in safetensors, configuration, classes and palette), this
package's own code, and the name of the module that loads it: nothing is pickled, nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cosa_ray
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD, DatasetCard
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import MODEL_FILES, Description, is_model, read_config
from cosa_ray.tracking.describe import parameters, without_secrets
from cosa_ray.tracking.pyfunc import DATA, example, signature
from cosa_ray.tracking.refusal import ask_to_add_version, ask_to_change, refusal, refusals
from cosa_ray.tracking.store import Store, find_run
from cosa_ray.tracking.views import NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

SCHEME = "models:/"
# What loading and predicting import; their versions are those of this environment.
_NEEDED = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "pillow", "pydantic", "pyyaml", "safetensors")
_VARIABLE = "MLFLOW_TRACKING_URI"
_METRICS_A_REQUEST = 500
_NO_MODEL_NAME = re.compile(r"[/:.%\"']")  # what a run may be called and a logged model may not
_SHOWN = ("val/miou", "val/miou_labels_given", "val/cam_miou_best")
_ABOUT = """Semantic segmentation by CoSA: a picture in, a mask of class numbers out. Which classes, and how well, is \
with each version.

`mlflow.pyfunc.load_model("models:/{name}/VERSION")`, or `cosa-ray predict "models:/{name}/VERSION" PICTURES`."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,199}")
_ALIAS = re.compile(r"(?!v\d+$)[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and how to name it."""

    name: str
    version: str
    aliases: tuple[str, ...]
    uri: str
    mlflow_run_id: str

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def check_names(name: str, aliases: Sequence[str]) -> None:
    """Raise UserError for a model name or an alias that MLflow does not take."""
    if not _NAME.fullmatch(name):
        raise UserError(f"model name {name!r}: use letters, digits, '_', '.', '-' and blanks, a letter or digit first.")
    for alias in aliases:
        if not _ALIAS.fullmatch(alias) or alias == "latest":
            raise UserError(
                f"alias {alias!r}: use letters, digits, '_' and '-', and neither `latest` nor v and a number."
            )


def register(
    store: Store,
    folder: Path,
    *,
    run: str,
    run_folder: str,
    run_id: str | None = None,
    name: str,
    aliases: Sequence[str] = (),
) -> Registered:
    """Log the trained model in a local folder to its MLflow run and register it under a name, with aliases.

    Signature, input example, settings, classes, palette and metrics (with the data they were measured on) go with it,
    and a description of model and version. run_id: the run's MLflow id where it is known; else it is found by its name
    and folder. Raises UserError for names that MLflow does not take and for a run that MLflow does not have.
    """
    check_names(name, aliases)
    client = store.client()
    with refusals(store):
        experiment = store.experiment_id(client)
        ask_to_change(store, client, experiment)
        run_id = run_id or find_run(client, experiment, run, run_folder)
    ask_to_add_version(store, client, name)
    if run_id is None:
        raise UserError(
            f"MLflow at {store.shown} has no run {run} of {run_folder}; a model is registered from its run: set the "
            "MLFLOW_TRACKING_URI it was tracked with."
        )
    import mlflow
    from mlflow.entities import LoggedModelOutput

    described, settings = Description.read(folder), without_secrets(read_config(folder))
    card = DatasetCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
    facts = {
        "run": run,
        "step": described.step,
        "classes": described.classes,
        "palette": [list(colour) for colour in card.palette],
        "metrics": described.metrics,
    }
    text = _text(run, described, settings)
    # Its experiment is given: left to itself, MLflow takes the one that it last heard of in this process.
    model = client.create_logged_model(
        experiment,
        name=_NO_MODEL_NAME.sub("-", run),
        source_run_id=run_id,
        tags={NOTE: text},
        params=parameters(settings),
        model_type="cosa",
    )
    with _tracking_uri(store.uri):
        try:
            _upload(client, model, folder, run_id, facts)
        except BaseException:
            client.finalize_logged_model(model.model_id, "FAILED")
            raise
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, described.step)])
        measured = _measured(client, run_id, described.step, model.model_id)
        for start in range(0, len(measured), _METRICS_A_REQUEST):
            client.log_batch(run_id, metrics=measured[start : start + _METRICS_A_REQUEST])
        number = str(mlflow.register_model(f"{SCHEME}{model.model_id}", name, await_registration_for=60).version)
    for alias in aliases:
        client.set_registered_model_alias(name, alias, number)
    for key, value in facts.items():
        content = value if isinstance(value, str) else json.dumps(value)
        client.set_model_version_tag(name, number, f"cosa_ray.{key}", content)
    client.update_model_version(name, number, text)
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, _ABOUT.format(name=name))
    named = f"{SCHEME}{name}@{aliases[0]}" if aliases else f"{SCHEME}{name}/{number}"
    return Registered(name, number, tuple(aliases), named, run_id)


def _text(run: str, described: Description, settings: Config) -> str:
    """What a version is; plain at its start, of which a list shows twenty letters."""
    scores = ", ".join(f"{key} {described.metrics[key]:.4f}" for key in _SHOWN if key in described.metrics)
    data = settings.data.dataset.rstrip("/").rpartition("/")[2]
    return (
        f"{scores or 'No score'}: run {run} at step {described.step}, `{settings.model.backbone}` on `{data}`.\n\n"
        f"Classes: {', '.join(described.classes)}."
    )


def _upload(client: MlflowClient, model: LoggedModel, folder: Path, run_id: str, facts: Mapping[str, Any]) -> None:
    """Put the trained model in a folder, with what loads it, where MLflow keeps this logged model.

    Not by MLflow's own `Model.log`: it copies the run's metrics to the model without the data they were measured on.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="cosa-ray-model-") as temporary:
        data, made = Path(temporary) / DATA, Path(temporary) / "model"
        data.mkdir()
        for file in MODEL_FILES:
            shutil.copy(folder / file, data / file)
        package = Path(temporary) / "code" / "cosa_ray"
        shutil.copytree(Path(cosa_ray.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        place, number = model.artifact_location, model.model_id
        mlflow.pyfunc.save_model(
            path=str(made),
            mlflow_model=Model(place, run_id=run_id, model_uuid=number, model_id=number, metadata=dict(facts)),
            loader_module="cosa_ray.tracking.pyfunc",
            data_path=str(data),
            code_paths=[str(package)],
            pip_requirements=[f"{needed}=={version(needed).partition('+')[0]}" for needed in _NEEDED],
            signature=signature(),
            input_example=example(),
        )
        for cache in made.rglob("__pycache__"):
            shutil.rmtree(cache)
        client.log_model_artifacts(model.model_id, str(made))


def _measured(client: MlflowClient, run_id: str, step: int, model_id: str) -> list[Metric]:
    """The run's points at a step as metrics of its model, those of the evaluation with the split they are of."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    used = [each.dataset for each in run.inputs.dataset_inputs if any(tag.value == "val" for tag in each.tags)]
    points: list[Any] = []
    for latest in run.to_proto().data.metrics:
        # A request for each metric is minutes on a busy server: only a later step's hides the one wanted.
        if latest.step > step:
            points += [point for point in client.get_metric_history(run_id, latest.key) if point.step == step]
        elif latest.step == step:
            points.append(latest)
    metrics = []
    for point in points:
        of = next((each for each in used if point.key.startswith(each.name.rpartition("/")[2])), None)
        name, digest = (of.name, of.digest) if of is not None else (None, None)
        metrics.append(Metric(point.key, point.value, point.timestamp, step, model_id, name, digest, run_id))
    return metrics


@contextlib.contextmanager
def open_registered(uri: str, tracking_uri: str) -> Iterator[Path]:
    """The trained model behind `models:/name@alias`, `models:/name/version` or a logged model, as a local folder.

    Raises UserError when there is none, or it was not made here.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = Store(tracking_uri, "")
    store.client()  # settles how MLflow is used before it is imported
    with tempfile.TemporaryDirectory(prefix="cosa-ray-model-") as temporary:
        try:
            with _tracking_uri(tracking_uri):  # the registry is found by it, unless MLFLOW_REGISTRY_URI says another
                path = Path(download_artifacts(artifact_uri=uri, dst_path=temporary))
        except (MlflowException, OSError) as error:
            if (refused := refusal(store, error, f"READ on {uri}")) is not None:
                raise refused from None
            raise UserError(
                f"no model {uri} in MLflow at {store.shown} ({store.said(error)}); check name and alias."
            ) from (None)
        folder = next((found.parent for found in path.rglob("checkpoint.json") if is_model(found.parent)), None)
        if folder is None:
            raise UserError(
                f"the model {uri} in MLflow at {store.shown} was not registered by cosa-ray; give one that was."
            )
        yield folder


@contextlib.contextmanager
def _tracking_uri(uri: str) -> Iterator[None]:
    """MLflow's own idea of where it logs, for the block: logging a model knows no other way to be told."""
    import mlflow

    before = os.environ.get(_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        # It writes the variable too, which would send every later run of this process to this store.
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ[_VARIABLE] = before
