"""params.yaml -> typed, checked params. `load` hands a stage instance its own section and nothing else.

The only module that opens params.yaml. What needs torch to be described (models, solvers, training) is in
`train_params` and imported when such a section is read, so that a stage that does not train starts at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.data.generated import GeneratedCifar10, GeneratedCityscapes, GeneratedImageNet

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FILE = Path("params.yaml")
SCHEMA = "params.schema.json"
VALUES = 100_000  # in a file; aliases count where they are used


class ParamsError(ValueError):
    """What is wrong with a params file: a line an error, `file: key: what is wrong`."""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ranges:
    """Annotates a plain dataclass as a params field: `Annotated[Broyden, Ranges(steps=Field(ge=1))]`.

    A field named here takes the range (or the type with ranges); all others are as the dataclass declares
    them. Errors then name the key, and the JSON schema knows the range; the value is the dataclass itself.
    """

    def __init__(self, **ranges: Any) -> None:
        self._ranges = ranges

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        hints = get_type_hints(source)
        declared: dict[str, Any] = {}
        for field in fields(source):
            kind = hints[field.name]
            extra = self._ranges.get(field.name)
            if extra is not None:
                kind = Annotated[kind, extra] if isinstance(extra, FieldInfo) else extra
            declared[field.name] = (kind, ... if field.default is MISSING else field.default)
        summary = " ".join((source.__doc__ or "").partition("\n\n")[0].split())
        mirror = create_model(source.__name__, __base__=Section, __doc__=summary, **declared)

        def build(checked: Section) -> Any:
            return source(**{name: getattr(checked, name) for name in declared})

        return core_schema.no_info_after_validator_function(
            build,
            handler.generate_schema(mirror),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""What a model may be called: it becomes part of a stage's name, of a path and of a dotted key."""

Source = Annotated[
    Literal["generated", "folder", "download"],
    Field(description="drawn by the pipeline | the files you have | fetched with the set's official tool"),
]


class PrepareParams(Section):
    """Where a set comes from."""

    source: Source
    generated: GeneratedCifar10 | GeneratedImageNet | GeneratedCityscapes | None = Field(
        default=None, description="what to draw; needed with `source: generated`, ignored otherwise"
    )

    @model_validator(mode="after")
    def _drawn_from_something(self) -> PrepareParams:
        if self.source == "generated" and self.generated is None:
            raise ValueError("generated: is missing; `source: generated` needs to know what to draw")
        return self


LAST_SEED = 2**32 - 1
_Seed, _Count, _Ten = Field(ge=0, le=LAST_SEED), Field(ge=1), Field(ge=10)
_PER_CLASS = {"train_per_class": _Count, "val_per_class": _Count}
_SIZE = {"height": Field(ge=32), "width": Field(ge=32)}


class PrepareCifar10(PrepareParams):
    """Where CIFAR-10 comes from."""

    generated: Annotated[GeneratedCifar10, Ranges(seed=_Seed, train=_Ten, test=_Ten)] | None = None


class PrepareImageNet(PrepareParams):
    """Where ImageNet comes from."""

    generated: Annotated[GeneratedImageNet, Ranges(seed=_Seed, classes=Field(ge=2), **_PER_CLASS)] | None = None


class PrepareCityscapes(PrepareParams):
    """Where Cityscapes comes from."""

    generated: Annotated[GeneratedCityscapes, Ranges(seed=_Seed, train=_Count, val=_Count, **_SIZE)] | None = None


class EvaluateParams(Section):
    """How trained models are judged."""

    batch: int = Field(ge=1, description="samples at once; a prediction never depends on its neighbours")
    steps: int | None = Field(default=None, ge=1, description="the forward solver's limit; null: the one trained with")
    limit: int | None = Field(default=None, ge=1, description="only the first samples of the split; null: all")
    examples: int = Field(default=8, ge=1, le=64, description="predictions shown beside the truth")
    accuracy_up_to: int | None = Field(
        default=None, ge=1, description="also the accuracy with each limit of 1, 2, ... this many solver steps"
    )


class EvaluateCityscapes(EvaluateParams):
    """How segmentation is judged; the paper: at a single scale, without flips."""

    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = Field(
        default=(1.0,), description="of the image; the probabilities of all are averaged"
    )
    flip: bool = Field(default=False, description="average with the mirrored image's probabilities, too")


PREPARE = {"cifar10": PrepareCifar10, "imagenet": PrepareImageNet, "cityscapes": PrepareCityscapes}
EVALUATE = {"cifar10": EvaluateParams, "imagenet": EvaluateParams, "cityscapes": EvaluateCityscapes}
TRAINED_BY = {"cifar10": "classify", "imagenet": "pretrain", "cityscapes": "finetune"}
TRAINED_ON = {stage: dataset for dataset, stage in TRAINED_BY.items()}
SOLVING = (*TRAINED_BY.values(), "convergence", "benchmark")


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml and the one section that its command reads ({} stands for the instance)."""

    command: str
    section: str | None


STAGES = {
    "prepare": Stage("prepare {}", "prepare.{}"),
    "classify": Stage("classify {}", "classify.{}"),
    "pretrain": Stage("pretrain {}", "pretrain.{}"),
    "finetune": Stage("finetune {}", "finetune.{}"),
    "evaluate-cifar10": Stage("evaluate cifar10 {}", "evaluate.cifar10"),
    "evaluate-imagenet": Stage("evaluate imagenet {}", "evaluate.imagenet"),
    "evaluate-cityscapes": Stage("evaluate cityscapes {}", "evaluate.cityscapes"),
    "convergence": Stage("convergence {}", "convergence.{}"),
    "machine": Stage("machine", None),
    "benchmark": Stage("benchmark", "benchmark"),
    "report": Stage("report", None),
}
"""The stages of dvc.yaml; a test holds both together."""


def load(stage: str, instance: str | None = None, path: str | Path = FILE) -> Section:
    """The params of a stage instance: `load("classify", "mdeq-small")`, `load("benchmark")`.

    Raises:
        ParamsError: The section is missing or wrong.
    """
    data = _read(Path(path))
    keys = (stage,) if instance is None else (stage, instance)
    for i, key in enumerate(keys):
        if not isinstance(data, dict) or key not in data:
            there = ", ".join(map(str, data)) if isinstance(data, dict) and data else "none"
            raise ParamsError(f"{path}: {'.'.join(keys[: i + 1])}: is not there; there are: {there}")
        data = data[key]
    section = _validate(_section_type(stage, instance), data, Path(path), keys)
    assert isinstance(section, Section)
    return section


def scale(path: str | Path = FILE) -> str:
    """What the file calls its scale; "unnamed" where `check` will say what is wrong with that."""
    name = _read(Path(path)).get("scale")
    return name if isinstance(name, str) else "unnamed"


def locked(output: Path, lock: Path = Path("dvc.lock")) -> dict[str, Any] | None:
    """The params that a stage's output was made with, as dvc.lock says; None if it does not know this very file."""
    if not lock.exists():
        return None
    md5 = hashlib.md5(output.read_bytes(), usedforsecurity=False).hexdigest()
    for stage in _read(lock).get("stages", {}).values():
        if any(out["path"] == output.as_posix() and out.get("md5") == md5 for out in stage.get("outs", ())):
            return next(iter(stage.get("params", {}).get(str(FILE), {}).values()), None)
    return None


def instances(stage: str, path: str | Path = FILE) -> list[str]:
    """The names in a stage's section."""
    return list(_read(Path(path))[stage])


def check(path: str | Path = FILE, stamp: Path | None = None) -> None:
    """Check the whole file, with what one section says of another; `stamp` remembers a file found right.

    Raises:
        ParamsError: Every error of the file, a line each.
    """
    path = Path(path)
    data = _read(path)
    digest = _digest(path)
    if stamp is not None and stamp.is_file() and stamp.read_text() == digest:
        return
    from pipeline.train_params import Params, across

    params = _validate(Params, data, path, ())
    assert isinstance(params, Params)
    if wrong := across(params):
        raise ParamsError("\n".join(f"{path}: {line}" for line in wrong))
    if stamp is not None:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)


def schema() -> str:
    """The JSON schema of params.yaml, for editors."""
    from pipeline.train_params import Params

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Params.model_json_schema()}
    return json.dumps(document, indent=2) + "\n"


def _section_type(stage: str, instance: str | None) -> type[Section]:
    if stage in SOLVING:
        from pipeline import train_params

        return train_params.BY_STAGE[stage]
    if stage == "prepare":
        return PREPARE[instance or ""]
    return EVALUATE[instance or ""]


def _read(path: Path) -> Any:
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        _bounded(data)
        data = json.loads(json.dumps(data, default=str))  # as JSON has it: text for keys, no loops
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the repository's root or name one with --params") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read: {error}".replace("\n", " ")) from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ParamsError(f"{path}: {line}not YAML: {error.problem}".replace("\n", " ")) from None
    except RecursionError:
        raise ParamsError(f"{path}: not YAML: nested too deeply") from None
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{path}: not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path}: must hold sections (prepare:, classify:, ...)")
    return data


def _bounded(data: Any) -> None:
    """Refuses aliases of aliases, which a few lines of YAML can make billions of."""
    todo, count = [data], 0
    while todo:
        node = todo.pop()
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if (count := count + 1) > VALUES:
            raise ValueError(f"more than {VALUES:,} values, or an alias that holds itself")


def _validate(kind: type[Section], data: Any, path: Path, keys: tuple[str, ...]) -> Section:
    try:
        # JSON mode: a list becomes a tuple and a mapping a dataclass, while scalars are taken strictly
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        document = kind.model_json_schema()
        lines = dict.fromkeys(_line(details, data, document, keys) for details in error.errors(include_url=False))
        raise ParamsError("\n".join(f"{path}: {line}" for line in lines)) from None


def _line(error: ErrorDetails, data: Any, document: dict[str, Any], keys: tuple[str, ...]) -> str:
    """One error as `dotted.key: what is wrong`."""
    where = _location(error["loc"], data, error["type"] == "missing")
    what = error["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
    what = what.replace("less than or equal to", "at most").removeprefix("Value error, ")
    match error["type"]:
        case "missing":
            what = "is missing"
        case "extra_forbidden":
            allowed = sorted(_at(document, data, where[:-1]).get("properties", {}))
            near = difflib.get_close_matches(str(where[-1]), allowed, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            what = f"unknown key; {hint}allowed: {', '.join(allowed)}"
        case "union_tag_not_found":
            where, what = (*where, "kind"), f"is missing; one of {_expected(document, data, where)}"
        case "union_tag_invalid":
            where = (*where, "kind")
            tags = error.get("ctx", {})
            what = f"must be one of {tags.get('expected_tags')}, not {tags.get('tag')!r}"
        case "value_error":
            field, colon, rest = what.partition(": ")
            if colon and field.replace(".", "").isidentifier():
                where, what = (*where, field), rest
        case "too_short" | "too_long":
            what = re.sub(r".* should have (.*) after validation, not .*", r"must have \1", what)
        case "string_pattern_mismatch":
            what = "a model's name is made of letters, digits, - and _"
        case "dataclass_type" | "model_type" | "dict_type" | "model_attributes_type":
            what = f"must be a mapping (key: value lines), not {_short(error['input'])}"
        case _:
            what = f"{what}, not {_short(error['input'])}"
    return f"{'.'.join(map(str, (*keys, *where))) or 'the file'}: {what}"


def _short(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _location(loc: tuple[int | str, ...], data: Any, missing: bool) -> tuple[int | str, ...]:
    """Pydantic's path without the union tags in it, which no key of the file has."""
    where: list[int | str] = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (missing and i == len(loc) - 1):
            continue
        where.append(part)
    return tuple(where)


def _at(document: dict[str, Any], data: Any, where: tuple[int | str, ...]) -> dict[str, Any]:
    """The object schema at a place of the file."""
    node = _follow(document, document, data)
    for part in where:
        data = data[part]
        node = _follow(document, _inner(node, part), data)
    return node


def _expected(document: dict[str, Any], data: Any, where: tuple[int | str, ...]) -> str:
    """The kinds that the schema offers at a place of the file."""
    choices = [last := _inner(_at(document, data, where[:-1]), where[-1]), *last.get("anyOf", [])]
    return ", ".join(repr(tag) for choice in choices for tag in choice.get("discriminator", {}).get("mapping", {}))


def _inner(node: dict[str, Any], part: int | str) -> dict[str, Any]:
    """The schema of a key; every key of a mapping of models has the same."""
    if part in node.get("properties", {}):
        return node["properties"][part]
    return next(iter(node.get("patternProperties", {}).values()), {})


def _follow(document: dict[str, Any], node: dict[str, Any], data: Any) -> dict[str, Any]:
    """The object schema behind references, optional values and unions, by the `kind` that the file names."""
    if "$ref" in node:
        return _follow(document, document["$defs"][node["$ref"].rpartition("/")[2]], data)
    if "discriminator" in node and isinstance(data, dict):
        return _follow(document, {"$ref": node["discriminator"]["mapping"].get(data.get("kind"), "")}, data)
    for choice in node.get("anyOf", []):
        if choice.get("type") != "null":
            return _follow(document, choice, data)
    return node


def _digest(path: Path) -> str:
    """Of the file and of the code that decides what is right."""
    here = Path(__file__).parent
    code = [here / "recipe.py", *sorted(here.glob("*params.py")), *sorted((here.parent / "mdeq").glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in (path, *code))).hexdigest()
