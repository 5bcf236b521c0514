"""params.yaml as plain data, and plain data as checked dataclasses.

Torch is not imported here, so that a slip in the YAML is found, and data are prepared, at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UserError

FILE = Path("params.yaml")
VALUES = 100_000  # in a file; an alias counts wherever it is used
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
NOT_YAML = (YAMLError, ValueError, TypeError, RecursionError)
Keys = tuple[str, ...]
Problem = tuple[Keys, str]  # where, and what is wrong


def name(text: str) -> str:
    """The text, if YAML 1.1, YAML 1.2, DVC and a file system all take it for this very name.

    Raises:
        ValueError: They do not.
    """
    values = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none"}
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_-]{0,99}", text) or text.lower() in values:
        raise ValueError(
            "a name begins with a letter, has at most 100 letters, digits, - and _, and is no "
            "word for true, false or nothing"
        )
    return text


Name = Annotated[str, AfterValidator(name)]
Count = Annotated[int, Field(ge=1)]
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
        if self.source == "generated" and self.generated is None:
            raise ValueError("generated: is missing; `source: generated` needs what to draw")
        if self.source not in ("generated", None) and self.generated is not None:
            raise ValueError("generated: is for `source: generated` alone; leave it out")


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


PREPARE = {"cifar10": PrepareCifar10, "imagenet": PrepareImageNet, "cityscapes": PrepareCityscapes}


# the file


def read(path: Path) -> dict[str, Any]:
    """The content of a params file.

    Raises:
        UserError: It is missing, not YAML, or has keys or values of kinds that params never are.
    """
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run in the repository's root, or name a file with --params"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except NOT_YAML as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}: {where}not YAML: {' '.join(what.split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must have sections (prepare:, classify:, ...)")
    report(_strange(data), path)
    return data


def _strange(data: Any) -> list[Problem]:
    """The first key that is not text, value that JSON lacks, or alias of aliases."""
    todo: list[tuple[Any, Keys]] = [(data, ())]
    for _ in range(VALUES):
        if not todo:
            return []
        node, keys = todo.pop()
        if isinstance(node, dict):
            values = [key for key in node if not isinstance(key, str)]
            if values:
                return [((*keys, str(values[0])), "is not a name but a value to YAML; quote it")]
            todo += [(value, (*keys, key)) for key, value in node.items()]
        elif isinstance(node, list):
            todo += [(value, (*keys, str(i))) for i, value in enumerate(node)]
        elif not isinstance(node, str | int | float | NoneType):
            kind = type(node).__name__
            return [(keys, f"must be text, a number, true, false or null, not a {kind}")]
    return [((), f"more than {VALUES:,} values, or an alias that contains itself")]


def section(data: Mapping[str, Any], keys: Keys, path: Path) -> Any:
    """What a file says under some keys.

    Raises:
        UserError: One of them is missing; the message lists those that are there.
    """
    node: Any = data
    for i, key in enumerate(keys):
        if not isinstance(node, dict) or key not in node:
            there = ", ".join(node) if isinstance(node, dict) else ""
            report([(keys[: i + 1], f"is missing; there are: {there or 'none'}")], path)
        node = node[key]
    return node


def changed(data: Any, changes: Sequence[str]) -> Any:
    """A section with some values replaced.

    Args:
        data: The section.
        changes: Of the form `optimizer.lr=3e-4`; the value is YAML.

    Raises:
        UserError: One has another form, or its keys lead nowhere.
    """
    data = json.loads(json.dumps(data))  # a copy, without aliases
    for change in changes:
        key, equals, text = change.partition("=")
        *parents, last = key.split(".")
        if not equals or not last:
            raise UserError(f"--set {change}: must be key=value, as in optimizer.lr=3e-4")
        try:
            value = YAML(typ="safe").load(text)
        except NOT_YAML:
            raise UserError(f"--set {change}: {text!r} is not a value in YAML") from None
        node = data
        for parent in parents:
            if isinstance(node, dict) and node.get(parent) is None:
                node[parent] = {}
            node = node[parent] if isinstance(node, dict) else None
        if not isinstance(node, dict) or _strange(value):
            raise UserError(f"--set {change}: there is no such key, or it takes no such value")
        node[last] = value
    return data


def load(kind: Any, path: Path, keys: Keys = (), changes: Sequence[str] = ()) -> Any:
    """What a params file says under some keys, as a value of the type `kind`.

    Raises:
        UserError: It is missing or wrong; one line per error.
    """
    data = section(read(path), keys, path)
    reader = Reader()
    value = reader.value(kind, changed(data, changes) if changes else data, keys)
    report(reader.problems, path, keys, changes)
    return value


def report(
    problems: Sequence[Problem], path: Path, keys: Keys = (), changes: Sequence[str] = ()
) -> None:
    """Raises a UserError with a line per problem, if there are any.

    Args:
        problems: What is wrong.
        path: Of the file, which a line names unless a change is to blame.
        keys: Of the section that was changed.
        changes: As for `changed`.
    """
    lines = []
    for where, what in problems:
        source = str(path)
        for change in changes:
            place = (*keys, *change.partition("=")[0].split("."))
            if where[: len(place)] == place:
                source = f"--set {change}"
        lines.append(f"{source}: {'.'.join(where) or 'the file'}: {what}")
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


# plain data to dataclasses


class Reader:
    """Turns plain data into dataclasses, and collects every problem on the way."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def value(self, kind: Any, data: Any, keys: Keys) -> Any:
        """`data` as a value of the type `kind`; None, and a problem, if it is none."""
        classes = dataclasses_of(kind)
        if get_origin(kind) is dict:
            return self._named(get_args(kind)[1], data, keys)
        if (
            get_origin(kind) is tuple
            and isinstance(data, list)
            and dataclasses_of(kind.__args__[0])
        ):
            member = get_args(kind)[0]
            return tuple(self.value(member, each, (*keys, str(i))) for i, each in enumerate(data))
        if not classes or (data is None and NoneType in get_args(kind)):
            return self._plain(kind, data, keys) if not classes else None
        if not isinstance(data, dict):
            return self._wrong(keys, f"must be a mapping (key: value lines), not {_short(data)}")
        chosen = self._choice(classes, data, keys)
        return self._made(chosen, data, keys) if chosen else None

    def _wrong(self, keys: Keys, what: str) -> None:
        self.problems.append((keys, what))

    def _named(self, kind: Any, data: Any, keys: Keys) -> Any:
        if not isinstance(data, dict):
            return self._wrong(keys, f"must be a mapping (name: ... lines), not {_short(data)}")
        for key in data:
            self._plain(Name, key, (*keys, key))
        return {key: self.value(kind, value, (*keys, key)) for key, value in data.items()}

    def _choice(self, classes: list[Any], data: dict[str, Any], keys: Keys) -> Any:
        """The class that the mapping's `kind` names."""
        if len(classes) == 1:
            return classes[0]
        by_kind = {get_args(hints(each)["kind"])[0]: each for each in classes}
        if "kind" not in data:
            return self._wrong((*keys, "kind"), f"is missing; one of {', '.join(by_kind)}")
        kind = data["kind"]
        if isinstance(kind, str) and kind in by_kind:
            return by_kind[kind]
        what = f"must be one of {', '.join(by_kind)}, not {_short(kind)}"
        return self._wrong((*keys, "kind"), what)

    def _made(self, kind: Any, data: dict[str, Any], keys: Keys) -> Any:
        before = len(self.problems)
        known = {field.name: field for field in fields(kind)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key in known:
                values[key] = self.value(hints(kind)[key], value, (*keys, key))
                continue
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            self._wrong((*keys, key), f"unknown key; {hint}allowed: {', '.join(sorted(known))}")
        for key, field in known.items():
            if key not in data and field.default is field.default_factory is MISSING:
                self._wrong((*keys, key), "is missing")
        self._check(kind, values, keys)
        return kind(**values) if len(self.problems) == before else None

    def _check(self, kind: Any, values: dict[str, Any], keys: Keys) -> None:
        """Collects what a dataclass' own checks say, also where some of its values are wrong.

        They run on an object without its wrong values: None passes the checks.
        """
        trial = object.__new__(kind)
        for field in fields(kind):
            default = None if field.default is MISSING else field.default
            object.__setattr__(trial, field.name, values.get(field.name, default))
        named = {where[len(keys)] for where, _ in self.problems if where[:-1][: len(keys)] == keys}
        while hasattr(trial, "__post_init__"):
            try:
                return trial.__post_init__()
            except (TypeError, AttributeError):
                return None  # where a check of two values met None
            except ValueError as error:
                where, colon, what = str(error).partition(": ")
                key = where.partition(".")[0]
                if not colon or key in named or key not in hints(kind):
                    return None if key in named else self._wrong(keys, str(error))
                self._wrong((*keys, *where.split(".")), what)
                named.add(key)
                object.__setattr__(trial, key, None)

    def _plain(self, kind: Any, data: Any, keys: Keys) -> Any:
        try:
            return _adapter(kind).validate_json(json.dumps(data))
        except ValidationError as error:
            found = error.errors(include_url=False)
            wrong_members = [each for each in found if each["type"] != "too_short"]
            for each in wrong_members or found:
                where = (*keys, *(str(part) for part in each["loc"]))
                self._wrong(where, _message(each["msg"], each["input"]))
            return None


@cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass' fields."""
    return get_type_hints(kind, include_extras=True)


def dataclasses_of(kind: Any) -> list[Any]:
    """The dataclasses of a union, or the one that the type is."""
    members = get_args(kind) or (kind,)
    return [each for each in members if isinstance(each, type) and is_dataclass(each)]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT)


_WORDS = {
    "Input should be": "must be",
    "Tuple should have": "must have",
    " after validation, not 0": "",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid array": "a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "Field required": "is missing",
    "Value error, ": "",
}


def _message(text: str, value: Any) -> str:
    """Pydantic's message in the words of the other checks."""
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text if text == "is missing" else f"{text}, not {_short(value)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
