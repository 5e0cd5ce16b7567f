"""The team's MLflow by Compose: the file against its specification, its variables, and the small programs in it."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.cluster_files import CLUSTER, documents

FOLDER = CLUSTER / "mlflow"
COMPOSE = (FOLDER / "compose.yaml").read_text()
SECRETS = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")
VERSIONS = ("PYTHON_IMAGE", "POSTGRES_VERSION", "SEAWEEDFS_VERSION")
FILLED = {name: f"x-{name.lower()}" for name in (*SECRETS, *VERSIONS)}


def filled(text: str, environment: dict[str, str]) -> dict[str, Any]:
    """What Compose makes of the file: ${X}, ${X:-default} and ${X:?sentence}, then `$$` is `$`."""

    def value(match: re.Match[str]) -> str:
        found = environment.get(match["name"], "")
        if not found and match["how"] == ":?":
            raise ValueError(f"{match['name']}: {match['word']}")
        return found or (match["word"] if match["how"] == ":-" else "")

    pattern = r"(?<!\$)\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<word>[^}]*))?\}"
    done: dict[str, Any] = yaml.safe_load(re.sub(pattern, value, text).replace("$$", "$"))
    return done


def errors(compose: dict[str, Any]) -> list[str]:
    """Where a file is not what the Compose specification says."""
    from check_jsonschema.builtin_schemas import get_builtin_schema
    from jsonschema import Draft202012Validator

    return [
        each.message for each in Draft202012Validator(get_builtin_schema("vendor.compose-spec")).iter_errors(compose)
    ]


def test_compose_takes_the_file() -> None:
    assert errors(yaml.safe_load(COMPOSE)) == []
    assert errors(filled(COMPOSE, FILLED)) == []


def test_a_misspelt_key_of_compose_is_found() -> None:
    broken = yaml.safe_load(COMPOSE)
    broken["services"]["mlflow"]["healtcheck"] = {}
    assert any("healtcheck" in each for each in errors(broken))


@pytest.mark.parametrize("name", FILLED)
def test_nothing_starts_while_a_value_is_missing(name: str) -> None:
    for missing in ({}, {name: ""}):
        with pytest.raises(ValueError, match=f"^{name}: set {name} in .env"):
            filled(COMPOSE, {key: value for key, value in FILLED.items() if key != name} | missing)


def test_the_example_names_every_variable_and_gives_no_value() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / ".env.example").read_text(), re.MULTILINE))
    optional = {"ARTIFACT_BUCKET"}
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE)) - optional == set(example)
    assert set(example.values()) == {""}
    assert set(FILLED) <= set(example)


def exposures(compose: dict[str, Any]) -> list[str]:
    """What somebody outside could reach, beyond MLflow on this machine; and what is lost or unwatched."""
    found = []
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if name != "mlflow" or not port.startswith("127.0.0.1:"):
                found.append(f"{name}: port {port}")
        if name != "mlflow" and service["networks"] != ["back"]:
            found.append(f"{name}: network")
        if "no-new-privileges:true" not in service.get("security_opt", []):
            found.append(f"{name}: privileges")
        if name != "bucket" and not ("healthcheck" in service and service.get("restart") == "unless-stopped"):
            found.append(f"{name}: unwatched")
        if name in ("postgres", "s3"):
            if not any(volume.partition(":")[0] in compose["volumes"] for volume in service.get("volumes", [])):
                found.append(f"{name}: no volume")
            if ":x-" not in service["image"]:
                found.append(f"{name}: version")
    if compose["networks"]["back"] != {"internal": True}:
        found.append("back: not internal")
    return found


def test_only_mlflow_is_reached_and_only_from_this_machine() -> None:
    assert exposures(filled(COMPOSE, FILLED)) == []
    assert filled(COMPOSE, {**FILLED, "MLFLOW_BIND": "192.0.2.1"})["services"]["mlflow"]["ports"] == [
        "192.0.2.1:5000:5000"
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("127.0.0.1}:5000", "0.0.0.0}:5000", "mlflow: port 0.0.0.0:5000:5000"),
        (
            "    networks: [back]\n    environment:\n      POSTGRES_USER",
            "    networks: [front]\n    environment:\n      POSTGRES_USER",
            "postgres: network",
        ),
        ("{internal: true}", "{}", "back: not internal"),
        ('    volumes: ["artifacts:/data"]\n', "", "s3: no volume"),
        ("postgres:${POSTGRES_VERSION:?set POSTGRES_VERSION in .env, as 17.6}", "postgres:latest", "postgres: version"),
    ],
)
def test_each_exposure_is_found(old: str, new: str, problem: str) -> None:
    assert old in COMPOSE
    assert problem in exposures(filled(COMPOSE.replace(old, new), FILLED))


def test_the_server_waits_for_what_it_needs_and_leaves_out_its_job_runner() -> None:
    server = filled(COMPOSE, FILLED)["services"]["mlflow"]
    assert server["depends_on"] == {
        "postgres": {"condition": "service_healthy"},
        "bucket": {"condition": "service_completed_successfully"},
    }
    kubernetes = documents(CLUSTER / "kubernetes" / "mlflow.yaml")[1]["spec"]["template"]["spec"]["containers"][0]
    other = {each["name"]: each.get("value") for each in kubernetes["env"]}
    needed = {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert needed <= set(other)
    assert needed <= set(server["environment"])
    assert server["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert other["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_accounts_lie_in_the_database_of_the_runs_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server.auth.config import read_auth_config

    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(FOLDER / "basic_auth.ini"))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "of-the-test")
    accounts = read_auth_config()
    assert (accounts.admin_username, accounts.admin_password) == ("admin", "of-the-test")
    assert f"--backend-store-uri={accounts.database_uri}" in filled(COMPOSE, FILLED)["services"]["mlflow"]["command"]
    # A key that MLflow does not know would be passed over in silence.
    parser = configparser.ConfigParser()
    parser.read(FOLDER / "basic_auth.ini")
    assert set(parser["mlflow"]) <= set(accounts._fields)


def test_the_store_is_started_with_its_keys_in_a_private_file(tmp_path: Path) -> None:
    """The container's own shell command, with a `weed` that says how it was started."""
    service = filled(COMPOSE, FILLED)["services"]["s3"]
    (tmp_path / "weed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "weed").chmod(0o755)
    config = tmp_path / "s3.json"
    shell, script = service["entrypoint"], service["command"][0].replace("/tmp/s3.json", str(config))
    ran = subprocess.run(
        [*shell, script],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["server", "-dir=/data", "-s3", "-s3.port=8333", f"-s3.config={config}"]
    credentials = json.loads(config.read_text())["identities"][0]["credentials"]
    assert credentials == [{"accessKey": "key", "secretKey": "secret"}]
    assert config.stat().st_mode & 0o777 == 0o600
    # The server looks for the store where it listens.
    assert filled(COMPOSE, FILLED)["services"]["mlflow"]["environment"]["MLFLOW_S3_ENDPOINT_URL"] == "http://s3:8333"


STUBS = {
    "boto3.py": """
import json, os, pathlib
from botocore.exceptions import ClientError

state = pathlib.Path(os.environ["STATE"])


class Store:
    def list_buckets(self):
        known = json.loads(state.read_text())
        if known["starting"]:
            state.write_text(json.dumps({**known, "starting": known["starting"] - 1}))
            raise ClientError
        return {"Buckets": [{"Name": name} for name in known["buckets"]]}

    def create_bucket(self, Bucket):
        known = json.loads(state.read_text())
        assert Bucket not in known["buckets"]
        state.write_text(json.dumps({**known, "buckets": [*known["buckets"], Bucket]}))


def client(service, endpoint_url):
    assert (service, endpoint_url) == ("s3", "http://s3:8333")
    return Store()
""",
    "botocore/__init__.py": "",
    "botocore/exceptions.py": "class ClientError(Exception): ...\nclass BotoCoreError(Exception): ...\n",
}


@pytest.mark.parametrize("before", [[], ["mlflow"], ["another"]])
def test_the_bucket_is_made_once_the_store_answers(before: list[str], tmp_path: Path) -> None:
    for name, text in STUBS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"starting": 1, "buckets": before}))
    service = filled(COMPOSE, FILLED)["services"]["bucket"]
    environment = {key: service["environment"][key] for key in ("ARTIFACT_BUCKET", "MLFLOW_S3_ENDPOINT_URL")}
    command = [word.replace("/etc/mlflow", str(FOLDER)) for word in service["command"]]
    assert command[0] == "python"
    subprocess.run(
        [sys.executable, *command[1:]],
        env={**environment, "PYTHONPATH": str(tmp_path), "STATE": str(state), "PATH": os.environ["PATH"]},
        check=True,
        timeout=60,
    )
    assert json.loads(state.read_text()) == {"starting": 0, "buckets": list(dict.fromkeys([*before, "mlflow"]))}
