"""Servers that several files of tests talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.team_server import TeamServer, postgres_programs


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    """MLflow with users on PostgreSQL and S3; ada and bob are users without any permission but the default READ."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    for package in ("psycopg2", "boto3", "moto.server", "flask_wtf"):
        pytest.importorskip(package)
    folder: Path = tmp_path_factory.mktemp("team")
    with TeamServer(folder) as server:
        for name in ("ada", "bob"):
            server.user(name)
        yield server


@pytest.fixture
def as_ada(team: TeamServer) -> Iterator[TeamServer]:
    """The server, with this process its client as ada."""
    with team.client_of("ada"):
        yield team
