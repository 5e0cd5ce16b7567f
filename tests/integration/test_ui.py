"""`cosa-ray ui` as a person meets it: the link, the page in a browser, and nothing left after Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tracking.store import open_store
from cosa_ray.tracking.tracker import open_tracker
from cosa_ray.tracking.ui import Pages, store_to_show

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a store and one finished run in it."""
    place = tmp_path_factory.mktemp("ui")
    settings = Config.model_validate({"tracking": {"uri": f"sqlite:///{place}/mlflow.db"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = open_tracker(open_store(settings, run_name="shapes-in-the-browser", folder=str(place / "runs/x")))
    for step in range(10):
        tracker.log({"train/loss": 1 / (step + 1), "val/miou": step / 10}, step)
    tracker.log_image("val/panel", Image.new("RGB", (300, 200), (90, 120, 200)), 9)
    tracker.finish("FINISHED", 120)
    return place


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    line = [sys.executable, "-m", "cosa_ray.cli.main", "ui", *words]
    return subprocess.Popen(
        line, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def processes_naming(text: str) -> list[int]:
    """Processes whose command line or environment names a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            seen = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in seen and int(place.name) != os.getpid():
            found.append(int(place.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_prints_a_link_that_answers_and_leaves_no_process(folder, number) -> None:
    import urllib.request

    port = free_port()
    process = command(folder, "--port", str(port))
    try:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        runs = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        assert link == f"{runs}&viewStateShareKey=cosa-ray-runs"
        with urllib.request.urlopen(link, timeout=60) as page:
            assert b"MLflow" in page.read()
        # MLflow alone starts ten, most of them for jobs that are never run here.
        assert len(processes_naming(f"{folder}/mlflow.db")) <= 3
        # The store's address may hold a password, and a command line is everybody's to read.
        shown = [(Path("/proc") / str(number) / "cmdline") for number in processes_naming(f"{folder}/mlflow.db")]
        assert not [place for place in shown if b"mlflow.db" in place.read_bytes()]
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
    deadline = time.monotonic() + 10
    while processes_naming(f"{folder}/mlflow.db") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_naming(f"{folder}/mlflow.db") == []


def test_mistakes_are_one_sentence(folder, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = command(folder, "--port", str(port))
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        assert f"port {port} on 127.0.0.1 cannot be used" in said
    process = command(tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.strip() == (
        f"cosa-ray: there is no MLflow store at {tmp_path}/mlflow.db; train a run from this folder first, or give --uri"
    )
    with pytest.raises(UserError, match=r"^--uri has an unknown scheme"):
        store_to_show("htp://x")


def test_a_server_is_only_named(tmp_path) -> None:
    process = command(tmp_path, "--uri", "http://me:secret@tracking.example.org:5000")
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, printed.strip()) == (0, "http://tracking.example.org:5000")
    assert "secret" not in said


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_the_run_is_seen_in_a_browser(folder, tmp_path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--window-size=1400,900")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    uri = f"sqlite:///{folder}/mlflow.db"
    with Pages(uri, port=free_port()) as pages:
        browser = webdriver.Chrome(options, Service(DRIVER))
        try:

            def shows(text: str) -> None:
                WebDriverWait(browser, 180).until(lambda page: text in page.find_element(By.TAG_NAME, "body").text)

            browser.get(pages.link())
            shows("shapes-in-the-browser")
            browser.save_screenshot(str(tmp_path / "experiment.png"))
            browser.find_element(By.PARTIAL_LINK_TEXT, "shapes-in-the-browser").click()
            shows("val/miou")
            browser.save_screenshot(str(tmp_path / "run.png"))
            assert pages.link("no such experiment") == pages.url
        finally:
            browser.quit()


def test_the_assistant_of_mlflow_is_not_served(folder) -> None:
    """It runs shell commands for every user of this machine; the pages answer, and it does not."""
    import requests

    with Pages(f"sqlite:///{folder}/mlflow.db", port=free_port()) as pages:
        session = requests.Session()
        session.trust_env = False
        # The server ends a connection whose body it did not read, and a request on its way there would be lost.
        session.headers["Connection"] = "close"
        assert session.get(f"{pages.url}/ajax-api/3.0/mlflow/server-info", timeout=60).ok
        for method, path in (("GET", "config"), ("PUT", "config"), ("POST", "message"), ("GET", "providers")):
            answer = session.request(
                method, f"{pages.url}/ajax-api/3.0/mlflow/assistant/{path}", json={"message": "x"}, timeout=60
            )
            assert answer.status_code in (404, 405), path
