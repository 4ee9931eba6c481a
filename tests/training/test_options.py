"""The options: what a command line may say, what is refused in one line, what --help shows."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import pave_grpo
import train
from zoo.oracle import theory
from zoo.training import command_line, draw, evaluate, options

pytestmark = pytest.mark.usefixtures("one_process")
WARMTH = "zoo.rewards.example:warmth"
ROOT = Path(__file__).parents[2]

BAD = {  # the command line, and what the one line must name
    "--group-size 1": "--group-size 1",
    "--factors 1": "factors=[1]",
    "--factors 2 2": "factors=[2, 2]",
    "--kernel ddpm": "--kernel",
    "--eta 0": "--eta 0.0: must be a positive number",
    "--kernel cps --eta 1.5": "eta=1.5",
    "--form both": "--form",
    "--kernel cps --sde-steps 7": "step 7 ends at t = 0",
    "--sde-steps 8": "sde_steps=[8]",
    "--steps 0": "--steps 0: must be 1 or more",
    "--shift 0": "--shift 0.0: must be a positive number",
    "--prompts-per-iteration 0": "--prompts-per-iteration 0",
    "--clip -1": "--clip -1",
    "--lr nan": "--lr nan",
    "--heldout 6": "--heldout 6",
    "--own-start": "--own-start",
    "--updates 0": "--updates 0",
    f"--out {ROOT}": "--out",
    "--kl -0.1": "--kl -0.1",
    "--window-every -1": "--window-every -1",
    "--window-every 2 --window-by 0": "--window-by 0: must be other than 0",
    "--window-by 2": "--window-by: must be left out",
    "--window-every 2 --sde-steps": "must be 0, since --sde-steps 0 1 2 3 4 5 6 7",
    "--window-every 2 --window-by 9": "cannot move by 9",
    "--factors --step-weights gamma": "--step-weights gamma: must be one or noise",
    "--form matched --step-weights level": "--step-weights level: must be one or noise",
    "--form matched --term-weights rescaled": "--term-weights: must be left out",
    "--advantages ranked": "--advantages",
    "--ratio-norm --term-weights rescaled": "--ratio-norm: must be left out",
    "--ratio-norm --step-weights level": "--ratio-norm: must be left out",
    "--ratio-norm --step-weights gamma": "--ratio-norm: must be left out",
    "--finish-stride 0": "--finish-stride 0: must be 1 or more",
    "--finish-stride 7": "--finish-stride 7: must be 6 or less, as 6 grid steps follow stochastic",
    "--sde-steps --rollouts independent --finish-stride 2": "--finish-stride 2: must be 1 or less",
    "--finish-stride 7 --window-every 5": "--finish-stride 7: must be 6 or less",
    "--finish-order 3": "--finish-order",
    "--finish-stride 6 --finish-order 2": "--finish-order 2: must be 1, as fewer than two ODE",
    "--window-every 40": "--window-every 40: must be below --iterations 40",
    "--seed -1": "--seed -1",
    "--device tpu": "--device tpu",
    "--iterations x": "'x'",
    "--max-grad-norm 0": "--max-grad-norm 0",
    "--threads -1": "--threads -1",
    "--eval-every -1": "--eval-every -1",
    "--warmup -1": "--warmup -1",
    "--weight-decay -1": "--weight-decay -1",
    "--iterations -1": "--iterations -1",
    "--iterations 0": "--iterations 0",
    "--optimizer sgd --weight-decay 0.1": "--weight-decay: must be left out",
    "--factors --form matched": "--form",
    "--sde-steps 2 1": "sde_steps=[2, 1]",
    "--tune head": "--tune",
    "--iter 3": "--iter",
    "--device cuda:9": "--device cuda:9",
    "--guidance 3": "--guidance",
    "--dtype bfloat16": "--dtype",
    "--size 64 64": "--size",
    "--rank 4": "--rank",
    "--preset paper-flux": "--preset",
    "--tune lora": "--tune lora",
    "--ema 1": "--ema 1",
    "--decode-batch 2": "--dec",
    "--gather-rollouts": "--gather-rollouts: must be left out, being read only with --tune full",
    "--tune full --no-gather-rollouts": "--gather-rollouts: must be left out",
    "--update-batch -1": "--update-batch -1",
    "--eval-batch 6": "--eval-batch 6",
    "--eval-steps": "--eval-steps",
    "--eval-steps 8 8": "--eval-steps 8 8",
    "--reward": "--reward",
    "--reward aesthetics": "'aesthetics'",
    "--reward rule:-1": "'rule:-1'",
    "--reward rule rule:2": "given twice",
    "--eval-reward rule:2": "--eval-reward rule:2: must be without weights",
    "--prompts no.txt": "--eval-prompts",
    "--prompts no.txt --eval-prompts no.txt": "'no.txt'",
    f"--model {ROOT}": "model_index.json",
    f"--prompts {ROOT}/requirements.txt --eval-prompts {ROOT}/LICENSE": "torch==",
    "--evaluate x": "--evaluate: is now the command python -m zoo.training.evaluate CHECKPOINT",
    "--sample x --prompt y": "--sample: is now the command python -m zoo.training.draw CHECKPOINT",
    "--prompt circle": "--prompt: is now the command python -m zoo.training.draw CHECKPOINT",
}
BAD_PROGRAMS = {
    (evaluate.main, "no.safetensors"): "no.safetensors",
    (evaluate.main, f"{ROOT / 'train.py'}"): "train.py",
    (evaluate.main, "x --dry-run"): "--dry-run",
    (evaluate.main, "x --out y"): "--out",
    (evaluate.main, "x --heldout 6"): "--heldout 6",
    (evaluate.main, "x --eval-reward rule:2"): "must be without weights",
    (draw.main, "x --prompt y --kernel dance"): "--kernel",
    (draw.main, "x"): "--prompt",
    (draw.main, "no.safetensors --prompt circle"): "circle",
    (draw.main, f"x --prompt y --out {ROOT}"): "--out",
}
LINES = [(train.main, flags, named) for flags, named in BAD.items()]
LINES += [(main, flags, named) for (main, flags), named in BAD_PROGRAMS.items()]


@pytest.mark.parametrize(("main", "flags", "named"), LINES)
def test_bad_options_give_one_line_and_status_2_before_any_work(
    main, flags, named, capsys, monkeypatch
):
    """One line on standard error that names what was wrong, and nothing written."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit) as stop:
        main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err
    assert not any(Path().iterdir())


def test_a_picture_is_not_written_over(capsys):
    """Without --out, samples.png in this folder is kept."""
    Path("samples.png").write_text("mine")
    with pytest.raises(SystemExit):
        draw.main(["x", "--prompt", "a red circle"])
    assert "--out: must be given where samples.png exists" in capsys.readouterr().err
    assert Path("samples.png").read_text() == "mine"


def test_a_window_may_make_the_way_long_enough():
    """From step 6 of 8 one grid step is left; where the window moves to, there are more."""
    command_line.parse(
        ["--sde-steps", "6", "--window-every", "5", "--window-by", "-1", "--finish-stride", "2"]
    )
    with pytest.raises(SystemExit):
        command_line.parse(["--sde-steps", "6", "--finish-stride", "2"])


def test_prompts_must_divide_among_the_ranks(monkeypatch, capsys):
    """Eight prompts on three ranks are refused: unequal shares would weigh prompts unequally."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        command_line.parse([])
    assert "multiple of the 3 ranks" in capsys.readouterr().err


def test_help_has_every_option_once_in_its_group(capsys):
    """Each flag under its heading, headings in the order of the fields, defaults said."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--evaluate" not in shown
    headings = list(dict.fromkeys(about.group for about in options.ABOUT.values()))
    assert headings[0].startswith("what to align") and len(headings) == 6
    sections = re.split("|".join(re.escape(f"\n{heading}:\n") for heading in headings), shown)[1:]
    for heading, section in zip(headings, sections, strict=True):
        flags = re.findall(r"^  (--[a-z-]+)", section, re.M)
        own = [name for name, about in options.ABOUT.items() if about.group == heading]
        assert flags == ["--" + name.replace("_", "-") for name in own]
    text = " ".join(shown.split())
    assert "(default: 40; with --model 300)" in text
    assert "with --rollouts independent: every member starts from its own noise" in text


def test_defaults_pass_every_rule():
    """Nothing given is what the fields say, and is a run."""
    assert command_line.parse([]) == options.Options()


# ---- Defaults ------------------------------------------------------------------------------------

DEFAULTS = dict(
    model="",
    reward=("rule",),
    reward_timeout=0.0,
    prompts="",
    eval_prompts="",
    tune="transformer",
    rank=64,
    alpha=128.0,
    preset="",
    revision="",
    size=(),
    guidance=0.0,
    iterations=40,
    out="",
    resume="",
    save_every=10,
    dry_run=False,
    device="auto",
    threads=0,
    seed=0,
    factors=(2, 3),
    prompts_per_iteration=8,
    group_size=24,
    steps=8,
    sde_steps=(1,),
    window_every=0,
    window_by=1,
    shift=1.0,
    sigmas="shifted",
    kernel="flow_sde",
    eta=0.7,
    rollouts="shared_anchor",
    own_start=False,
    finish_stride=1,
    finish_order=1,
    form="paper",
    place="half",
    term_weights="printed",
    step_weights="one",
    advantages="standardised",
    poisoned="stop",
    ratio_norm=False,
    reduction="mean",
    updates=1,
    clip=1e-4,
    kl=0.0,
    eval_reward=("right", "rule"),
    heldout=512,
    eval_steps=(16, 8, 40),
    eval_every=0,
    draw_at=(10, 20, 30),
    compare_every=0,
    eval_batch=128,
    lr=2e-4,
    warmup=15,
    optimizer="adamw",
    weight_decay=1e-4,
    max_grad_norm=1.0,
    ema=0.0,
    dtype="float32",
    checkpointing=False,
    rollout_batch=0,
    update_batch=0,
    reward_batch=0,
    decode_batch=4,
    gather_rollouts=False,
)
RELEASED = dict(  # what of it is another with --model
    model="owner/name",
    revision="abc",
    reward=("clip:0.01", "hpsv2"),
    eval_reward=("clip", "hpsv2"),
    tune="lora",
    size=(512, 512),
    guidance=9.5,
    iterations=300,
    group_size=12,
    steps=16,
    sde_steps=(0, 2, 4, 6),
    shift=3.0,
    eta=0.8,
    heldout=64,
    eval_steps=(16, 40),
    eval_every=50,
    draw_at=(),
    save_every=50,
    eval_batch=16,
    lr=1e-4,
    warmup=0,
    dtype="bfloat16",
    checkpointing=True,
    rollout_batch=16,
    update_batch=1,
    reward_batch=16,
)


@pytest.fixture
def family(monkeypatch):
    """A family with a guidance of its own; what was asked to find it."""
    asked = []

    def family_of(*place):
        asked.append(place)
        return SimpleNamespace(preset="theirs", default_guidance=9.5)

    monkeypatch.setattr(command_line.families, "family_of", family_of)
    return asked


def test_the_defaults_are_those_of_the_documented_run():
    """A default changed in silence changes the figures of README and of docs/RUNS.md."""
    assert dataclasses.asdict(options.Options()) == DEFAULTS


GIVEN = {"model": "owner/name", "revision": "abc", "reward": ("clip:0.01", "hpsv2")}


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ({}, {}),
        ({"tune": "full"}, {"tune": "full", "lr": 2e-6}),
        ({"preset": "theirs"}, {"preset": "theirs", "tune": "full", "lr": 2e-6}),
        ({"preset": "theirs", "tune": "lora"}, {"preset": "theirs"}),
        ({"lr": 0.5, "steps": 3, "guidance": 2.0}, {"lr": 0.5, "steps": 3, "guidance": 2.0}),
        ({"eval_reward": ("pickscore",)}, {"eval_reward": ("pickscore",)}),
    ],
)
def test_a_released_model_has_defaults_of_its_own(more, changed, family):
    """What is typed goes before them; judges are the rewards, without their weights."""
    settled = command_line.settle(GIVEN | more)
    assert dataclasses.asdict(settled) == DEFAULTS | RELEASED | changed
    assert family == [("owner/name", "abc")]


def test_a_preset_of_another_family_is_refused(family):
    """By name, with the one that would be right."""
    with pytest.raises(ValueError, match="--preset ours: must be theirs for this model"):
        command_line.settle(GIVEN | {"preset": "ours"})


def test_what_is_aligned_is_made_of_the_options(monkeypatch):
    """Every argument of either policy; a reference only where a KL needs it."""
    made = Mock()
    monkeypatch.setattr(options.policies, "Embedded", made.embedded)
    monkeypatch.setattr(options.policies, "Released", made.released)
    for kl in (0.0, 0.5):
        options.policy_of(options.Options(tune="full", shift=2.0, kl=kl))
        (checkpoint, tune, shift), how = made.embedded.call_args
        assert (checkpoint.name, tune, shift) == ("shapes.safetensors", "full", 2.0)
        assert how == {"reference": kl > 0}
        o = options.Options(
            **GIVEN,
            size=(32, 64),
            guidance=2.5,
            dtype="bfloat16",
            sigmas="pipeline",
            shift=5.0,
            tune="lora",
            rank=3,
            alpha=7.0,
            seed=11,
            checkpointing=True,
            kl=kl,
            decode_batch=9,
            gather_rollouts=True,
        )
        options.policy_of(o, ranks=2)
        assert made.released.call_args.args == ("owner/name", "abc")
        assert made.released.call_args.kwargs == {
            "size": (32, 64),
            "guidance": 2.5,
            "dtype": torch.bfloat16,
            "sigmas": "pipeline",
            "shift": 5.0,
            "tune": "lora",
            "rank": 3,
            "alpha": 7.0,
            "seed": 11,
            "checkpointing": True,
            "reference": kl > 0,
            "decode_batch": 9,
            "gather_rollouts": True,
            "world": 2,
        }


# Rules at their edges: (the last value that is refused, the first that is not).
EDGES = {
    "iterations": (0, 1),
    "threads": (1025, 1024),
    "seed": (2**63, 2**63 - 1),
    "steps": (10**6 + 1, 10**6),
    "reward_timeout": (math.inf, 0.5),
    "group_size": (1, 2),
    "eta": (0.0, 1e-6),
    "shift": (1.1e6, 1e6),
    "clip": (0.0, 1e-9),
    "kl": (math.inf, 1e9),
    "lr": (math.inf, 1e9),
    "weight_decay": (-1e-9, 0.0),
    "heldout": (0, 4),
    "eval_batch": (2, 4),
    "max_grad_norm": (0.0, math.inf),
    "ema": (1.0, 0.999999),
    "eval_steps": ((8, 8), (8, 9)),
    "draw_at": ((0, 5), ()),
    "update_batch": (-1, 0),
    "reward": ((), ("rule",)),
    "eval_reward": (("rule:2",), ("rule:1",)),
}


@pytest.mark.parametrize(("name", "edge"), EDGES.items())
def test_rules_end_where_they_say(name, edge):
    """Just outside is refused, just inside is not."""
    refused, taken = edge
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        command_line.check_alone(options.Options(**{name: refused}), [])
    command_line.check_alone(options.Options(**{name: taken}), [])


READ_ONLY = {  # an option given, the run that does not read it, the run that does
    "rank": ({"tune": "full"}, {"tune": "lora"}),
    "shift": ({"sigmas": "pipeline"}, {"sigmas": "shifted"}),
    "own_start": ({"rollouts": "shared_anchor"}, {"rollouts": "independent"}),
    "form": ({"factors": ()}, {"factors": (2,)}),
    "compare_every": ({"factors": ()}, {"factors": (2,)}),
    "place": ({"factors": ()}, {"factors": (), "form": "midpoint"}),
    "term_weights": ({"form": "matched"}, {"form": "paper"}),
    "window_by": ({"window_every": 0}, {"window_every": 3}),
    "weight_decay": ({"optimizer": "sgd"}, {"optimizer": "adamw"}),
    "decode_batch": ({"model": ""}, {"model": "x", "size": (8, 8)}),
    "gather_rollouts": (
        {"model": "x", "size": (8, 8), "tune": "lora"},
        {"model": "x", "size": (8, 8), "tune": "full"},
    ),
}


@pytest.mark.parametrize(("name", "runs"), READ_ONLY.items())
def test_an_option_that_is_not_read_is_refused(name, runs):
    """Where no run could notice it, it must be left out; and only where it is given."""
    without, reading = runs
    with pytest.raises(ValueError, match=r"must be left out, being read only with"):
        command_line.check_alone(options.Options(**without), [name])
    command_line.check_alone(options.Options(**without), [])
    command_line.check_alone(options.Options(**reading), [name])


def test_sharded_gradients_are_not_compared():
    """--compare-every reads whole gradients: of a released model those of adapters."""
    command_line.check_alone(
        options.Options(model="x", size=(8, 8), tune="lora"), ["compare_every"]
    )
    command_line.check_alone(options.Options(tune="full"), ["compare_every"])
    with pytest.raises(ValueError, match="without --tune full of a --model"):
        command_line.check_alone(
            options.Options(model="x", size=(8, 8), tune="full"), ["compare_every"]
        )


def test_the_midpoint_form_takes_no_factors():
    """With S it is refused in a line that says so, wherever S comes from."""
    command_line.check_alone(options.Options(form="midpoint", factors=()), ["form"])
    with pytest.raises(ValueError, match="or as midpoint with --factors of none"):
        command_line.check_alone(options.Options(form="midpoint"), ["form"])


@pytest.mark.parametrize("there", [True, False])
def test_a_device_is_one_that_this_machine_has(there, monkeypatch):
    """cuda where there is CUDA; cpu and auto everywhere; nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    taken = [name for name in ("cpu", "auto", "cuda", "cuda:0", "mps") if options.is_device(name)]
    assert taken == ["cpu", "auto", *(["cuda"] if there else [])]


@pytest.mark.parametrize("bad", ["train.txt", "heldout.txt"])
@pytest.mark.parametrize(
    ("prompt", "flags", "said"),
    [
        ("red circle", "", "not in the grammar"),  # known words
        ("a purple cow", f"--reward {WARMTH} --eval-reward {WARMTH}", "up to 8 words from"),
    ],
)
def test_prompts_the_world_does_not_know_are_refused(bad, prompt, flags, said, capsys):
    """By the rule's grammar where it judges, by the model's words in any case; of either file."""
    for name, good in (("train.txt", "a red circle"), ("heldout.txt", "a blue square")):
        Path(name).write_text((prompt if name == bad else good) + "\n")
    files = ["--prompts", "train.txt", "--eval-prompts", "heldout.txt"]
    with pytest.raises(SystemExit):
        command_line.parse([*files, *flags.split()])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and repr(prompt) in err and said in err


def test_a_judge_is_checked_as_a_reward_is(capsys):
    """Before any work, as the rewards are."""
    with pytest.raises(SystemExit):
        command_line.parse(["--eval-reward", "aesthetics"])
    assert "'aesthetics'" in capsys.readouterr().err


# ---- Windows and weights -------------------------------------------------------------------------


def test_a_window_goes_along_what_can_be_stochastic_and_starts_over():
    """Where it would leave the grid, or come to the Dirac of cps, it goes back to the start."""
    assert options.windows((0, 1), range(4), 1) == [(0, 1), (1, 2), (2, 3)]
    assert options.windows((0, 2), range(6), 2) == [(0, 2), (2, 4)]
    assert options.windows((3,), range(4), -2) == [(3,), (1,)]
    o = options.Options(kernel="cps", steps=4, sde_steps=(1, 2), window_every=3, window_by=-1)
    policy = options.policy_of(o)
    places = [options.stochastic_steps(o, policy, iteration) for iteration in range(1, 8)]
    assert places == [(1, 2)] * 3 + [(0, 1)] * 3 + [(1, 2)]


STEPS = (0, 1, 3)


def gamma_of(weights, record, grid):
    """What a step's terms weigh together, by E12, from the record of theory."""
    found = []
    for j, i in enumerate(STEPS):
        scales = {k: record.scale(k, grid[i], grid[i + 1]) for k in weights}
        found.append(sum(w[j].item() * scales[k] for k, w in weights.items()))
    return found


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance"])
def test_weights_are_those_of_e12(kernel):
    """Rescaled, each k-term weighs 1/|S|; level, each step 1; gamma is what the step weighed."""
    made = options.Options(kernel=kernel, factors=(2, 3, 5), steps=5, sde_steps=STEPS)
    process = options.process_of(made, options.policy_of(made))
    record, grid = theory.of(kernel, made.eta), process.grid.tolist()

    def weights(**how):
        return options.weights_of(dataclasses.replace(made, **how), process, STEPS)

    printed = weights()
    assert {k: w.tolist() for k, w in printed.items()} == {1: [1] * 3} | {
        k: [1 / 3] * 3 for k in (2, 3, 5)
    }
    gamma = gamma_of(printed, record, grid)
    rescaled = weights(term_weights="rescaled")
    assert gamma_of(rescaled, record, grid) == pytest.approx([2.0] * 3, rel=1e-13)
    assert gamma_of({2: rescaled[2]}, record, grid) == pytest.approx([1 / 3] * 3, rel=1e-13)
    level = weights(step_weights="level")
    assert gamma_of(level, record, grid) == pytest.approx([1.0] * 3, rel=1e-13)
    assert (level[2] / level[1]).tolist() == pytest.approx([1 / 3] * 3, rel=1e-13)
    (alone,) = weights(step_weights="gamma").items()
    assert alone[0] == 1 and alone[1].tolist() == pytest.approx(gamma, rel=1e-13)
    noise = weights(step_weights="noise")
    stds = [record.std(1, grid[i], grid[i + 1]) for i in range(5)]
    able = [c for c in stds if c > 0]  # of cps all but the last
    wanted = [stds[i] * len(able) / sum(able) for i in STEPS]
    assert noise[1].tolist() == pytest.approx(wanted, rel=1e-13)
    assert noise[5].tolist() == pytest.approx([w / 3 for w in wanted], rel=1e-13)


def test_centred_rewards_of_any_scale_are_not_clamped():
    """The clamp at 5 is one of standardised advantages: centred ones would lose their sum of 0."""
    rewards = torch.tensor([[[0.0, 100.0, 260.0]]])
    assert options.ADVANTAGES["centred"](rewards).tolist() == [[[-120.0, -20.0, 140.0]]]
    assert options.ADVANTAGES["standardised"] is pave_grpo.group_advantages
