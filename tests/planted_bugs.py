"""Plants the bugs of zoo/oracle/bugs.py and asks whether the test suite notices.

    python tests/planted_bugs.py                    all of them, and the correct variants
    python tests/planted_bugs.py "coarse std"       those named

Each patch is applied to a copy of pave_grpo.py, beside copies of the tests, and a fast subset of the suite is run on
it. A bug is killed by a failing assertion alone: an import error, a syntax error or a crash is no proof that a test
knows what is right. The correct variants of the table must survive. Prints the table; exit status 1 if a bug survives,
a variant is accused, or a run takes longer than LIMIT seconds.
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
LIMIT = 30.0  # seconds for one run, start-up of torch included; five is usual, fifteen the aim
ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE", "Failed: DID NOT WARN")


def run(patch: bugs.Patch) -> tuple[str, str, float]:
    """(outcome, the test that failed first, seconds): outcome is killed, survived, or an error in words."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "pave_grpo.py").write_text(bugs.patched_source(patch))
        shutil.copytree(
            ROOT / "tests",
            place / "tests",
            ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"),
        )
        shutil.copytree(ROOT / "zoo", place / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        report, began = place / "report.xml", time.perf_counter()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CI": "true",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-x",
                    "-q",
                    "--tb=line",
                    f"--junitxml={report}",
                    *(f"tests/{name}" for name in SUITES[patch.level]),
                ],
                cwd=place,
                env=environment,
                capture_output=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no verdict within {LIMIT:.0f} s", "", LIMIT
        seconds = time.perf_counter() - began
        if not report.exists():
            return "pytest did not run", "", seconds
        for case in ElementTree.parse(report).iter("testcase"):
            for failure in (*case.findall("failure"), *case.findall("error")):
                message = failure.get("message") or ""
                by_assertion = failure.tag == "failure" and message.startswith(ASSERTIONS)
                outcome = "killed" if by_assertion else f"crashed: {message.splitlines()[0][:60]}"
                return outcome, case.get("name"), seconds
        return "survived", "", seconds


def main() -> int:
    """Run the table, up to four at a time; print it; 0 if every bug is killed and every variant survives."""
    table = [(patch, "killed") for patch in bugs.BUGS] + [
        (patch, "survived") for patch in bugs.VARIANTS
    ]
    names = {patch.name for patch, _ in table}
    if unknown := set(sys.argv[1:]) - names:
        print(
            f"planted_bugs.py: error: {', '.join(sorted(unknown))}: must be of: {', '.join(sorted(names))}",
            file=sys.stderr,
        )
        return 2
    table = [
        (patch, wanted) for patch, wanted in table if not sys.argv[1:] or patch.name in sys.argv[1:]
    ]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = list(tqdm(pool.map(run, [patch for patch, _ in table]), "bugs", total=len(table)))
    wrong = 0
    for (patch, wanted), (outcome, test, seconds) in zip(table, results, strict=True):
        bad = outcome != wanted
        wrong += bad
        print(
            f"{'!!' if bad else '  '} {patch.name:28} {patch.level:11} {outcome:10} {seconds:5.1f} s  {test}"
        )
    planted = sum(wanted == "killed" for _, wanted in table)
    print(
        f"{planted} bugs and {len(table) - planted} correct variants: "
        + (
            "every bug killed by an assertion, no variant accused"
            if not wrong
            else f"{wrong} not as they should be"
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
