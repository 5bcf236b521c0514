"""params.yaml as plain data, and plain data as checked dataclasses.

Torch is not imported here: it takes seconds, and preparing data does without.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError, escaped

FILE = Path("params.yaml")
NOT_YAML = (YAMLError, ValueError, TypeError, RecursionError)
Keys = tuple[str, ...]


def name(text: str) -> str:
    """The text, if YAML 1.1, YAML 1.2, DVC and a file system all take it for this very name.

    Raises:
        ValueError: They do not.
    """
    values = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none"}
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_-]{0,99}", text) or text.lower() in values:
        raise ValueError(
            "a name begins with a letter, has letters, digits, - and _, and is no word for true, "
            "false or nothing"
        )
    return text


Name = Annotated[str, AfterValidator(name)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=8)]  # of an image, in pixels
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class GeneratedCifar10:
    """How many images are drawn in CIFAR-10's format."""

    seed: Seed = 0
    train: Annotated[int, Field(ge=10)]
    test: Annotated[int, Field(ge=10)]


@dataclass(frozen=True, kw_only=True)
class GeneratedImageNet:
    """How many classes and photos are drawn in ImageNet's format."""

    seed: Seed = 0
    classes: Annotated[int, Field(ge=2, le=10)]
    train_per_class: Count
    val_per_class: Count


@dataclass(frozen=True, kw_only=True)
class GeneratedCityscapes:
    """How many scenes are drawn in Cityscapes' format, and their size in pixels."""

    seed: Seed = 0
    train: Count
    val: Count
    height: Annotated[int, Field(ge=32)] = 128
    width: Annotated[int, Field(ge=32)] = 256


@dataclass(frozen=True, kw_only=True)
class PrepareParams:
    """Where a data set comes from: drawn by the pipeline, a folder of yours, or a download."""

    source: Literal["generated", "folder", "download"]
    generated: GeneratedCifar10 | GeneratedImageNet | GeneratedCityscapes | None = None

    def __post_init__(self) -> None:
        if (self.source == "generated") != (self.generated is not None):
            raise ValueError("generated: must be given with `source: generated`, and only then")


@dataclass(frozen=True, kw_only=True)
class PrepareCifar10(PrepareParams):
    """Where CIFAR-10 comes from."""

    generated: GeneratedCifar10 | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareImageNet(PrepareParams):
    """Where ImageNet comes from."""

    generated: GeneratedImageNet | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareCityscapes(PrepareParams):
    """Where Cityscapes comes from."""

    generated: GeneratedCityscapes | None = None


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """The section `prepare`."""

    cifar10: PrepareCifar10
    imagenet: PrepareImageNet
    cityscapes: PrepareCityscapes


def load(kind: Any, path: Path, *keys: str) -> Any:
    """What a params file says under some keys, as a value of the type `kind`."""
    return build(kind, section(read(path), keys, path), str(path), keys)


def read(path: Path) -> Any:
    """The content of a params file, as JSON has it: without aliases, a date as its text."""
    try:
        return _plain(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        way_out = "run in the repository's root, or name a file with --params"
        raise UserError(f"{path}: cannot be read ({error}); {way_out}") from None
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        what = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise UserError(f"{path}: {line}not YAML: {what}") from None


def _plain(text: str) -> Any:
    return json.loads(json.dumps(YAML(typ="safe").load(text), default=str))


def section(data: Any, keys: Keys, path: Path) -> Any:
    """The part of a file's content under some keys; the error names what is there."""
    for i, key in enumerate(keys):
        if not isinstance(data, dict) or key not in data:
            there = ", ".join(data) if isinstance(data, dict) else "none"
            raise UserError(f"{path}: {'.'.join(keys[: i + 1])}: is missing; there are: {there}")
        data = data[key]
    return data


def change(section: Any, setting: str) -> None:
    """Replaces a value of a section that was read: `optimizer.lr=3e-4`, where the value is YAML."""
    try:
        key, value = setting.split("=", 1)
        *parents, last = key.split(".")
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
        section |= {last: _plain(value)}
    except (AttributeError, *NOT_YAML):
        example = "such as optimizer.lr=3e-4"
        raise UserError(f"--set {setting}: must be a key and its value, {example}") from None


def build(kind: Any, data: Any, source: str, keys: Keys = ()) -> Any:
    """Plain data, found under some keys of a source, as a value of the type `kind`.

    Raises:
        UserError: One line per error; of a mapping's values out of range, the first.
    """
    reader = _Reader()
    value = reader.value(kind, data, keys)
    if reader.problems:
        raise UserError("\n".join(f"{source}: {escaped(problem)}" for problem in reader.problems))
    return value


class _Reader:
    """Turns plain data into dataclasses, and collects the problems on the way."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def value(self, kind: Any, data: Any, keys: Keys) -> Any:
        """`data` as a value of the type `kind`; None, and a problem, if it is not one."""
        members: tuple[Any, ...] = get_args(kind) or (kind,)
        classes: list[Any] = [
            each for each in members if isinstance(each, type) and is_dataclass(each)
        ]
        if get_origin(kind) is dict and isinstance(data, dict):
            for key in data:
                self._leaf(members[0], key, (*keys, key))
            return {key: self.value(members[1], data[key], (*keys, key)) for key in data}
        if get_origin(kind) is tuple and members[-1] is Ellipsis and isinstance(data, list):
            values = enumerate(data)
            return tuple(self.value(members[0], value, (*keys, str(i))) for i, value in values)
        if data is None and NoneType in members:
            return None
        if not classes:
            return self._leaf(kind, data, keys)
        if not isinstance(data, dict):
            return self._wrong(keys, f"must be a mapping (key: value lines), not {_shown(data)}")
        if len(classes) == 1:
            return self._made(classes[0], data, keys)
        by_kind = {each.kind: each for each in classes}
        if data.get("kind") in list(by_kind):
            return self._made(by_kind[data["kind"]], data, keys)
        what = f"must be one of {', '.join(by_kind)}, not {_shown(data.get('kind'))}"
        return self._wrong((*keys, "kind"), what)

    def _made(self, kind: Any, data: dict[str, Any], keys: Keys) -> Any:
        before = len(self.problems)
        known = {field.name: field for field in fields(kind)}
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                self._wrong((*keys, key), f"unknown key; {hint}allowed: {', '.join(known)}")
        for key, field in known.items():
            if key not in data and field.default is field.default_factory is MISSING:
                self._wrong((*keys, key), "is missing")
        types = _types(kind)
        values = {k: self.value(types[k], data[k], (*keys, k)) for k in known if k in data}
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except ValueError as error:  # begins with the key, as mdeq.checks does
            self.problems.append(".".join((*keys, str(error))))

    def _leaf(self, kind: Any, data: Any, keys: Keys) -> Any:
        try:
            return _adapter(kind).validate_json(json.dumps(data))
        except ValidationError as error:
            for each in error.errors(include_url=False):
                text = each["msg"].removeprefix("Value error, ").replace("Input should", "must")
                where = (*keys, *map(str, each["loc"]))
                self._wrong(where, f"{text}, not {_shown(each['input'])}")

    def _wrong(self, keys: Keys, what: str) -> None:
        self.problems.append(f"{'.'.join(keys) or 'the file'}: {what}")


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
