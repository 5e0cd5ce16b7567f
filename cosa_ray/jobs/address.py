"""Which cluster is meant: the address given, the environment's, or the one that cluster/current.yaml names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from cosa_ray.config.load import explain, read_yaml
from cosa_ray.config.section import Section
from cosa_ray.errors import UserError

CURRENT = "cluster/current.yaml"
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order of Ray's own job client


class Cluster(Section):
    """A cluster that jobs are sent to, as cluster/current.yaml describes it."""

    address: str = Field(description="The head's dashboard, http://HOST:PORT.")
    folder: str | None = Field(None, description="Folder on the cluster where relative paths start.")
    installed: bool = Field(False, description="Use the cosa-ray installed there instead of sending this one.")
    python: str = Field("python", description="Python of the cluster's nodes.")
    token_path: str | None = Field(None, description="File with the cluster's token, from the working folder or ~.")


@dataclass(frozen=True)
class Found:
    """The cluster to talk to and what named it, as a sentence says it: `--address`, a variable, or the file."""

    cluster: Cluster
    origin: str

    @property
    def label(self) -> str:
        """What named the address, and the address: the start of a sentence about it."""
        return f"{self.origin} {self.cluster.address}"


def find_cluster(
    address: str | None = None, environment: Mapping[str, str] = os.environ, folder: Path | None = None
) -> Found:
    """The cluster to talk to: `address`, else RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else the file's.

    `folder` is where cluster/current.yaml is looked for (None: the working folder). What that file says besides the
    address holds for its own address only. Raises UserError when nothing names a cluster, and for a file that says
    something else.
    """
    file = (folder or Path.cwd()) / CURRENT
    current = _read(file) if file.is_file() else None
    candidates = [("--address", address), *((name, environment.get(name)) for name in _VARIABLES)]
    for origin, given in candidates:
        if given:
            same = current is not None and current.address.rstrip("/") == given.rstrip("/")
            return Found(current if same and current is not None else Cluster(address=given), origin)
    if current is None:
        raise UserError(
            f"no cluster: give --address http://HOST:8265, set RAY_ADDRESS to it, or write `address:` into {CURRENT}."
        )
    return Found(current, CURRENT)


def _read(file: Path) -> Cluster:
    try:
        return Cluster.model_validate(read_yaml(file))
    except ValidationError as error:
        raise UserError(explain(error, str(file), Cluster)) from None
