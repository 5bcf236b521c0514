"""README, CONTRIBUTING and docs/: what they show runs, and what they name exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from dvc.cli.parser import get_main_parser
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.report import pages
from pipeline.stages import report as report_stage

ROOT = Path(__file__).parents[1]
PAGES = (*ROOT.glob("[RC]*.md"), *ROOT.glob("docs/*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
SOURCES = [path.read_text("utf-8") for path in (ROOT / "pipeline").rglob("*.py")]
OTHERS = {"cp", "git", "docker", "pip", "torchrun", "srun", ".venv/bin/pre-commit"}  # not ours


def shell(text: str) -> list[str]:
    """The commands of a text: lines of its sh blocks, and code within lines like them."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in blocks.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " ")
    inline = re.findall(r"`((?:make |dvc |cp |python -m (?:pipeline|benchmarks))[^`]*)`", prose)
    return [line for line in (*lines, *inline) if line]


SHOWN = sorted(
    (name, line) for name, text in TEXTS.items() if name != "CHANGELOG.md" for line in shell(text)
)


@pytest.mark.parametrize(("name", "command"), SHOWN)
def test_a_command_exists_as_it_is_shown(name: str, command: str) -> None:
    command = re.sub(r"\[[^\]]*\]|<set>|\$\w+|\$\([^)]*\)", "cifar10", command)
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    match words:
        case [] | ["export", _]:
            pass
        case ["make", target, *_]:
            makefile = (ROOT / "Makefile").read_text("utf-8")
            assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE)
        case ["python", "-m", module, *_] if module.startswith("benchmarks."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
        case ["python", "-m", "pipeline", command, *options] if command != "--help":
            shown = CliRunner().invoke(app, [command, "--help"])
            assert shown.exit_code == 0, command
            parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
            known = {option for parameter in parameters for option in parameter.opts} | {"--help"}
            assert {word for word in options if word.startswith("--")} <= known
        case ["dvc", "queue" | "remote", *_]:
            pass
        case ["dvc", *arguments]:
            get_main_parser().parse_args(arguments)
        case ["cp", source, *_]:
            assert (ROOT / source).is_file()
        case ["python", *_]:
            pass
        case _:
            assert words[0] in OTHERS, f"{name}: a command that no test knows"


@pytest.mark.parametrize("name", TEXTS)
def test_links_files_and_variables_exist(name: str) -> None:
    text = TEXTS[name]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    named = r"`((?:mdeq|pipeline|tests|params|docs|benchmarks|weights)/[\w./-]*)`"
    for file in re.findall(named, text):
        assert (ROOT / file).exists(), file
    for variable in set(re.findall(r"`((?:MDEQ|MLFLOW)_[A-Z]+[A-Z_0-9]*)[`=]", text)):
        stem = "MDEQ_DATA_" if variable.startswith("MDEQ_DATA_") else variable
        assert any(stem in source for source in SOURCES), variable


@pytest.mark.parametrize("name", ["README.md", "docs/paper.md"])
def test_the_python_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shared: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL):
        exec(compile(block, name, "exec"), shared)


def test_the_first_lines_of_readme_train(capsys: pytest.CaptureFixture[str]) -> None:
    first = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    assert first
    exec(compile(first[1], "README.md", "exec"), {})
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_the_demos_table_is_that_of_the_recorded_report() -> None:
    record = json.loads((ROOT / "docs/measured/demo.json").read_text("utf-8"))
    begin, end = report_stage.BEGIN, report_stage.END
    shown = TEXTS["README.md"].partition(begin)[2].partition(end)[0]
    assert pages.readme_table(record).strip() == shown.strip()


def test_the_row_of_real_data_is_that_of_its_card() -> None:
    (row,) = re.findall(r"^\| MDEQ-small, 170K \|.*$", TEXTS["README.md"], re.MULTILINE)
    name = re.findall(r"weights/([\w-]+)\.safetensors", row)[0]
    card = json.loads((ROOT / f"weights/{name}.json").read_text("utf-8"))
    assert f"{card['measured']['eval/top1']:.2f}" in row
    assert f"{card['core-hours']:.1f}" in row
