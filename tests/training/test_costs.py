"""What an iteration costs and holds, as it is printed, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from zoo.training import costs
from zoo.training.options import Options
from zoo.training.policies import Sizes

GIB = 2**30
RELEASED = Options(
    model="owner/name",
    reward=("a:b", "c:d"),
    eval_reward=("a:b",),
    prompts_per_iteration=6,
    group_size=3,
    steps=5,
    factors=(2, 4),
    updates=2,
    kl=0.1,
    checkpointing=True,
    ema=0.9,
    rollout_batch=7,
    decode_batch=2,
    reward_batch=5,
    update_batch=5,
    heldout=24,
    eval_every=10,
)
# Steps 1 and 3 of 5 branch. A prompt's anchor takes steps 0 to 3: 4 rows; 3 members of step 1 take
# steps 2, 3, 4: 9 rows; 3 members of step 3 take step 4: 3 rows. Of 6 prompts: 24 + 54 + 18 = 96.
# Most at once are 3 members of 6 prompts, 18. States: 6 prompts by 2 steps, 12. Each asks for
# 1 + 1 + 3 velocities in each of 2 updates, and for 1 of the reference. Forwards: 96 +
# 4 x 120 + 24 = 600, and without S 96 + 4 x 24 + 24 = 216. A rank has 3 prompts by 2 steps, and at
# most 5 states, which is 2 prompts, a pass.
PRINTED = """\
one iteration: 36 images in groups of 3 from 6 prompts on 2 ranks (cuda)
  velocity evaluations: 96 sampled, 120 trained (4 forwards each), 24 reference; \
each is 2 rows of the network, for guidance
  S = {2, 4} adds 96 trained evaluations, 177.8 % more forwards; no image, no reward
  on a rank: 18 images; velocity calls of a step at most 2 of up to 7 rows (--rollout-batch 7); \
VAE calls 9 of up to 2 (--decode-batch 2); reward calls 4 of up to 5 (--reward-batch 5)
  2 updates, each of 6 observed states on a rank in backward passes: 2 of up to 4 \
(--update-batch 5), gradients added up: the same gradient
parameters: 1,000 of the network, 2,000 trained, sharded over 2 ranks; memory of a rank, GiB: \
3.00 frozen weights + 1.00 trained, float32 + 1.00 gradients + 2.00 Adam + 1.00 EMA = 8.00, \
activations, VAE and reward models besides
judged, before, every 10 iterations and after: 24 pictures of 4 of the 4 held-out prompts, \
4 each or more (--heldout 24)
every judge is ascended too, and will rise whatever happens to the pictures: see --eval-reward"""

EMBEDDED = Options(
    rollouts="independent",
    prompts_per_iteration=4,
    group_size=3,
    steps=5,
    factors=(),
    optimizer="sgd",
    heldout=8,
)
# Chains: 4 x 3 rows at each of 5 steps; 12 states at each of 2 stochastic ones.
PRINTED_CHAINS = """\
one iteration: 12 images in groups of 3 from 4 prompts on 1 rank (cpu)
  velocity evaluations: 60 sampled, 24 trained (3 forwards each)
  S = {} adds 0 trained evaluations, 0.0 % more forwards; no image, no reward
  on a rank: 12 images; velocity calls of a step at most 1 of up to 12 rows (--rollout-batch 0); \
reward calls 1 of up to 12 (--reward-batch 0)
  1 update, each of 24 observed states on a rank in backward passes: 1 of up to 24 \
(--update-batch 0), gradients added up: the same gradient
parameters: 1,000 of the network, 2,000 trained; memory of a rank, GiB: \
1.00 trained, float32 + 1.00 gradients = 2.00, activations besides
judged, before and after: 8 pictures of 2 of the 4 held-out prompts, 4 each (--heldout 8)"""


def policy(rows, frozen, sharded, gathered=0):
    return SimpleNamespace(sizes=Sizes(1000, 2000, rows, frozen, GIB, gathered), sharded=sharded)


@pytest.mark.parametrize(
    ("o", "made", "ranks", "device", "printed"),
    [
        (RELEASED, policy(2, 3 * GIB, True), 2, "cuda", PRINTED),
        (EMBEDDED, policy(1, 0, False), 1, "cpu", PRINTED_CHAINS),
    ],
)
def test_the_cost_is_what_was_worked_out(o, made, ranks, device, printed):
    """Every number of every line; steps 1 and 3 are stochastic, four prompts are held out."""
    assert costs.describe(o, (1, 3), made, 4, ranks, device) == printed


def test_gathered_weights_are_held_besides():
    """Where they are gathered: all of them, beside what a rank has anyway."""
    printed = costs.describe(RELEASED, (1, 3), policy(2, 3 * GIB, True, GIB // 2), 4, 2, "cuda")
    assert "2.00 Adam + 1.00 EMA + 0.50 gathered to sample = 8.50, activations" in printed


# Steps 1 and 3 of 9; the way to the picture from step 1 is 7 grid steps, from step 3 it is 5. By
# 2 at once 4 and 3: anchors 4 rows each, members 3 (4 + 3). Chains 4 steps, and then 3.
@pytest.mark.parametrize("rollouts, sampled", [("shared_anchor", 25), ("independent", 21)])
def test_a_shorter_way_is_counted(rollouts, sampled):
    """Of two prompts, three members each."""
    sizes = dict(prompts_per_iteration=2, group_size=3, steps=9)
    o = Options(rollouts=rollouts, finish_stride=2, **sizes)
    assert costs.cost_of(o, (1, 3), ()).sampled == 2 * sampled


def test_a_judge_of_its_own_needs_no_warning():
    """One that is not ascended can tell whether pictures became better."""
    o = Options(model="x", reward=("a:b",), eval_reward=("a:b", "e:f"))
    assert "every judge" not in costs.describe(o, (1,), policy(1, 0, False), 4, 1, "cpu")


def test_a_comparison_is_counted():
    """Of 24 states, S = {2, 3}: 2 (1 + 2 + 3) evaluations with gradients, and 1 + 1 + 2 without."""
    o = Options(
        prompts_per_iteration=4,
        group_size=3,
        steps=5,
        rollouts="independent",
        compare_every=10,
    )
    (line,) = [
        line
        for line in costs.describe(o, (1, 3), policy(1, 0, False), 4, 1, "cpu").splitlines()
        if "compared" in line
    ]
    assert line == (
        "  every 10 iterations k-terms are compared with the original: 384 more velocity "
        "evaluations, 288 of them with gradients; nothing else changes"
    )
    assert "compared" not in costs.describe(Options(), (1,), policy(1, 0, False), 4, 1, "cpu")
