"""What people see: MLflow's pages in headless Chromium (Debian: apt install chromium
chromium-driver).

pytest -m long tests/servers/test_browser.py    LWO_SCREENSHOTS=FOLDER keeps what was seen
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.config import Config, DataConfig, LWOConfig
from lwo_dist.spool import SPOOL_NAME, Sent
from lwo_dist.tracking.mlflow import create_run, experiment_page
from lwo_dist.tracking.mlflow import run_page as page_of_run
from tests.cluster.launching import REPOSITORY, free_port
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
SECTION = re.compile(r"^([a-z]+)\n\(\d+\)$", re.MULTILINE)
"""The heading of a group of charts, such as `eval` over `(4)`."""
BEFORE, AFTER = ({"eval/loss": loss, "eval/lines": 200.0} for loss in (3.0, 2.0))
SUMMARY = {
    "eval": {
        "before": BEFORE,
        "after": AFTER,
        "best_step": 100,
        "gain_95": {"loss": {"mean": 1.0, "low": 0.5, "high": 1.5}},
    },
    "training_seconds": 60.0,
    "tokens_per_second": 1000.0,
}


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

    def press(self, selector: str) -> None:
        for button in self.driver.find_elements("css selector", selector):
            self.driver.execute_script("arguments[0].click()", button)

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
    found = {}
    for name, loss, lr in (("first", 2.0, 1e-3), ("second", 3.0, 1e-4)):
        config = seen_config(server.uri).model_copy(update={"lwo": LWOConfig(lr=lr)})
        run_id = create_run(config, tmp_path, name)
        callback = begin(config, tmp_path, name, run_id)
        train(callback, loss=loss)
        callback.on_metrics(100, {"system/node-a/cpu_utilization_percentage": 40.0})
        save_tiny_model(tmp_path / name / "model", ["def f(x):\n    return x\n"])
        callback.on_run_end(SUMMARY)
        sent = Sent.load(tmp_path / name / SPOOL_NAME)
        assert (sent.run_id, sent.waiting) == (run_id, [])
        found[name] = str(run_id)
    return found


def seen_config(uri: str) -> Config:
    data = {"data": DataConfig(source="https://github.com/a/shop")}
    return config_for(uri, experiment="seen", upload_timeout_s=120).model_copy(update=data)


def test_people_see_their_runs(browser: Browser, server: Server, runs: dict[str, str]) -> None:
    config = seen_config(server.uri)
    browser.open(experiment_page(config.tracking, server.uri))
    browser.see(lambda: "first" in browser.text() and "second" in browser.text())
    assert "shop (0123456789abcdef)" in browser.text()  # the dataset
    browser.keep("experiment")

    run_page = str(page_of_run(config, runs["first"]))
    browser.open(run_page)
    browser.see(lambda: "Datasets" in browser.text() and "Parameters (" in browser.text())
    text = browser.text()
    for said in (
        "tiny-code before and after step 100, on 200 held-out lines of shop:",
        "loss: 3.000 to 2.000, gain +1.000 (95 % interval +0.500 to +1.500)",
        "shop (0123456789abcdef)",
        "lwo-dist train",
        "model\n: tiny-code",
        "device\n: cpu",
    ):
        assert said in text, (said, text)
    assert "null" not in text and str(Path.home()) not in text
    browser.keep("run")

    run_page = run_page.partition("?")[0]
    browser.open(f"{run_page}/model-metrics")
    browser.see(lambda: browser.charts() >= 3)
    assert SECTION.findall(browser.text()) == ["eval", "train", "visit"]
    for name in ("eval/loss", "train/loss", "visit/loss_drop"):
        assert_chart(browser, name)
    browser.keep("run-charts")

    browser.open(f"{run_page}/system-metrics")
    browser.see(lambda: "cpu_utilization_percentage" in browser.text() and browser.charts() >= 1)
    assert_chart(browser, "system/peak_memory_GB")

    experiment_page_of_runs = run_page.rpartition("/")[0]
    browser.open(f"{experiment_page_of_runs}?compareRunsMode=CHART")  # both runs in every chart
    browser.see(lambda: browser.charts() >= 3)
    assert SECTION.findall(browser.text())[0] == "eval"
    browser.keep("comparison-charts")
    experiment = experiment_page_of_runs.split("/")[-2]
    browser.open(
        f"{server.uri}/#/compare-runs?runs={quoted(list(runs.values()))}&experiments={quoted([experiment])}"
    )
    browser.see(lambda: "Comparing 2 Runs" in browser.text() and "train.steps" in browser.text())
    browser.press("button[role=switch]")  # "Show diff only", of parameters, metrics and tags
    browser.see(lambda: "train.steps" not in browser.text())
    parameters = browser.text().partition("Show diff only")[2].partition("Metrics")[0]
    assert parameters.split() == ["lwo.lr", "0.001", "0.0001"]
    browser.keep("comparison")

    for name in PICTURES:
        browser.open(f"{run_page}/artifacts/pictures/{name}.png")
        browser.see(lambda: largest_image(browser.driver) >= 1000)
        browser.keep(f"artifact-{name}")
    browser.open(f"{run_page}/artifacts/report.html")
    browser.see(lambda: bool(browser.driver.find_elements("css selector", "iframe")))
    browser.keep("artifact-report")


def test_ui_prints_the_address_of_the_experiment(browser: Browser, storage: Path) -> None:
    command = [sys.executable, "-m", "lwo_dist.cli", "ui", f"storage={storage}"]
    command += ["tracking.experiment=first", "--port", str(free_port())]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            until(lambda: answers(address), 120)
            browser.open(address)
            browser.see(lambda: "Run Name" in browser.text() and "1 matching run" in browser.text())
            # The other menu, of the pages for language-model applications, has Prompts.
            assert "Model registry" in browser.text() and "Prompts" not in browser.text()
            browser.keep("ui")
        finally:
            server.terminate()


def answers(address: str) -> bool:
    with suppress(OSError):
        return bool(urllib.request.urlopen(address, timeout=2).status == 200)
    return False


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
