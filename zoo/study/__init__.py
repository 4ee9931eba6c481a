"""The evidence: does denser supervision help, or the re-weighting, or neither?

plan.py         what is compared, with which seeds and rates, and what decides: written beforehand
training.py     Study B: trains every arm of the plan, two at a time, a JSON line for each run
gradients.py    Study A: what the arms' expected gradients are worth at the shipped model
inference.py    paired intervals, Holm's correction, jackknife
report.py       tables and figures of both
results/        the runs of docs/EVIDENCE.md

    python -m zoo.study gradients | train | report
"""
