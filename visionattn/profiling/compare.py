"""Two reports of one kind, side by side: the same rows, before and after, or on two machines."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from visionattn.errors import ConfigError, suggest
from visionattn.profiling.protocols import Number, Result

Row = dict[str, Any]

COUNTED = frozenset({"peak_memory"})
"""Fields of whole numbers that were measured."""

REMARKS = frozenset({"bound", "device", "found", "parameters", "reason"})
"""Fields that neither name a row nor measure it."""

UNTOLD = frozenset({"command", "date"})
"""What differs from run to run without telling anything."""


class Pair(Result):
    """A measurement of a row in both reports; None where a report has none.

    Attributes:
        row: what names it, as text.
        a: in the first report; the median of a time.
        b: in the second.
        ratio: b over a.
    """

    row: tuple[str, ...]
    a: Number | None
    b: Number | None
    ratio: Number | None


class Comparison(Result):
    """Of reports A and B.

    Attributes:
        names: of the fields that name a row.
        pairs: for each measurement, the rows that both have.
        only_a: rows that only A has, by what names them.
        only_b: as ``only_a``.
        differences: settings, devices, versions and commits that differ: (what, A, B).
    """

    names: tuple[str, ...]
    pairs: dict[str, list[Pair]]
    only_a: list[tuple[str, ...]]
    only_b: list[tuple[str, ...]]
    differences: list[tuple[str, str, str]]


def compare_reports(a: Path, b: Path, only: Sequence[str] = ()) -> Comparison:
    """Match the rows of two reports by what names them: texts, whole numbers, and lists of such.

    Args:
        a: the first report, a JSON file.
        b: the second, of the same kind.
        only: measurements; all if empty.

    Raises:
        ConfigError: a file is no report with rows, they are of different kinds, or lack a measurement asked for.
    """
    first, second = _read(a), _read(b)
    names, others = _names(first["rows"]), _names(second["rows"])
    if names != others:
        raise ConfigError(
            f"{a} names its rows by {', '.join(names)}; {b} by {', '.join(others)}; "
            "give two reports of the same command of the profiler"
        )
    measured = _measurements([*first["rows"], *second["rows"]])
    for name in only:
        if name not in measured:
            raise ConfigError(f"measurement {name!r}; {suggest(name, measured)}")
    before, after = _by_name(first["rows"], names, a), _by_name(second["rows"], names, b)
    both = [key for key in before if key in after]
    return Comparison(
        names=names,
        pairs={field: [_pair(key, before[key], after[key], field) for key in both] for field in only or measured},
        only_a=[key for key in before if key not in after],
        only_b=[key for key in after if key not in before],
        differences=_differences(first, second),
    )


def _read(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}; give a report that the profiler wrote, a .json file") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} has no rows to compare; give a report of `ops`, `model` or `memory`")
    return dict(content)


def _names(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the fields that name rows."""
    found = dict.fromkeys(name for row in rows for name, value in row.items() if _is_name(name, value))
    return tuple(found)


def _is_name(name: str, value: Any) -> bool:
    if name in COUNTED | REMARKS or isinstance(value, bool):
        return False
    return isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(x, int) for x in value))


def _measurements(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the fields that hold numbers with a fraction, times, or counts."""
    found = dict.fromkeys(
        name for row in rows for name, value in row.items() if name not in REMARKS and _value(name, value) is not None
    )
    return tuple(found)


def _value(name: str, value: Any) -> float | None:
    """Return a measurement as a number; None where it is none."""
    if isinstance(value, dict):
        value = value.get("median")
    counted = name in COUNTED and isinstance(value, int)
    return float(value) if counted or isinstance(value, float) else None


def _by_name(rows: Iterable[Row], names: Sequence[str], path: Path) -> dict[tuple[str, ...], Row]:
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(_text(row.get(name)) for name in names)
        if key in found:
            raise ConfigError(f"{path} has two rows {' '.join(key)}; give reports without such rows")
        found[key] = row
    return found


def _text(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pair(key: tuple[str, ...], before: Row, after: Row, field: str) -> Pair:
    a, b = _value(field, before.get(field)), _value(field, after.get(field))
    return Pair(row=key, a=a, b=b, ratio=b / a if a and b is not None else None)


def _differences(first: Row, second: Row) -> list[tuple[str, str, str]]:
    """Return what differs of all that is no row, dicts within dicts by their path."""
    a, b = _flat(first), _flat(second)
    return [
        (name, a.get(name, "-"), b.get(name, "-")) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)
    ]


def _flat(content: Row) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": text for inner, text in _flat(value).items()}
        elif name != "rows" and name not in UNTOLD:
            found[name] = str(value)
    return found
