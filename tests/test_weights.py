"""Files of other formats become models; models are found by name; the zoo tells the whole story."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdeq import MDEQConfig
from mdeq.saved import Architecture
from pipeline import files, params, weights, zoo
from pipeline.data.cifar10 import CLASSES
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.predict import Predictor
from pipeline.sets import SETS
from pipeline.train.checkpoints import load_model, save_model
from tests.toys import ARCHITECTURE, network

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "params" / "paper.yaml"
REFERENCE = np.load(Path(__file__).parent / "reference" / "cifar10_mdeq_small.npz")
SMALL = "cifar10-mdeq-small"
PUBLISHED_SIZES = {  # of the models that the authors' code builds
    SMALL: 158_890,
    "cifar10-mdeq": 11_097_438,
    "imagenet-mdeq-small": 16_808_936,
    "imagenet-mdeq-large": 67_063_624,
    "imagenet-mdeq-xl": 90_463_280,
    "cityscapes-mdeq-small": 8_968_467,
    "cityscapes-mdeq-large": 55_955_859,
    "cityscapes-mdeq-xl": 79_551_755,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "size"), PUBLISHED_SIZES.items())
def test_every_preset_has_the_published_size(name: str, size: int) -> None:
    dataset, _, model = name.partition("-")
    preset = params.load(SETS[dataset].stage, model, PRESETS)
    classes = SETS[dataset].classes
    assert isinstance(preset.model, MDEQConfig)
    with torch.device("meta"):
        built = Architecture(preset.model, preset.head, classes, preset.forward).build()
    assert sum(p.numel() for p in built.parameters()) == size


# ---- the authors' checkpoints


def published() -> dict[str, torch.Tensor]:
    names = [name for name in REFERENCE.files if name.startswith("state/")]
    return {name.removeprefix("state/"): torch.from_numpy(REFERENCE[name]) for name in names}


def test_a_wrapped_published_file_becomes_a_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"module.{name}": value for name, value in published().items()}
    torch.save({"epoch": 50, "best_perf": np.float64(87.1), "state_dict": state}, "tiny.pkl")
    path = zoo.import_weights(Path("tiny.pkl"), SMALL, presets=PRESETS)
    assert path == Path("results/classify/mdeq-small/model.safetensors")
    assert "tiny.pkl: not part of the model: epoch, best_perf" in capsys.readouterr().err
    model, _, facts = load_model(path)
    assert facts["names"][3] == "cat" and facts["published"] == "tiny.pkl"
    assert torch.equal(model.backbone.stem[0].weight, published()["downsample.0.weight"])
    predictor = Predictor(path, Machine(here))
    best = predictor.best(predictor(np.full((40, 60, 3), 90, np.uint8)).shares, 10)
    assert set(best) == set(CLASSES) and sum(best.values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="exists; name another file"):
        zoo.import_weights(Path("tiny.pkl"), SMALL, presets=PRESETS)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_what_does_not_fit_is_listed(here: Path) -> None:
    state = published()
    del state["classifier.bias"]
    torch.save(state, "less.pkl")
    torch.save(published() | {"mystery": torch.zeros(1), "riddle": torch.zeros(1)}, "more.pkl")
    torch.save({"state_dict": Malicious()}, "evil.pkl")
    torch.save({"state_dict": {"a": 1}}, "number.pkl")
    torch.save({"state_dict": [1]}, "list.pkl")
    torch.save([published()], "array.pkl")
    Path("text.pkl").write_text("hello")
    Path("empty.pkl").touch()
    os.mkfifo("pipe.pkl")
    for file, model, reason in (
        ("less.pkl", SMALL, r"head\.classifier\.bias"),
        ("more.pkl", SMALL, "mystery.*riddle"),
        ("more.pkl", "mdeq-small", "--model mdeq-small: must name the preset"),
        ("more.pkl", None, "must name the preset"),
        ("more.pkl", "cifar10-nothing", "classify.nothing: is missing"),
        ("evil.pkl", SMALL, "damaged, or not a checkpoint"),
        ("number.pkl", SMALL, "a"),
        ("list.pkl", SMALL, "state_dict"),
        ("array.pkl", SMALL, "damaged, or not a checkpoint"),
        ("text.pkl", SMALL, "damaged"),
        ("empty.pkl", SMALL, "damaged"),
        ("pipe.pkl", SMALL, "no such file"),
        ("none.pkl", SMALL, "no such file"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            zoo.import_weights(Path(file), model, presets=PRESETS)
        assert len(str(error.value).splitlines()) == 1
    assert not Path("ran").exists() and not Path("results").exists()


# ---- models of version 0.1


def old() -> dict[str, Any]:
    """What version 0.1 saved as model.pt."""
    model = {"channels": [8, 8], "expansion": 2, "groups": 4, "dropout": 0.3, "kind": "mdeq"}
    architecture = {
        "model": model,
        "head": {"channels": [4, 4], "final_channels": 16, "kind": "classification"},
        "classes": 2,
        "forward": {"steps": 4, "tolerance": 1e-3, "kind": "broyden"},
        "backward": {"steps": 1, "damping": 1.0, "kind": "phantom"},
    }
    facts = {"stage": "classify", "model": "tiny", "names": ["a", "b"], "run_id": "r", "params": {}}
    state = network().state_dict()
    return {"format": 1, "architecture": architecture, "meta": facts, "state": state}


def test_a_model_of_the_old_format_becomes_one_of_the_new(here: Path) -> None:
    torch.save(old(), "model.pt")
    path = zoo.import_weights(Path("model.pt"))
    assert path == Path("results/classify/tiny/model.safetensors")
    model, architecture, facts = load_model(path)
    assert architecture.forward.steps == 4 and architecture.model == ARCHITECTURE.model
    assert facts["dataset"] == "cifar10" and facts["run"] == "r"
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images).logits, network().eval()(images).logits)


BIAS = "state/head.classifier.bias"
MALFORMED = [
    ("format", 2),
    ("architecture", None),
    ("architecture/classes", -1),
    ("architecture/classes", 10**12),
    ("architecture/surprise", 1),
    ("architecture/head", None),
    ("architecture/model", {"kind": "perceptron"}),
    ("architecture/model/groups", "4"),
    ("meta", None),
    ("meta", {}),
    ("meta/stage", ["classify"]),
    ("meta/model", 5),
    ("meta/model", "../../outside"),
    ("state", None),
    ("state", {}),
    (BIAS, torch.zeros(3)),
    (BIAS, 7),
    ("state/more", torch.zeros(1)),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_malformed_old_models_are_one_line(here: Path, key: str, value: object) -> None:
    content = part = old()
    *outer, last = key.split("/")
    for name in outer:
        part = part[name]
    part[last] = value
    torch.save(content, "bad.pt")
    with pytest.raises(UserError, match="bad.pt: ") as error:
        zoo.import_weights(Path("bad.pt"))
    assert len(str(error.value).splitlines()) == 1 and not Path("results").exists()


def test_old_models_that_are_cut_off_are_refused(here: Path) -> None:
    torch.save(old(), "whole.pt")
    content = Path("whole.pt").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        Path("cut.pt").write_bytes(content[:size])
        with pytest.raises(UserError, match="cut.pt: damaged"):
            zoo.import_weights(Path("cut.pt"))


# ---- the zoo


def results(source: str = "folder") -> None:
    """What classify and evaluate leave of a tiny model."""
    trained, evaluated = Path("results/classify/tiny"), Path("results/evaluate/cifar10-tiny")
    facts = {"dataset": "cifar10", "seed": 0, "commit": "abc", "params": {"batch": 2}}
    save_model(trained / "model.safetensors", network(), ARCHITECTURE, facts)
    origin = {"device": "abacus", "threads": 2, "processes": 3, "cores": 64}
    files.write_json(trained / "metrics.json", {"time/seconds": 7200.0, "parameters": 10})
    files.write_json(trained / "facts.json", origin)
    files.write_text(trained / "history.csv", "epoch,eval/top1\n1,50\n")
    files.write_json(evaluated / "metrics.json", {"eval/top1": 60.0})
    digest = files.file_digest(trained / "model.safetensors")
    where = {"dataset": "cifar10", "source": source, "digest": "0", "samples": 9}
    files.write_json(evaluated / "facts.json", where | {"model_digest": digest})
    steps = "evaluations,accuracy,residual\n1,50,0.5\n2,60,0.1\n"
    files.write_text(evaluated / "by_steps.csv", steps)
    files.write_text(evaluated / "confusion.csv", "true,across,down\nacross,3,1\ndown,2,3\n")


def test_a_published_model_has_its_card_and_is_found_by_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results()
    monkeypatch.setattr(weights, "ZOO", here / "zoo")
    path = zoo.publish("classify", "tiny", "cifar10-tiny", here / "zoo")
    card = json.loads((here / "zoo/cifar10-tiny.json").read_text())
    assert card["core-hours"] == 12 and card["device"] == "abacus" and card["commit"] == "abc"
    assert card["measured"] == {"eval/top1": 60.0} and card["params"] == {"batch": 2}
    assert card["by evaluations of f"][1] == {"evaluations": 2, "accuracy": 60, "residual": 0.1}
    assert card["confusion"] == {"true": ["across", "down"], "across": [3, 2], "down": [1, 3]}
    with (here / "zoo/cifar10-tiny.csv").open() as file:
        assert next(csv.DictReader(file))["eval/top1"] == "50"
    assert weights.zoo() == ["cifar10-tiny"]
    assert weights.find("cifar10-tiny") == weights.find(None) == path
    assert path.read_bytes() == Path("results/classify/tiny/model.safetensors").read_bytes()
    assert weights.find("tiny", "classify") == Path("results/classify/tiny/model.safetensors")
    assert weights.find("results/classify/tiny/model.safetensors", "classify").is_file()
    with pytest.raises(UserError, match="exists; choose another name"):
        zoo.publish("classify", "tiny", "cifar10-tiny", here / "zoo")


def test_what_is_not_there_is_not_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ZOO", here / "zoo")
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="no model comes with this copy"):
        weights.find(None)
    for name in ("nothing", "pipe", "x" * 300, "a\0b", "."):
        with pytest.raises(UserError, match="no such model file"):
            weights.find(name)
    with pytest.raises(UserError, match="safetensors: .*run `python -m pipeline classify tiny`"):
        weights.find("tiny", "classify")


def test_the_zoo_takes_whole_results_of_real_data_alone(here: Path) -> None:
    folder = here / "zoo"
    with pytest.raises(UserError, match="results/classify/tiny/metrics.json: no such file"):
        zoo.publish("classify", "tiny", "cifar10-tiny", folder)
    results("generated")
    with pytest.raises(UserError, match="the zoo takes real data alone"):
        zoo.publish("classify", "tiny", "cifar10-tiny", folder)
    results()
    save_model(Path("results/classify/tiny/model.safetensors"), network(), ARCHITECTURE, {})
    with pytest.raises(UserError, match="results/evaluate/cifar10-tiny: of another model"):
        zoo.publish("classify", "tiny", "cifar10-tiny", folder)
    for name, content in (
        ("evaluate/cifar10-tiny/by_steps.csv", ""),
        ("classify/tiny/facts.json", '{"device": "abacus", "cores": 64}'),  # core-hours: no guess
    ):
        results()
        files.write_text(Path("results", name), content)
        with pytest.raises(UserError, match="incomplete"):
            zoo.publish("classify", "tiny", "cifar10-tiny", folder)
    with pytest.raises(UserError, match=r"\.\./x: "):
        zoo.publish("classify", "tiny", "../x", folder)
    assert not folder.exists()
