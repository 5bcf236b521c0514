"""params.yaml: what is right loads as the library's types; what is wrong is named, all of it, a line each."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mdeq import Broyden, Gmres, Implicit, MDEQConfig
from pipeline import params
from pipeline.paper import TABLES
from pipeline.params import ParamsError, PrepareParams
from pipeline.train_params import ClassifyParams, FinetuneParams

CLASSIFY = "classify.mdeq-small"
GONE = object()


def edited(workspace: Path, edits: dict[str, Any]) -> Path:
    """The demo's params with some dotted keys set, or removed."""
    path = workspace / "params.yaml"
    data = YAML(typ="safe").load(path.read_text())
    for dotted, value in edits.items():
        *parents, last = dotted.split("/") if "/" in dotted else dotted.split(".")
        node = data
        for key in parents:
            node = node[key]
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    with path.open("w") as file:
        YAML(typ="safe").dump(data, file)
    return path


def errors(path: Path) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        params.check(path)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("name", ["params.yaml", "params/paper.yaml", "params/all.yaml", "params/soak.yaml"])
def test_what_we_ship_is_right(repository: Path, name: str) -> None:
    params.check(repository / name)


def test_a_section_loads_as_the_librarys_own_types(repository: Path) -> None:
    small = params.load("classify", "mdeq-small", repository / "params/paper.yaml")
    assert isinstance(small, ClassifyParams)
    assert small.model == MDEQConfig(channels=(24, 24), dropout=0.25)
    assert small.forward == Broyden(steps=18, tolerance=1e-3, stop="relative")
    assert small.backward == Implicit(Broyden(steps=20, tolerance=1e-3, stop="relative"))
    assert (small.warm_up.layers, small.warm_up.steps, small.batch, small.epochs) == (10, 3000, 128, 50)


def test_the_papers_models_are_all_there(repository: Path) -> None:
    path = repository / "params/paper.yaml"
    data = YAML(typ="safe").load(path.read_text())
    for table in TABLES:
        assert {row.model for row in table.rows if row.model} <= set(data[table.stage])
    for name in ("mdeq-small", "mdeq-large", "mdeq-xl"):
        entry = params.load("finetune", name, path)
        assert isinstance(entry, FinetuneParams)
        assert entry.backbone == name and entry.test_size == (1024, 2048) and entry.loss.class_weights
    xl = params.load("finetune", "mdeq-xl", path)
    assert isinstance(xl, FinetuneParams)
    assert (xl.model.expansion, xl.batch, xl.crop, xl.optimizer.weight_decay) == (6, 16, (768, 1024), 3e-4)


def test_the_whole_demo_holds_the_demo_unchanged(repository: Path) -> None:
    """What `make repro` has trained, `make repro-all` finds up to date, and the other way round."""
    demo, whole = (
        YAML(typ="safe").load((repository / name).read_text()) for name in ("params.yaml", "params/all.yaml")
    )
    assert demo["prepare"] == whole["prepare"] and demo["scale"] == whole["scale"]
    for stage in ("classify", "pretrain", "finetune"):
        assert demo[stage].items() <= whole[stage].items()


def test_sections_survive_json(repository: Path) -> None:
    entry = params.load("pretrain", "mdeq-small", repository / "params.yaml")
    assert type(entry).model_validate_json(json.dumps(entry.model_dump(mode="json"))) == entry


def test_a_stage_reads_its_own_section_alone(workspace: Path) -> None:
    path = edited(workspace, {f"{CLASSIFY}.batch": "many", "evaluate": GONE})
    assert isinstance(params.load("prepare", "cifar10", path), PrepareParams)
    with pytest.raises(ParamsError, match=r"classify\.mdeq-small\.batch"):
        params.load("classify", "mdeq-small", path)
    with pytest.raises(ParamsError, match="evaluate: is not there; there are: .*classify"):
        params.load("evaluate", "cifar10", path)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("batch", "64", 'batch: must be a valid integer, not "64"'),
        ("batch", True, "batch: must be a valid integer, not true"),
        ("batch", 0, "batch: must be at least 1, not 0"),
        ("batch", 64.5, "batch: must be a valid integer, not 64.5"),
        ("batch", None, "batch: must be a valid integer, not null"),
        ("epochs", GONE, "epochs: is missing"),
        ("optimizer.lr", "1e-3", 'optimizer.lr: must be a valid number, not "1e-3"'),
        ("optimizer.lr", 0, "optimizer.lr: must be greater than 0, not 0"),
        ("optimizer.lr", float("inf"), "optimizer.lr: must be a finite number, not Infinity"),
        ("optimizer.kind", "adamw", "optimizer.kind: must be one of 'adam', 'sgd', not 'adamw'"),
        ("forward.kind", GONE, "forward.kind: is missing; one of 'anderson', 'broyden', 'fixed_point'"),
        ("forward.steps", -1, "forward.steps: must be at least 1, not -1"),
        ("forward.step", 3, "forward.step: unknown key; did you mean steps? allowed: check_every, kind, "),
        ("forward", None, "forward: must not be null; an mdeq needs it"),
        ("forward", 7, "forward: must be a mapping (key: value lines), not 7"),
        ("forward.memory", 5, "forward.memory: unknown key; allowed: "),
        ("backward.solver.kind", "lu", "backward.solver.kind: must be one of 'broyden', 'anderson', "),
        ("model.channels", [20, 24], "model.channels: 20 is not divisible by the 8 groups"),
        ("model.channels", 24, "model.channels: must be a valid array, not 24"),
        ("model.channels", [], "model.channels: must have at least 1 item"),
        ("model.groups", 3, "model.groups: must be a multiple of 2, not 3"),
        ("model.dropout", 1.0, "model.dropout: must be less than 1, not 1.0"),
        ("model.kind", "mdqe", "model.kind: must be one of 'mdeq', 'resnet18', 'neural_ode', 'explicit', not 'mdqe'"),
        ("model", {"kind": "resnet18"}, "head: must be null; a resnet18 has no equilibrium to find"),
        ("model.unrolled", 5, "forward: must be null; a model with `unrolled` has no equilibrium to find"),
        ("model", {"kind": "explicit", "name": "vgg"}, "model.name: must be one of alexnet, "),
        ("epochs", 0, "epochs: must be at least 1; 0 is for a classifier with `weights: default`"),
        ("head.channels", [8], "head.channels: must have 2 numbers, one a scale of model.channels"),
        ("warm_up.steps", GONE, "warm_up.steps: is missing"),
        ("jacobian", {"weight": -1.0}, "jacobian.weight: must be at least 0, not -1.0"),
        ("jacobian", {"weight": 1.0, "stop_epoch": 0}, "jacobian.stop_epoch: must be at least 1, not 0"),
        ("seeds", [2**32], "seeds.0: must be at most 4294967295, not 4294967296"),
        ("seeds", [1, 1], "seeds: must differ from each other, not [1, 1]"),
        ("augment", "on", 'augment: must be a valid boolean, not "on"'),
        ("precision", "float64", "precision: must be 'float32', 'bfloat16' or 'float16', not \"float64\""),
        ("lr", 0.1, "lr: unknown key; allowed: accumulate, augment, backward, batch, "),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(workspace: Path, key: str, value: Any, line: str) -> None:
    (found,) = errors(edited(workspace, {f"{CLASSIFY}.{key}": value}))
    assert found.startswith(f"{CLASSIFY}.{line}")


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        ({"mnist": {}}, "mnist: unknown key; allowed: benchmark, classify, "),
        ({"prepare.cifar10.source": "foldr"}, "prepare.cifar10.source: must be 'generated', 'folder' or "),
        ({"prepare.cifar10.generated": GONE}, "prepare.cifar10.generated: is missing; `source: generated` "),
        ({"prepare.imagenet.generated.classes": 1}, "prepare.imagenet.generated.classes: must be at least 2"),
        ({"finetune.mdeq-small.backbone": "x"}, "finetune.mdeq-small.backbone: no model 'x' in pretrain; "),
        (
            {"classify.resnet18-small.model": {"kind": "explicit", "name": "hrnet_w48"}},
            "classify.resnet18-small.model.n",
        ),
        ({"finetune.mdeq-small.crop": [64]}, "finetune.mdeq-small.crop.1: is missing"),
        ({"finetune.mdeq-small.model.expansion": 3}, "finetune.mdeq-small.model.expansion: must be that "),
        ({"convergence.cifar10.model": "x"}, "convergence.cifar10.model: no mdeq 'x' in classify; "),
        ({"convergence.cifar10.model": "resnet18-small"}, "convergence.cifar10.model: no mdeq 'resnet18"),
        ({"convergence.cifar10.solvers": []}, "convergence.cifar10.solvers: must have at least 1 item"),
        ({"benchmark.reference": "x"}, "benchmark.reference: must be one of models ("),
        ({"classify/a.b": {}}, "classify.a.b: a model's name is made of letters, digits, - and _"),
    ],
)
def test_errors_of_other_sections(workspace: Path, edits: dict[str, Any], line: str) -> None:
    assert errors(edited(workspace, edits))[0].startswith(line)


def test_all_errors_are_said_at_once(workspace: Path) -> None:
    path = edited(workspace, {f"{CLASSIFY}.batch": 0, f"{CLASSIFY}.lr": 1, "evaluate.cifar10.batch": GONE})
    keys = [line.partition(": ")[0] for line in errors(path)]
    assert sorted(keys) == [f"{CLASSIFY}.batch", f"{CLASSIFY}.lr", "evaluate.cifar10.batch"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2", "line 2: not YAML: "),
        ("a: 1\na: 2", 'line 2: not YAML: found duplicate key "a"'),
        ("- 1", "must hold sections"),
        ("", "must hold sections"),
        ("a: &x [*x]", "not YAML: more than 100,000 values, or an alias that holds itself"),
    ],
)
def test_what_is_no_params_file_is_one_line(workspace: Path, text: str, line: str) -> None:
    path = workspace / "params.yaml"
    path.write_text(text)
    (found,) = errors(path)
    assert found.startswith(line)


def test_a_missing_file_says_what_to_do(workspace: Path) -> None:
    (found,) = errors(workspace / "none.yaml")
    assert "no such file" in found and "--params" in found


def test_explicit_models_need_no_solver(workspace: Path) -> None:
    entry = params.load("classify", "resnet18-small")
    assert isinstance(entry, ClassifyParams)
    assert entry.forward is None and entry.model.kind == "resnet18"


def test_an_adjoint_solver_that_only_solves_linear_systems_is_no_forward_solver(workspace: Path) -> None:
    path = edited(workspace, {f"{CLASSIFY}.backward.solver": {"kind": "gmres", "steps": 3}})
    entry = params.load("classify", "mdeq-small", path)
    assert isinstance(entry, ClassifyParams) and entry.backward == Implicit(Gmres(steps=3))
    (found,) = errors(edited(workspace, {f"{CLASSIFY}.forward": {"kind": "gmres"}}))
    assert "forward.kind: must be one of" in found


def test_a_right_file_is_not_checked_again_until_it_changes(workspace: Path) -> None:
    stamp = workspace / "work" / "stamp"
    path = workspace / "params.yaml"
    params.check(path, stamp)
    code = (
        "import sys; from pathlib import Path; from pipeline import params; "
        f"params.check(Path({str(path)!r}), Path({str(stamp)!r})); "
        f"params.load('prepare', 'cifar10', {str(path)!r}); "
        "assert 'torch' not in sys.modules"
    )
    root = Path(params.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    edited(workspace, {f"{CLASSIFY}.batch": 0})
    with pytest.raises(ParamsError):
        params.check(path, stamp)


def test_the_schema_knows_ranges_and_refuses_unknown_keys() -> None:
    definitions = json.loads(params.schema())["$defs"]
    assert definitions["Broyden"]["properties"]["steps"]["minimum"] == 1
    assert all(d["additionalProperties"] is False for d in definitions.values() if "properties" in d)


def test_the_committed_schema_is_the_generated_one(repository: Path) -> None:
    committed = (repository / params.SCHEMA).read_text(encoding="utf-8")
    assert committed == params.schema(), "run `make schema` and commit params.schema.json"


# ---- whatever stands in the file


def _places(node: Any, where: tuple = ()) -> list[tuple]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inner for place in ((*where, key), *_places(value, (*where, key)))]


SHIPPED = YAML(typ="safe").load((Path(params.__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["mdeq", "resnet18", "broyden", "gmres", "7", "1e-3", ".nan", "~", "2020-01-01"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("kind"), inner, max_size=3)
    ),
    max_leaves=5,
)


def _says_what_is_wrong(path: Path) -> None:
    """Right, or wrong in lines that name the file; never another exception."""
    try:
        params.scale(path)
        params.check(path)
    except ParamsError as error:
        lines = str(error).splitlines()
        assert lines and all(line.startswith(f"{path}: ") and len(line) > len(f"{path}: ") for line in lines)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.sampled_from(_places(SHIPPED)), st.one_of(VALUES, st.just(GONE))), max_size=3))
def test_no_value_anywhere_gives_a_traceback(tmp_path: Path, edits: list[tuple[tuple, Any]]) -> None:
    data = copy.deepcopy(SHIPPED)
    for place, value in edits:
        node = data
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier edit took the place away
            for key in place[:-1]:
                node = node[key]
            if value is GONE:
                del node[place[-1]]
            else:
                node[place[-1]] = value
    (tmp_path / "params.yaml").write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML
    _says_what_is_wrong(tmp_path / "params.yaml")


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`?,.~ \n\t0\u00e9\u2028"), max_size=40).map(str.encode)
    | st.binary(max_size=40)
    | st.sampled_from(
        [
            b"[" * 9000,
            b"a: " + b"9" * 9000,
            b"a: &a [*a]",
            b"? {a: 1}\n: 2",
            b"!!python/object:os.system [ls]",
            b"\xff\xfe",
            b"a: &a [1,1,1,1,1,1,1,1]\n"
            + b"".join(
                b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*a" if i == 0 else b"*b%d" % (i - 1)] * 8)) for i in range(8)
            ),
        ]
    )
)
def test_no_bytes_at_all_give_a_traceback(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(text)
    _says_what_is_wrong(tmp_path / "params.yaml")
