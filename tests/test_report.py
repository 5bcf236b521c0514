"""The report from small synthetic results trees: whole, with missing parts, with broken files."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from pipeline.machine import Machine
from pipeline.paper import TABLE_1, TABLE_2, TABLE_3, TABLES
from pipeline.results import data_statement, iou_by_class, lines, read
from pipeline.stages import report

RUN, MARK = "00ab54aa9d8f4a5db4a8e9ff17a0c9a1", "51cafe9d8f4a5db4a8e9ff17a0c9a100-mark"
FACTS = {"device": "Test CPU", "commit": "0123456789abcdef", "torch": "2.14.1"}
SUMMARY = {"set": "cifar10", "source": "generated", "classes": 10, "images": {"train": 4000, "test": 1000}}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    figure.savefig(path)


def tree(root: Path) -> None:
    """What the stages would have left for one CIFAR-10 model, a benchmark, and nothing else."""
    write(root / "data/cifar10/summary.json", SUMMARY)
    picture(root / "data/cifar10/contact_sheet.png")
    training = {
        "eval/top1": 71.0,
        "solver/relative_residual": 0.05,
        "parameters": 176402,
        "seeds": [0],
        **FACTS,
    }
    write(root / "classify/mdeq-small/metrics.json", training)
    rows = ["seed,epoch,step,loss/train_epoch,lr,eval/top1,eval/top1_unrolled,time/seconds"]
    rows += [
        f"0,{epoch},{10 * epoch},{2 / epoch},0.001,{20 * epoch},{'' if epoch > 1 else 15},{epoch}"
        for epoch in (1, 2, 3)
    ]
    write(root / "classify/mdeq-small/history.csv", "\n".join(rows) + "\n")
    evaluation = root / "evaluate/cifar10-mdeq-small"
    solver = {"solver/relative_residual": 0.06, "solver/relative_residual_max": 0.4, "solver/converged": 0.25}
    solver |= {"solver/nfe": 19.0, "solver/steps_to_best": 16.5, "solver/failed": 0.0}
    write(
        evaluation / "metrics.json",
        {"eval/top1": 72.4, "run": RUN, "samples": 1000, "data/source": "generated", **solver, **FACTS},
    )
    picture(evaluation / "examples.png")
    picture(evaluation / "confusion.png")
    convergence = {"model": "mdeq-small", "batches": 2, "batch": 4, "run": MARK, **FACTS}
    trace = []
    for solver_name, rate in (("broyden", 0.5), ("fixed_point", 0.8)):
        convergence |= {f"{solver_name}/residual": rate**5, f"{solver_name}/residual_std": 0.001}
        convergence |= {f"{solver_name}/change": rate**5, f"{solver_name}/evaluations": 5}
        for batch in range(2):
            trace += [(solver_name, batch, k, "" if k < 3 else rate**k, rate**k) for k in range(1, 6)]
    write(root / "convergence/cifar10/metrics.json", convergence)
    with (root / "convergence/cifar10/trace.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("solver", "batch", "evaluation", "change", "residual"), *trace])
    entry = {
        "seconds": 1.5,
        "memory_bytes": 2**29,
        "parameters": 100,
        "relative": {"time": 0.9, "memory": 0.25},
    }
    models = {"mdeq-small": entry, "resnet101": {**entry, "relative": {"time": 1.0, "memory": 1.0}}}
    runtime = {
        "models": models,
        "reference": "resnet101",
        "batch": 8,
        "rounds": 2,
        "threads": 2,
        "memory": "peak RSS",
    }
    write(root / "benchmark/runtime.json", {**runtime, **FACTS})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written() -> tuple[str, str, dict]:
    out = Path("results/report")
    return (
        (out / "index.html").read_text(),
        (out / "results.md").read_text(),
        json.loads((out / "results.json").read_text()),
    )


class Wellformed(HTMLParser):
    """Checks that tags nest; collects ids, links and sources."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values[name] or "" for name in ("href", "xlink:href") if name in values]
        self.sources += [values["src"] or ""] if "src" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_row_of_the_paper_is_there_measured_or_with_its_reason(here: Path) -> None:
    tree(here / "results")
    report.run(Machine(here))
    page, markdown, record = written()
    for table, ours in zip(TABLES, record["tables"], strict=True):
        assert len(ours["rows"]) == len(table.rows)
        for row, line in zip(table.rows, ours["rows"], strict=True):
            assert line["system"] == row.system
            assert line["status"] == "measured" or line["reason"]
            assert row.system in page and row.system.replace("*", r"\*") in markdown
    small = next(row for row in record["tables"][0]["rows"] if row["system"] == "MDEQ-small")
    assert small["paper"] == ["87.1 ± 0.4"] and small["ours"] == ["72.4"]
    assert small["data"] == "generated pictures, NOT CIFAR-10 (4,000 train + 1,000 test)"
    assert (small["device"], small["seeds"], small["commit"], small["comparable"]) == (
        "Test CPU",
        "0",
        "0123456",
        False,
    )
    assert "generated pictures, NOT CIFAR-10" in markdown and "generated pictures, NOT CIFAR-10" in page


def test_the_page_is_one_file_that_nests_and_loads_nothing(here: Path) -> None:
    tree(here / "results")
    report.run(Machine(here))
    page, text, _ = written()
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.sources and all(source.startswith("data:image/") for source in parser.sources)
    links = [link for link in parser.links if link != "data:,"]  # no icon is asked for
    assert all(link.startswith("#") and link[1:] in parser.ids for link in links)
    assert '<a href="#run-00ab54aa">72.4</a>' in page and f"<code>{RUN}</code>" in page
    assert f"`tags.mark = '{MARK}'`" in text  # the store had not answered; so it is found
    assert "<script" not in page and not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r'(?<!xmlns=")(?<!xmlns:xlink=")https?://', page.replace("http://www.w3.org/", ""))
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_nothing_run_is_a_report_that_says_so(here: Path) -> None:
    report.run(Machine(here))
    page, markdown, record = written()
    statuses = {row["status"] for table in record["tables"] for row in table["rows"]}
    assert statuses == {"paper only", "not run"}
    assert "python -m pipeline classify mdeq-small" in page
    assert "not run: " in markdown
    assert "no results/benchmark/runtime.json" in page


def test_broken_files_are_named_and_not_fatal(here: Path) -> None:
    tree(here / "results")
    write(here / "results/evaluate/cifar10-mdeq-small/metrics.json", '{"eval/top1": 7')
    write(here / "results/convergence/cifar10/trace.csv", "solver,batch\nbroyden,0\n")
    write(here / "results/classify/mdeq-small/history.csv", "")
    report.run(Machine(here))
    page, _, record = written()
    assert len(record["problems"]) == 3
    assert "results/evaluate/cifar10-mdeq-small/metrics.json: unreadable" in page
    small = next(row for row in record["tables"][0]["rows"] if row["system"] == "MDEQ-small")
    assert small["ours"] == ["71.0"]  # what training measured


def test_several_seeds_show_their_spread_and_a_model_of_our_own_comes_last(here: Path) -> None:
    root = here / "results"
    tree(root)
    several = {"eval/top1": 86.9, "eval/top1_std": 0.31, "seeds": [0, 1, 2], **FACTS}
    write(root / "classify/mdeq-small/metrics.json", several)
    write(root / "finetune/from-scratch/metrics.json", {"eval/miou": 30.0, "seeds": [0], **FACTS})
    results = read(root)
    small = next(line for line in lines(results, TABLE_1) if line.row.model == "mdeq-small")
    assert small.ours == ("86.9 ± 0.3",) and small.seeds == "0, 1, 2"
    last = lines(results, TABLE_3)[-1]
    assert (last.row.system, last.ours, last.paper) == ("from-scratch", ("30.0",), ("",))


@pytest.mark.parametrize(
    ("summary", "facts", "words", "comparable"),
    [
        ({"source": "download", "images": {"train": 50000, "test": 10000}}, {}, "CIFAR-10, complete", True),
        (
            {"source": "folder", "images": {"train": 50000, "test": 10000}},
            {"samples": 500},
            "only 500 of its 10,000",
            False,
        ),
        (
            {"source": "folder", "images": {"train": 100, "test": 30}, "classes": 10},
            {},
            "NOT the paper's CIFAR-10",
            False,
        ),
        ({"source": "generated", "images": {"train": 50000, "test": 10000}}, {}, "NOT CIFAR-10", False),
        ({}, {}, "data unknown", False),
    ],
)
def test_what_data_a_number_is_about(tmp_path: Path, summary: dict, facts: dict, words: str, comparable: bool) -> None:
    if summary:
        write(tmp_path / "data/cifar10/summary.json", summary)
    statement, same = data_statement(read(tmp_path), "cifar10", facts)
    assert words in statement and same is comparable


def test_ablations_are_drawn_beside_what_they_vary_and_not_in_table_1(here: Path) -> None:
    root = here / "results"
    tree(root)
    evaluation = json.loads((root / "evaluate/cifar10-mdeq-small/metrics.json").read_text())
    write(root / "evaluate/cifar10-mdeq-small/metrics.json", evaluation | {"by_steps": {"1": 20.0, "2": 60.0}})
    history = (root / "classify/mdeq-small/history.csv").read_text()
    two_seeds = history + "".join(f"1,{epoch},{10 * epoch},1,0.001,{19 * epoch},,1\n" for epoch in (1, 2, 3))
    write(root / "classify/ablation-softplus/history.csv", two_seeds)
    write(root / "classify/ablation-softplus/metrics.json", {"eval/top1": 64.2, "seeds": [0], "flops": 3e9, **FACTS})
    report.run(Machine(here))
    page, markdown, record = written()
    assert "ablation-softplus" not in {row["system"] for row in record["tables"][0]["rows"]}
    assert "| ablation-softplus | **64.2** |" in markdown and "| mdeq-small | **72.4** |" in markdown
    for name in ("ablation-1", "accuracy-by-steps", "figure4a"):
        assert (root / f"report/figures/{name}.svg").is_file() and f"figures/{name}.svg" in markdown
    assert "3 GFLOPs an image" in page and page.count("Softplus for the last ReLUs") >= 2


def test_the_paper_as_printed() -> None:
    assert [len(table.rows) for table in TABLES] == [7, 14, 14]
    printed = {row.system: tuple(value.value for value in row.values) for row in TABLE_2.rows}
    assert printed["MDEQ-XL"] == (79.2, 94.5) and printed["Unrolled 5-layer MDEQ-large"] == (75.9, 93.0)
    assert all(len(row.values) == len(table.measures) for table in TABLES for row in table.rows)
    assert all(row.missing and row.cited if row.model is None else row.model for t in TABLES for row in t.rows)


def test_iou_by_class_skips_what_the_labels_never_show() -> None:
    confusion = pd.DataFrame([[3, 1, 0], [0, 4, 0], [0, 0, 0]], index=["a", "b", "c"], columns=["a", "b", "c"])
    scores = iou_by_class(confusion)
    assert scores["a"] == pytest.approx(75) and scores["b"] == pytest.approx(80) and np.isnan(scores["c"])


def test_show_prints_the_tables_and_the_paths(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(here / "results")
    report.run(Machine(here))
    report.show()
    printed = capsys.readouterr().out
    assert "MDEQ-small" in printed and "72.4" in printed and "index.html" in printed
