"""Where runs are tracked: an MLflow SQLite file in the working folder by default, or any MLflow server."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from cosa_ray.config.credentials import redacted, without_credentials
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tracking.describe import RunDescription, describe
from cosa_ray.tracking.refusal import ask_to_change, refusal
from cosa_ray.tracking.views import new_experiment_tags, offer_views

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
RUN_TAG = "cosa_ray.run"
FOLDER_TAG = "cosa_ray.folder"
DEFAULT_FILE = "mlflow.db"
_SERVERS = ("http", "https")
_PAGE = 100  # runs a request
_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")


@dataclass(frozen=True)
class Store:
    """An MLflow store and the experiment in it; picklable, made on the driver and handed to the workers."""

    uri: str = field(repr=False)  # may carry credentials
    experiment: str

    @property
    def is_sqlite(self) -> bool:
        """True for a SQLite file, which only processes of one machine may share."""
        return self.uri.startswith("sqlite:")

    @property
    def shown(self) -> str:
        """The URI without credentials, for messages and logs."""
        return without_credentials(self.uri)

    def said(self, error: BaseException) -> str:
        """An error that came of using the store, in its first telling line, without the credentials it may hold."""
        lines = (str(error) or type(error).__name__).splitlines()
        # SQLAlchemy's remark on when it was raised comes before what it is.
        return redacted(next((line for line in lines if not line.startswith("(raised as")), lines[0]), self.uri)

    def client(self) -> MlflowClient:
        """A client that gives up soon: whoever calls it retries in its own time."""
        prepare_mlflow()
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def experiment_id(self, client: MlflowClient) -> str:
        """Id of the experiment, created when it is not there. Raises UserError when it was deleted."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                place, tags = self._artifacts(), new_experiment_tags()
                return str(client.create_experiment(self.experiment, artifact_location=place, tags=tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)  # somebody else was faster
        if found is None or found.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {self.experiment!r} in {self.shown} was deleted; restore it, or set "
                "tracking.experiment to another name"
            )
        return str(found.experiment_id)

    def _artifacts(self) -> str | None:
        """Where a new experiment keeps artifacts: beside the SQLite file; a server decides for itself."""
        path = sqlite_path(self.uri)
        return (path.parent / "mlartifacts").as_uri() if path else None


@dataclass(frozen=True)
class Tracking:
    """Which MLflow run this is, what is logged about it at its start, and where undelivered records wait.

    Picklable: made on the driver, used by rank 0. Run name and folder (path or URI) identify the run; the spool is a
    folder or fsspec URI on the run's storage. The parent of a sweep's trial is given by id, or by run name where the
    server was away when the sweep began: the child then waits until the parent is there.
    """

    store: Store
    run: str
    folder: str
    spool: str
    parent_run_id: str | None = None
    parent: str | None = None
    description: RunDescription | None = None

    @property
    def uri(self) -> str:
        """The store's URI without credentials."""
        return self.store.shown


def tracking_uri(config: Config) -> str:
    """The MLflow URI of a run: MLFLOW_TRACKING_URI, else `tracking.uri`, else a SQLite file in the working folder.

    SQLite paths come back absolute, because workers run in folders of their own. Raises UserError for a URI MLflow
    cannot use.
    """
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    origin = "MLFLOW_TRACKING_URI" if from_environment else "tracking.uri"
    return checked_uri(from_environment or config.tracking.uri or f"sqlite:///{Path.cwd() / DEFAULT_FILE}", origin)


def checked_uri(uri: str, origin: str) -> str:
    """The URI with an absolute SQLite path; UserError naming `origin` (an option, a variable, a key) when malformed."""
    advice = "use sqlite:///path/to/mlflow.db or http://host:port"
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise UserError(f"{origin} is not a URL: {without_credentials(uri)!r}; {advice}") from None
    scheme = parts.scheme.partition("+")[0]
    if scheme in _SERVERS:
        if not parts.hostname:
            raise UserError(f"{origin} names no host: {without_credentials(uri)!r}; {advice}")
        return uri.rstrip("/")
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path is None:
            raise UserError(f"{origin} names no file: {without_credentials(uri)!r}; {advice}")
        return f"sqlite:///{path}"
    if scheme in _DATABASES or uri == "databricks" or scheme == "databricks":
        return uri
    if scheme in ("", "file"):
        raise UserError(
            f"{origin} is a folder, which MLflow no longer writes to: {without_credentials(uri)!r}; {advice}"
        )
    raise UserError(f"{origin} has an unknown scheme: {without_credentials(uri)!r}; {advice}")


def sqlite_path(uri: str) -> Path | None:
    """Absolute path of a SQLite URI's file; None for another store or a database in memory."""
    if not uri.startswith("sqlite:///"):
        return None
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(name).expanduser().absolute() if name and name != ":memory:" else None


def open_store(
    config: Config,
    *,
    run_name: str,
    folder: str,
    parent_run_id: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Tracking:
    """Check the store once on the driver, making the SQLite file and the experiment, and say how a run is tracked.

    A server that does not answer is no error: the run starts, and its tracker delivers later. Raises UserError for a
    malformed URI, a SQLite file of another MLflow version, a server that refuses, or a deleted experiment.
    """
    store = Store(tracking_uri(config), config.tracking.experiment)
    check_store(store)
    description = describe(config, tags or {})
    return Tracking(store, run_name, folder, f"{folder.rstrip('/')}/spool", parent_run_id, parent, description)


def check_reachable(tracking: Tracking, nodes: int) -> None:
    """Refuse, with a UserError, a SQLite file for workers on more than one machine."""
    if tracking.store.is_sqlite and nodes > 1:
        raise UserError(
            f"workers on {nodes} machines cannot share the SQLite file {sqlite_path(tracking.store.uri)}; start an "
            "MLflow server and set MLFLOW_TRACKING_URI=http://host:port, or pass --no-track"
        )


def check_store(store: Store) -> None:
    """Open the store and its experiment once, making what is missing; see `open_store` for what it raises."""
    path = sqlite_path(store.uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder of the MLflow store {path} cannot be made ({error.strerror})") from None
    try:
        with _alone(path):
            client = store.client()
            experiment = store.experiment_id(client)
            offer_views(client, experiment)
            ask_to_change(store, client, experiment)
    except UserError:
        raise
    except Exception as error:
        _explain(store, path, error)


def _alone(path: Path | None) -> AbstractContextManager[object]:
    """Keep other runs from making the same SQLite file at the same time, which MLflow takes for damage."""
    if path is None:
        return nullcontext()
    return FileLock(path.with_name(f".{path.name}.lock"))


def _explain(store: Store, path: Path | None, error: Exception) -> None:
    """Turn what MLflow raised into a UserError, or a warning when the server is merely away."""
    message = str(error)
    first = store.said(error)
    if "out-of-date database schema" in message or "Can't locate revision" in message:
        import mlflow

        raise UserError(
            f"the MLflow store {store.shown} was made by another MLflow version than this one ({mlflow.__version__}); "
            f"back it up and run `mlflow db upgrade {store.shown}`, or set tracking.uri to another store"
        ) from None
    if path is not None:
        raise UserError(
            f"the MLflow store {path} cannot be opened ({first}); set tracking.uri to another one"
        ) from None
    if (refused := refusal(store, error)) is not None:
        raise refused from None
    log.warning("MLflow at %s does not answer; the run starts, and its metrics are delivered later", store.shown)
    log.debug("MLflow said: %s", first)


def find_run(client: MlflowClient, experiment_id: str, name: str, folder: str | None = None) -> str | None:
    """Id of the run with this name (and folder), by its tags.

    Of two, which a lost answer of a server can make, the one that something was logged to; else the oldest.
    """
    if "'" in name:
        raise ValueError(f"a run name may not contain quotes: {name!r}")  # MLflow's filter cannot escape one
    runs = client.search_runs(
        [experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{name}'", order_by=["attributes.start_time ASC"]
    )
    mine = [run for run in runs if folder in (None, run.data.tags.get(FOLDER_TAG))]
    logged = (run for run in mine if run.data.params or run.data.metrics)
    return next((run.info.run_id for run in [*logged, *mine]), None)


def metric_course(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Finite points (step, value) of a run's metric by step; of a step that was logged again, what was logged last."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda point: (point.step, point.timestamp))
    last = {point.step: float(point.value) for point in points}
    return [(step, value) for step, value in last.items() if math.isfinite(value)]


def filtered_runs(store: Store, words: str, where: str, *, most: int = 1000, newest_first: bool = False) -> list[Run]:
    """Runs of the store's experiment that an MLflow filter finds, by their start; none where there is no experiment.

    Raises UserError, beginning with `where`, when there is no store or MLflow does not answer the filter.
    """
    path = sqlite_path(store.uri)
    if path is not None and not path.exists():  # asked, MLflow would make one
        raise UserError(f"{where}: there is no MLflow store at {path}; set MLFLOW_TRACKING_URI to the one meant.")
    client = store.client()
    from mlflow.exceptions import MlflowException

    try:
        place = client.get_experiment_by_name(store.experiment)
        if place is None:
            return []
        order = [f"attributes.start_time {'DESC' if newest_first else 'ASC'}"]
        runs: list[Run] = []
        token = None
        while True:
            # In pages: a busy server takes longer over 1,000 runs than the client waits for one answer.
            size = min(_PAGE, most - len(runs))
            page = client.search_runs([place.experiment_id], words, max_results=size, order_by=order, page_token=token)
            runs += page
            token = page.token
            if not token or len(runs) >= most:
                return runs
    except MlflowException as error:
        if (refused := refusal(store, error)) is not None:
            raise refused from None
        raise UserError(f"{where}: MLflow does not answer this filter ({store.said(error)}); mend it.") from None


def find_run_id(tracking: Tracking) -> str | None:
    """MLflow's id of a run; None when the server is away or the run has not reached it."""
    try:
        client = tracking.store.client()
        return find_run(client, tracking.store.experiment_id(client), tracking.run, tracking.folder)
    except Exception as error:
        log.debug("no MLflow run id of %s: %s", tracking.run, tracking.store.said(error))
        return None


def folder_of_run(run_id: str, config: Config | None = None) -> str | None:
    """The folder of the run with this MLflow id; None when the store has no such run.

    Raises UserError when a server refuses this client.
    """
    uri = tracking_uri(config or Config())
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    store = Store(uri, "")
    try:
        tags: dict[str, str] = store.client().get_run(run_id).data.tags
    except Exception as error:
        # Asked for a run that is not there, a server with users says "Permission denied".
        if "Permission denied" not in str(error) and (refused := refusal(store, error)) is not None:
            raise refused from None
        log.debug("no MLflow run %s: %s", run_id, store.said(error))
        return None
    return tags.get(FOLDER_TAG)


def prepare_mlflow() -> None:
    """Settings of MLflow's client that must stand before it is imported: give up soon, report nothing to anybody."""
    for key, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(key, value)
    # Their news is of no use: tables being made, and every failed connection once more.
    for noisy in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # A locked SQLite file with its traceback and 500 points, before the error is raised, and told in a line here.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
