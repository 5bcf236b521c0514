"""params.yaml: what is valid loads as the library's types; what is wrong is named, a line each."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mdeq import Broyden, Gmres, Implicit, MDEQConfig
from pipeline import params, settings
from pipeline.errors import UserError
from pipeline.params import ClassifyParams, check_warm_up
from pipeline.recipe import Adam, Recipe, WarmStart, WarmUp

ROOT = Path(__file__).parents[1]
SHIPPED = ("params.yaml", *(f"params/{file.name}" for file in (ROOT / "params").glob("*.yaml")))
SMALL = "classify.mdeq-small"
GONE = object()


def loaded(path: Path) -> Any:
    return json.loads(json.dumps(YAML(typ="safe").load(path.read_text())))  # aliases apart


DEMO = loaded(ROOT / "params.yaml")


def put(data: Any, keys: Any, value: Any) -> None:
    """Sets or removes what is there under some keys."""
    *parents, last = keys
    for key in parents:
        data = data.setdefault(key, {}) if isinstance(data, dict) else data[key]
    if value is GONE:
        del data[last]
    else:
        data[last] = value


def edited(workspace: Path, edits: dict[str, Any]) -> Path:
    """The demo's params with some dotted keys set, or removed."""
    data = copy.deepcopy(DEMO)
    for dotted, value in edits.items():
        put(data, dotted.split("/") if "/" in dotted else dotted.split("."), value)
    path = workspace / "params.yaml"
    path.write_text(json.dumps(data).replace("Infinity", ".inf"), encoding="utf-8")  # JSON is YAML
    return path


def errors(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        params.check(path)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


# what is valid


@pytest.mark.parametrize("file", SHIPPED)
def test_what_we_ship_is_valid_and_repeats_no_null(repository: Path, file: str) -> None:
    params.check(repository / file)
    text = (repository / file).read_text()
    assert "schema" not in text
    if file == "params.yaml":
        assert len(text.splitlines()) <= 100 and "null\n" not in text


def test_a_section_is_a_recipe_of_the_librarys_own_types(repository: Path) -> None:
    small = params.load("classify", "mdeq-small", repository / "params/paper.yaml")
    assert isinstance(small, ClassifyParams) and isinstance(small, Recipe)
    assert small.model == MDEQConfig(channels=(24, 24), dropout=0.25)
    assert small.forward == Broyden(steps=18, tolerance=1e-3, stop="relative")
    assert small.backward == Implicit(Broyden(steps=20, tolerance=1e-3, stop="relative"))
    assert small.optimizer == Adam(lr=1e-3, weight_decay=2.5e-6)
    assert (small.warm_up.layers, small.warm_up.steps) == (10, 3000)
    assert (small.batch, small.epochs, small.seeds) == (128, 50, (0, 1, 2, 3, 4))


PUBLISHED = {  # what the authors' released configurations say of their models
    ("pretrain", "mdeq-small"): (128, 100, 5e-5, (5, 510_000), (26, 27), 0.0),
    ("pretrain", "mdeq-large"): (128, 100, 1e-4, (4, 510_000), (26, 27), 0.0),
    ("pretrain", "mdeq-xl"): (256, 100, 1e-4, (4, 400_000), (26, 27), 0.0),
    ("finetune", "mdeq-small"): (12, 500, 2e-4, (3, 60_000), (27, 30), 0.05),
    ("finetune", "mdeq-large"): (12, 500, 3e-4, (3, 60_000), (27, 30), 0.03),
    ("finetune", "mdeq-xl"): (16, 500, 3e-4, (3, 40_000), (27, 30), 0.04),
}


@pytest.mark.parametrize(("entry", "published"), PUBLISHED.items())
def test_the_papers_models_have_the_published_settings(
    repository: Path, entry: tuple[str, str], published: tuple[Any, ...]
) -> None:
    batch, epochs, decay, warm_up, steps, dropout = published
    found = params.load(*entry, repository / "params/paper.yaml")
    assert (found.batch, found.epochs, found.optimizer.weight_decay) == (batch, epochs, decay)
    assert (found.warm_up.layers, found.warm_up.steps) == warm_up
    assert (found.forward.steps, found.backward.solver.steps) == steps
    assert found.forward.stop == found.backward.solver.stop == "absolute"
    assert found.model.dropout == dropout and found.model.post_fusion_affine
    if entry[0] == "finetune":
        assert found.backbone == entry[1] and found.test_size == (1024, 2048)
        assert found.loss.class_weights and not found.loss.ohem


def test_the_whole_demo_has_the_demo_unchanged(repository: Path) -> None:
    """So what `make repro` has trained with one is up to date with the other."""
    whole = loaded(repository / "params/all.yaml")
    assert DEMO["prepare"] == whole["prepare"] and DEMO["scale"] == whole["scale"]
    for stage in ("classify", "pretrain", "finetune"):
        assert DEMO[stage].items() <= whole[stage].items()


def test_a_section_as_json_gives_the_same_section(workspace: Path) -> None:
    entry = params.load("pretrain", "mdeq-small")
    path = edited(workspace, {"pretrain.mdeq-small": params.plain(entry)})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is no key
    assert params.load("pretrain", "mdeq-small", path) == entry
    with pytest.raises(UserError, match="pretrain.x: is missing; there are: mdeq-small"):
        params.load("pretrain", "x", path)


def test_a_linear_solver_is_for_the_adjoint_alone(workspace: Path) -> None:
    adjoint = {"kind": "implicit", "solver": {"kind": "gmres", "steps": 3}}
    path = edited(workspace, {f"{SMALL}.backward": adjoint})
    assert params.load("classify", "mdeq-small", path).backward == Implicit(Gmres(steps=3))
    (found,) = errors(edited(workspace, {f"{SMALL}.forward": {"kind": "gmres"}}))
    assert "forward.kind: must be one of broyden, anderson, fixed_point, not" in found


# what is wrong

WRONG_VALUES = [
    ("batch", "64", 'batch: must be a valid integer, not "64"'),
    ("batch", True, "batch: must be a valid integer, not true"),
    ("batch", 0, "batch: must be a whole number of at least 1, not 0"),
    ("epochs", GONE, "epochs: is missing"),
    ("optimizer.lr", "1e-3", 'optimizer.lr: must be a valid number, not "1e-3"'),
    ("optimizer.lr", 0, "optimizer.lr: must be a number greater than 0, not 0"),
    ("optimizer.lr", float("inf"), "optimizer.lr: must be a finite number, not Infinity"),
    ("optimizer.kind", GONE, "optimizer.kind: must be one of adam, sgd, muon, not null"),
    ("optimizer", {"kind": "muon", "rest": {"lr": 0}}, "optimizer.rest.lr: must be a number"),
    ("forward.stop", "rel", "forward.stop: must be 'relative' or 'absolute', not \"rel\""),
    ("forward.step", 3, "forward.step: unknown key; did you mean steps? allowed: "),
    ("forward", None, "forward: is missing; an mdeq needs it"),
    ("forward", 7, "forward: must be a mapping (key: value lines), not 7"),
    ("model.channels", [20, 24], "model.channels: "),
    ("model.channels", [24, "x"], 'model.channels.1: must be a valid integer, not "x"'),
    ("model.kind", "mdqe", "model.kind: must be one of mdeq, resnet18, neural_ode, explicit,"),
    ("model", {"kind": "explicit", "name": "vgg"}, "model.name: must be one of "),
    ("head.channels", [8], "head.channels: must have 2 numbers, one per scale"),
    ("jacobian.stop_epoch", 0, "jacobian.stop_epoch: must be a whole number of at least 1"),
    ("warm_start", {"steps": []}, "warm_start.steps: must have at least one number"),
    ("seeds", [2**32], "seeds.0: must be less than or equal to 4294967295, not 4294967296"),
    ("seeds", [1, 1], "seeds: must be one or more different numbers, not [1, 1]"),
    ("seeds", [], "seeds: must be one or more different numbers, not []"),
    ("augment", "2020-01-01", 'augment: must be a valid boolean, not "2020-01-01"'),
    ("precision", "float64", "precision: must be 'float32', 'bfloat16' or 'float16', not"),
]


RESNET, FINETUNE = "classify.resnet18-small", "finetune.mdeq-small"
WRONG_SECTIONS = [
    ({"mnist": {}}, "mnist: unknown key; allowed: "),
    ({"scale": None}, "scale: must be a valid string, not null"),
    ({"prepare.cifar10.source": "x"}, "prepare.cifar10.source: must be 'generated', 'folder"),
    ({"prepare.cifar10.generated": GONE}, "prepare.cifar10.generated: must be given with `source"),
    ({"prepare.cifar10.source": "folder"}, "prepare.cifar10.generated: must be given with `sou"),
    ({"prepare.imagenet.generated.classes": 1}, "prepare.imagenet.generated.classes: must be gr"),
    ({f"{FINETUNE}.backbone": "x"}, f"{FINETUNE}.backbone: there is no mdeq 'x' in pretrain"),
    ({f"{FINETUNE}.model.expansion": 3}, f"{FINETUNE}.model.expansion: must be that of pretrain"),
    ({f"{FINETUNE}.crop": [64]}, f"{FINETUNE}.crop.1: Field required"),
    ({f"{RESNET}.model": {"kind": "explicit", "name": "hrnet_w48"}}, f"{RESNET}.model.name: hrnet"),
    ({f"{RESNET}.forward": {"kind": "broyden"}}, f"{RESNET}.forward: must be left out"),
    ({f"{SMALL}.warm_start": {}, f"{SMALL}.augment": True}, f"{SMALL}.warm_start: needs `augment"),
    ({"evaluate.mnist": {"batch": 1}}, "evaluate.mnist: must be 'cifar10', 'imagenet' or"),
    ({"evaluate.cifar10.examples": 65}, "evaluate.cifar10.examples: must be less than or"),
    (
        {"convergence.cifar10.model": "resnet18-small"},
        "convergence.cifar10.model: there is no mdeq",
    ),
    ({"convergence.cifar10.solvers": []}, "convergence.cifar10.solvers: must be one or more"),
    ({"benchmark.reference": "x"}, "benchmark.reference: must be one of models ("),
    ({"classify/a.b": DEMO["classify"]["mdeq-small"]}, "classify.a.b: a name begins with a letter"),
]


WRONG_SECTIONS += [({f"{SMALL}.{k}": v}, f"{SMALL}.{line}") for k, v, line in WRONG_VALUES]


@pytest.mark.parametrize(("edits", "line"), WRONG_SECTIONS)
def test_an_error_names_key_value_and_what_is_allowed(
    workspace: Path, edits: dict[str, Any], line: str
) -> None:
    (found,) = errors(edited(workspace, edits))
    assert found.startswith(line) and "Value error" not in found


def test_errors_of_several_places_are_listed_at_once(workspace: Path) -> None:
    wrong = {"epochs": "x", "lr": 1, "forward.step": 1, "optimizer.lr": 0, "jacobian.weight": GONE}
    edits = {f"{SMALL}.{key}": value for key, value in wrong.items()}
    edits |= {"evaluate.cifar10.batch": GONE, f"{RESNET}.batch": 0}
    keys = [line.partition(": ")[0] for line in errors(edited(workspace, edits))]
    assert sorted(keys) == sorted(edits)


NO_NAMES = "1 True ~ None 0o17 1e3 on off Yes no null y n -a _a .a a.b a/b 1_000 a:b".split()


@pytest.mark.parametrize("text", [*NO_NAMES, "", " ", "a b", "é", "a" * 101, "a\n"])
def test_a_name_must_read_alike_everywhere(text: str) -> None:
    with pytest.raises(ValueError, match="a name begins with a letter"):
        settings.name(text)
    assert settings.name("mdeq-small_2") == "mdeq-small_2"


def test_names_that_are_values_to_yaml_are_refused_in_a_file(workspace: Path) -> None:
    path = workspace / "params.yaml"
    whole = path.read_text()
    for text in ("1", "True", "~", "0o17", "1e3", "? {a: 1}\n ", "2020-01-01", '"on"', "None"):
        path.write_text(whole.replace("  resnet18-small:", f"  {text}:"))
        found = errors(path)
        assert len(found) == 1 and ("name" in found[0] or "not YAML" in found[0]), (text, found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"a: [1\nb: 2", "line 2: not YAML: "),
        (b"a: 1\na: 2", 'line 2: not YAML: found duplicate key "a"'),
        (b"a:\n\t- 1", "line 2: not YAML: "),
        (b"- 1", "the file: must be a mapping (key: value lines), not [1]"),
        (b"", "the file: must be a mapping (key: value lines), not null"),
        (b"\xff\xfe", "cannot be read ("),
        (b"a: &x [*x]", "not YAML: Circular reference detected"),
        (b"a: " + b"9" * 9000, "not YAML: "),
        (b"[" * 9000, "not YAML: "),
        (b"!!python/object:os.system [ls]", ""),
    ],
)
def test_what_is_no_params_file_is_one_line(workspace: Path, text: bytes, line: str) -> None:
    (workspace / "params.yaml").write_bytes(text)
    (found,) = errors(workspace / "params.yaml")
    assert found.startswith(line)
    (found,) = errors(workspace / "none.yaml")
    assert "No such file" in found and "--params" in found


def test_preparing_reads_its_section_without_torch(workspace: Path) -> None:
    edited(workspace, {f"{SMALL}.batch": "many"})
    code = """
import sys, types
from typer.testing import CliRunner
from pipeline.cli import app
stage = sys.modules["pipeline.stages.prepare"] = types.ModuleType("pipeline.stages.prepare")
stage.run = lambda dataset, section, machine: print(section.generated.train)
result = CliRunner().invoke(app, ["prepare", "cifar10"])
assert (result.exit_code, result.stdout) == (0, "2560\\n"), result.output
assert "torch" not in sys.modules
"""
    environment = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=workspace, env=environment)


# changes on the command line


def test_changes_replace_values_of_one_section(workspace: Path) -> None:
    before = params.load("classify", "mdeq-small")
    changes = ["optimizer.lr=3e-4", "epochs=5", "seeds=[1, 2]"]
    changes += ["warm_start.steps=[2]", "jacobian=null"]
    assert params.load("classify", "mdeq-small", changes=changes) == replace(
        before,
        optimizer=replace(before.optimizer, lr=3e-4),
        epochs=5,
        seeds=(1, 2),
        warm_start=WarmStart((2,)),
        jacobian=None,
    )
    assert params.load("classify", "mdeq-small") == before


WITH = "params.yaml with --set batch=16 "


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("epochs", "--set epochs: must be a key and its value, such as optimizer.lr=3e-4"),
        ("epochs=[", "--set epochs=[: must be a key and its value"),
        ("epochs.x=1", "--set epochs.x=1: must be a key and its value"),
        ("=3", f"{WITH}=3: {SMALL}.: unknown key"),
        ("epoch=3", f"{WITH}epoch=3: {SMALL}.epoch: unknown key; did you mean epochs?"),
        ("epochs=many", f"{WITH}epochs=many: {SMALL}.epochs: must be a valid integer, not"),
        ("optimizer.lr=-1", f"{WITH}optimizer.lr=-1: {SMALL}.optimizer.lr: must be a number gr"),
    ],
)
def test_a_wrong_change_names_the_option(workspace: Path, change: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        params.load("classify", "mdeq-small", changes=["batch=16", change])
    (found,) = str(caught.value).splitlines()
    assert found.startswith(line)


def test_a_warm_up_must_be_shorter_than_its_training() -> None:
    entry = params.load("classify", "mdeq-small", ROOT / "params.yaml")
    entry = replace(entry, warm_up=WarmUp(layers=3, steps=40), epochs=3, warm_start=None)
    check_warm_up("classify.a", entry, 2560)
    with pytest.raises(UserError, match=r"classify\.a\.warm_up\.steps: must be fewer than the 9"):
        check_warm_up("classify.a", entry, 96)
    with pytest.raises(UserError, match="30 updates of this training .320 images"):
        check_warm_up("classify.a", replace(entry, limit=320), 2560)


# whatever the file says


def places(node: Any, where: tuple = ()) -> list[tuple]:
    found = [where] if where else []
    if isinstance(node, list):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, dict) else ():
        found += places(value, (*where, key))
    return found


WORDS = "mdeq resnet18 broyden gmres muon 7 1e-3 .nan ~ 2020-01-01".split()
PLAIN = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats()
TEXTS = st.text(max_size=8) | st.sampled_from(WORDS)
KEYS = st.text(max_size=5) | st.just("kind")
VALUES = st.recursive(
    PLAIN | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
RANDOM = hypothesis_settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_lines(path: Path) -> None:
    """Valid, or wrong in lines that name the file; never another exception."""
    try:
        params.check(path)
    except UserError as error:
        prefix = f"{path}: "
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith(prefix) and len(line) > len(prefix) for line in lines)


@RANDOM
@given(st.lists(st.tuples(st.sampled_from(places(DEMO)), VALUES | st.just(GONE)), max_size=3))
def test_no_value_anywhere_gives_a_traceback(
    tmp_path: Path, edits: list[tuple[tuple, Any]]
) -> None:
    data = copy.deepcopy(DEMO)
    for keys, value in edits:
        with suppress(KeyError, IndexError, TypeError):  # an earlier edit took the place away
            put(data, keys, value)
    (tmp_path / "params.yaml").write_text(json.dumps(data), encoding="utf-8")
    check_lines(tmp_path / "params.yaml")


ALPHABET = "ab:-[]{}#&*!|>'\"%@`?,.~ \n\t0\u00e9\u2028"


@RANDOM
@given(st.text(st.sampled_from(ALPHABET), max_size=40).map(str.encode) | st.binary(max_size=40))
def test_no_bytes_at_all_give_a_traceback(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(text)
    check_lines(tmp_path / "params.yaml")
