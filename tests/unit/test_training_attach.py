"""Going to the cluster that RAY_ADDRESS names: what is wrong with it is one sentence, said at once."""

from __future__ import annotations

import socket

import pytest

from cosa_ray.errors import UserError
from cosa_ray.training.ray_train import check_address, not_attached


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_where_jobs_are_sent_is_no_cluster_to_attach_to(address: str) -> None:
    with pytest.raises(UserError, match=r"is where jobs are sent \(cosa-ray submit\)"):
        check_address(address)


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="no connection"):
        check_address(f"127.0.0.1:{port}")


def test_somebody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
    check_address("auto")


def test_another_version_on_the_cluster() -> None:
    """The message is Ray's own."""
    ray = pytest.importorskip("ray")
    import platform

    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.41.0", "python_version": "3.9.7"}, "here", raise_on_mismatch=True)
    said = not_attached(str(caught.value))
    here = f"Ray {ray.__version__} and Python {platform.python_version()}"
    assert said == (
        f"the cluster runs Ray 2.41.0 and Python 3.9.7, and this side {here}; use the same versions on both."
    )
    assert not_attached("Something\nelse") == "Ray did not attach (Something else)."
