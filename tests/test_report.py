"""The report of small results trees: whole, partial, damaged, with hostile names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.errors import UserError
from pipeline.figures import save
from pipeline.machine import Machine
from pipeline.report import comparison
from pipeline.report.comparison import PAPER, about_data, build, judged
from pipeline.report.pages import readme_table
from pipeline.report.results import Facts, Result, Results, read
from pipeline.sets import SETS
from pipeline.stages import report

RUN = "00ab54aa9d8f4a5db4a8e9ff17a0c9a1"
FACTS = {"device": "Test CPU", "commit": "0123456789abcdef", "run": RUN}
FACTS |= {"source": "generated", "seeds": [0]}
FULL, SMALL = {"train": 50000, "test": 10000}, {"train": 4000, "test": 1000}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def picture(path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    save(figure, path)


HISTORY = "seed,epoch,eval/top1,time/seconds\n0,1,20,60\n0,2,40,120\n"


def trace(*curves: Sequence[float]) -> str:
    """Of Broyden's method and of iterating f, with two batches whose mean is the curve."""
    rows = ["solver,batch,evaluation,residual,change"]
    for solver, curve in zip(("broyden", "fixed_point"), curves, strict=True):
        for k, residual in enumerate(curve, 1):
            rows.append(f"{solver},0,{k},{0.9 * residual},1")
            rows.append(f"{solver},1,{k},{1.1 * residual},1")
    return "\n".join(rows)


EVALUATION = {"solver/relative_residual": 0.061, "solver/converged": 0.25, "solver/nfe": 19.0}
RELATIVE = {"mdeq/relative_time": 2, "mdeq/relative_memory": 0.25}
RELATIVE |= {"resnet101/relative_time": 1, "resnet101/relative_memory": 1}
FILES = {  # of one CIFAR-10 model and a benchmark
    "data/cifar10/summary.json": {"source": "generated", "images": SMALL},
    "data/cifar10/contact_sheet.png": "",
    "classify/mdeq-small/metrics.json": {"eval/top1": 71.0, "parameters": 176402.0, "epochs": 3},
    "classify/mdeq-small/facts.json": FACTS,
    "classify/mdeq-small/history.csv": HISTORY,
    "classify/mdeq-small/curves.png": "",
    "evaluate/cifar10-mdeq-small/metrics.json": {"eval/top1": 72.44, **EVALUATION},
    "evaluate/cifar10-mdeq-small/facts.json": FACTS | {"samples": 1000},
    "evaluate/cifar10-mdeq-small/by_steps.csv": "evaluations,accuracy,residual\n1,20.5,0.5\n",
    "evaluate/cifar10-mdeq-small/examples.png": "",
    "convergence/cifar10/trace.csv": trace([1, 0.1, 0.01], [1, 0.5, 0.2]),
    "convergence/cifar10/overview.svg": "",
    "benchmark/metrics.json": RELATIVE,
    "benchmark/facts.json": FACTS | {"reference": "resnet101", "batch": 8},
    "benchmark/figure4b.svg": "",
}


def tree(root: Path) -> None:
    """What the stages leave."""
    for name, content in FILES.items():
        write(root / name, content) if content else picture(root / name)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(empty: Path) -> Path:
    tree(empty / "results")
    return empty


def made() -> tuple[str, str, dict[str, Any]]:
    """The page, the Markdown and the record of the report of results/."""
    report.run(Machine(Path.cwd()))
    names = ("index.html", "report.md", "results.json")
    page, text, record = (Path("results/report", name).read_text("utf-8") for name in names)
    return page, text, json.loads(record)


def words(page: str) -> str:
    """What is read; also checks that tags nest, as XML must, and that none is active."""
    root = ElementTree.fromstring(page)
    assert not {"script", "b", "iframe"} & {element.tag for element in root.iter()}
    return "".join(root.itertext())


def attributes(page: str, name: str) -> list[str]:
    return [own.attrib[name] for own in ElementTree.fromstring(page).findall(f".//*[@{name}]")]


def claims(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    parts = [*record["tables"], record["figure4b"], {"claims": record["figure5"]}]
    every = [claim for part in parts for claim in part["claims"]]
    return {claim["says"][:25]: (claim["verdict"], claim["numbers"]) for claim in every}


def test_the_page_shows_the_measured_numbers_beside_the_papers(here: Path) -> None:
    write(here / "results/classify/own/metrics.json", {"eval/top1": 33.3})
    page, text, record = made()
    row = "MDEQ-small: accuracy, % | 87.1 ± 0.4 | 72.4 | generated pictures, 3 epochs |"
    assert row in text  # 72.4: what evaluation measured, not training's 71.0
    assert "| Table 1 | own: accuracy, % | – | 33.3 |" in text
    step = "MDEQ: time / memory of a step, ResNet-101 = 1 | 2.7 / \\< 0.4 | 2.00 / 0.25 |"
    assert step in text
    assert "Device: Test CPU.\nCommit: 0123456.\nSeeds: 0." in text
    assert "numbers on generated pictures show that the pipeline works" in text
    assert "CIFAR-10: generated pictures (4,000 train + 1,000 test)" in text
    shown = words(page)
    for number in ("72.4", "87.1 ± 0.4", "2.00 / 0.25", "0.061", "19.0", RUN, "(here 176,402)"):
        assert number in shown, number
    assert record["problems"] == []
    assert record["tables"][0]["rows"][4]["value"] == 72.44


def test_every_system_of_the_paper_is_there_with_its_printed_numbers(empty: Path) -> None:
    page, text, record = made()
    shown = words(page)
    for table, ours in zip(PAPER["tables"], record["tables"], strict=True):
        for row, own in zip(table["rows"], ours["rows"], strict=True):
            assert row["system"] in shown and " / ".join(row["paper"]) in shown
            assert own["paper"] == row["paper"] and not own["here"]
    assert "Nothing yet; `make repro` runs every stage." in text
    assert "Not measured here; `python -m pipeline benchmark` measures it." in text
    assert {verdict for verdict, _ in claims(record).values()} == {"not measured here"}


def test_only_the_papers_data_bear_its_name() -> None:
    def label(facts: Facts, source: str = "", images: dict[str, int] = FULL) -> str:
        results = Results(data={"cifar10": Facts(source=source, images=images)})
        return about_data(results, "cifar10", Result(facts=facts))

    assert label(Facts(samples=10000), "download") == "CIFAR-10"
    assert label(Facts(samples=500), "folder") == "part of CIFAR-10"
    assert label(Facts(), "folder", SMALL) == label(Facts(), images={}) == "other pictures"
    assert label(Facts(), "generated") == "generated pictures"
    assert label(Facts(source="generated"), "folder") == "generated pictures"


def test_the_papers_data_have_no_banner_and_several_seeds_a_spread(here: Path) -> None:
    write(here / "results/data/cifar10/summary.json", {"source": "folder", "images": FULL})
    facts = FACTS | {"source": "folder", "seeds": [0, 1, 2]}
    for name in ("classify/mdeq-small", "evaluate/cifar10-mdeq-small"):
        write(here / "results" / name / "facts.json", facts)
    several = {"eval/top1": 86.9, "eval/top1_std": 0.31}
    write(here / "results/classify/mdeq-small/metrics.json", several)
    text = made()[1]
    assert "| 87.1 ± 0.4 | 86.9 ± 0.3 | CIFAR-10 |" in text and "Seeds: 0, 1, 2." in text
    assert "About the data" not in text


def test_claims_are_judged_by_the_numbers(here: Path) -> None:
    write(here / "results/classify/resnet18-small/metrics.json", {"eval/top1": 80.0})
    write(here / "results/classify/anode/metrics.json", {"eval/top1": 52.0})
    found = claims(made()[2])
    numbers = "MDEQ-small 72.4, ResNet-18 small 80"
    assert found["MDEQ-small is above the R"] == ("does not hold here", numbers)
    numbers = "MDEQ-small 72.4, ANODE 52"  # by 20.4; the other was not measured
    assert found["“Compared to NODEs and Au"] == ("holds here", numbers)
    assert found["“a larger MDEQ matches an"] == ("not measured here", "")
    assert found["“MDEQ saves more than 60%"][0] == "holds here"
    assert found["“We observe a 2.7× slowdo"] == ("holds here", "MDEQ relative time 2")
    assert found["“when compared to ANODEs "][0] == "not measured here"


def test_conditions_are_compared_where_they_were_measured() -> None:
    def verdict(*conditions: str) -> str:
        claim = {"says": "", "place": "", "holds": conditions}
        return judged(claim, {"a": 3.0, "b": 2.0})["verdict"]

    for condition in ("a > b", "a > b + 0.5", "b > a - 1.5", "b <= 2", "b <= a * 0.7"):
        assert verdict(condition) == verdict("c > a", condition) == "holds here"
    for condition in ("b > a", "a > b + 1", "b > a - 1", "a <= 2", "b < a * 0.4"):
        assert verdict(condition) == verdict(condition, "a > b") == "does not hold here"
    assert verdict("c > a") == verdict("a > c") == "not measured here"


ENDS = {  # Broyden's residuals; those of iterating f end at 0.2
    (1, 0.1, 0.02, 0.001): "holds here",
    (1, 0.1, 0.4, 0.3): "does not hold here",  # not below the other's
    (1, 0.1, 0.1, 0.1): "does not hold here",  # no longer falls
    (1,): "not measured here",
}


def test_the_sentence_under_figure_5(empty: Path) -> None:
    for broyden, verdict in ENDS.items():
        curves = trace(broyden, (1, 0.5, 0.3, 0.2))
        write(empty / "results/convergence/cifar10/trace.csv", curves)
        claim = build(read(Path("results")))["figure5"][0]
        assert claim["verdict"] == verdict
        numbers = f"CIFAR-10 Broyden {broyden[-1]:g}, CIFAR-10 iterating f 0.2"
        assert (numbers in claim["numbers"]) == (len(broyden) > 1)


def test_more_steps_as_the_resolution_grows(empty: Path) -> None:
    for rates, verdict in (
        ((0.3, 0.5, 0.95), "holds here"),
        ((0.5, 0.3, 0.95), "does not hold here"),
    ):
        for name, rate in zip(SETS, rates, strict=True):
            curve = [rate**k for k in range(1, 40)]
            write(empty / f"results/convergence/{name}/trace.csv", trace(curve, curve))
        claim = build(read(Path("results")))["figure5"][1]
        assert claim["verdict"] == verdict
        counts = sorted(re.findall(r"evaluations (\w+)", claim["numbers"]))
        assert counts == ["4", "7", "inf"]  # 0.3**4 and 0.5**7 are the first below 0.01


def test_the_page_is_one_file_that_loads_nothing(here: Path) -> None:
    text, _, _ = made()
    ids, sources = attributes(text, "id"), attributes(text, "src")
    assert len(ids) == len(set(ids)) == 9
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert len(attributes(text, "alt")) == len(sources)
    links = {link.removeprefix("#") for link in attributes(text, "href")}
    assert links == {*ids, "data:,"}
    assert not re.search(r"@import|url\(|https?://", re.sub(r"base64,[^\"]*", "", text))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def contrast(*colours: str) -> float:
    """The contrast of two colours by WCAG 2.1."""
    digits = [colour * 2 if len(colour) == 3 else colour for colour in colours]
    parts = np.array([[int(six[i : i + 2], 16) / 255 for i in (0, 2, 4)] for six in digits])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_the_page_can_be_read() -> None:
    style = Path(comparison.__file__).with_name("style.css").read_text("utf-8")
    schemes = [dict(re.findall(r"--(\w+): #(\w+)", part)) for part in style.split("@media")[:2]]
    assert contrast("000", "fff") == pytest.approx(21)
    for scheme in schemes:
        for ink in ("ink", "soft", "link"):
            for ground in ("page", "tint") + ("notice",) * (ink == "ink"):
                assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)


def test_hostile_names_stay_text(here: Path) -> None:
    name = "<b onclick=x>|`*_$\\frac [x](javascript:y) 猫"
    for stage in ("classify", "evaluate"):
        folder = here / "results" / stage / (f"cifar10-{name}" if stage == "evaluate" else name)
        write(folder / "metrics.json", {"eval/top1": 55.5, "solver/nfe": 3.0})
        write(folder / "facts.json", FACTS | {"device": "<script>alert(1)</script> | `x`"})
        write(folder / "history.csv", HISTORY)
        picture(folder / "curves.png")
    page, markdown, _ = made()
    assert name in words(page) and "<script>alert(1)</script> | `x`" in words(page)
    (row,) = (line for line in markdown.splitlines() if line.startswith("| Table 1 | \\<b"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert f"classify/{name}" in attributes(page, "alt")


@pytest.mark.parametrize("only", ["data", "classify", "evaluate", "convergence", "benchmark"])
def test_any_one_stage_alone_makes_a_report(empty: Path, only: str) -> None:
    tree(empty / "all")
    (empty / "results").mkdir()
    (empty / "all" / only).rename(empty / "results" / only)
    page, _, record = made()
    assert record["problems"] == []
    assert attributes(page, "src")


BROKEN = {
    "data/cifar10/summary.json": "[]",
    "benchmark/metrics.json": "\x00",
    "classify/mdeq-small/metrics.json": '{"eval/top1": 7',
    "classify/mdeq-small/facts.json": '{"seeds": "none"}',
    "classify/mdeq-small/history.csv": "seed,epoch,eval/top1\n0,1,high\n",
    "evaluate/cifar10-mdeq-small/metrics.json": '{"eval/top1": [72]}',
    "evaluate/cifar10-mdeq-small/by_steps.csv": "steps\n1\n",
    "convergence/cifar10/trace.csv": "solver,batch\nbroyden,0\n",
}


def test_a_damaged_file_is_named_in_one_line(here: Path) -> None:
    for name, content in BROKEN.items():
        write(here / "results" / name, content)
    page, _, record = made()
    shown = words(page)
    assert len(record["problems"]) == len(BROKEN)
    for problem, name in zip(record["problems"], BROKEN, strict=True):
        assert problem.startswith(f"results/{name}: damaged (") and "\n" not in problem
        assert f"results/{name}: damaged" in shown
    assert "87.1 ± 0.4" in shown  # the rest of the report is there


def test_wild_numbers_are_dashes(here: Path) -> None:
    write(here / "results/evaluate/cifar10-mdeq-small/metrics.json", '{"eval/top1": NaN}')
    write(here / "results/benchmark/metrics.json", '{"mdeq/relative_time": Infinity}')
    write(here / "results/convergence/cifar10/trace.csv", trace((-1, 1), (0, 0)))
    write(here / "results/classify/mdeq-small/history.csv", "seed,epoch,eval/top1\n0,1,inf\n0,2,\n")
    _, text, record = made()
    assert "| 87.1 ± 0.4 | – |" in text and not re.search(r"\b(nan|inf)\b", text)
    assert record["problems"] == []


def test_the_readme_table_is_made_from_the_record_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, record = made()
    table = readme_table(record)
    assert table in text and table.startswith("| | measure | paper | here | on |\n")
    file = here / "README.md"
    file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.show(file)
    assert file.read_text() == f"before\n{report.BEGIN}\n{table}{report.END}\nafter\n"
    report.show()
    printed = capsys.readouterr().out
    assert "72.4" in printed and str(here / "results/report/index.html") in printed


def test_show_says_what_is_wrong(here: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: no such file; run `make repro`"):
        report.show()
    for content in ("{}", '{"tables": 7, "figure4b": {}}', "["):
        write(here / "results/report/results.json", content)
        with pytest.raises(UserError, match=r"results\.json: .*run `"):
            report.show()
    made()
    write(here / "README.md", "no marks")
    with pytest.raises(UserError, match=r"README\.md: no place for the table"):
        report.show(here / "README.md")


def test_a_second_report_forgets_the_first(here: Path) -> None:
    first = made()[1]
    (here / "results/classify/mdeq-small/history.csv").unlink()
    assert "figure4a.svg" in first and "figure4a.svg" not in made()[1]
    lines = (here / "results/report/run.jsonl").read_text().splitlines()
    assert sum('"run"' in line for line in lines) == 1


# The published tables: size and numbers, in Table 3 with the backbone before them.
PRINTED = """
172K 53.7 0.2 / 172K 60.6 0.4 / 170K 82.2 0.3 / 170K 81.6 0.3 / 170K 87.1 0.4 / 10M 92.9 0.2 /
10M 93.8 0.3

238M 57.0 80.3 / 13M 70.2 89.9 / 21M 74.8 91.1 / 12M 74.8 92.2 / 26M 75.1 92.5 / 21M 76.8 93.4 /
18M 72.9 91.0 / 18M 75.5 92.7 / 52M 77.1 93.5 / 69M 78.1 93.9 / 74M 79.7 94.8 / 63M 77.5 93.6 /
63M 75.9 93.0 / 81M 79.2 94.5

ResNet-18 3.8M 55.4 / ResNet-18 15.24M 69.1 / MobileNetV2 8.3M 74.5 / ResNet-50 - 73.0 /
HRNet 4.0M 76.0 / MDEQ 7.8M 75.1 / ResNet-101 59.5M 75.5 / D-ResNet-101 52.1M 75.7 /
D-ResNet-101 65.9M 78.4 / D-ResNet-101 58.0M 78.5 / ResNet-101 - 78.6 / HRNet 65.9M 81.1 /
MDEQ 53.0M 77.8 / MDEQ 70.9M 80.3
"""


def test_the_paper_as_printed() -> None:
    for printed, table in zip(PRINTED.split("\n\n"), PAPER["tables"], strict=True):
        ours = [(row.get("backbone", ""), row["size"], *row["paper"]) for row in table["rows"]]
        cells = " / ".join(" ".join(row).replace("± ", "").strip() for row in ours)
        assert cells == " ".join(printed.split())
    assert PAPER["figure4b"]["relative"]["mdeq"] == ["2.7", "< 0.4"]


def test_the_papers_own_numbers_bear_out_its_claims() -> None:
    """What is judged of ours must hold of the printed numbers, or it is judged wrongly."""
    root = Results()
    for stage, table in zip(("classify", "pretrain", "finetune"), PAPER["tables"], strict=True):
        key = next(iter(table["measures"].values()))
        for row in table["rows"]:
            value = float(row["paper"][0].split()[0])
            root.found[f"{stage}/{row.get('model')}"] = Result({key: value})
    verdicts = [c["verdict"] for table in build(root)["tables"] for c in table["claims"]]
    assert len(verdicts) == 10 and set(verdicts) == {"holds here"}


def test_only_files_are_read(empty: Path) -> None:
    write(empty / "results/classify/mdeq-small", "a file where a folder belongs")
    write(empty / "results/data/cifar10/summary.json/x", "a folder where a file belongs")
    assert read(Path("results")) == Results()
