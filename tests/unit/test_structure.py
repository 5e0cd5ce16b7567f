"""The shape of the house: imports go down, start-up is light, and no file names this or that machine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "cosa_ray"
FLOORS = [
    "errors",
    "config",
    "data",
    "method",
    "evaluation",
    "tracking",
    "training",
    "tuning",
    "reporting",
    "ablation",
    "jobs",
    "cli",
]
# What must stay unimported until a verb runs.
HEAVY = ["torch", "ray", "mlflow", "numpy", "pyarrow", "timm", "pandas"]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    floor = FLOORS.index(parts[0])
    for name in imported(file):
        words = name.split(".")
        if words[0] == "cosa_ray" and len(words) > 1 and words[1] in FLOORS:
            assert FLOORS.index(words[1]) <= floor, f"{'/'.join(parts)} is below {name}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "method").glob("*.py")), ids=lambda path: path.name)
def test_method_is_pure_torch(file: Path) -> None:
    roots = {name.split(".")[0] for name in imported(file)}
    assert not roots & {"ray", "mlflow", "pathlib", "os", "io", "pyarrow", "fsspec"}


def test_no_file_is_too_long() -> None:
    long = {str(f.relative_to(ROOT)): n for f in modules() if (n := len(f.read_text().splitlines())) > 400}
    assert not long


def test_every_public_name_is_documented() -> None:
    bare = []
    for file in modules():
        for node in ast.parse(file.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{file.relative_to(PACKAGE)}:{node.name}")
        if file.stat().st_size:
            assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"
    assert not bare


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "import", "--help"], ["tune", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys, json\n"
        "from cosa_ray.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_package_imports_lightly_and_names_its_verbs() -> None:
    script = (
        "import sys, json, cosa_ray\n"
        f"light = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "print(json.dumps([light, [callable(getattr(cosa_ray, n)) for n in cosa_ray.__all__ if n != '__version__']]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    light, callables = json.loads(done.stdout.splitlines()[-1])
    assert light == []
    assert callables
    assert all(callables)


def test_worker_floors_import_without_ray_and_mlflow() -> None:
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'mlflow', 'optuna', 'matplotlib', 'pycocotools'):\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import cosa_ray.training.driver, cosa_ray.training.evaluating, cosa_ray.data.importing\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_every_package_imported_is_declared() -> None:
    """What only happens to be installed on one machine is missing on the next."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=~! ;]", requirement)[0].lower().replace("-", "_") for requirement in requirements}

    inside = {*sys.stdlib_module_names, "cosa_ray", "tests"}
    inside |= {file.stem for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    known = {
        "yaml": "pyyaml",
        "PIL": "pillow",
        "skimage": "scikit_image",
        "sklearn": "scikit_learn",
        "pydensecrf": "pydensecrf2",
        "xdist": "pytest_xdist",
        "psycopg2": "psycopg2_binary",
    }
    for folder, declared in (
        ("cosa_ray", names(project["dependencies"] + extras)),
        ("benchmarks", names(project["dependencies"] + extras)),
        ("tests", names(project["dependencies"] + extras)),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in imported(file)} - inside
            missing = {root for root in roots if known.get(root, root).lower() not in declared}
            assert not missing, f"{file}: {missing} are not in pyproject.toml"
