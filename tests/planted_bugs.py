"""Plants known bugs, one at a time, and asks whether the test suite notices.

    python tests/planted_bugs.py                    every sixth of all tables
    python tests/planted_bugs.py --all              every one, and the correct variants
    python tests/planted_bugs.py "coarse std"       those named
    python tests/planted_bugs.py zoo/training       the table of a room

The tables stand beside what they break. Those of pave_grpo.py are in zoo/oracle/bugs.txt, whose
correct variants must survive. Every other room has a planted.txt, which names for each bug the file
it breaks and the tests that must see it.

A bug is planted in a copy of the programs and the tests, and killed by a failing assertion alone:
an import error, a syntax error or a crash is no proof that a test knows what is right. Prints the
table; exit status 1 if a bug survives, a variant is accused, or a run takes longer than LIMIT
seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from zoo.oracle import bugs  # noqa: E402

CORE = "zoo/oracle/bugs.txt"
SUITES = {  # the fast subset that should notice a bug of each level of the core
    "transition": ("test_kernels.py", "test_decomposition.py"),
    "log_prob": ("test_kernels.py",),
    "advantages": ("test_advantages.py",),
    "loss": ("test_midpoint.py", "test_loss.py"),
    "sampler": ("test_sampler.py", "test_kernels.py"),
}
THIN = 6  # one bug of so many is planted by default
LIMIT = 120.0  # seconds for one run, start-up of torch included; ten is usual on an idle machine
ASSERTIONS = ("AssertionError", "assert ", "Failed: ")  # the last of pytest.raises and pytest.fail
KILLED, SURVIVED = "killed", "survived"


class Planted(NamedTuple):
    """A change of a file, the tests that are run on it, and what should become of it."""

    name: str
    table: str
    file: str
    tests: tuple[str, ...]
    old: str  # occurs once in the file
    new: str
    wanted: str = KILLED


class Outcome(NamedTuple):
    """What became of a bug: killed, survived, or an error in words."""

    verdict: str
    test: str  # the one that failed first
    seconds: float


# ---- The tables ----------------------------------------------------------------------------------


def of_the_core() -> list[Planted]:
    """The bugs of pave_grpo.py, and its correct variants."""
    wanted = dict.fromkeys(bugs.BUGS, KILLED) | dict.fromkeys(bugs.VARIANTS, SURVIVED)
    return [
        Planted(b.name, CORE, "pave_grpo.py", SUITES[b.level], b.old, b.new, verdict)
        for b, verdict in wanted.items()
    ]


def of_a_room(path: Path) -> list[Planted]:
    """The bugs of a planted.txt. ValueError for one that is malformed, or fits nowhere."""
    table, planted = path.relative_to(ROOT).as_posix(), []
    for head, old, new in bugs.entries(path.read_text()):
        if head.count(" | ") != 3:
            raise ValueError(f"{table}: {head!r}: must be name | file | tests | it ...")
        name, file, tests, _ = head.split(" | ")
        found = (ROOT / file).read_text().count(old)
        if found != 1:
            raise ValueError(f"{table}: {name!r}: must occur once in {file}, occurs {found} x")
        for test in tests.split():
            if not (ROOT / "tests" / test.partition("::")[0]).is_file():
                raise ValueError(f"{table}: {name!r}: {test} must be a file of tests/")
        planted.append(Planted(name, table, file, tuple(tests.split()), old, new))
    return planted


def everything() -> list[Planted]:
    """All tables, one after another."""
    rooms = sorted(ROOT.glob("zoo/*/planted.txt"))
    return of_the_core() + [planted for path in rooms for planted in of_a_room(path)]


# ---- One bug -------------------------------------------------------------------------------------


def plant(bug: Planted, place: Path) -> None:
    """What the tests need, in a folder of its own, with the bug in it."""
    leave = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for folder in ("tests", "zoo", "docs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=leave)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, place)
    file = place / bug.file
    file.write_text(file.read_text().replace(bug.old, bug.new))


def run(bug: Planted) -> Outcome:
    """Plant one bug and run its tests."""
    quiet = {"OMP_NUM_THREADS": "1", "CI": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place, report = Path(folder), Path(folder) / "report.xml"
        plant(bug, place)
        suite = [f"tests/{name}" for name in bug.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line"]
        command += [f"--junitxml={report}", *suite]
        how = {"cwd": place, "env": os.environ | quiet, "capture_output": True, "timeout": LIMIT}
        began = time.perf_counter()
        try:
            subprocess.run(command, check=False, **how)
        except subprocess.TimeoutExpired:
            return Outcome(f"no verdict within {LIMIT:.0f} s", "", LIMIT)
        seconds = time.perf_counter() - began
        if not report.exists():
            return Outcome("pytest did not run", "", seconds)
        return verdict_of(report, seconds)


def verdict_of(report: Path, seconds: float) -> Outcome:
    """The first failure in a report of pytest, and whether an assertion made it."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for failure in (*case.findall("failure"), *case.findall("error")):
            message = failure.get("message") or ""
            by_assertion = failure.tag == "failure" and message.startswith(ASSERTIONS)
            verdict = KILLED if by_assertion else f"crashed: {message.splitlines()[0][:60]}"
            return Outcome(verdict, case.get("name") or "", seconds)
    return Outcome(SURVIVED if cases else "no test ran", "", seconds)


# ---- The program ---------------------------------------------------------------------------------


def chosen(asked: list[str], every: bool) -> list[Planted]:
    """Those of some names or rooms; all; or a few of each table. ValueError for what is unknown."""
    tables = everything()
    names = {bug.name for bug in tables} | {Path(bug.table).parent.as_posix() for bug in tables}
    unknown = ", ".join(sorted(set(asked) - names))
    if unknown:
        raise ValueError(f"{unknown}: must be of {', '.join(sorted(names))}")
    if asked:
        return [
            bug for bug in tables if bug.name in asked or Path(bug.table).parent.as_posix() in asked
        ]
    return tables if every else tables[::THIN]


def main(argv: list[str] | None = None) -> int:
    """Plant what was asked for, two at a time or more, and print it. 0: all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every bug and every correct variant")
    parser.add_argument("names", nargs="*", help="bugs, or rooms such as zoo/training")
    asked = parser.parse_args(argv)
    try:
        planted = chosen(asked.names, asked.all)
    except ValueError as problem:
        print(f"planted_bugs.py: error: {problem}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        outcomes = list(tqdm(pool.map(run, planted), "bugs", total=len(planted)))

    wrong = 0
    for bug, (verdict, test, seconds) in zip(planted, outcomes, strict=True):
        mark = "  " if verdict == bug.wanted else "!!"
        wrong += verdict != bug.wanted
        print(f"{mark} {bug.name:32} {bug.file:28} {verdict:10} {seconds:5.1f} s  {test}")
    variants = sum(bug.wanted == SURVIVED for bug in planted)
    verdict = f"{wrong} not as they should be"
    if not wrong:
        verdict = "every bug killed by an assertion, no variant accused"
    print(f"{len(planted) - variants} bugs and {variants} correct variants: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
