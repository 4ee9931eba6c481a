"""The oracle: what verify_equivalence.py, which holds the claims, is made of.

    findings.py       what one measurement found, and its verdict
    claims.py         what a claim is: sentence, statements, registered verdicts, rows
    theory.py         what theory predicts of each kernel: a record per kernel
    bench.py          what claims are tested with; fields.py, the velocity fields
    measures.py       what is measured; experiments.py, the setups of single claims
    comparison.py     decomposed against original, step by step; figures.py, the pictures
    report.py         the page, every row, JSON, docs/VERDICTS.md; options.py, the command line
    judging/          judges other implementations; bugs.txt, the known bugs
    numerics.py       a model's replays beside its rollouts, its gradients beside Adam's eps
    vectors.py        golden vectors for other languages

A new kernel is a function in pave_grpo.KERNELS and a class in theory.RECORDS. A new claim is a
decorated function in verify_equivalence.py. A new known bug is an entry in bugs.txt, or in
planted.txt if it is one of the oracle.
"""
