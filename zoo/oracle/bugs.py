"""Known ways to get Pave-GRPO wrong, and a few ways to write it that are right: the table bugs.txt.

One table for two uses: verify_equivalence.py --against recognises the numbers that a bug produces,
and tests/planted_bugs.py plants each bug and asks whether the test suite notices. An entry replaces
text that occurs exactly once in pave_grpo.py. Its level is where it first shows: in a transition's
mean and std, in a log-probability, in advantages, in a loss, or in the sampler alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pave_grpo

LEVELS = ("transition", "log_prob", "advantages", "loss", "sampler")
VARIANTS_BEGIN = "# ==== Correct variants"


class Patch(NamedTuple):
    """`old` -> `new` in the text of pave_grpo.py."""

    name: str
    level: str  # one of LEVELS
    says: str  # completes "it ..."
    old: str
    new: str


def entries(table: str) -> Iterator[tuple[str, str, str]]:
    """(head, old, new) of each entry of a table: a line, and lines that begin "- " and "+ ".

    Entries are set apart by an empty line; # begins a comment. Raises ValueError for a malformed
    one.
    """
    lines = [line for line in table.splitlines() if not line.startswith("#")]
    for entry in "\n".join(lines).split("\n\n"):
        head, *changes = entry.strip("\n").splitlines() or [""]
        if not head:
            continue
        old = [line[2:] for line in changes if line.startswith("- ")]
        new = [line[2:] for line in changes if line.startswith("+ ")]
        if not old or not new or len(old) + len(new) < len(changes) or head.count(" | ") < 2:
            raise ValueError(f"{head!r} is malformed; the table's first lines say how it should be")
        yield head, "\n".join(old), "\n".join(new)


def read(table: str) -> tuple[Patch, ...]:
    """The entries of a table in the format that bugs.txt states. ValueError for a malformed one."""
    patches = []
    for head, old, new in entries(table):
        name, level, says = head.split(" | ")
        if level not in LEVELS:
            raise ValueError(f"bugs.txt: {name!r}: level {level!r} must be of {', '.join(LEVELS)}")
        patches.append(Patch(name, level, says, old, new))
    return tuple(patches)


_BUGS, _, _VARIANTS = Path(__file__).with_name("bugs.txt").read_text().partition(VARIANTS_BEGIN)
BUGS, VARIANTS = read(_BUGS), read("#" + _VARIANTS)


def patched_source(patch: Patch) -> str:
    """The text of pave_grpo.py with the patch applied.

    Raises ValueError unless its place occurs exactly once.
    """
    source = Path(pave_grpo.__file__).read_text()
    count = source.count(patch.old)
    if count != 1:
        raise ValueError(f"patch {patch.name!r}: must occur once in pave_grpo.py, occurs {count} x")
    return source.replace(patch.old, patch.new)


@functools.cache
def patched(patch: Patch) -> ModuleType:
    """pave_grpo with the patch applied, as a module of its own; the real one is untouched."""
    module = ModuleType(f"pave_grpo_with_{patch.name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    code = compile(patched_source(patch), f"pave_grpo.py with {patch.name!r}", "exec")
    exec(code, module.__dict__)
    return module
