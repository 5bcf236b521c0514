"""A finished model in one file, in the safetensors format: its tensors, architecture and facts.

The file is 8 bytes (the header's length, little-endian), a JSON header, and the tensors' bytes.
The header's `__metadata__` holds `format`, `architecture` and `facts` (JSON texts), and `digest`:
BLAKE2b-128 of the whole file as it is with a digest of zeros. Nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from mdeq import baselines, checks
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig
from mdeq.equilibrium import Implicit, Phantom, Reversible
from mdeq.heads import ClassificationHeadConfig, SegmentationHeadConfig
from mdeq.model import Network
from mdeq.solvers import Anderson, Broyden, FixedPoint
from mdeq.transformation import MDEQConfig

FORMAT = "mdeq 1"
ZEROS = "0" * 32
LONGEST_HEADER = 2**24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Architecture:
    """All that rebuilds a network."""

    model: MDEQConfig | ResNetConfig | NeuralODEConfig | ExplicitConfig
    head: ClassificationHeadConfig | SegmentationHeadConfig | None
    classes: int
    forward: Broyden | Anderson | FixedPoint | None = None
    backward: Implicit | Phantom | Reversible | None = None

    def __post_init__(self) -> None:
        checks.whole(1, classes=self.classes)
        if isinstance(self.model, MDEQConfig) and self.head is None:
            raise ValueError("head: an MDEQ needs one")

    def build(self, *, fetch: bool = False) -> nn.Module:
        """A freshly initialised network; `fetch`, and what is raised, as in `baselines.build`."""
        if not isinstance(self.model, MDEQConfig):
            return baselines.build(self.model, self.classes, fetch=fetch)
        assert self.head is not None
        forward, backward = self.forward or Anderson(), self.backward or Implicit()
        return Network(self.model, self.head, self.classes, forward, backward)


@dataclass
class Saved:
    """The content of a file."""

    architecture: Architecture
    facts: dict[str, Any]
    state: dict[str, Tensor]

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model in evaluation mode, with attributes `architecture` and `facts`.

        Raises:
            ImportError: The library that keeps an explicit model is not installed.
            ValueError: The tensors do not fit the architecture, or it cannot be built.
        """
        try:
            with torch.device("meta"):  # no memory for an architecture that does not fit
                model = self.architecture.build()
        except (RuntimeError, OverflowError, TypeError) as error:
            raise ValueError(f"architecture: cannot be built ({_line(error)})") from error
        _check_fit(self.state, model.state_dict())
        model.load_state_dict(self.state, assign=True)
        model.architecture, model.facts = self.architecture, self.facts  # type: ignore[assignment]
        return model.to(device).eval()


def save(model: nn.Module, architecture: Architecture, facts: dict[str, Any]) -> bytes:
    """The bytes of the file of a model; the caller writes them.

    Args:
        model: Its state is stored, on the CPU.
        architecture: What `read` rebuilds.
        facts: A JSON-like dictionary.

    Raises:
        TypeError: `facts` has other than JSON's values, or the state a dtype outside of `DTYPES`.
        ValueError: `facts` has a number that is not finite.
    """
    state = model.state_dict()
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))  # all are aligned
    metadata = {
        "format": FORMAT,
        "digest": ZEROS,
        "architecture": _text(dataclasses.asdict(architecture)),
        "facts": _text(facts),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = state[name]
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name}: {tensor.dtype} cannot be stored")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = _text(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = bytearray(end)
    for name in names:
        start = header[name]["data_offsets"][0]
        _view(data, start, state[name].dtype, state[name].shape).copy_(state[name])
    head = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.blake2b(head + data, digest_size=16).hexdigest()
    return head.replace(ZEROS.encode(), digest.encode(), 1) + data


def read(content: bytes) -> Saved:
    """What a file's bytes hold.

    Raises:
        ValueError: They are damaged, or not such a file; one line says why.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, LONGEST_HEADER):
        raise ValueError("not a safetensors file, or cut off")
    header = _parsed(content[8 : 8 + length], "header")
    metadata = header.pop("__metadata__", None)
    expected = {"format", "digest", "architecture", "facts"}
    if not isinstance(metadata, dict) or metadata.keys() != expected:
        raise ValueError(f"not a model of this library (format {FORMAT!r})")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: every value must be a text")
    if metadata["format"] != FORMAT:
        raise ValueError(f"format: must be {FORMAT!r}, not {metadata['format'][:40]!r}")
    _check_digest(content, 8 + length, metadata["digest"])
    architecture = _decoded(
        Architecture, _parsed(metadata["architecture"], "architecture"), "architecture"
    )
    facts = _parsed(metadata["facts"], "facts")
    data = bytearray(memoryview(content)[8 + length :])
    return Saved(architecture, facts, _tensors(header, data))


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a file in evaluation mode, with attributes `architecture` and `facts`.

    Raises:
        ImportError: The library that keeps an explicit model is not installed.
        OSError: The file cannot be read.
        ValueError: The file is damaged, or not a model of this library.
    """
    try:
        return read(Path(path).read_bytes()).build(device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_old(content: Mapping[str, Any]) -> Saved:
    """What `torch.load(..., weights_only=True)` gave of a model file of version 0.1 (`model.pt`).

    Raises:
        ValueError: It is not such a file.
    """
    if content.get("format") != 1 or not {"architecture", "meta", "state"} <= content.keys():
        raise ValueError("not a model file of version 0.1")
    facts, state = content["meta"], content["state"]
    if not isinstance(facts, dict) or not isinstance(state, dict):
        raise ValueError("not a model file of version 0.1")
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("state: every value must be a tensor")
    return Saved(_decoded(Architecture, content["architecture"], "architecture"), facts, state)


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _parsed(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object, with no key twice and no number that is not finite."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_digest(content: bytes, start: int, digest: str) -> None:
    """`start` is where the data begin."""
    head, found = content[:start], digest.encode()
    if len(found) == len(ZEROS) and head.count(found) == 1:
        hashed = hashlib.blake2b(head.replace(found, ZEROS.encode()), digest_size=16)
        hashed.update(memoryview(content)[start:])
        if hashed.hexdigest() == digest:
            return
    raise ValueError("damaged: the content does not have the digest that it was written with")


def _tensors(header: dict[str, Any], data: bytearray) -> dict[str, Tensor]:
    """The tensors that a header describes, which fill the data without holes."""
    state: dict[str, Tensor] = {}
    places: list[list[int]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name[:80]!r}: must have dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise ValueError(f"{name[:80]!r}: the dtype must be one of {', '.join(DTYPES)}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name[:80]!r}: shape and data_offsets must be lists of sizes")
        dtype = DTYPES[entry["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if offsets[1] > len(data) or offsets[1] - offsets[0] != size:
            raise ValueError(f"{name[:80]!r}: the data_offsets do not fit the shape or the file")
        places.append(offsets)
        state[name] = _view(data, offsets[0], dtype, shape).clone()
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise ValueError("the tensors overlap, or leave a hole")
        end = stop
    if end != len(data):
        raise ValueError("there are bytes that belong to no tensor")
    return state


def _sizes(value: Any) -> bool:
    """Whether it is a list of sizes, short enough to multiply and small enough for an index."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(size) is int and 0 <= size < 2**48 for size in value)


def _view(data: bytearray, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor whose bytes begin at `start`, sharing their memory."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start)
    return flat.view(shape)


def _check_fit(state: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    if missing := sorted(model.keys() - state.keys()):
        raise ValueError(f"the file lacks {_listed(missing)}")
    if foreign := sorted(state.keys() - model.keys()):
        raise ValueError(f"the architecture does not have {_listed(foreign)}")
    for name, tensor in model.items():
        found = state[name]
        if found.shape != tensor.shape:
            ours, theirs = list(tensor.shape), list(found.shape)
            raise ValueError(f"{name}: the architecture has the shape {ours}, the file {theirs}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name}: must be {tensor.dtype}, not {found.dtype}")
    if len({tensor.dtype for tensor in state.values() if tensor.is_floating_point()}) > 1:
        raise ValueError("the floating-point tensors differ in precision")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name[:80]!r}" for name in names[:5]) + more


def _decoded(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as the type `hint`: a dataclass of settings, or what its fields are made of."""
    if dataclasses.is_dataclass(hint):
        return _settings(hint, value, name)  # type: ignore[arg-type]
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return _decoded(_chosen(options, value, name), value, name)
    if kind is Literal and isinstance(value, str) and value in options:
        return value
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_decoded(options[0], item, name) for item in value)
    absurd = type(value) is int and abs(value) >= 2**31
    if not absurd and (type(value) is hint or (hint is float and type(value) is int)):
        return value
    raise ValueError(f"{name}: {str(value)[:40]!r} is not valid here")


def _settings(hint: type, value: Any, name: str) -> Any:
    hints = get_type_hints(hint)
    if not isinstance(value, dict) or not value.keys() <= hints.keys():
        raise ValueError(f"{name}: must be an object with keys among {', '.join(hints)}")
    fields = {key: _decoded(hints[key], item, f"{name}.{key}") for key, item in value.items()}
    try:
        return hint(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {_line(error)}") from error


def _chosen(options: tuple[Any, ...], value: Any, name: str) -> Any:
    """The option of a union that a value belongs to: a dataclass by its `kind`."""
    if value is None and NoneType in options:
        return NoneType
    if not isinstance(value, dict):
        return options[0]
    kinds = {option.kind: option for option in options if hasattr(option, "kind")}
    if not isinstance(value.get("kind"), str) or value["kind"] not in kinds:
        raise ValueError(f"{name}: the kind must be one of {', '.join(kinds)}")
    return kinds[value["kind"]]


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
