"""`cosa-ray compare` over two runs that were really trained, and its page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosa_ray.cli.main import main
from cosa_ray.data.dataset import open_dataset
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import scores
from cosa_ray.evaluation.report import Report
from cosa_ray.reporting.compare import compare_runs
from cosa_ray.training.driver import train
from cosa_ray.training.evaluating import draw_images, evaluate_run
from cosa_ray.training.runs import find_run
from tests.conftest import history, tiny_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
# Sorts every table by every column both ways; returns the columns and how many are out of order or lost rows.
_SORT = """
let columns = 0, wrong = 0;
for (const table of document.querySelectorAll("table.sortable")) {
  const count = table.tBodies[0].rows.length;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    columns += 1;
    for (const _ of [1, 2]) {
      head.querySelector("button").click();
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.v);
      const known = cells.filter((value) => value !== "");
      const numeric = known.every((value) => !Number.isNaN(Number(value)));
      const sign = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
      const ordered = known.every((value, i) => i === 0 || sign * (numeric
        ? Number(known[i - 1]) - Number(value) : known[i - 1].localeCompare(value)) <= 0);
      const emptyLast = cells.slice(known.length).every((value) => value === "");
      if (!ordered || !emptyLast || cells.length !== count) wrong += 1;
    }
  });
}
return [columns, wrong];
"""


@pytest.fixture(scope="module")
def folder(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with two finished and evaluated runs, a seed apart and with other weights of a loss."""
    place = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, changes in (("plain", {}), ("pulled", {"losses__contrastive": 0.5, "optimiser__lr": 2e-3})):
            assert train(tiny_config(tiny_dataset, place, **changes), name=name, local=True).state == "finished"
            evaluate_run(name, storage=str(place / "runs"), protocol="single_scale", local=True)
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The page of the comparison, and what the command printed with it."""
    out = folder / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(SystemExit) as ended:
            main(["compare", "plain", "pulled", "--protocol", "single_scale", "--html", str(out)])
    assert ended.value.code == 0
    found = compare_runs(["plain", "pulled"], storage=str(folder / "runs"), protocol="single_scale")
    return out, found.as_json()


def test_the_numbers_are_those_of_the_evaluations(folder: Path, page: tuple[Path, dict[str, Any]]) -> None:
    _, found = page
    results = [
        json.loads(next((folder / "runs" / name).glob("evaluations/*/*/result.json")).read_text())
        for name in ("plain", "pulled")
    ]
    for row in found["metrics"]:
        if row["source"] == "evaluation":
            assert row["values"] == [result["metrics"].get(row["name"]) for result in results]
    ious = [[row["iou"] for row in result["per_class"]["miou"]] for result in results]
    for row, first, second in zip(found["per_class"], *ious, strict=True):
        assert row["values"] == [first, second]
    assert {row["key"] for row in found["config"]} == {"losses.contrastive", "optimiser.lr"}
    (verdict,) = found["verdicts"]
    assert verdict["interval"][0] <= verdict["difference"] <= verdict["interval"][1]
    assert verdict["images"] == 11
    for side in found["sides"]:
        (run,) = side["runs"]
        assert run["hours"] > 0
        assert run["wall_seconds"] > 0
        assert len(run["mlflow_run_id"]) == 32


def test_an_mlflow_filter_names_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    both = compare_runs(["mlflow:params.seed = '0'"])
    assert [side["name"] for side in both.sides] == ["plain", "pulled"], "by start time"
    first = compare_runs(["pulled", 'mlflow:params."seed" = "0"'], storage=str(folder / "runs"))
    assert [side["name"] for side in first.sides] == ["pulled", "plain"], "a run named before is not there twice"
    with pytest.raises(UserError, match="does not answer this filter"):
        compare_runs(["mlflow:seed is 1"])
    with pytest.raises(UserError, match="finds no run"):
        compare_runs(["mlflow:params.seed = '7'"])
    monkeypatch.chdir(folder / "runs")
    with pytest.raises(UserError, match="there is no MLflow store"):
        compare_runs(["mlflow:params.seed = '0'"])


@pytest.mark.parametrize("metric", ["miou", "miou_online", "miou_labels_given"])
def test_pictures_are_what_was_evaluated(folder: Path, tiny_dataset: str, metric: str) -> None:
    run = find_run("pulled", str(folder / "runs"))
    place = next(Path(run.folder.path).glob("evaluations/*/*"))
    report = Report(**json.loads((place / "result.json").read_text()))
    ids = open_dataset(tiny_dataset).split("val").ids()
    tiles = draw_images(run, report, ids, metric)
    matrix = np.zeros((256, 256), np.int64)
    for name in ids:
        np.add.at(matrix, (tiles[name].truth, tiles[name].segmentation), 1)
    classes = len(report.per_class[metric])
    assert scores(matrix[:classes, :classes]).miou == pytest.approx(report.metrics[f"val/single_scale/{metric}"])
    with pytest.raises(UserError, match="no longer has the image nobody"):
        draw_images(run, report, ["nobody"], metric)


def test_curves_are_mlflows(folder: Path, page: tuple[Path, dict[str, Any]]) -> None:
    text = page[0].read_text()
    charts = {
        name: json.loads(unescape(data))["lines"]
        for name, data in re.findall(r'aria-label="([^"]+)" data-chart="([^"]+)"', text)
    }
    assert {"train/loss", "val/miou", "threshold/background"} <= set(charts)
    run_id = find_run("pulled", str(folder / "runs")).record.mlflow_run_id
    for name in ("train/loss", "threshold/background"):
        expected = history(f"sqlite:///{folder}/mlflow.db", run_id, name)
        assert [step for step, _ in charts[name]["B"]] == [step for step, _ in expected]
        np.testing.assert_allclose([v for _, v in charts[name]["B"]], [v for _, v in expected], rtol=1e-5)


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_the_page_in_a_browser(page: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(DRIVER))

    def look(width: int, scheme: str) -> np.ndarray:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "the page itself never scrolls sideways"
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
        (tmp_path / f"{width}-{scheme}.png").write_bytes(base64.b64decode(shot))
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("L"), float)

    try:
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
        )
        browser.get("about:blank")
        browser.get_log("performance")  # of the browser's own first page
        browser.get(page[0].as_uri())
        sections = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "section h2")]
        assert sections[0] == "Verdict"
        assert {"Settings that differ", "Metrics", "Classes", "Curves", "Thresholds", "Confusion"} <= set(sections)

        look(400, "light")
        light, dark = look(1400, "light"), look(1400, "dark")
        assert light.mean() > 180 > 80 > dark.mean()
        assert min(light.std(), dark.std()) > 10, "not blank"

        table = browser.find_element(By.CSS_SELECTOR, "#classes table")

        def shown() -> list[float]:
            cells = table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(4)")
            return [float(value) for cell in cells if (value := cell.get_attribute("data-v"))]

        before = shown()
        head = table.find_elements(By.CSS_SELECTOR, "th")[3]
        button = head.find_element(By.TAG_NAME, "button")
        button.click()
        assert shown() == sorted(before, reverse=True) != before
        assert head.get_attribute("aria-sort") == "descending"
        button.send_keys(Keys.ENTER)
        assert shown() == sorted(before)
        assert head.get_attribute("aria-sort") == "ascending"

        columns, wrong = browser.execute_script(_SORT)
        assert columns > 20
        assert wrong == 0

        chart = browser.find_element(By.CSS_SELECTOR, "#curves .chart")
        browser.execute_script("arguments[0].focus()", chart)
        readout = chart.find_element(By.CLASS_NAME, "readout")
        last = readout.text
        assert last.startswith("step 20")
        chart.send_keys(Keys.ARROW_LEFT)
        assert readout.text.startswith("step")
        assert readout.text != last

        images = browser.find_elements(By.CSS_SELECTOR, "#images img")
        assert len(images) in range(4, 25)
        assert all(browser.execute_script("return arguments[0].naturalWidth", image) > 0 for image in images)

        assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        addresses = [
            each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"
        ]
        assert page[0].as_uri() in addresses
        assert [url for url in addresses if not url.startswith(("data:", page[0].as_uri()))] == []
    finally:
        browser.quit()
