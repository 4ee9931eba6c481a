"""One thread, and Hypothesis without deadlines: the same examples every time under CI."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile(
    "ci", deadline=None, max_examples=60, derandomize=True, report_multiple_bugs=False
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
