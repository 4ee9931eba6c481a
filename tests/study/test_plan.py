"""The plan: what docs/EVIDENCE.md registered, fits together and is fair."""

import re
from collections import Counter
from pathlib import Path

import pytest

from zoo.study.plan import LAPTOP, PLANS, Arm, Run, chosen
from zoo.study.training import command_of
from zoo.training import costs, options
from zoo.training.command_line import parse

PAGE = " ".join((Path(__file__).parents[2] / "docs/EVIDENCE.md").read_text().split())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_run_is_a_command_of_train_py(plan):
    """Its flags are taken, and its seed and its rate arrive."""
    for arm in plan.arms:
        words = command_of(plan, Run("judged", arm.name, 3e-4, 207), threads=1)
        o = parse(["cpu" if word == "cuda" else word for word in words])
        assert (o.seed, o.lr, o.threads, o.heldout) == (207, 3e-4, 1, 4)


def test_names_fit_together():
    """Contrasts and rates are of arms that there are, and no arm is there twice."""
    for plan in PLANS.values():
        names = [arm.name for arm in plan.arms]
        assert len(set(names)) == len(names)
        used = {name for contrast in plan.contrasts for name in contrast.arms}
        used |= set(plan.common_arms)
        used |= {arm.rate_of for arm in plan.arms} - {""}
        assert used <= set(names)
        assert all(arm.seeds <= len(plan.seeds) for arm in plan.arms)


def test_the_plan_is_what_the_page_registered():
    """Seeds, rates, outcome, and the two comparisons that decide."""
    assert LAPTOP.seeds == tuple(range(200, 212)) and "Seeds 200 to 211" in PAGE
    assert Counter(arm.seeds for arm in LAPTOP.arms) == {12: 3, 8: 9} and "200 to 207" in PAGE
    assert LAPTOP.search_seeds == (100, 101) and "on seeds 100 and 101" in PAGE
    assert LAPTOP.rates == (1e-4, 2e-4, 4e-4) and "the rates 1e-4, 2e-4, 4e-4" in PAGE
    assert LAPTOP.common == 2e-4 and "at the common rate 2e-4" in PAGE
    assert (LAPTOP.outcome, LAPTOP.eval_steps[0], LAPTOP.heldout) == ("right", 16, 512)
    primary = [z.parts for z in LAPTOP.contrasts if z.primary]
    assert primary == [((1, "S23"), (-1, "k1")), ((1, "midpoint"), (-1, "k1"))]
    # Seeds that had been looked at, those of the search and those that count are apart.
    looked_at = set(range(6))
    assert not looked_at & set(LAPTOP.seeds) and not set(LAPTOP.seeds) & set(LAPTOP.search_seeds)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "rows"), [("laptop", 144), ("gpu", 312)])
def test_three_steps_cost_what_one_does(name, rows):
    """8 members at three steps are as many rollout evaluations as 24 at the one in the middle."""
    plan, sampled = PLANS[name], set()
    shared = ["cpu" if word == "cuda" else word for word in plan.flags]
    for arm in ("k1", "several k1"):
        o = parse([*shared, *plan.arm(arm).flags])
        steps = options.stochastic_steps(o, options.policy_of(o))
        cost = costs.cost_of(o, steps, ())
        assert cost.images == 8 * 24
        sampled.add(cost.sampled - 8 * (steps[-1] + 1))  # the anchor's own apart
    assert sampled == {8 * rows}
    assert re.search("as many rollout evaluations", PAGE)


def outcomes(J, w):
    """Of the arms of the 2 x 2, made of two effects and an interaction."""
    return {
        "several k1": 0.5,
        "several S23 level": 0.5 + J,
        "several k1 gamma": 0.5 + w,
        "several S23": 0.5 + J + w + 0.01,
    }


def test_effects_of_the_2_by_2_are_what_they_are_called():
    """Simple effects, their means, and the interaction, of outcomes made of them."""
    made, found = outcomes(J=0.3, w=0.07), {}
    for contrast in LAPTOP.contrasts:
        if set(contrast.arms) <= made.keys():
            value = sum(count * made[name] for count, name in contrast.parts)
            found[contrast.name.removeprefix("3 steps: ")] = round(value, 9)
    assert found == {
        "Jacobian, at weights 1": 0.3,
        "Jacobian, at weights Γ": 0.31,
        "weights Γ, with k = 1": 0.07,
        "weights Γ, with S = {2, 3}": 0.08,
        "S = {2, 3} as printed − k = 1": 0.38,
        "Jacobian, mean of both": 0.305,
        "weights Γ, mean of both": 0.075,
        "interaction": 0.01,
    }


ARM = Arm("k1", "", (), 2)


def test_a_rate_is_the_best_mean_and_of_equals_the_smallest():
    """Over both seeds of the search; an incomplete search chooses nothing."""
    scores = [(1e-4, 0.5), (1e-4, 0.75), (2e-4, 0.875), (2e-4, 0.125), (4e-4, 0.625), (4e-4, 0.625)]
    assert chosen(LAPTOP, ARM, scores) == 1e-4
    assert chosen(LAPTOP, ARM, [*scores[:5], (4e-4, 0.75)]) == 4e-4
    with pytest.raises(ValueError, match="search of 'k1': 5 runs, not all of its own"):
        chosen(LAPTOP, ARM, scores[:5])


def test_seeds_go_through_the_arms_in_turn():
    """So that what is there early is paired; the common rate only where it is another."""
    stage = LAPTOP.stages[0]
    runs = LAPTOP.judged(stage, {"k1": 2e-4, "S23": 1e-4, "midpoint": 2e-4})
    assert [(run.role, run.arm, run.lr, run.seed) for run in runs[:4]] == [
        ("judged", "k1", 2e-4, 200),
        ("judged", "S23", 1e-4, 200),
        ("common", "S23", 2e-4, 200),
        ("judged", "midpoint", 2e-4, 200),
    ]
    assert len(runs) == 4 * 12 and len(set(runs)) == len(runs)
    more = LAPTOP.judged(LAPTOP.stages[2][:1], {"k1 more": 4e-4})
    assert [run.seed for run in more] == list(range(200, 208))
    assert len(LAPTOP.search(stage)) == 18 and LAPTOP.search(LAPTOP.stages[2]) == []
