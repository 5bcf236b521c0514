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
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mdeq import Broyden, Gmres, Implicit, MDEQConfig, Network
from mdeq.baselines import build
from pipeline import params
from pipeline.errors import UserError
from pipeline.params import ClassifyParams, PrepareParams, check_counts
from pipeline.recipe import Adam, Recipe, WarmStart
from pipeline.settings import name

ROOT = Path(__file__).parents[1]
SHIPPED = ("params.yaml", *(f"params/{file.name}" for file in (ROOT / "params").glob("*.yaml")))
CLASSIFY = "classify.mdeq-small"
GONE = object()


def loaded(path: Path) -> Any:
    return json.loads(json.dumps(YAML(typ="safe").load(path.read_text())))  # aliases apart


def edited(workspace: Path, edits: dict[str, Any]) -> Path:
    """The demo's params with some dotted keys set, or removed."""
    path = workspace / "params.yaml"
    data = loaded(path)
    for dotted, value in edits.items():
        *parents, last = dotted.split("/") if "/" in dotted else dotted.split(".")
        node = data
        for key in parents:
            node = node.setdefault(key, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    with path.open("w") as file:
        YAML(typ="safe").dump(data, file)
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
    assert "schema" not in text and "/work" not in text
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
    demo, whole = (loaded(repository / file) for file in ("params.yaml", "params/all.yaml"))
    assert demo["prepare"] == whole["prepare"] and demo["scale"] == whole["scale"]
    for stage in ("classify", "pretrain", "finetune"):
        assert demo[stage].items() <= whole[stage].items()


def test_a_section_as_json_gives_the_same_section(workspace: Path) -> None:
    entry = params.load("pretrain", "mdeq-small")
    path = edited(workspace, {"pretrain.mdeq-small": params.plain(entry)})
    assert params.load("pretrain", "mdeq-small", path) == entry
    assert params.instances("pretrain", path) == ["mdeq-small"] and params.scale(path) == "demo"


def test_a_stage_reads_its_own_section_alone(workspace: Path) -> None:
    path = edited(workspace, {f"{CLASSIFY}.batch": "many", "evaluate": GONE})
    assert isinstance(params.load("prepare", "cifar10", path), PrepareParams)
    with pytest.raises(UserError, match=r"classify\.mdeq-small\.batch"):
        params.load("classify", "mdeq-small", path)
    with pytest.raises(UserError, match="evaluate: is missing; there are: .*classify"):
        params.load("evaluate", "cifar10", path)


def test_an_adjoint_solver_that_only_solves_linear_systems_is_no_forward_solver(
    workspace: Path,
) -> None:
    path = edited(workspace, {f"{CLASSIFY}.backward.solver": {"kind": "gmres", "steps": 3}})
    assert params.load("classify", "mdeq-small", path).backward == Implicit(Gmres(steps=3))
    (found,) = errors(edited(workspace, {f"{CLASSIFY}.forward": {"kind": "gmres"}}))
    assert "forward.kind: must be one of" in found


# what is wrong


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("batch", "64", 'batch: must be a whole number, not "64"'),
        ("batch", True, "batch: must be a whole number, not true"),
        ("batch", 0, "batch: must be a whole number of at least 1, not 0"),
        ("batch", 64.5, "batch: must be a whole number, not 64.5"),
        ("batch", None, "batch: must be a whole number, not null"),
        ("epochs", GONE, "epochs: is missing"),
        ("optimizer.lr", "1e-3", 'optimizer.lr: must be a number, not "1e-3"'),
        ("optimizer.lr", 0, "optimizer.lr: must be a number greater than 0, not 0"),
        ("optimizer.lr", float("inf"), "optimizer.lr: must be a finite number, not Infinity"),
        ("optimizer.kind", "adamw", "optimizer.kind: must be one of adam, sgd, muon, not"),
        ("optimizer.kind", GONE, "optimizer.kind: is missing; one of adam, sgd, muon"),
        (
            "optimizer",
            {"kind": "muon", "rest": {"lr": 0}},
            "optimizer.rest.lr: must be a number gr",
        ),
        ("forward.steps", -1, "forward.steps: must be a whole number of at least "),
        ("forward.stop", "rel", "forward.stop: must be 'relative' or 'absolute', not \"rel\""),
        ("forward.step", 3, "forward.step: unknown key; did you mean steps? allowed: "),
        ("forward", None, "forward: is missing; an mdeq needs it"),
        ("forward", 7, "forward: must be a mapping (key: value lines), not 7"),
        ("forward.memory", 5, "forward.memory: unknown key; allowed: "),
        ("backward.solver.kind", "lu", "backward.solver.kind: must be one of broyden, anderson, "),
        ("model.channels", [20, 24], "model.channels: "),
        ("model.channels", 24, "model.channels: must be a list, not 24"),
        ("model.channels", [], "model.channels: "),
        ("model.groups", 3, "model.groups: "),
        ("model.dropout", 1.0, "model.dropout: must be "),
        ("model.kind", "mdqe", "model.kind: must be one of mdeq, resnet18, neural_ode, explicit,"),
        ("model", {"kind": "explicit", "name": "vgg"}, "model.name: must be one of "),
        ("epochs", 0, "epochs: must be at least 1; 0 is for a classifier with `weights: default`"),
        ("head.channels", [8], "head.channels: must have 2 numbers, one per scale"),
        ("warm_up.steps", GONE, "warm_up.steps: is missing"),
        ("jacobian", {"weight": -1.0}, "jacobian.weight: must be a number of at least 0, not -1.0"),
        ("jacobian.stop_epoch", 0, "jacobian.stop_epoch: must be a whole number of at least 1"),
        ("warm_start", {"steps": []}, "warm_start.steps: must have at least one number"),
        ("seeds", [2**32], "seeds.0: must be at most 4294967295, not 4294967296"),
        ("seeds", [1, 1], "seeds: must differ from each other, not [1, 1]"),
        ("seeds", [], "seeds: must have at least 1 item, not []"),
        ("limit", 0, "limit: must be at least 1, not 0"),
        ("augment", "on", 'augment: must be true or false, not "on"'),
        ("precision", "float64", "precision: must be 'float32', 'bfloat16' or 'float16', not"),
        ("lr", 0.1, "lr: unknown key; "),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(
    workspace: Path, key: str, value: Any, line: str
) -> None:
    (found,) = errors(edited(workspace, {f"{CLASSIFY}.{key}": value}))
    assert found.startswith(f"{CLASSIFY}.{line}") and "Value error" not in found


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        ({"mnist": {}}, "mnist: unknown key; allowed: benchmark, classify, "),
        ({"scale": None}, "scale: must be text, not null"),
        (
            {"prepare.cifar10.source": "foldr"},
            "prepare.cifar10.source: must be 'generated', 'folder",
        ),
        (
            {"prepare.cifar10.generated": GONE},
            "prepare.cifar10.generated: is missing; `source: gen",
        ),
        ({"prepare.cifar10.source": "folder"}, "prepare.cifar10.generated: is for `source: gener"),
        (
            {"prepare.imagenet.generated.classes": 1},
            "prepare.imagenet.generated.classes: must be at",
        ),
        ({"finetune.mdeq-small.backbone": "x"}, "finetune.mdeq-small.backbone: no mdeq 'x' in pre"),
        ({"finetune.mdeq-small.crop": [64]}, "finetune.mdeq-small.crop.1: is missing"),
        (
            {"finetune.mdeq-small.model.expansion": 3},
            "finetune.mdeq-small.model.expansion: must be",
        ),
        (
            {"classify.resnet18-small.model": {"kind": "explicit", "name": "hrnet_w48"}},
            "classify.resnet18-small.model.name: hrnet_w48 labels pixels",
        ),
        (
            {"classify.resnet18-small.forward": {"kind": "broyden"}},
            "classify.resnet18-small.forward:",
        ),
        (
            {f"{CLASSIFY}.warm_start": {}, f"{CLASSIFY}.augment": True},
            f"{CLASSIFY}.warm_start: need",
        ),
        ({"evaluate.cityscapes.scales": [0.5, 9]}, "evaluate.cityscapes.scales.1: must be at most"),
        (
            {"convergence.cifar10.model": "x"},
            "convergence.cifar10.model: no mdeq 'x' in classify; ",
        ),
        (
            {"convergence.cifar10.model": "resnet18-small"},
            "convergence.cifar10.model: no mdeq 'resn",
        ),
        ({"convergence.cifar10.solvers": []}, "convergence.cifar10.solvers: must be one or more"),
        ({"benchmark.reference": "x"}, "benchmark.reference: must be one of models ("),
        ({"classify/a.b": {}}, "classify.a.b: a name begins with a letter"),
    ],
)
def test_errors_of_other_sections(workspace: Path, edits: dict[str, Any], line: str) -> None:
    assert errors(edited(workspace, edits))[0].startswith(line)


def test_all_errors_are_said_at_once(workspace: Path) -> None:
    """Also a mapping's own checks beside values of a wrong type, and two of one mapping."""
    wrong = {
        "batch": 0,
        "log_every": 0,
        "epochs": "x",
        "lr": 1,
        "forward.step": 1,
        "optimizer.lr": 0,
    }
    edits = {f"{CLASSIFY}.{key}": value for key, value in wrong.items()}
    path = edited(
        workspace, edits | {"evaluate.cifar10.batch": GONE, "convergence.cifar10.batch": 0}
    )
    keys = [line.partition(": ")[0] for line in errors(path)]
    assert sorted(keys) == sorted([*edits, "evaluate.cifar10.batch", "convergence.cifar10.batch"])


@pytest.mark.parametrize(
    "text",
    "1 True ~ None 0o17 1e3 on off Yes no null y n -a _a .a a.b a/b 1_000 2020-01-01 a:b".split()
    + ["", " ", "a b", "é", "a" * 101, "a\n"],
)
def test_a_name_must_read_alike_everywhere(text: str) -> None:
    with pytest.raises(ValueError, match="a name begins with a letter"):
        name(text)


def test_names_that_are_values_to_yaml_are_refused_in_a_file(workspace: Path) -> None:
    path = workspace / "params.yaml"
    whole = path.read_text()
    for text in (
        "1",
        "True",
        "~",
        "0o17",
        "1e3",
        "? {a: 1}\n ",
        "2020-01-01",
        "-a",
        '"on"',
        "None",
    ):
        path.write_text(whole.replace("  resnet18-small:", f"  {text}:"))
        found = errors(path)
        assert len(found) == 1 and ("name" in found[0] or "not YAML" in found[0]), (text, found)
    assert name("mdeq-small_2") == "mdeq-small_2"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"a: [1\nb: 2", "line 2: not YAML: "),
        (b"a: 1\na: 2", 'line 2: not YAML: found duplicate key "a"'),
        (b"a:\n\t- 1", "line 2: not YAML: "),
        (b"- 1", "must have sections"),
        (b"", "must have sections"),
        (b"\xff\xfe", "cannot be read: "),
        (b"a: &x [*x]", "the file: more than 100,000 values, or an alias that contains itself"),
        (b"a: 2020-01-01", "a: must be text, a number, true, false or null, not a date"),
        (b"a: " + b"9" * 9000, "not YAML: "),
        (b"[" * 9000, "not YAML: "),
        (b"? {a: 1}\n: 2", ""),
        (b"!!python/object:os.system [ls]", ""),
    ],
)
def test_what_is_no_params_file_is_one_line(workspace: Path, text: bytes, line: str) -> None:
    (workspace / "params.yaml").write_bytes(text)
    (found,) = errors(workspace / "params.yaml")
    assert found.startswith(line)


def test_a_byte_order_mark_is_no_key_and_a_missing_file_says_what_to_do(workspace: Path) -> None:
    path = workspace / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    params.check(path)
    (found,) = errors(workspace / "none.yaml")
    assert "no such file" in found and "--params" in found


def test_a_slip_in_the_file_is_found_without_torch(workspace: Path) -> None:
    (workspace / "params.yaml").write_text("prepare: [")
    code = """
import sys
from typer.testing import CliRunner
from pipeline.cli import app
for words in (["classify", "x"], ["check"], ["prepare", "cifar10"], ["report"]):
    assert CliRunner().invoke(app, words).exit_code == 2
assert "torch" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=workspace, env={"PYTHONPATH": str(ROOT)}
    )


# changes on the command line


def test_changes_replace_values_of_one_section(workspace: Path) -> None:
    before = params.load("classify", "mdeq-small")
    changes = [
        "optimizer.lr=3e-4",
        "epochs=5",
        "seeds=[1, 2]",
        "warm_start.steps=[2]",
        "jacobian=null",
    ]
    found = params.load("classify", "mdeq-small", changes=changes)
    assert found == replace(
        before,
        optimizer=replace(before.optimizer, lr=3e-4),
        epochs=5,
        seeds=(1, 2),
        warm_start=WarmStart((2,)),
        jacobian=None,
    )
    assert params.load("classify", "mdeq-small") == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("epochs", "--set epochs: must be key=value, as in optimizer.lr=3e-4"),
        ("=3", "--set =3: must be key=value"),
        ("a.=3", "--set a.=3: must be key=value"),
        ("epochs=[", "--set epochs=[: '[' is not a value in YAML"),
        ("epochs.x=1", "--set epochs.x=1: there is no such key"),
        ("epochs=2020-01-01", "--set epochs=2020-01-01: there is no such key, or it takes no such"),
        (
            "epochs=many",
            '--set epochs=many: classify.mdeq-small.epochs: must be a whole number, not "',
        ),
        (
            "optimizer.lr=-1",
            "--set optimizer.lr=-1: classify.mdeq-small.optimizer.lr: must be a num",
        ),
        ("epoch=3", "--set epoch=3: classify.mdeq-small.epoch: unknown key; did you mean epochs?"),
    ],
)
def test_a_wrong_change_names_the_option(workspace: Path, change: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        params.load("classify", "mdeq-small", changes=["batch=16", change])
    (found,) = str(caught.value).splitlines()
    assert found.startswith(line)


# counts


def trained(batch: int, **values: Any) -> ClassifyParams:
    entry = params.load("classify", "resnet18-small", ROOT / "params.yaml")
    return replace(entry, batch=batch, **values)


def test_a_warm_up_must_be_shorter_than_its_training() -> None:
    entry = params.load("classify", "mdeq-small", ROOT / "params.yaml")
    check_counts("classify.a", entry, 2560)
    with pytest.raises(
        UserError, match=r"classify\.a\.warm_up\.steps: must be fewer than the 9 upd"
    ):
        check_counts("classify.a", entry, 96)
    with pytest.raises(UserError, match="30 updates of this training .320 images"):
        check_counts("classify.a", replace(entry, limit=320), 2560)


def photos(kind: dict[str, Any], batch: int, image: int, path: Path, **values: Any) -> Any:
    data = loaded(ROOT / "params.yaml")
    data["pretrain"]["x"] = {
        "model": kind, "batch": batch, "image": image, "augment": True, "epochs": 1,
        "optimizer": {"kind": "sgd"}, **values,
    }  # fmt: skip
    path.write_text(json.dumps(data))
    return params.load("pretrain", "x", path)


ONE_PIXEL = [
    ({"kind": "explicit", "name": "resnet18"}, 32, {}),
    ({"kind": "explicit", "name": "resnet18"}, 33, {}),
    ({"kind": "explicit", "name": "resnet18", "small_input": True}, 8, {}),
    ({"kind": "explicit", "name": "resnet18", "small_input": True}, 16, {}),
    ({"kind": "explicit", "name": "densenet121"}, 32, {}),
    ({"kind": "explicit", "name": "densenet121"}, 64, {}),
    ({"kind": "explicit", "name": "alexnet"}, 64, {}),
    ({"kind": "resnet18"}, 8, {}),
    ({"kind": "resnet18"}, 9, {}),
    ({"kind": "mdeq", "channels": [8, 8, 8], "downsamplings": 1}, 8, {}),
    ({"kind": "mdeq", "channels": [8, 8, 8], "downsamplings": 1}, 16, {}),
]


@pytest.mark.parametrize(("kind", "image", "parts"), ONE_PIXEL)
def test_a_lonely_image_is_refused_exactly_where_batch_norm_refuses_it(
    kind: dict[str, Any], image: int, parts: Any, tmp_path: Path
) -> None:
    if kind["kind"] == "mdeq":
        parts = {
            "head": {"kind": "classification", "channels": [4, 4, 4], "final_channels": 8},
            "forward": {"kind": "broyden", "steps": 1},
            "backward": {"kind": "phantom", "steps": 1},
        }
    entry = photos(kind, 4, image, tmp_path / "params.yaml", **parts)
    torch.manual_seed(0)
    if entry.head:
        model: Any = Network(entry.model, entry.head, 3, entry.forward, entry.backward)
    else:
        model = build(entry.model, 3)
    refused = False
    try:
        model.train()(torch.zeros(1, 3, image, image))
    except ValueError as error:
        assert "more than 1 value per channel" in str(error)
        refused = True
    check_counts("pretrain.x", entry, 8)
    if not refused:
        return check_counts("pretrain.x", entry, 9)
    with pytest.raises(UserError, match=r"pretrain\.x\.batch: .*`limit: 8`"):
        check_counts("pretrain.x", entry, 9)
    check_counts("pretrain.x", replace(entry, limit=8), 9)
    with pytest.raises(UserError, match="which 4 parts share"):  # 4 images by 2 x 2
        check_counts("pretrain.x", replace(entry, accumulate=2), 8, processes=2)
    return None


# whatever the file says


def _places(node: Any, where: tuple = ()) -> list[tuple]:
    inner = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [
        place for key, value in inner for place in ((*where, key), *_places(value, (*where, key)))
    ]


DEMO = loaded(ROOT / "params.yaml")
WORDS = "mdeq resnet18 broyden gmres muon 7 1e-3 .nan ~ 2020-01-01".split()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("kind"), inner, max_size=3)
    ),
    max_leaves=5,
)


def _says_what_is_wrong(path: Path) -> None:
    """Valid, or wrong in lines that name the file; never another exception."""
    try:
        params.check(path)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines and all(
            line.startswith(f"{path}: ") and len(line) > len(f"{path}: ") for line in lines
        )


RANDOM = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@RANDOM
@given(
    edits=st.lists(st.tuples(st.sampled_from(_places(DEMO)), VALUES | st.just(GONE)), max_size=3)
)
def test_no_value_anywhere_gives_a_traceback(
    tmp_path: Path, edits: list[tuple[tuple, Any]]
) -> None:
    data = copy.deepcopy(DEMO)
    for place, value in edits:
        node = data
        with suppress(KeyError, IndexError, TypeError):  # an earlier edit took the place away
            for key in place[:-1]:
                node = node[key]
            if value is GONE:
                del node[place[-1]]
            else:
                node[place[-1]] = value
    (tmp_path / "params.yaml").write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML
    _says_what_is_wrong(tmp_path / "params.yaml")


@RANDOM
@given(
    text=st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`?,.~ \n\t0\u00e9\u2028"), max_size=40).map(
        str.encode
    )
    | st.binary(max_size=40)
)
def test_no_bytes_at_all_give_a_traceback(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(text)
    _says_what_is_wrong(tmp_path / "params.yaml")
