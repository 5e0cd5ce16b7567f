"""What a command opens on one machine: the dashboard on loopback, and nothing that answers without the token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cosa_ray.training.ray_train import ray_cluster

pytestmark = pytest.mark.ray
# A driver that does not send the token, which Ray must not let in.
STRANGER = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('LET IN', ray.nodes())"

ROOT = Path(__file__).parents[2]


def listening() -> dict[int, str]:
    """Addresses of this process's descendants that wait for connections, by port."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        for each in process.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                found[each.laddr.port] = each.laddr.ip
    return found


def test_a_local_cluster_lets_nobody_in_without_its_token() -> None:
    """In a process of its own: Ray keeps the token that it read first."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_"))}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_alone"]
    ran = subprocess.run(words, env={**clean, "ALONE": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert "1 passed" in ran.stdout, ran.stdout


@pytest.mark.skipif("ALONE" not in os.environ, reason="run by the test above")
def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with ray_cluster():
        import ray

        context: Any = ray.get_runtime_context()
        dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]  # type: ignore[attr-defined]
        port = int(dashboard.rpartition(":")[2])
        assert listening()[port] in ("127.0.0.1", "::1")
        assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0
        token = (home / ".ray/auth_token").read_text()
        job = {"entrypoint": f"touch {tmp_path}/ran"}
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert requests.get(f"http://{dashboard}/api/jobs/", headers=headers, timeout=30).status_code in (401, 403)
            sent = requests.post(f"http://{dashboard}/api/jobs/", json=job, headers=headers, timeout=30)
            assert sent.status_code in (401, 403)
        right = {"Authorization": f"Bearer {token}"}
        assert requests.get(f"http://{dashboard}/api/jobs/", headers=right, timeout=30).status_code == 200
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER, context.gcs_address],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert stranger.returncode != 0
        assert "LET IN" not in stranger.stdout
        assert "uthenticat" in stranger.stderr
        assert token not in stranger.stderr
        for process in psutil.Process().children(recursive=True):
            assert token not in " ".join(process.cmdline()), "command lines are everybody's to read"
    assert not (tmp_path / "ran").exists()
