"""Checks of settings, called by a dataclass when it is made: a wrong value never gets further.

Each takes keyword arguments, `name=value`, and raises a ValueError that begins with `name:`, so
that whoever reports it can say which key is wrong. None passes all but `given`: it stands for a
setting that is not used.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any


def given(**values: Any) -> None:
    """Values that are not None."""
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name}: must be given")


def whole(least: int, **values: Any) -> None:
    """Whole numbers of at least `least`."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: must be a whole number of at least {least}, not {value!r}")


def at_least(least: float, **values: Any) -> None:
    """Finite numbers of at least `least`."""
    for name, value in values.items():
        if value is not None and not (_finite(value) and value >= least):
            raise ValueError(f"{name}: must be a number of at least {least:g}, not {value!r}")


def above(bound: float, **values: Any) -> None:
    """Finite numbers greater than `bound`."""
    for name, value in values.items():
        if value is not None and not (_finite(value) and value > bound):
            raise ValueError(f"{name}: must be a number greater than {bound:g}, not {value!r}")


def between(
    low: float, high: float, *, open_low: bool = False, open_high: bool = False, **values: Any
) -> None:
    """Numbers from `low` to `high`; an open end is itself excluded."""
    for name, value in values.items():
        if value is None:
            continue
        inside = (
            _finite(value)
            and (value > low if open_low else value >= low)
            and (value < high if open_high else value <= high)
        )
        if not inside:
            ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            raise ValueError(f"{name}: must be a number in {ends}, not {value!r}")


def one_of(allowed: Collection[object], **values: Any) -> None:
    """Values among `allowed`."""
    for name, value in values.items():
        if value is not None and value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}: must be one of {listed}, not {value!r}")


def instance(kinds: tuple[type, ...], **values: Any) -> None:
    """Objects of one of `kinds`."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kinds):
            listed = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: must be one of {listed}, not {value!r}")


def _finite(value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and float("-inf") < float(value) < float("inf")
    )
