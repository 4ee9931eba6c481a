"""The house of the programs: six rooms, and one style for their pictures. Imports go one way:

    pave_grpo  <-  shapes, released, rewards  <-  training, oracle  <-  study, the two programs

    shapes     the embedded world: pictures of coloured shapes, the rule that judges them, the model
    released   the released model families, one class each
    rewards    what a picture is worth: the contract, how a reward is named, the wrapped models
    training   what train.py is made of
    oracle     what verify_equivalence.py is made of
    study      the evidence: gradients and training runs of several arms, compared

No room imports a program. The first lines of each room say what is added there, and where.
"""
