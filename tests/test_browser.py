"""What people see, in a real headless Chromium: MLflow's pages of a store made by our code, and the report.

Skipped where there is no Chromium, or no driver for it (`pip install 'mdeq[browser]'`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import figures, tracking
from pipeline.machine import Machine
from pipeline.stages import report
from tests.test_report import tree

driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'mdeq[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on PATH")]
ROOT = Path(__file__).parents[1]
PATIENCE = 100_000
"""Milliseconds: a busy machine takes a minute to start a server and to draw its first page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def served(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address that `python -m pipeline ui` names, over a store with a pipeline, a training and the report."""
    monkeypatch.setenv("DVC_STAGE", "classify@tiny")
    machine = Machine.from_environment(device="cpu", scale="demo")
    history = pd.DataFrame({"epoch": [1, 2], "loss/train_epoch": [2.0, 1.0], "eval/top1": [20.0, 60.0]})
    figures.save(figures.training_curves(history, "tiny"), workspace / "curves.png")
    with tracking.start("classify", "tiny", None, machine) as tracker:
        tracker.dataset("cifar10", "0123456789abcdef", "generated")
        for step in range(4):
            names = ("loss/train", "solver/nfe", "memory/peak_process_bytes", "eval/top1")
            tracker.metrics({name: 10.0 / (1 + step) for name in names}, step)
        tracker.artifact(workspace / "curves.png")
    tree(workspace / "results")
    report.run(machine)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipeline", "ui", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert server.stdout is not None
    yield server.stdout.readline().removeprefix("MLflow: ").strip()
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()


def opened(page: Any, url: str) -> None:
    """Go there as soon as something answers."""
    for _ in range(PATIENCE // 1000):
        try:
            page.goto(url, timeout=PATIENCE)
            return
        except driver.Error as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            page.wait_for_timeout(1000)


def test_mlflow_shows_the_pipeline_its_stages_charts_and_pictures(served: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1900, "height": 1000})
    page.set_default_timeout(PATIENCE)
    opened(page, served)
    whole = page.get_by_role("link", name="pipeline workspace").first
    whole.wait_for()
    for column in ("cifar10/mdeq-small", "eval/top1"):  # the saved view's columns, and not all that there are
        page.get_by_role("columnheader", name=column).first.wait_for()
    assert page.get_by_role("columnheader", name="memory/peak_process_bytes").count() == 0
    assert page.get_by_role("gridcell", name="72.4").count() == 1  # the report's headline, on the whole's row
    assert page.get_by_role("link", name="classify/tiny").count() == 0
    page.locator(".ag-row [role=button], .ag-row button").first.click()  # the stages unfold below it
    page.get_by_role("link", name="classify/tiny").first.click()
    page.get_by_text("cifar10").first.wait_for()  # the data set that it reads
    page.get_by_role("tab", name="Model metrics").click()
    for group in ("loss", "solver", "memory", "eval"):
        page.get_by_text(group, exact=True).first.wait_for()
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("curves.png").first.click()
    picture = page.locator("img[src*='curves.png'], img[src^='blob:']").first
    picture.wait_for()
    page.wait_for_function("image => image.naturalWidth > 500", arg=picture.element_handle())
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_one_file_that_reads_on_a_phone(workspace: Path, browser: Any, scheme: str) -> None:
    tree(workspace / "results")
    report.run(Machine(workspace))
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url.split(":")[0]))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((workspace / "results/report/index.html").as_uri(), timeout=PATIENCE)
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"} and said == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # what ink there is against what paper: WCAG's ratio for text, in figures too
    for text in ("h1", "td", "figcaption", "figure svg text"):
        assert page.evaluate(CONTRAST, text) >= 4.5
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").rstrip(")").split(","))) > 384) == (scheme == "light")
    page.close()


CONTRAST = """selector => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v > 0.04045 ? ((v + 0.055) / 1.055) ** 2.4 : v / 12.92);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const element = document.querySelector(selector), style = getComputedStyle(element);
    const ink = light(element instanceof SVGElement ? style.fill : style.color);
    let paper = element;
    while (getComputedStyle(paper).backgroundColor === "rgba(0, 0, 0, 0)") paper = paper.parentElement;
    const page = light(getComputedStyle(paper).backgroundColor);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
}"""
