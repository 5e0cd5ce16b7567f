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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cosa_ray
from cosa_ray.data.card import CARD, DatasetCard
from cosa_ray.errors import UserError
from cosa_ray.evaluation.trained import MODEL_FILES, Description, is_model
from cosa_ray.tracking.pyfunc import DATA, example, signature
from cosa_ray.tracking.store import Store, find_run

SCHEME = "models:/"
# What loading and predicting import; their versions are those of this environment.
_NEEDED = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "pillow", "pydantic", "pyyaml", "safetensors")
_VARIABLE = "MLFLOW_TRACKING_URI"
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

    Signature, input example, classes, palette and metrics go with it. run_id: the run's MLflow id where it is known;
    else it is found by its name and folder. Raises UserError for names that MLflow does not take and for a run that
    MLflow does not have.
    """
    check_names(name, aliases)
    client = store.client()
    experiment = store.experiment_id(client)
    run_id = run_id or find_run(client, experiment, run, run_folder)
    if run_id is None:
        raise UserError(
            f"MLflow at {store.shown} has no run {run} of {run_folder}; a model is registered from its run: set the "
            "MLFLOW_TRACKING_URI it was tracked with."
        )
    import mlflow.pyfunc
    from mlflow.models import Model

    described = Description.read(folder)
    card = DatasetCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
    facts = {
        "run": run,
        "step": described.step,
        "classes": described.classes,
        "palette": [list(colour) for colour in card.palette],
        "metrics": described.metrics,
    }
    with tempfile.TemporaryDirectory(prefix="cosa-ray-model-") as temporary, _tracking_uri(store.uri):
        data = Path(temporary) / DATA
        data.mkdir()
        for file in MODEL_FILES:
            shutil.copy(folder / file, data / file)
        package = Path(temporary) / "code" / "cosa_ray"
        shutil.copytree(Path(cosa_ray.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        # Made first: left to itself, MLflow would put it into the experiment that it last heard of in this process.
        model = client.create_logged_model(experiment, name="cosa", source_run_id=run_id, model_type="cosa")
        logged = Model.log(
            None,  # the artifact path of old, which the model's id replaces
            mlflow.pyfunc,
            model_id=model.model_id,
            run_id=run_id,
            step=described.step,
            registered_model_name=name,
            await_registration_for=60,
            loader_module="cosa_ray.tracking.pyfunc",
            data_path=str(data),
            code_paths=[str(package)],
            pip_requirements=[f"{needed}=={version(needed).partition('+')[0]}" for needed in _NEEDED],
            signature=signature(),
            input_example=example(),
            metadata=facts,
        )
        number = str(logged.registered_model_version)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, number)
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            client.set_model_version_tag(name, number, f"cosa_ray.{key}", text)
    named = f"{SCHEME}{name}@{aliases[0]}" if aliases else f"{SCHEME}{name}/{number}"
    return Registered(name, number, tuple(aliases), named, run_id)


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
