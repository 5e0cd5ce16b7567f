"""Every command in cluster/ and its guide, given to the command line that it is for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.unit.cluster_files import (
    CLUSTER,
    GUIDE,
    RAY_UP,
    documents,
    files,
    manifests,
    pods,
    ray_cluster,
    shell_blocks,
    shell_words,
)


def parse(command: Any, name: str, words: list[str]) -> None:
    """Take the words as the program would, without running it; raises for what it does not know."""
    command.make_context(name, list(words))


# Ray.


def ray_starts() -> Iterator[tuple[str, list[str]]]:
    """The words after each `ray start` of ray up's files and of the Slurm script."""
    for name in RAY_UP:
        config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
        for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
            if "ray start" in command:
                yield name, shell_words(command.partition("ray start ")[2])
    script = re.sub(r"\\\n\s*", "", (CLUSTER / "slurm" / "cosa-ray.sbatch").read_text())
    for line in re.findall(r'^ *"\$\{on\[@\]\}" \S+ ray start (.*) &$', script, re.MULTILINE):
        yield "slurm", shell_words(line)


STARTS = list(ray_starts())


def test_both_kinds_of_node_are_started_everywhere() -> None:
    assert [name for name, words in STARTS if "--head" in words] == [*RAY_UP, "slurm"]
    assert [name for name, words in STARTS if any(word.startswith("--address=") for word in words)] == [
        *RAY_UP,
        "slurm",
    ]


@pytest.mark.parametrize(("name", "words"), STARTS)
def test_ray_start_knows_every_flag(name: str, words: list[str]) -> None:
    from ray.scripts.scripts import start

    parse(start, "start", words)


def test_a_misspelt_flag_of_ray_is_found() -> None:
    from ray.scripts.scripts import start

    with pytest.raises(Exception, match="No such option"):
        parse(start, "start", [*STARTS[0][1], "--dashbord-host=127.0.0.1"])
    with pytest.raises(Exception, match="not a valid integer"):
        parse(start, "start", ["--head", "--port=many"])


def test_kuberay_starts_ray_with_flags_that_exist() -> None:
    from ray.scripts.scripts import start

    for manifest in manifests():
        if cluster := ray_cluster(manifest):
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                parse(start, "start", [f"--{key}={value}" for key, value in group["rayStartParams"].items()])


def test_other_commands_of_ray_exist() -> None:
    from ray.scripts.scripts import cli

    texts = [path.read_text() for path in files() if path.suffix in (".yaml", ".sbatch")] + [GUIDE.read_text()]
    named = {
        name for text in texts for name in re.findall(r"\bray (up|down|dashboard|stop|health-check|get-\S+)", text)
    }
    assert named == {"up", "down", "dashboard", "stop", "health-check", "get-auth-token"}
    assert named <= set(cli.commands)
    parse(cli.commands["get-auth-token"], "get-auth-token", ["--generate"])
    parse(cli.commands["health-check"], "health-check", ["--address", "127.0.0.1:20000"])
    for verb in ("up", "down", "dashboard"):
        parse(cli.commands[verb], verb, ["cluster/aws.yaml"])


# MLflow.


def servers() -> dict[str, list[str]]:
    """The command of MLflow's server, of Compose and of Kubernetes."""
    compose = documents(CLUSTER / "mlflow" / "compose.yaml")[0]["services"]["mlflow"]["command"]
    kubernetes = pods(manifests())["Deployment/mlflow"]["spec"]["containers"][0]["command"]
    return {"compose": compose, "kubernetes": kubernetes}


@pytest.mark.parametrize(("where", "command"), servers().items())
def test_mlflow_server_knows_every_flag(where: str, command: list[str]) -> None:
    from mlflow.cli import cli

    assert command[:2] == ["mlflow", "server"]
    parse(cli.commands["server"], "server", command[2:])
    flags = {word.partition("=")[0] for word in command[2:]}
    assert "--app-name=basic-auth" in command
    assert {"--serve-artifacts", "--artifacts-destination", "--allowed-hosts", "--backend-store-uri"} <= flags
    # Passwords of a command line are seen by every process of the machine.
    assert not [word for word in command if re.search(r"://[^/@]*:[^/@]*@", word)]


def test_a_misspelt_flag_of_mlflow_is_found() -> None:
    from mlflow.cli import cli

    with pytest.raises(Exception, match="No such option"):
        parse(cli.commands["server"], "server", [*servers()["compose"][2:], "--allow-hosts=localhost"])


# cosa-ray.


def lines() -> Iterator[str]:
    """Every command line of cosa-ray: in heads of files, in the guide's blocks, in the Kubernetes job."""
    yield documents(CLUSTER / "kubernetes" / "rayjob.yaml")[0]["spec"]["entrypoint"]
    for path in files():
        if path.suffix in (".yaml", ".sbatch"):
            comments = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#   ")]
            yield from (line for line in comments if re.match(r"(cosa-ray|sbatch) ", line))
    yield from (line for line in shell_blocks(GUIDE.read_text()) if re.match(r"(cosa-ray|sbatch) ", line))


def words_of(line: str) -> list[str]:
    """The words for cosa-ray of a command line, which may go through the Slurm script."""
    words = shell_words(line)
    return words[next(i for i, word in enumerate(words) if word in ("cosa-ray", "cluster/slurm/cosa-ray.sbatch")) + 1 :]


def taken(words: list[str]) -> None:
    """Parse with the real command line; then find the file it names, and every key it sets."""
    import typer

    from cosa_ray.cli.main import app
    from cosa_ray.config.load import load_config
    from cosa_ray.tuning.sweepfile import load_sweep

    command: Any = typer.main.get_command(app)
    depth = 0
    while hasattr(command, "commands"):
        command = command.commands[words[depth]]
        depth += 1
    parse(command, words[0], words[depth:])
    rest = words[1:] if words[0] == "submit" else words
    if rest[0] in ("train", "tune"):
        values = [value for flag, value in itertools.pairwise(rest) if flag == "--set"]
        (load_config if rest[0] == "train" else load_sweep)(rest[1], values)


LINES = list(dict.fromkeys(lines()))


@pytest.mark.parametrize("line", LINES)
def test_cosa_ray_takes_the_line(line: str) -> None:
    taken(words_of(line))


def test_lines_of_every_place_were_found() -> None:
    assert len(LINES) >= 8
    for start in ("sbatch cluster", "cosa-ray tune", "cosa-ray submit", "cosa-ray data", "sbatch --nodes"):
        assert any(line.startswith(start) for line in LINES), start


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cosa-ray submit train voc --adress http://127.0.0.1:8265", "No such option"),
        ("cosa-ray submit trian voc --address http://127.0.0.1:8265", "trian"),
        ("sbatch cluster/slurm/cosa-ray.sbatch tune sweeps/vok --name x", "vok"),
        ("cosa-ray train voc --name x --set storrage=/mnt/cosa/runs", "storrage"),
    ],
)
def test_a_wrong_line_is_found(line: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        taken(words_of(line))
