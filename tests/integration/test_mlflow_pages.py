"""MLflow's own pages on a store of ours, as somebody who has configured nothing sees them in a browser."""

from __future__ import annotations

import io
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.tracking.store import Store, open_store
from cosa_ray.tracking.tracker import open_tracker
from cosa_ray.tracking.ui import Pages
from cosa_ray.tracking.views import sweep_view
from cosa_ray.training.models import register_run
from tests.conftest import tiny_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
SECONDS = 120.0  # for a page on a busy machine
SETTINGS = ("losses.cam_to_seg", "losses.contrastive")
TRIALS = {"001": (0.05, 0.10, 0.41), "002": (0.10, 0.30, 0.62), "003": (0.20, 0.20, 0.55), "004": (0.40, 0.05, 0.30)}
ROW = ".ag-row[row-index]"
EXPANDER = 'button[data-component-id*="runnamecellrenderer"]'

# In the page, not element by element: a table has hundreds.
_DISPLAYED = """
const displayed = (selector, text) => [...document.querySelectorAll(selector)].filter(each =>
  each.getClientRects().length && (text === null || each.textContent.trim() === text));
"""


def log_sweep(config: Config, folder: Path) -> None:
    """A sweep of four trials, by the calls that sweeps and runs make."""
    tags = {"cosa_ray.kind": "sweep", "cosa_ray.sweep": "night"}
    parent = open_tracker(open_store(config, run_name="night", folder=str(folder / "night"), tags=tags))
    parent.offer_view(sweep_view("night", {"val/miou": "max"}, SETTINGS, steps=20))
    parent.log({"val/miou": 0.62}, 80)
    assert parent.flush(120)
    for number, (*values, miou) in TRIALS.items():
        name = f"night-{number}"
        tags = {"cosa_ray.kind": "trial", "cosa_ray.sweep": "night", "cosa_ray.trial": number}
        changed = apply_overrides(config, dict(zip(SETTINGS, values, strict=True)))
        place = str(folder / name)
        trial = open_tracker(open_store(changed, run_name=name, folder=place, parent_run_id=parent.run_id, tags=tags))
        for step in (10, 20):
            trial.log({"train/loss": 1 / step, "threshold/background": 0.4, "cost/cpu_hours": step / 1000}, step)
            trial.log({"val/miou": miou * step / 20, "val/miou_labels_given": miou, "val/cam_miou_best": 0.5}, step)
            trial.log_image("val/panel", Image.new("RGB", (60, 40), (step * 10, 0, 0)), step)
        trial.finish("FINISHED", 120)
    parent.finish("FINISHED", 120)


@pytest.fixture(scope="module")
def store(trained_run: Path, tiny_dataset: str) -> Store:
    """A trained run, registered, and a sweep beside it."""
    folder = trained_run.parent.parent
    config = tiny_config(tiny_dataset, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        log_sweep(config, folder / "runs")
        register_run(str(trained_run), name="shapes model", aliases=["best"])
    return Store(config.tracking.uri or "", config.tracking.experiment)


@pytest.fixture(scope="module")
def pages(store: Store) -> Iterator[Pages]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with Pages(store.uri, port=port) as served:
        yield served


class Browser:
    """What a person does: open, look, click; every look waits until it is there."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # pages that differ after the # alone are not loaded anew
        self.driver.get(address if "://" in address else f"{self.url}/#/{address}")

    def until(self, what: Callable[[], Any], why: str) -> Any:
        """What a look returns once it is true; looking again where the page changed meanwhile."""
        from selenium.common.exceptions import WebDriverException

        # IndexError: nothing of the kind is displayed yet.
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if found := what():
                    return found
            except (WebDriverException, IndexError):
                pass
            time.sleep(0.1)
        raise AssertionError(f"{why} on {self.driver.current_url}:\n{self.text()}")

    def all(self, selector: str, text: str | None = None) -> list[Any]:
        """What is displayed of a CSS selector, with exactly this text."""
        return self.driver.execute_script(_DISPLAYED + "return displayed(arguments[0], arguments[1])", selector, text)

    def find(self, selector: str, text: str | None = None) -> Any:
        return self.until(lambda: next(iter(self.all(selector, text)), None), f"no {selector} {text or ''}")

    def click(self, selector: str, text: str | None = None) -> None:
        self.until(lambda: self.all(selector, text)[0].click() or True, f"{selector} {text or ''} takes no click")

    def text(self, selector: str = "body") -> str:
        script = "return displayed(arguments[0], null).map(each => each.innerText).join('\\n')"
        return self.driver.execute_script(_DISPLAYED + script, selector)

    def sees(self, *texts: str, inside: str = "body") -> None:
        for text in texts:
            self.until(lambda text=text: text in self.text(inside), f"{text!r} is not seen")

    def rows(self) -> list[dict[str, str]]:
        """The run table from top to bottom, by column."""
        cells = self.driver.execute_script(
            f"return [...document.querySelectorAll('{ROW} [role=gridcell]')].map(cell => [Number(cell.closest("
            "'[role=row]').getAttribute('row-index')), cell.getAttribute('col-id'), cell.innerText])"
        )
        found: dict[int, dict[str, str]] = {}
        for index, column, text in cells:
            found.setdefault(index, {})[column] = text.strip()
        return [found[index] for index in sorted(found)]

    def names(self) -> list[str]:
        return [row["attributes.`Run Name`"].splitlines()[-1] for row in self.rows()]

    def settle(self, names: list[str]) -> list[dict[str, str]]:
        """The rows once the table shows these runs in this order."""
        self.until(lambda: self.names() == names, f"the table does not show {names}")
        return self.rows()


@pytest.fixture(scope="module")
def browser(pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--window-size=2400,900")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield Browser(driver, pages.url)
    finally:
        driver.quit()


def test_the_assistant_that_mlflow_opens_stays_away_once_closed(browser: Browser, pages: Pages) -> None:
    close = '[data-component-id="mlflow.assistant.chat_panel.close"]'
    browser.open(pages.link())
    browser.find(ROW)
    browser.click(close)
    browser.open(pages.link())
    browser.find(ROW)
    browser.find('[data-assistant-ui="true"]')  # the button that would open it
    assert browser.all(close) == []


def test_a_parent_expands_to_its_children_and_the_columns_need_no_configuration(browser: Browser, pages: Pages) -> None:
    browser.open(pages.link())
    browser.sees("cosa-ray: runs and sweeps", "prepared columns and charts")
    folded = browser.settle(["night", "trained"])
    assert {"val/miou", "val/miou_labels_given", "val/cam_miou_best", "cost/cpu_hours", "cosa_ray.kind", "Dataset"} <= {
        column.split("`")[1] for column in folded[0] if "`" in column
    }
    assert "cost/gpu_hours" not in "".join(folded[0]), "columns that no run fills are left out"
    assert [row["tags.`cosa_ray.kind`"] for row in folded] == ["sweep", "run"]
    assert folded[1]["attributes.`Models`"].split() == ["shapes", "model", "v1"]
    assert folded[1]["duration"].endswith("s")
    browser.click(EXPANDER)
    rows = browser.settle(["night", *(f"night-{number}" for number in reversed(TRIALS)), "trained"])
    for number, row in zip(reversed(TRIALS), rows[1:], strict=False):
        assert float(row["metrics.`val/miou`"]) == TRIALS[number][2]
        assert float(row["params.`losses.cam_to_seg`"]) == TRIALS[number][0]
        assert row["attributes.`Dataset`"].startswith("shapes/train")
    browser.click(EXPANDER)
    browser.settle(["night", "trained"])


def test_the_views_are_in_the_menu_and_a_sweeps_shows_its_trials_best_first(browser: Browser, pages: Pages) -> None:
    browser.open(pages.link())
    browser.find(ROW)
    browser.click("[data-testid=saved-views-trigger]")
    browser.sees("cosa-ray: best val/miou first", "sweep night", inside="[role=menu]")
    browser.click("[role=menu] *", "sweep night")
    rows = browser.settle([f"night-{number}" for number in ("002", "003", "001", "004")])
    for name, place in zip(SETTINGS, (0, 1), strict=True):
        assert [float(row[f"params.`{name}`"]) for row in rows] == [
            TRIALS[number][place] for number in ("002", "003", "001", "004")
        ]
    browser.open(pages.link().replace("cosa-ray-runs", "cosa-ray-best"))
    browser.until(lambda: len(browser.rows()) == len(TRIALS) + 2, "a run is missing")
    scores = [float(row["metrics.`val/miou`"]) for row in browser.rows()]
    assert scores == sorted(scores, reverse=True)


def card(browser: Browser, title: str) -> Any:
    """A chart by its title."""
    selector = '[data-testid="experiment-view-compare-runs-card"]'
    return browser.until(
        lambda: next((each for each in browser.all(selector) if each.text.startswith(title)), None), f"no card {title}"
    )


def pictures(card: Any) -> list[str]:
    """Addresses of the pictures that a card shows, once they are loaded."""
    found = card.find_elements("css selector", "img")
    return [each.get_attribute("src") for each in found if each.get_property("naturalWidth")]


def step_through(browser: Browser, title: str, steps: tuple[int, int], runs: int) -> None:
    """Move a card's slider from one step to the next: the pictures of each are shown."""
    from selenium.webdriver.common.keys import Keys

    panel = card(browser, title)
    browser.driver.execute_script("arguments[0].scrollIntoView()", panel)
    key = Keys.ARROW_LEFT if steps[0] > steps[1] else Keys.ARROW_RIGHT
    for step in steps:
        browser.until(
            lambda step=step: (
                len(found := pictures(panel)) == runs and all(f"%2Bstep%2B{step}%2B" in source for source in found)
            ),
            f"no pictures of step {step}",
        )
        panel.find_element("css selector", "[role=slider]").send_keys(key)


def test_the_charts_of_a_sweep_and_its_pictures_through_time(browser: Browser) -> None:
    view = "workflowType=machine_learning&viewStateShareKey=cosa-ray-sweep-night&compareRunsMode=CHART"
    browser.open(f"experiments/1/runs?{view}")
    browser.sees("overview\n(6)")
    drawn = card(browser, "Parallel Coordinates")
    browser.until(
        lambda: (
            {"losses.contrastive", "val/miou"}
            <= {each.text for each in drawn.find_elements("css selector", "svg text")}
        ),
        "no parallel coordinates",
    )
    course = card(browser, "val/miou")
    points = ".scatterlayer path.point"
    browser.until(lambda: len(course.find_elements("css selector", points)) == 2 * len(TRIALS), "a point is missing")
    step_through(browser, "val/panel", (20, 10), len(TRIALS))
    assert "seed=" not in card(browser, "val/panel").text, "the settings would hide the pictures"


def test_comparing_runs_draws_its_charts(browser: Browser) -> None:
    browser.open("experiments/1/runs?workflowType=machine_learning&viewStateShareKey=cosa-ray-sweep-night")
    browser.settle([f"night-{number}" for number in ("002", "003", "001", "004")])
    browser.click(".ag-header-select-all .ag-checkbox-input-wrapper")
    browser.click("[data-testid=runs-compare-button]")
    browser.sees("Comparing 4 Runs from 1 Experiment", *SETTINGS)
    browser.find(".parcoords")  # with what differs between the runs, chosen by MLflow

    def choose(axis: str, value: str) -> None:
        browser.click(f"[role=tabpanel]:not([hidden]) [id^={axis}][id$=axis-selector]")
        option = browser.find("[role=option]", value)
        browser.driver.execute_script("arguments[0].scrollIntoView()", option)  # the list is long
        browser.until(lambda: option.click() or True, f"{value} takes no click")

    def drawn() -> bool:
        """True when the plot has more than axes and text in it; a scatter plot is on a canvas."""
        # The part of the page where it lies: what is around it may have no height.
        place = browser.all(".js-plotly-plot .main-svg")[0]
        with Image.open(io.BytesIO(place.screenshot_as_png)) as image:
            saturation = image.convert("HSV").getchannel("S").histogram()
        return sum(saturation[100:]) > 50

    for tab, axes in (
        ("Scatter Plot", {"x": SETTINGS[0], "y": "val/miou"}),
        ("Box Plot", {"x": SETTINGS[0], "y": "val/miou"}),
        ("Contour Plot", {"x": SETTINGS[0], "y": SETTINGS[1], "z": "val/miou"}),
    ):
        browser.click("[role=tab]", tab)
        for axis, value in axes.items():
            choose(axis, value)
        browser.until(drawn, f"the {tab} is empty")
        browser.sees(*axes.values())


@pytest.fixture
def run_id(store: Store) -> str:
    """MLflow's id of the trained run."""
    (run,) = store.client().search_runs(["1"], "tags.`cosa_ray.run` = 'trained'")
    return str(run.info.run_id)


def test_a_run_says_what_it_is_and_on_what_data(browser: Browser, run_id: str) -> None:
    browser.open(f"experiments/1/runs/{run_id}?workflowType=machine_learning")
    browser.sees("A run on shapes (40 images, 5 classes)", "losses.contrastive", "cosa_ray.kind", "shapes model", "v1")
    name = "//span[starts-with(normalize-space(.), 'shapes/train (')]"
    browser.until(lambda: browser.driver.find_element("xpath", name).click() or True, "the data takes no click")
    browser.sees("2 datasets used", "shapes/val (", "images: 40", '"disc":', "image\nbinary", inside="[role=dialog]")
    assert "Unrecognized" not in browser.text()


def test_the_metrics_of_a_run_in_groups_and_its_pictures(browser: Browser, run_id: str) -> None:
    browser.open(f"experiments/1/runs/{run_id}/model-metrics?workflowType=machine_learning")
    header = '[data-testid="experiment-view-compare-runs-section-header"]'
    browser.until(
        lambda: (
            {"cost", "perf", "threshold", "train", "val", "val/iou"}
            <= {each.text.splitlines()[0] for each in browser.all(header)}
        ),
        "a group is missing",
    )
    browser.find("input[placeholder='Search metric charts']").send_keys("val/panel")
    browser.until(lambda: len(browser.all(header)) == 1, "the search finds more than a picture")
    card(browser, "val/panel").find_element("css selector", "[role=slider]").send_keys("\ue014")  # to the first step
    step_through(browser, "val/panel", (10, 20), 1)


def test_what_a_run_kept_can_be_read(browser: Browser, run_id: str) -> None:
    browser.open(f"experiments/1/runs/{run_id}/artifacts?workflowType=machine_learning")
    browser.sees("config.yaml", "dataset.json", "environment.json", "images")
    browser.click("span, div", "config.yaml")
    browser.sees("batch_size: 4", "embed_dim: 32")


def test_models_with_their_data_and_the_registry(browser: Browser, store: Store, run_id: str) -> None:
    browser.open("experiments/1/models?workflowType=machine_learning")
    browser.sees("Ready", "trained", "shapes model", "v1", "shapes/val (")
    browser.click("a", "trained")
    options = len(store.client().get_run(run_id).data.params)
    browser.sees("at step 20", "Datasets used", "shapes/val (", f"Parameters ({options})", "Metrics (")
    browser.open("models/shapes%20model?workflowType=machine_learning")
    browser.sees("Version 1", "best", "Semantic segmentation by CoSA", "val/miou 0.")
    points = store.client().get_metric_history(run_id, "val/miou")
    assert sorted(point.step for point in points) == [10, 20], "the model's metrics are the run's, not more of them"


def test_an_experiment_of_an_earlier_version_gets_the_views_once(pages: Pages, store: Store) -> None:
    client = store.client()
    number = client.create_experiment("earlier")
    client.set_experiment_tag(number, "mlflow.sharedViewState.1795597794553abc", "deflate;mine")
    plain = f"{pages.url}/#/experiments/{number}/runs?workflowType=machine_learning"
    assert pages.link("earlier") == f"{plain}&viewStateShareKey=cosa-ray-runs"
    client.delete_experiment_tag(number, "mlflow.sharedViewState.cosa-ray-runs")
    assert pages.link("earlier") == plain
    assert client.get_experiment(number).tags["mlflow.sharedViewState.1795597794553abc"] == "deflate;mine"
