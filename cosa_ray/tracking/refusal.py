"""What an MLflow server with users means by its 401 and 403, said in one sentence, and asked before work is done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cosa_ray.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from cosa_ray.tracking.store import Store

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
_NOBODY = "cosa_ray.nobody_has_this_tag"


def refusal(store: Store, error: BaseException, wanted: str | None = None) -> UserError | None:
    """Why the server does not serve this client, and what to do; None when the error is another one.

    wanted: the permission that is missing, in words; None is to change the store's experiment.
    """
    status = _status(error)
    if status is None:
        return None
    from mlflow.utils.credentials import read_mlflow_creds

    user = read_mlflow_creds().username or urlsplit(store.uri).username  # of the environment, or ~/.mlflow/credentials
    if status == 401:
        if not (user or os.environ.get(TOKEN)):
            return UserError(f"the MLflow server {store.shown} asks who you are; set {USER} and {PASSWORD}")
        return UserError(
            f"the MLflow server {store.shown} does not know this user with this password; check {USER} and {PASSWORD}"
        )
    if status == 403 and "Permission denied" in str(error):
        return UserError(
            f"the MLflow server {store.shown} does not let {user or 'this user'} do this; ask its administrator for "
            f"the permission {wanted or f'EDIT on the experiment {store.experiment!r}'}, or use another name"
        )
    if status == 403:
        return UserError(
            f"the MLflow server {store.shown} refused the request ({store.said(error)}); check its allowed hosts"
        )
    return None


@contextlib.contextmanager
def refusals(store: Store, wanted: str | None = None) -> Iterator[None]:
    """Raise UserError in place of a refusal that the block meets; see `refusal`."""
    try:
        yield
    except Exception as error:
        if (refused := refusal(store, error, wanted)) is not None:
            raise refused from None
        raise


def ask_to_change(store: Store, client: MlflowClient, experiment: str) -> None:
    """Raise UserError when the server lets this client read an experiment and not log to it.

    Found out by a change of nothing: a tag that nobody has is deleted. Permissions come before the tag's absence.
    """
    from mlflow.exceptions import MlflowException

    if is_server(store.uri):
        with contextlib.suppress(MlflowException), refusals(store):
            client.delete_experiment_tag(experiment, _NOBODY)


def ask_to_add_version(store: Store, client: MlflowClient, name: str) -> None:
    """Raise UserError when the server keeps this client from adding a version to a registered model that is there."""
    from mlflow.exceptions import MlflowException

    if is_server(store.uri):
        # Of a name that is free the server says "Permission denied" too; whoever takes it owns it.
        with contextlib.suppress(MlflowException):
            client.get_registered_model(name)
            with refusals(store, f"EDIT on the registered model {name!r}"):
                client.delete_registered_model_tag(name, _NOBODY)


def check_access(store: Store) -> None:
    """Raise UserError when a server refuses this client, or its changes to the experiment; away is no error."""
    from mlflow.exceptions import MlflowException

    if is_server(store.uri):
        with contextlib.suppress(MlflowException), refusals(store):
            client = store.client()
            found = client.get_experiment_by_name(store.experiment)
            if found is not None:
                ask_to_change(store, client, str(found.experiment_id))


def is_server(uri: str) -> bool:
    """True when the store is an MLflow server."""
    return uri.startswith(("http://", "https://"))


def _status(error: BaseException) -> int | None:
    """The HTTP status behind what MLflow raised: its own error for a request, that of `requests` for an artifact."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # A server's plain answer; other errors of these codes are MLflow's own.
        return int(error.get_http_status_code()) if "API request to endpoint" in str(error) else None
    text = str(error)
    return next((code for code in (401, 403) if text.startswith(f"{code} Client Error")), None)
