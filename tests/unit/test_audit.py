"""The audit of the pinned dependencies, with a pip-audit that says what it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SAFE: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
WEAK: dict[str, Any] = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN: dict[str, Any] = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}
AWAY = "ERROR:pip_audit._cli:Could not connect\\nERROR:pip_audit._cli:Tip: your network may be blocking this service."


def audit(folder: Path, printed: str, error: str, code: int) -> tuple[int, str]:
    """Exit code and words of the audit, where pip-audit prints this."""
    fake = folder / "pip-audit"
    fake.write_text(
        f"#!{sys.executable}\nimport sys\nprint({printed!r})\nprint('{error}', file=sys.stderr)\nsys.exit({code})\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/audit"), "--ignore-vuln", "X"],
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("packages", "error", "ends", "code", "said"),
    [
        ([SAFE, UNKNOWN], "", 0, 0, "audit: 1 packages, 0 known vulnerabilities; 1 packages not known there"),
        ([SAFE, WEAK], "Found 1", 1, 1, "audit: b 2: PYSEC-1, mended in 3\naudit: 2 packages, 1 known"),
        ([UNKNOWN], "", 0, 0, "NOTHING WAS AUDITED: the vulnerability service knows none of the 1 packages"),
        (None, AWAY, 1, 0, "NOTHING WAS AUDITED: the vulnerability service cannot be reached"),
        (None, "unrecognised arguments", 2, 2, "pip-audit failed: unrecognised arguments"),
        (None, "", 0, 1, "pip-audit failed"),
    ],
    ids=["nothing known", "a vulnerability", "a service that knows nothing", "no service", "a mistake", "no answer"],
)
def test_what_the_audit_says(
    packages: list[dict[str, Any]] | None, error: str, ends: int, code: int, said: str, tmp_path: Path
) -> None:
    printed = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    found, words = audit(tmp_path, printed, error, ends)
    assert said in words
    assert found == code


def test_without_pip_audit_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/audit")], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "audit: pip-audit is not installed: run make install\n")


def test_continuous_integration_audits() -> None:
    assert "\nmake audit\n" in (ROOT / ".ci/run").read_text()
    assert ".ci/audit" in (ROOT / "Makefile").read_text()
    assert "pip-audit==" in (ROOT / "constraints.txt").read_text()
