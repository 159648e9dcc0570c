"""What people see: MLflow's pages in headless Chromium (Debian: apt install chromium
chromium-driver).

pytest -m long tests/servers/test_browser.py    LWO_SCREENSHOTS=FOLDER keeps what was seen
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.spool import SPOOL_NAME, Sent
from lwo_dist.tracking.mlflow import create_run
from tests.models import save_tiny_model
from tests.tracking import PICTURES, Server, begin, config_for, train, until

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("clean_environment"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt install chromium chromium-driver"),
]
CHARTS = ".js-plotly-plot svg"


class Browser:
    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1600,1150",
        ):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.shots = os.environ.get("LWO_SCREENSHOTS")

    def open(self, address: str) -> None:
        self.driver.get(
            "about:blank"
        )  # the pages are one page to the browser: a new hash alone loads nothing
        self.driver.get(address)

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def see(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        try:
            until(condition, seconds)
        except AssertionError:
            raise AssertionError(
                f"not seen within {seconds} s; the page says: {self.text()[:1500]}"
            ) from None

    def charts(self) -> int:
        return len(self.driver.find_elements("css selector", CHARTS))

    def keep(self, name: str) -> None:
        if self.shots:
            for close in self.driver.find_elements("css selector", "button[aria-label='Close']"):
                self.driver.execute_script(
                    "arguments[0].click()", close
                )  # what MLflow's assistant offers
            time.sleep(2)  # for the eye only: let what moves come to rest
            Path(self.shots).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(self.shots) / f"{name}.png"))


@pytest.fixture
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def runs(server: Server, tmp_path: Path) -> dict[str, str]:
    """Two runs in a server, to their ends. Name -> MLflow's id."""
    server.start()
    config = config_for(server.uri, experiment="seen", upload_timeout_s=120)
    found = {}
    for name, loss in (("first", 2.0), ("second", 3.0)):
        run_id = create_run(config, tmp_path, name)
        callback = begin(config, tmp_path, name, run_id)
        train(callback, loss=loss)
        callback.on_metrics(100, {"system/node-a/cpu_utilization_percentage": 40.0})
        save_tiny_model(tmp_path / name / "model", ["def f(x):\n    return x\n"])
        callback.on_run_end({})
        sent = Sent.load(tmp_path / name / SPOOL_NAME)
        assert (sent.run_id, sent.waiting) == (run_id, [])
        found[name] = str(run_id)
    return found


def test_people_see_their_runs(browser: Browser, server: Server, runs: dict[str, str]) -> None:
    from tests.tracking import client_of

    experiment = client_of(server.uri).get_run(runs["first"]).info.experiment_id
    experiment_page = f"{server.uri}/#/experiments/{experiment}"
    run_page = f"{experiment_page}/runs/{runs['first']}"

    browser.open(f"{experiment_page}/runs")
    browser.see(lambda: "first" in browser.text() and "second" in browser.text())
    browser.keep("experiment")

    browser.open(f"{run_page}/model-metrics")
    browser.see(lambda: browser.charts() >= 3)
    for name in (
        "train/loss",
        "memory/peak_bytes",
        "train/elapsed_seconds",
        "visit/loss_drop",
        "run/attempt",
    ):
        assert_chart(browser, name)
    browser.keep("run-charts")

    browser.open(f"{run_page}/system-metrics")
    browser.see(lambda: "cpu_utilization_percentage" in browser.text() and browser.charts() >= 1)

    browser.open(f"{experiment_page}/runs?compareRunsMode=CHART")  # both runs in every chart
    browser.see(lambda: browser.charts() >= 3)
    browser.keep("comparison-charts")
    browser.open(
        f"{server.uri}/#/compare-runs?runs={quoted(list(runs.values()))}&experiments={quoted([experiment])}"
    )
    browser.see(lambda: "Comparing 2 Runs" in browser.text())
    browser.keep("comparison")

    for name in PICTURES:
        browser.open(f"{run_page}/artifacts/pictures/{name}.png")
        browser.see(lambda: largest_image(browser.driver) >= 1000)
        browser.keep(f"artifact-{name}")
    browser.open(f"{run_page}/artifacts/report.html")
    browser.see(lambda: bool(browser.driver.find_elements("css selector", "iframe")))
    browser.keep("artifact-report")


def quoted(run_ids: list[str]) -> str:
    return "[" + ",".join(f"%22{run_id}%22" for run_id in run_ids) + "]"


def largest_image(driver: Any) -> int:
    return int(
        driver.execute_script(
            "return Math.max(0, ...[...document.images].map(i => i.naturalWidth))"
        )
    )


def assert_chart(browser: Browser, metric: str) -> None:
    """The page's search box finds a chart of the metric."""
    [search, *_] = browser.driver.find_elements(
        "css selector", "input[placeholder*='earch metric']"
    )
    search.send_keys("\ue009a\ue000", "\ue003", metric)
    browser.see(lambda: metric in browser.text() and browser.charts() >= 1, 60)


def test_the_report_opens_without_a_network(browser: Browser, tmp_path: Path) -> None:
    callback = begin(
        config_for(f"sqlite:///{tmp_path}/none.db", flush_timeout_s=0), tmp_path, "report"
    )
    train(callback)
    callback.on_run_end({})
    browser.open((tmp_path / "report" / "report.html").as_uri())
    assert browser.driver.execute_script("return document.querySelectorAll('svg').length") == len(
        PICTURES
    )
    loaded = browser.driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert loaded == []
    assert browser.driver.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    )
    browser.keep("report")
