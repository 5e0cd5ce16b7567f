"""The Kubernetes manifests: against KubeRay's and Kubernetes' schemas, and what refers to what."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import outside
from tests.unit.cluster_files import CLUSTER, GUIDE, documents, manifests, pods, ray_cluster

Object = dict[str, Any]
FOLDER = CLUSTER / "kubernetes"
OWN = [each for each in manifests() if not each["apiVersion"].startswith("ray.io/")]
RAY = [each for each in manifests() if each["apiVersion"].startswith("ray.io/")]


def title(manifest: Object) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def closed(schema: Any) -> Any:
    """The same schema, in which a key that it does not name is an error, as it is to kubectl."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(each) for key, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


@functools.cache
def schemas(folder: Path) -> dict[str, Any]:
    found = {}
    for kind in ("rayclusters", "rayjobs"):
        text = (folder / "kuberay" / f"ray.io_{kind}.yaml").read_text()
        spec = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
        version = next(each for each in spec["versions"] if each["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[spec["names"]["kind"]] = schema
    return found


def faults(manifest: Object) -> list[str]:
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schemas(outside("COSA_SCHEMAS", "schemas"))[manifest["kind"]])
    return [f"{'/'.join(map(str, each.absolute_path))}: {each.message}" for each in validator.iter_errors(manifest)]


@pytest.mark.parametrize("manifest", RAY, ids=title)
def test_kuberay_takes_its_objects(manifest: Object) -> None:
    assert faults(manifest) == []


@pytest.mark.parametrize("manifest", RAY, ids=title)
def test_a_misspelt_key_deep_inside_is_found(manifest: Object) -> None:
    broken = copy.deepcopy(manifest)
    cluster = ray_cluster(broken)
    assert cluster
    cluster["authOption"] = cluster.pop("authOptions")
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContexts"] = {}
    cluster["workerGroupSpecs"][0]["maxReplicas"] = "four"
    text = "\n".join(faults(broken))
    assert "'authOption' was unexpected" in text
    assert "'securityContexts' was unexpected" in text
    assert "'four' is not of type 'integer'" in text


@pytest.mark.parametrize("manifest", OWN, ids=title)
def test_kubernetes_takes_the_others(manifest: Object) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_a_misspelt_key_of_kubernetes_is_found() -> None:
    import kubernetes_validate

    broken = copy.deepcopy(next(each for each in OWN if each["kind"] == "Deployment"))
    broken["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="'container' was unexpected"):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_the_kustomization_names_every_file_but_the_job() -> None:
    kustomization = documents(FOLDER / "kustomization.yaml")[0]
    others = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml", "rayjob.yaml"}
    assert set(kustomization["resources"]) == others
    job = documents(FOLDER / "rayjob.yaml")[0]
    assert job["metadata"]["namespace"] == kustomization["namespace"]


def test_the_job_has_the_same_pods_as_the_cluster() -> None:
    clusters = []
    for manifest in RAY:
        cluster = copy.deepcopy(ray_cluster(manifest))
        assert cluster
        group = cluster["workerGroupSpecs"][0]
        assert 1 <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        clusters.append({**cluster, "workerGroupSpecs": [{**group, "minReplicas": 0, "replicas": 0}]})
    assert len(clusters) == 2
    assert clusters[0] == clusters[1]


def test_ray_is_ours_wants_its_token_and_scales() -> None:
    pins = dict(line.split("==") for line in (CLUSTER.parent / "constraints.txt").read_text().split() if "==" in line)
    for manifest in RAY:
        cluster = ray_cluster(manifest)
        assert cluster
        assert cluster["rayVersion"] == pins["ray"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "cosa-ray-token"}
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for container in cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]:
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"]


def weaknesses(template: Object, role: str) -> list[str]:
    """What a pod may that it need not."""
    spec, found = template["spec"], []
    if spec["securityContext"].get("runAsNonRoot") is not True or not spec["securityContext"].get("runAsUser"):
        found.append("root")
    # The head's autoscaler talks to Kubernetes; nobody else has to.
    if role != "head" and spec.get("automountServiceAccountToken") is not False:
        found.append("has a token of Kubernetes")
    for container in spec["containers"]:
        context, resources = container["securityContext"], container["resources"]
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
        if not (resources["requests"].keys() >= {"cpu", "memory"} and "memory" in resources["limits"]):
            found.append("resources")
        if "@sha256:" not in container["image"]:
            found.append("image is not pinned")
    return found


PODS = pods(manifests())


@pytest.mark.parametrize("name", PODS)
def test_pods_have_no_more_than_they_need(name: str) -> None:
    assert weaknesses(PODS[name], name.rpartition("/")[2]) == []


@pytest.mark.parametrize(
    ("path", "value", "weakness"),
    [
        (("securityContext", "runAsNonRoot"), False, "root"),
        (("automountServiceAccountToken",), True, "token"),
        (("containers", 0, "securityContext", "capabilities"), {"add": ["SYS_ADMIN"]}, "capabilities"),
        (("containers", 0, "resources", "limits"), {}, "resources"),
        (("containers", 0, "image"), "postgres:latest", "pinned"),
    ],
)
def test_each_weakness_is_found(path: tuple[Any, ...], value: Any, weakness: str) -> None:
    template = copy.deepcopy(PODS["Deployment/mlflow"])
    inside = functools.reduce(lambda each, key: each[key], path[:-1], template["spec"])
    inside[path[-1]] = value
    assert any(weakness in each for each in weaknesses(template, "mlflow"))


@pytest.mark.parametrize("name", ["Deployment/mlflow", "StatefulSet/postgres"])
def test_probes_ask_the_port_that_is_open(name: str) -> None:
    container = PODS[name]["spec"]["containers"][0]
    ports = {each["name"] for each in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind].get("httpGet", {"port": next(iter(ports))})["port"] in ports


# Policies. Labels of pods that we make, of pods of users, and of pods that must stay outside.
COMPONENT = "app.kubernetes.io/component"
CLIENT, STRANGER = {"cosa-ray/client": "yes"}, {"app": "anything"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def labels(name: str, among: dict[str, Object]) -> dict[str, str]:
    found: dict[str, str] = among[name]["metadata"]["labels"]
    return found


def matches(selector: Object, given: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= given.items()


def reaches(
    policies: list[Object], source: dict[str, str], target: dict[str, str], port: int, namespace: str = "cosa-ray"
) -> bool:
    """True when policies let a pod with these labels, of that namespace, connect to a port of a pod of ours."""
    about = [each["spec"] for each in policies if matches(each["spec"]["podSelector"], target)]
    if not about:
        return True

    def peer(each: Object) -> bool:
        if "namespaceSelector" in each:
            here = matches(each["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        else:
            here = namespace == "cosa-ray"
        return here and matches(each.get("podSelector", {}), source)

    return any(
        any(peer(each) for each in rule["from"])
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for spec in about
        for rule in spec.get("ingress", [])
    )


def wrong_connections(policies: list[Object], among: dict[str, Object]) -> list[str]:
    """Every connection that policies forbid and Ray or MLflow need, or allow and nobody needs."""
    cluster, job = "RayCluster/cosa-ray", "RayJob/voc-weights"
    mlflow, postgres = labels("Deployment/mlflow", among), labels("StatefulSet/postgres", among)
    submitter = labels(f"{job}/submitter", among)
    wrong = []

    def check(wanted: bool, name: str, source: dict[str, str], target: dict[str, str], port: int, at: str = "") -> None:
        if reaches(policies, source, target, port, at or "cosa-ray") is not wanted:
            wrong.append(f"{name} {port}: {'refused' if wanted else 'allowed'}")

    for where in (cluster, job):
        head, worker = labels(f"{where}/head", among), labels(f"{where}/gpu", among)
        for port in (6379, 8265, 10001, 11111):
            check(True, "worker to head", worker, head, port)
            check(True, "head to worker", head, worker, port)
            check(False, "stranger to head", STRANGER, head, port)
            check(False, "stranger to worker", STRANGER, worker, port)
            check(False, "mlflow to head", mlflow, head, port)
            check(port == 8265, "client to head", CLIENT, head, port)
            check(port == 8265, "submitter to head", submitter, head, port)
            check(port == 8265, "operator to head", OPERATOR, head, port, "kuberay")
            check(False, "false operator to head", OPERATOR, head, port, "elsewhere")
            check(False, "client elsewhere to head", CLIENT, head, port, "elsewhere")
        for pod in (head, worker):
            check(True, "ray to mlflow", pod, mlflow, 5000)
            check(False, "ray to postgres", pod, postgres, 5432)
    check(True, "client to mlflow", CLIENT, mlflow, 5000)
    check(False, "stranger to mlflow", STRANGER, mlflow, 5000)
    check(False, "submitter to mlflow", submitter, mlflow, 5000)
    check(True, "mlflow to postgres", mlflow, postgres, 5432)
    check(False, "mlflow to postgres elsewhere", mlflow, postgres, 5432, "elsewhere")
    check(False, "client to postgres", CLIENT, postgres, 5432)
    check(False, "stranger to any pod", STRANGER, {"app": "new"}, 80)
    return wrong


POLICIES = [each for each in OWN if each["kind"] == "NetworkPolicy"]


def test_policies_let_through_what_is_needed_and_nothing_else() -> None:
    assert wrong_connections(POLICIES, PODS) == []
    assert all("Ingress" in each["spec"]["policyTypes"] for each in POLICIES)


def test_each_defect_of_policies_is_found() -> None:
    assert any("allowed" in each for each in wrong_connections([], PODS))
    assert any("stranger to any pod" in each for each in wrong_connections(POLICIES[1:], PODS))

    def broken(policy: str, change: Any) -> list[str]:
        policies = copy.deepcopy(POLICIES)
        change(next(each["spec"] for each in policies if each["metadata"]["name"] == policy))
        return wrong_connections(policies, PODS)

    assert "client to head 6379: allowed" in broken("ray", lambda spec: spec["ingress"][1].pop("ports"))
    assert "false operator to head 8265: allowed" in broken(
        "ray", lambda spec: spec["ingress"][1]["from"][2]["namespaceSelector"].clear()
    )
    assert "ray to mlflow 5000: refused" in broken("mlflow", lambda spec: spec["ingress"][0]["from"].pop(0))
    assert "ray to postgres 5432: allowed" in broken(
        "postgres", lambda spec: spec["ingress"][0]["from"].append({"podSelector": {}})
    )
    relabelled = copy.deepcopy(PODS)
    labels("RayCluster/cosa-ray/gpu", relabelled)[COMPONENT] = "worker"
    assert "worker to head 6379: refused" in wrong_connections(POLICIES, relabelled)


def missing(objects: list[Object]) -> list[str]:
    """References of objects to others that are not there: services, claims, accounts, budgets, selectors."""
    templates = pods(objects)
    found = []
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            behind = [
                pod
                for pod in templates.values()
                if matches({"matchLabels": spec["selector"]}, pod["metadata"]["labels"])
            ]
            ports = {port["containerPort"] for pod in behind for port in pod["spec"]["containers"][0]["ports"]}
            if len(behind) != 1 or {port["port"] for port in spec["ports"]} != ports:
                found.append(f"pods of {title(each)}")
        if each["kind"] == "PodDisruptionBudget" and not any(
            matches(spec["selector"], pod["metadata"]["labels"]) for pod in templates.values()
        ):
            found.append(f"pods of {title(each)}")
        if each["kind"] in ("Deployment", "StatefulSet") and not matches(
            spec["selector"], spec["template"]["metadata"]["labels"]
        ):
            found.append(f"own pods of {title(each)}")
    named = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for name, pod in templates.items():
        account = pod["spec"].get("serviceAccountName")
        if account and ("ServiceAccount", account) not in named:
            found.append(f"account of {name}")
        for volume in pod["spec"].get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in named:
                found.append(f"claim of {name}")
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])} | {"data"}
        for container in pod["spec"]["containers"]:
            found += [f"volume of {name}" for each in container.get("volumeMounts", []) if each["name"] not in volumes]
    return found


def test_what_is_referred_to_is_there() -> None:
    assert missing(manifests()) == []


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("ServiceAccount", "account of"), ("PersistentVolumeClaim", "claim of"), ("Deployment", "pods of Service-mlflow")],
)
def test_a_missing_object_is_found(kind: str, problem: str) -> None:
    assert any(problem in each for each in missing([each for each in manifests() if each["kind"] != kind]))


def secrets(value: Any) -> set[tuple[str, str]]:
    """Every (secret, key) that something refers to; `auth_token` is the key that KubeRay reads."""
    if isinstance(value, list):
        return set().union(*map(secrets, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(secrets, value.values()))
    if isinstance(value.get("secretKeyRef"), dict):
        found.add((value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]))
    if "secretName" in value:
        found.add((value["secretName"], "auth_token"))
    return found


def test_the_guide_makes_every_secret_and_no_other() -> None:
    """Secrets are made by commands of docs/cluster.md; no value is in any file."""
    guide = re.sub(r"\\\n\s*", "", GUIDE.read_text())
    made = set()
    for name, words in re.findall(r"create secret generic (\S+)(.*)", guide):
        made |= {(name, key) for key in re.findall(r"--from-file=([\w.-]+)=", words)}
    used = secrets(manifests())
    assert used == {each for each in made if each[0] != "mlflow-bucket"}
    assert ("mlflow-bucket", "AWS_SECRET_ACCESS_KEY") in made
    assert ("mlflow-server", "admin-password") in used
    assert not [each for each in manifests() if each["kind"] == "Secret"]
