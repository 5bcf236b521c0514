"""What people see, in a real headless Chromium: MLflow's pages of our runs, and the report.

Skipped where there is no Chromium, or no driver for it (`pip install 'mdeq[browser]'`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from pipeline import tracking
from pipeline.machine import Machine
from pipeline.stages import report
from tests.test_report import tree
from tests.test_tracking import free_port

driver = pytest.importorskip("playwright.sync_api", reason="pip install 'mdeq[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on PATH"),
]
ROOT = Path(__file__).parents[1]
LONG = "a-model-with-a-rather-long-name"
METRICS = ("loss/train", "solver/nfe", "memory/peak_process_bytes", "eval/top1")
PATIENCE = 100_000
"""Milliseconds: a busy machine takes a minute to start a server and to draw its first page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--disable-gpu", "--disable-sync", "--disable-background-networking"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with driver.sync_playwright() as playwright:
        start = playwright.chromium.launch
        chromium = start(executable_path=CHROMIUM, args=options, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def served(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address that `python -m pipeline ui` prints, of a store with two pipelines."""
    machine = Machine.from_environment(device="cpu", scale="demo")
    picture = matplotlib.figure.Figure(figsize=(8, 4))
    picture.subplots().plot([2.0, 1.0])
    for pipeline in ("wide-kiss", "tall-moss"):
        monkeypatch.setenv("DVC_EXP_NAME", pipeline)
        for stage in ("classify", "evaluate"):
            monkeypatch.setenv("DVC_STAGE", stage)
            out = workspace / "results" / stage / LONG
            out.mkdir(parents=True, exist_ok=True)
            picture.savefig(out / "curves.png", dpi=100)
            with tracking.start(stage, LONG, {"a": 1}, machine, out / "run.jsonl") as run:
                run.dataset("cifar10", "0123456789abcdef", "generated")
                for step in range(4):
                    run.metrics({name: 10.0 / (1 + step) for name in METRICS}, step)
                run.artifact(out / "curves.png")
    command = [sys.executable, "-m", "pipeline", "ui", "--port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    assert server.stdout is not None
    yield server.stdout.readline().removeprefix("MLflow: ").strip()
    server.send_signal(signal.SIGTERM)
    server.wait()


def test_mlflow_opens_on_a_row_per_stage_and_shows_its_charts_and_pictures(
    served: str, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto(served)
    names = [f"classify/{LONG}", f"evaluate/{LONG}", "pipeline wide-kiss", "pipeline tall-moss"]
    for name in names:
        link = page.get_by_role("link", name=name, exact=True).first
        link.wait_for()
        assert link.evaluate("link => link.scrollWidth <= link.clientWidth || !link.clientWidth")
    assert page.get_by_role("link", name=f"classify/{LONG}").count() == 2
    page.get_by_role("columnheader", name="eval/top1").first.wait_for()
    assert page.get_by_role("columnheader", name="memory/peak_process_bytes").count() == 0
    page.get_by_role("link", name=f"classify/{LONG}").first.click()
    page.get_by_text("cifar10").first.wait_for()  # the data set that it reads
    page.get_by_role("tab", name="Model metrics").click()
    for group in ("loss", "solver", "memory", "eval"):
        page.get_by_text(group, exact=True).first.wait_for()
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("curves.png").first.click()
    picture = page.locator("img[src*='curves.png'], img[src^='blob:']").first
    picture.wait_for()
    wide = "image => image.naturalWidth > 500"
    page.wait_for_function(wide, arg=picture.element_handle())
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_one_file_that_reads_on_a_phone(
    workspace: Path, browser: Any, scheme: str
) -> None:
    tree(Path("results"))
    report.run(Machine(workspace))
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url.split(":")[0]))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((workspace / "results/report/index.html").as_uri(), timeout=PATIENCE)
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"} and said == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for text in ("h1", "td", "th", "blockquote p", "nav a", "code"):
        assert page.evaluate(CONTRAST, text) >= 4.5  # WCAG's ratio for text
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    pictures = page.locator("img").all()
    assert pictures
    for picture in pictures:
        assert picture.evaluate("image => image.naturalWidth > 0")
        box = picture.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, paper.removeprefix("rgb(").rstrip(")").split(","))) > 384
    assert light == (scheme == "light")
    page.close()


CONTRAST = """selector => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v > 0.04045 ? ((v + 0.055) / 1.055) ** 2.4 : v / 12.92);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let paper = document.querySelector(selector);
    const ink = light(getComputedStyle(paper).color);
    const clear = element => getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)";
    while (clear(paper)) paper = paper.parentElement;
    const page = light(getComputedStyle(paper).backgroundColor);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
}"""
