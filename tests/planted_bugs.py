"""Plants the bugs of zoo/oracle/bugs.txt and asks whether the test suite notices.

    python tests/planted_bugs.py                    all of them, and the correct variants
    python tests/planted_bugs.py "coarse std"       those named

Each patch is applied to a copy of pave_grpo.py, beside copies of the tests, and a fast subset of
the suite is run on it. A bug is killed by a failing assertion alone: an import error, a syntax
error or a crash is no proof that a test knows what is right. The correct variants of the table must
survive. Prints the table; exit status 1 if a bug survives, a variant is accused, or a run takes
longer than LIMIT seconds.
"""

from __future__ import annotations

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

SUITES = {  # the fast subset that should notice a bug of each level
    "transition": ["test_kernels.py", "test_decomposition.py"],
    "log_prob": ["test_kernels.py"],
    "advantages": ["test_advantages.py"],
    "loss": ["test_loss.py"],
    "sampler": ["test_sampler.py", "test_kernels.py"],
}
LIMIT = 60.0  # seconds for one run, start-up of torch included; ten is usual on an idle machine
ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE", "Failed: DID NOT WARN")
KILLED, SURVIVED = "killed", "survived"


class Outcome(NamedTuple):
    """What became of a patch: killed, survived, or an error in words."""

    verdict: str
    test: str  # the one that failed first
    seconds: float


def plant(patch: bugs.Patch, place: Path) -> None:
    """What the tests need, in a folder of its own, with the patch applied."""
    leave = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for folder in ("tests", "zoo"):
        shutil.copytree(ROOT / folder, place / folder, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", place)
    (place / "pave_grpo.py").write_text(bugs.patched_source(patch))


def run(patch: bugs.Patch) -> Outcome:
    """Plant one patch and run the subset of its level."""
    quiet = {"OMP_NUM_THREADS": "1", "CI": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place, report = Path(folder), Path(folder) / "report.xml"
        plant(patch, place)
        suite = [f"tests/{name}" for name in SUITES[patch.level]]
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
    for case in ElementTree.parse(report).iter("testcase"):
        for failure in (*case.findall("failure"), *case.findall("error")):
            message = failure.get("message") or ""
            by_assertion = failure.tag == "failure" and message.startswith(ASSERTIONS)
            verdict = KILLED if by_assertion else f"crashed: {message.splitlines()[0][:60]}"
            return Outcome(verdict, case.get("name") or "", seconds)
    return Outcome(SURVIVED, "", seconds)


def main(asked: list[str]) -> int:
    """Run the table, up to four at a time, and print it. 0 if all is as it should be."""
    wanted = dict.fromkeys(bugs.BUGS, KILLED) | dict.fromkeys(bugs.VARIANTS, SURVIVED)
    names = sorted(patch.name for patch in wanted)
    unknown = ", ".join(sorted(set(asked) - set(names)))
    if unknown:
        print(f"planted_bugs.py: error: {unknown}: must be of {', '.join(names)}", file=sys.stderr)
        return 2
    patches = [patch for patch in wanted if patch.name in (asked or names)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        outcomes = list(tqdm(pool.map(run, patches), "bugs", total=len(patches)))

    wrong = 0
    for patch, (verdict, test, seconds) in zip(patches, outcomes, strict=True):
        mark = "  " if verdict == wanted[patch] else "!!"
        wrong += verdict != wanted[patch]
        print(f"{mark} {patch.name:28} {patch.level:11} {verdict:10} {seconds:5.1f} s  {test}")
    planted = sum(patch in bugs.BUGS for patch in patches)
    verdict = f"{wrong} not as they should be"
    if not wrong:
        verdict = "every bug killed by an assertion, no variant accused"
    print(f"{planted} bugs and {len(patches) - planted} correct variants: {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
