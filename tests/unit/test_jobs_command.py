"""What a verb's command line becomes on the cluster: parsed there, it means what it meant here."""

from __future__ import annotations

import inspect
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from cosa_ray.ablation.plan import load_ablation, plan_ablation
from cosa_ray.cli import start
from cosa_ray.cli.main import app
from cosa_ray.errors import UserError
from cosa_ray.jobs.address import Cluster, find_cluster
from cosa_ray.jobs.command import VERBS, Verb, command_for

ROOT = Path(__file__).parents[2]
verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line of the verb makes of the words after `cosa-ray`."""
    return dict(verbs[words[0]].make_context(words[0], list(words[1:])).params)


def job(verb: Verb, **given: Any) -> dict[str, Any]:
    return parsed(command_for(verb, given, "/there", tracked=True).words)


def test_every_verb_has_its_job() -> None:
    assert set(VERBS) == set(verbs["submit"].commands)
    cluster = {"address", "folder", "installed", "python", "detach", "as_json"}
    for name in VERBS:
        mine = {p.name for p in verbs["submit"].commands[name].params if p.name != "help"}
        theirs = {p.name for p in verbs[name].params if p.name != "help"}
        assert mine == (theirs - {"local"}) | cluster, name


def test_an_experiment() -> None:
    there = job("train", file="shapes", set_=["seed=3"], name="a-1", resume=True, no_track=True)
    assert there["file"] == "shapes.yaml"
    assert (there["name"], there["resume"], there["no_track"], there["set_"]) == ("a-1", True, True, ())


def test_a_run_without_a_name_is_given_one_here() -> None:
    started = {
        "train": ("shapes", "shapes-"),
        "tune": ("shapes", "shapes-sweep-"),
        "ablate": ("terms", "terms-ablation-"),
    }
    for verb, (file, start_of_name) in started.items():
        sent = command_for(verb, {"file": file}, "/there", tracked=True)
        assert sent.name is not None
        assert sent.name.startswith(start_of_name)
        assert parsed(sent.words)["name"] == sent.name


def test_an_ablation_means_there_what_it_means_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan, from the files that were sent, against the plan of the command as it was given."""
    given = ["training.steps=900", "concurrency=1"]
    sent = command_for(
        "ablate",
        {"file": "terms", "base": "shapes_coexist", "set_": given, "seeds": 2, "name": "a", "protocol": "release"},
        "/there",
        tracked=True,
    )
    words = parsed(sent.words)
    assert (words["seeds"], words["base"], words["set_"], words["protocol"]) == (2, None, (), "release")
    assert set(sent.files) == {"ablations/terms.yaml", "shapes_coexist.yaml"}
    for name, content in sent.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    theirs, ours = load_ablation(words["file"]), load_ablation("terms", given, "shapes_coexist")
    there, here = (plan_ablation(*each, "a", 2) for each in (theirs, ours))
    assert there.base.data.dataset == "/there/datasets/shapes-coexist"
    assert there.points == here.points
    assert there.sweep.points == here.sweep.points
    assert there.sweep.concurrency == 1
    assert [each.name for each in there.warm_ups] == [each.name for each in here.warm_ups]
    assert there.warm_ups[0].config.training == here.warm_ups[0].config.training


def test_an_ablation_that_is_wrong_is_not_sent() -> None:
    with pytest.raises(UserError, match=r"losses\.nothing"):
        command_for("ablate", {"file": "terms", "set_": ["losses.nothing=1"]}, "/there", tracked=True)


def test_paths_start_at_the_clusters_folder() -> None:
    there = job("evaluate", run="a-1", dataset="datasets/x", checkpoint="last", workers=2, split="val")
    assert (there["run"], there["storage"], there["dataset"]) == ("a-1", "/there/runs", "/there/datasets/x")
    assert (there["checkpoint"], there["workers"], there["split"]) == ("last", 2, "val")
    there = job("predict", model="runs/a-1", images=["a.jpg", "s3://b/c", "~/d", "/e"], overlays=False, scores=True)
    assert there["model"] == "/there/runs/a-1"
    assert there["images"] == ["/there/a.jpg", "s3://b/c", "~/d", "/e"]
    assert (there["out"], there["overlays"], there["scores"]) == ("/there/predictions", False, True)
    there = job("pseudo-labels", model="a-1")
    assert (there["dataset"], there["out"]) == ("/there/datasets/voc", "/there/pseudo-labels")


def test_words_that_look_like_options_stay_words() -> None:
    assert job("predict", model="-x", images=["-y.jpg"])["images"] == ["/there/-y.jpg"]
    assert job("evaluate", run="a", split="-val")["split"] == "-val"


def test_what_is_found_in_mlflow_is_looked_up_there() -> None:
    for verb, key, given in (("predict", "model", "models:/cosa@best"), ("evaluate", "run", "0123456789abcdef" * 2)):
        sent = command_for(verb, {key: given}, "/there", tracked=False)
        assert sent.looks_up
        assert parsed(sent.words)[key] == given
    assert not command_for("evaluate", {"run": "a-1"}, "/there", tracked=False).looks_up


def test_protocols_and_labels_of_this_machine_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.yaml").write_text("scales: [1.0]\n")
    (tmp_path / "l.csv").write_text("a.jpg,cat\n")
    sent = command_for("evaluate", {"run": "a", "protocol": "here/mine.yaml"}, "/there", tracked=True)
    assert sent.files == {"mine.yaml": "scales: [1.0]\n"}
    assert parsed(sent.words)["protocol"] == "mine.yaml"
    assert command_for("evaluate", {"run": "a", "protocol": "release"}, "/there", tracked=True).files == {}
    sent = command_for("promote", {"sweep": "s", "protocol": ["release", "here/mine.yaml"]}, "/there", tracked=True)
    assert parsed(sent.words)["protocol"] == ["release", "mine.yaml"]
    sent = command_for("predict", {"model": "a", "labels": "l.csv", "images": ["x"]}, "/there", tracked=True)
    assert sent.files == {"l.csv": "a.jpg,cat\n"}
    assert job("predict", model="a", labels="else.csv")["labels"] == "/there/else.csv"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    given = []
    for folder, text in (("a", "scales: [1.0]\n"), ("b", "scales: [2.0]\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.yaml").write_text(text)
        given.append(str(tmp_path / folder / "p.yaml"))
    with pytest.raises(UserError, match=r"two files named p\.yaml"):
        command_for("promote", {"sweep": "s", "protocol": given}, "/there", tracked=True)


@pytest.mark.parametrize(
    ("verb", "given", "folder", "sentence"),
    [
        ("train", {"file": "shapes", "resume": True}, "/there", "--resume needs the --name"),
        ("train", {"file": "shapes"}, "there", "absolute folder"),
        ("train", {"file": "shapez"}, "/there", "did you mean shapes"),
        ("evaluate", {"run": "a", "protocol": "relaese"}, "/there", "no protocol relaese"),
        ("promote", {"sweep": "a", "base": "nothing"}, "/there", "no experiment file nothing"),
    ],
)
def test_mistakes_are_found_here(verb: Verb, given: dict[str, Any], folder: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        command_for(verb, given, folder, tracked=True)


def test_which_cluster(tmp_path: Path) -> None:
    file = tmp_path / "cluster" / "current.yaml"
    with pytest.raises(UserError, match="no cluster: give --address"):
        find_cluster(None, {}, tmp_path)
    file.parent.mkdir()
    file.write_text("address: http://c:8265\nfolder: /mnt/c\ninstalled: true\ntoken_path: ~/t\n")
    written = Cluster(address="http://c:8265", folder="/mnt/c", installed=True, token_path="~/t")
    found = find_cluster(None, {}, tmp_path)
    assert (found.cluster, found.origin) == (written, "cluster/current.yaml")
    found = find_cluster(None, {"RAY_ADDRESS": "http://b:8265"}, tmp_path)
    assert (found.cluster, found.origin) == (Cluster(address="http://b:8265"), "RAY_ADDRESS")
    both = {"RAY_ADDRESS": "http://b:8265", "RAY_API_SERVER_ADDRESS": "http://a:8265"}
    assert find_cluster(None, both, tmp_path).origin == "RAY_API_SERVER_ADDRESS"
    found = find_cluster("http://c:8265/", both, tmp_path)
    assert (found.cluster, found.origin) == (written, "--address")
    file.write_text("adress: http://c:8265\n")
    with pytest.raises(UserError, match=r"current\.yaml.*adress.*address"):
        find_cluster(None, {}, tmp_path)


def test_the_jobs_python_is_asked_for_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {
        requirement.split("[")[0] if "[" in requirement else requirement for requirement in project["dependencies"]
    }
    stated = {f"{name}{wanted}" for name, wanted in start.REQUIREMENTS.items() if name != "ray"}
    ray = next(each for each in project["dependencies"] if each.startswith("ray["))
    assert ray.endswith(start.REQUIREMENTS["ray"])
    assert stated | {"ray"} == asked
    assert project["requires-python"] == f">=3.{start.PYTHONS[0][1]},<3.{start.PYTHONS[1][1] + 1}"
    assert start.problem() is None


def test_what_the_jobs_python_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(start.REQUIREMENTS, "mlflow", ">=99")
    monkeypatch.setitem(start.REQUIREMENTS, "nowhere-to-be-found", ">=1")
    monkeypatch.setitem(start.REQUIREMENTS, "rich", "<1")
    said = start.problem()
    assert said is not None
    assert "nowhere-to-be-found>=1 (none there)" in said
    assert "mlflow>=99 (3." in said
    assert "rich<1 (1" in said
    assert "torch" not in said


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "PYTHONS", ((3, 1), (3, 2)))
    said = start.problem()
    assert said is not None
    assert f"is {sys.version.split()[0]}, and cosa-ray needs 3.1 to 3.2" in said


def test_the_start_of_a_job_needs_no_package() -> None:
    """What says that a package is missing must not need one."""
    roots = {
        line.split()[1].split(".")[0]
        for line in inspect.getsource(start).splitlines()
        if line.startswith(("import", "from"))
    }
    assert roots <= {"__future__", *sys.stdlib_module_names}
