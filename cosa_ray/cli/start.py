"""The command line as a job starts it: is this node's Python able to? Then the command itself.

Nothing but the standard library, in syntax that older Pythons read, so that what is missing can be said.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version

PYTHONS = ((3, 11), (3, 13))
# What pyproject.toml asks for: a copy, because the package is sent without its metadata (a test compares them).
REQUIREMENTS = {
    "torch": ">=2.11",
    "torchvision": ">=0.26",
    "timm": ">=1.0.31",
    "ray": ">=2.60,<2.61",
    "mlflow": ">=3.17,<4",
    "numpy": ">=2.0",
    "pandas": ">=2.2",
    "pyarrow": ">=21",
    "scikit-image": ">=0.25",
    "scikit-learn": ">=1.6",
    "scipy": ">=1.15",
    "pillow": ">=11",
    "pyyaml": ">=6",
    "safetensors": ">=0.5",
    "pycocotools": ">=2.0.8",
    "optuna": ">=4.4",
    "pydantic": ">=2.10",
    "typer": ">=0.20",
    "rich": ">=14",
    "fsspec": ">=2025.9",
    "filelock": ">=3.16",
    "matplotlib": ">=3.10",
    "requests": ">=2.32",
}


def problem() -> str | None:
    """What keeps this Python from running cosa-ray, in one sentence; None when nothing does."""
    where = f"the job's Python, {sys.executable} on {platform.node()},"
    (first, last), this = PYTHONS, sys.version_info
    if not first <= (this.major, this.minor) <= last:
        return (
            f"{where} is {platform.python_version()}, and cosa-ray needs {first[0]}.{first[1]} to {last[0]}.{last[1]}; "
            "name another one of the cluster by --python."
        )
    wrong = [f"{name}{wanted} ({found})" for name, wanted in REQUIREMENTS.items() if (found := _unfit(name, wanted))]
    if wrong:
        return (
            f"{where} lacks {', '.join(wrong)}; install them there, name another Python by --python, or use an image "
            "that holds cosa-ray (docs/cluster.md)."
        )
    return None


def _unfit(name: str, wanted: str) -> str | None:
    """What is there instead of a package of a wanted version; None when it is right."""
    try:
        there = version(name)
    except PackageNotFoundError:
        return "none there"
    for sign, bound in re.findall(r"([<>]=?)([\d.]+)", wanted):
        if (_numbers(there) < _numbers(bound)) == (sign == ">="):
            return f"{there} there"
    return None


def _numbers(text: str) -> list[int]:
    """The release numbers of a version, trailing zeros left out."""
    release = re.match(r"[\d.]+", text)
    numbers = [int(part) for part in (release.group(0) if release else "0").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


if __name__ == "__main__":
    if (sentence := problem()) is not None:
        print(f"cosa-ray: {sentence}", file=sys.stderr)
        sys.exit(2)
    from cosa_ray.cli.main import main

    main()
