"""Whenever a run is killed, it goes on as if it had not been."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_killed_run_loses_nothing():
    """At some changes of files and some moments; tests/kill.py alone has all, and sharded runs."""
    some = ["--every", "20", "--moments", "1"]
    words = [sys.executable, str(ROOT / "tests" / "kill.py"), *some]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith("changes of files in a run), 0 losses")
