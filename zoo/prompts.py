"""Prompts of a text file, one per line, and an account of every line that is not one."""

from __future__ import annotations

from pathlib import Path


def read(path: str | Path) -> tuple[list[str], list[str]]:
    """(prompts, report): distinct prompts in their order; a line for each line left out, empty or seen before.

    UTF-8; spaces around a prompt are not part of it. Raises ValueError for a file that cannot be read or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {str(path)!r}: cannot be read ({error}); must be a text file in UTF-8") from None
    first, report = {}, []
    for number, prompt in enumerate(map(str.strip, lines), 1):
        if not prompt:
            report.append(f"{path}, line {number}: empty, left out")
        elif prompt in first:
            report.append(f"{path}, line {number}: {prompt!r} is line {first[prompt]} again, left out")
        else:
            first[prompt] = number
    if not first:
        raise ValueError(f"prompts {str(path)!r}: must hold at least one prompt")
    return list(first), report
