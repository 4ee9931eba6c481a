"""Files that are whole or not there, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from zoo.training.ranks import Ranks, Unwritable

T = TypeVar("T")


def by_first(ranks: Ranks, run: Path, job: Callable[..., None], *arguments: Any) -> None:
    """job(*arguments) on the first rank. Raises Unwritable, on all, where its disk fails."""
    ranks.together(on_disk, run, job if ranks.leads else nothing, *arguments)


def nothing(*_: Any) -> None:
    """What the other ranks write."""


def on_disk(run: Path, job: Callable[..., T], *arguments: Any) -> T:
    """job(*arguments). Raises Unwritable, of the run, for what a disk does not do."""
    try:
        return job(*arguments)
    except (OSError, SafetensorError) as problem:
        said = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        raise Unwritable(f"{run}: cannot be written ({said}); checkpoints stay whole") from None


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def usual_mode(path: Path) -> None:
    """Give a file the mode that Python would give it; some libraries let nobody else read it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which then takes its place at once.

    Whoever reads `path` meanwhile, or after an interruption, finds the file of before or the new.
    """
    part = path.with_name(f".part-{path.name}")  # the name's end tells libraries the format
    try:
        yield part
        usual_mode(part)
        flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def link(path: Path, target: str) -> None:
    """Make `path` lead to `target`, which is relative to its folder, at once."""
    part = path.with_name(f".part-{path.name}")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    os.replace(part, path)
    flush(path.parent)


def strict(value: Any) -> Any:
    """The same value with "nan", "inf" or "-inf" where JSON has no number for a float."""
    if isinstance(value, dict):
        return {name: strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """A line or more of strict JSON, without an end of line."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Replace a file of JSON."""
    with replacing(path) as part:
        part.write_text(to_json(content, indent=1) + "\n")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines."""
    with replacing(path) as part:
        part.write_text("".join(to_json(line) + "\n" for line in lines))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines: all of it, or where the disk fails nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(to_json(line) + "\n")
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise
