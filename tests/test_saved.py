"""A model in one safetensors file: complete, readable by others, checked before it is used."""

import dataclasses
import hashlib
import json
import random
import re
import struct

import pytest
import torch
from torch import nn

import mdeq
from mdeq import (
    Anderson,
    Architecture,
    Broyden,
    ClassificationHeadConfig,
    FixedPoint,
    Implicit,
    MDEQConfig,
    Network,
    Phantom,
    Reversible,
    SegmentationHeadConfig,
    saved,
)
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig

SMALL = Architecture(
    MDEQConfig(channels=(8, 8), expansion=1, groups=4, dropout=0.25, upsampling="bilinear"),
    ClassificationHeadConfig((4, 4), 16),
    classes=5,
    forward=Anderson(steps=7, tolerance=1e-4),
    backward=Implicit(Broyden(steps=3)),
)
SEGMENTS = Architecture(
    MDEQConfig(channels=(8,), groups=4, weight_norm=False, unrolled=3),
    SegmentationHeadConfig("highest"),
    classes=19,
    forward=FixedPoint(steps=4, damping=0.5),
    backward=Reversible(3, 0.25),
)
FACTS = {"stage": "classify", "seed": 0, "names": ["cat", "Hündin"], "params": {"lr": 1e-3}}


def content(architecture=SMALL, facts=FACTS) -> bytes:
    torch.manual_seed(0)
    return saved.save(architecture.build(), architecture, facts)


@pytest.mark.parametrize(
    "architecture",
    [
        SMALL,
        SEGMENTS,
        Architecture(MDEQConfig((8,), groups=4), SegmentationHeadConfig(), 3, None, Phantom(1, 1)),
        Architecture(ResNetConfig(4), None, classes=10),
        Architecture(NeuralODEConfig(filters=4, augmented=2, image=16), None, classes=10),
        # its weights are for 1000 classes: a model that comes back never asks for them
        Architecture(ExplicitConfig("resnet18", "default", small_input=True), None, classes=10),
        Architecture(ExplicitConfig("fcn_resnet50"), None, classes=3),
    ],
    ids=["classification", "segmentation", "defaults", "narrow", "ode", "explicit", "fcn"],
)
def test_a_model_comes_back_with_its_architecture_and_facts(tmp_path, architecture):
    torch.manual_seed(0)
    model = architecture.build()
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved.save(model, architecture, FACTS))
    loaded = mdeq.load(file)
    assert loaded.architecture == architecture and loaded.facts == FACTS
    assert not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(image).logits
        torch.testing.assert_close(loaded(image).logits, expected, rtol=0, atol=0)
    if isinstance(loaded, Network):
        assert loaded.backbone.forward_solver == (architecture.forward or Anderson())
        assert loaded.backbone.backward == (architecture.backward or Implicit())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_precision_is_kept_and_a_loaded_model_trains(dtype):
    model = SMALL.build().to(dtype)
    loaded = saved.read(saved.save(model, SMALL, {})).build().train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    loaded(torch.randn(2, 3, 8, 8, dtype=dtype)).logits.float().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_the_safetensors_package_reads_it(tmp_path):
    package = pytest.importorskip("safetensors")
    model = SMALL.build()
    (tmp_path / "m.safetensors").write_bytes(saved.save(model, SMALL, FACTS))
    with package.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert json.loads(file.metadata()["facts"]) == FACTS
        assert json.loads(file.metadata()["architecture"])["model"]["channels"] == [8, 8]


def test_tensors_of_any_memory_layout_are_stored_and_are_aligned():
    model = nn.Module()
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("brief", torch.arange(3).bfloat16())
    model.register_buffer("last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    model.register_buffer("none", torch.empty(0, 4))
    found = saved.read(saved.save(model, SMALL, {})).state
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor) and found[name].is_contiguous()
        assert found[name].dtype == tensor.dtype
    header, _ = parts(saved.save(model, SMALL, {}))
    assert header["count"]["data_offsets"][0] % 8 == header["last"]["data_offsets"][0] % 4 == 0


def test_what_cannot_be_stored_is_an_error():
    with pytest.raises(ValueError):
        saved.save(SMALL.build(), SMALL, {"loss": float("nan")})
    with pytest.raises(TypeError):
        saved.save(SMALL.build(), SMALL, {"path": object()})
    with pytest.raises(TypeError, match="weight: torch.complex64 cannot be stored"):
        model = nn.Module()
        model.register_buffer("weight", torch.zeros(1, dtype=torch.complex64))
        saved.save(model, SMALL, {})


def test_a_model_of_version_0_1_is_converted():
    """As its `torch.save` wrote it: the same names, plain values."""
    model = SMALL.build()
    plain = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    old = {"format": 1, "architecture": plain, "meta": FACTS, "state": model.state_dict()}
    found = saved.from_old(old)
    assert found.architecture == SMALL and found.facts == FACTS
    assert torch.equal(
        found.build().backbone.f.blocks[0].conv1.g, model.backbone.f.blocks[0].conv1.g
    )
    with pytest.raises(ValueError, match=r"not a model file of version 0\.1"):
        saved.from_old({"state_dict": {}})
    for spoilt in ({"state": [1]}, {"meta": None}, {"state": {"a": 1}}, {"architecture": 3}):
        with pytest.raises(ValueError):
            saved.from_old(old | spoilt)


# Malformed files


def parts(whole: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def assembled(header: dict | bytes, data: bytes) -> bytes:
    """A file with a valid digest, written out: what a malicious author would make."""
    if isinstance(header, bytes):
        encoded = header
    else:
        if isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["digest"] = "0" * 32
        encoded = json.dumps(header).encode()
    head = struct.pack("<Q", len(encoded)) + encoded
    digest = hashlib.blake2b(head + data, digest_size=16).hexdigest()
    return head.replace(b"0" * 32, digest.encode(), 1) + data


def refused(whole: bytes) -> str:
    """The one line that says why."""
    with pytest.raises(ValueError) as caught:
        saved.read(whole).build()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 1000
    return message


def test_the_tests_own_files_are_valid():
    saved.read(assembled(*parts(content()))).build()


def test_a_flipped_bit_anywhere_is_an_error():
    whole, draw = content(SEGMENTS, {}), random.Random(0)
    length = struct.unpack("<Q", whole[:8])[0]
    places = [*range(8 + length), *(draw.randrange(len(whole)) for _ in range(200))]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        refused(bytes(changed))


def test_a_file_that_is_cut_off_or_continued_is_an_error():
    whole = content(SEGMENTS, {})
    length = struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(0)
    ends = [*range(20), 8 + length - 1, 8 + length, 8 + length + 1, len(whole) - 1]
    for end in ends + [draw.randrange(len(whole)) for _ in range(50)]:
        refused(whole[:end])
    refused(whole + b"\0")
    assert "not a safetensors file" in refused(b"")
    assert "not a safetensors file" in refused(struct.pack("<Q", 2**63) + b"{}")


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/x.safetensors: not a")):
        mdeq.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        mdeq.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b'{"a": 1' + b"0" * 10_000 + b"}",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"__metadata__": {"digest": "\\ud800"}}',
    ],
)
def test_a_header_that_is_no_proper_json_is_an_error(header):
    refused(assembled(header, b""))


ABSURD = [None, True, -1, 2**70, 1e308, "", "x" * 10_000, [], {}, [None], [-1], [[1]], {"kind": []}]
TENSOR = "backbone.stem.0.weight"


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize(
    "key",
    [
        ("__metadata__",),
        ("__metadata__", "format"),
        ("__metadata__", "architecture"),
        ("__metadata__", "facts"),
        ("__metadata__", "more"),
        (TENSOR,),
        (TENSOR, "dtype"),
        (TENSOR, "shape"),
        (TENSOR, "data_offsets"),
        (TENSOR, "more"),
        ("more",),
    ],
    ids=".".join,
)
def test_a_wrong_value_in_the_header_is_an_error(key, value):
    header, data = parts(content())
    inner = header
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = value
    refused(assembled(header, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [8, 3, 3, 2]}, "do not fit the shape"),
        ({"shape": [2**40, 2**40]}, "do not fit the shape"),
        ({"shape": [2**62]}, "must be lists of sizes"),
        ({"shape": [1] * 100}, "must be lists of sizes"),
        ({"data_offsets": [0, 2**40]}, "do not fit"),
        ({"data_offsets": [864, 0]}, "do not fit"),
        ({"data_offsets": [0, 864]}, "overlap"),
        ({"dtype": "F128"}, "the dtype must be one of"),
        ({"shape": [3, 8, 3, 3]}, "the architecture has the shape"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_an_error(change, message):
    header, data = parts(content())
    header[TENSOR] |= change
    assert message in refused(assembled(header, data))


def test_missing_foreign_and_mixed_tensors_are_errors():
    header, data = parts(content())
    header["mystery"] = header.pop(TENSOR)
    assert "lacks 'backbone.stem.0.weight'" in refused(assembled(header, data))
    header, data = parts(content())
    header["mystery"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert "does not have 'mystery'" in refused(assembled(header, data))
    header, data = parts(content())
    header[TENSOR]["dtype"] = "F64"
    header[TENSOR]["shape"][0] //= 2
    assert "shape" in refused(assembled(header, data))
    state = SMALL.build()
    state.head.double()
    assert "differ in precision" in refused(saved.save(state, SMALL, {}))
    state = SMALL.build()
    state.backbone.stem[1].num_batches_tracked = torch.tensor(1.0)
    assert "num_batches_tracked: must be torch.int64" in refused(saved.save(state, SMALL, {}))


def changed(path: tuple, value: object) -> bytes:
    header, data = parts(content())
    architecture = json.loads(header["__metadata__"]["architecture"])
    inner = architecture
    for name in path[:-1]:
        inner = inner[name]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    header["__metadata__"]["architecture"] = json.dumps(architecture)
    return assembled(header, data)


PATHS = [
    ("model",),
    ("head",),
    ("classes",),
    ("forward",),
    ("backward",),
    ("more",),
    ("model", "kind"),
    ("model", "channels"),
    ("model", "expansion"),
    ("model", "dropout"),
    ("model", "variational"),
    ("model", "upsampling"),
    ("model", "unrolled"),
    ("model", "more"),
    ("head", "channels"),
    ("head", "final_channels"),
    ("forward", "kind"),
    ("forward", "steps"),
    ("forward", "tolerance"),
    ("forward", "stop"),
    ("backward", "solver"),
    ("backward", "solver", "steps"),
]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_wrong_value_in_the_architecture_is_an_error(path):
    for value in ABSURD:
        whole = changed(path, value)
        try:
            saved.read(whole).build()
        except ValueError:
            refused(whole)
        else:  # a valid value of a setting that changes no tensor
            assert value is None or path[-1] in ("tolerance", "variational")
    if path[-1] != "more":
        try:
            saved.read(changed(path, KeyError)).build()
        except ValueError:
            refused(changed(path, KeyError))


def test_an_absurd_architecture_takes_no_memory_to_refuse():
    refused(changed(("model", "channels"), [2**30, 2**30]))
    refused(changed(("model", "channels"), [8] * 100_000))
    refused(changed(("model", "expansion"), 2**60))
    refused(changed(("classes",), 10**300))
    refused(changed(("head", "final_channels"), 2**40))


def test_an_unknown_kind_and_an_mdeq_without_head_are_named():
    assert "model: the kind must be one of mdeq, resnet18" in refused(
        changed(("model", "kind"), "vit")
    )
    assert "head: an MDEQ needs one" in refused(changed(("head",), None))
    with pytest.raises(ValueError, match="head: an MDEQ needs one"):
        Architecture(MDEQConfig(), None, 10)
