"""Every option of train.py reaches what it names.

Two runs are watched, of the embedded model and of adapters on SD3: what they call, what they write.
Options are at other values than their defaults there, so that one that is dropped is seen. A new
option without an entry fails the first test.
"""

import inspect
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import pave_grpo as pave
import train
from zoo.released import families, sd3, tuning
from zoo.rewards import example
from zoo.shapes import model as shapes_model
from zoo.training import options, prompts
from zoo.training.command_line import parse

WARMTH, CONTRAST = "zoo.rewards.example:warmth", "zoo.rewards.example:contrast"

# Option: what is typed, and what is seen of it in the run.
EMBEDDED = {
    "reward": (f"{WARMTH}:2", 2.0),
    "eval_reward": (f"{CONTRAST} rule", ["heldout_" + CONTRAST, "heldout_rule"]),
    "prompts": ("train.txt", {"a red circle"}),
    "eval_prompts": ("heldout.txt", {"two blue squares"}),
    "tune": ("full", True),
    "iterations": ("2", 2),
    "out": ("somewhere/else", True),
    "device": ("cpu", "cpu"),
    "threads": ("2", "cpu, 2 threads"),
    "seed": ("3", {(3, 1, 0), (3, 2, 0)}),
    "factors": ("4", {(4,)}),
    "prompts_per_iteration": ("1", {1}),
    "group_size": ("3", {3}),
    "steps": ("3", {3}),
    "sde_steps": ("1 2", {0, 1, 2}),  # and where they move
    "window_every": ("1", [(1, 2), (0, 1)]),
    "window_by": ("-1", -1),
    "shift": ("2", 0.8),  # of u = 2/3: 2 u / (1 + u)
    "kernel": ("dance", {"dance"}),
    "eta": ("0.35", {0.35}),
    "rollouts": ("independent", {1}),  # one x_0 for all steps
    "own_start": ("", True),
    "form": ("matched", {"matched"}),
    "step_weights": ("noise", True),
    "advantages": ("centred", False),  # not of std 1
    "ratio_norm": ("", {True}),
    "reduction": ("sum", {"sum"}),
    "updates": ("2", 2 * 2 * 6),  # passes: iterations, updates, states on two steps
    "clip": ("0.3", {0.3}),
    "kl": ("0.5", {0.5}),
    "heldout": ("8", 8),
    "eval_steps": ("2 1", ["1", "2"]),
    "eval_every": ("1", [0, 1, 2]),
    "compare_every": ("2", [2] * 2),  # of two iterations the second, on two stochastic steps
    "eval_batch": ("4", {4}),
    "lr": ("0.01", 0.01),
    "warmup": ("4", [0.01 / 5, 0.02 / 5]),
    "optimizer": ("adamw", ["AdamW"]),
    "weight_decay": ("0.2", 0.2),
    "max_grad_norm": ("0.7", {0.7}),
    "ema": ("0.6", {0.6}),
    "rollout_batch": ("2", 2),
    "update_batch": ("1", {1}),
    "reward_batch": ("2", 2),
    "reward_timeout": ("600", {600.0}),
}
RELEASED = {
    "model": ("PIPELINE", {"PIPELINE"}),
    "tune": ("lora", 1),
    "rank": ("2", 2),
    "alpha": ("6", 6.0),
    "size": ("32 64", (3, 32, 64)),
    "guidance": ("2.5", {2.5}),
    "sigmas": ("pipeline", True),
    "form": ("midpoint", {"midpoint"}),
    "place": ("uniform", True),
    "optimizer": ("sgd", ["SGD"]),
    "dtype": ("float32", {torch.float32}),
    "no_checkpointing": ("", False),
    "decode_batch": ("3", 3),
}
ELSEWHERE = {"preset", "dry_run", "revision"}  # in tests of their own, below
ELSEWHERE |= {"finish_stride", "finish_order"}
ELSEWHERE |= {"term_weights"}  # of the paper's form: in training/test_replay.py
ELSEWHERE |= {"gather_rollouts"}  # on two ranks, in test_runs.py
ELSEWHERE |= {"draw_at"}  # in training/test_run.py
ELSEWHERE |= {"resume", "save_every", "poisoned"}  # in training/test_survival.py


def test_no_option_is_forgotten():
    """Each has an entry, here or in the last tests of this file."""
    entries = EMBEDDED.keys() | {name.removeprefix("no_") for name in RELEASED} | ELSEWHERE
    assert entries == options.ABOUT.keys()


# ---- Watching a run ------------------------------------------------------------------------------


class Spies:
    """Calls of functions: {name: [arguments by name, and whether gradients were on]}."""

    def __init__(self, patch):
        self.patch, self.calls = patch, {}

    def on(self, place, name):
        """Put a spy in the place of a function or a class."""
        plain = getattr(place, name)
        signature, calls = inspect.signature(plain), self.calls.setdefault(name, [])

        def watched(*args, **how):
            bound = signature.bind(*args, **how)
            bound.apply_defaults()
            calls.append(SimpleNamespace(graded=torch.is_grad_enabled(), **bound.arguments))
            return plain(*args, **how)

        self.patch.setattr(place, name, watched)

    def values(self, name, argument):
        return {getattr(call, argument) for call in self.calls[name]}


WATCHED = [
    (pave, "draw_noise"),
    (pave, "finished"),
    (pave, "policy_loss"),
    (pave, "ode_sample"),
    (train, "weights_of"),
    (train.spec, "load_all"),
    (train.policies, "EMA"),
    (torch.optim, "AdamW"),
    (torch.optim, "SGD"),
    (torch.nn.utils, "clip_grad_norm_"),
    (train.costs, "describe"),
    (prompts, "generator_of"),
    (shapes_model.ShapesFlow, "forward"),
    (example, "warmth"),
    (example, "contrast"),
    (families, "outline"),
    (tuning, "add_lora"),
    (sd3.SD3, "velocity"),
    (AutoencoderKL, "decode"),
]


def typed(table):
    """The command line of a table."""
    words = []
    for name, (value, _) in table.items():
        words += ["--" + name.replace("_", "-"), *value.split()]
    return words


def watched_run(words, folder, texts):
    """Run a command line in a folder with two texts; returns its spies."""
    (folder / "train.txt").write_text(texts[0] + "\n")
    (folder / "heldout.txt").write_text(texts[1] + "\n")
    threads = torch.get_num_threads()
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        spies = Spies(patch)
        for place, name in WATCHED:
            spies.on(place, name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for name in ("draw_grid", "draw_curve"):
            patch.setattr(f"zoo.training.pictures.{name}", draw_nothing)
        patch.chdir(folder)
        train.main(words)
    torch.set_num_threads(threads)
    for which, handler in handlers.items():
        signal.signal(which, handler)
    return spies


def draw_nothing(content, about, path, *args, **how):
    path.touch()


def not_compared(call):
    """Whether a loss is of training: --compare-every weighs terms by plain numbers."""
    return isinstance(call.term_weights[1], torch.Tensor)


def with_tuples(given):
    """Options as JSON has them, lists as tuples again."""
    return {name: tuple(z) if isinstance(z, list) else z for name, z in given.items()}


def lines_of(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """{option: what is seen of it} in the run of the table EMBEDDED."""
    folder = tmp_path_factory.mktemp("embedded")
    spies = watched_run(typed(EMBEDDED), folder, ("a red circle", "two blue squares"))
    out = folder / "somewhere" / "else"
    lines, summary = lines_of(out), json.loads((out / "summary.json").read_text())
    trained = [line for line in lines if "reward" in line]
    compared = (out / "compare.jsonl").read_text()
    judged = [line for line in lines if "reward" not in line]
    passes = [call for call in spies.calls["policy_loss"] if not_compared(call)]
    rollouts = [call.rollout for call in passes]
    group = torch.cat([call.advantages.flatten() for call in passes[:6]]).unique()
    windows = list(dict.fromkeys(call.steps for call in spies.calls["weights_of"]))
    (noise, *_), (adam,) = spies.calls["draw_noise"], spies.calls["AdamW"]
    networks = spies.calls["forward"]
    sampled = [len(call.x) for call in networks if not call.graded]
    drawn = [len(call.x) for call in spies.calls["ode_sample"]]
    shown = 3 * 4  # of one held-out prompt: before, between and after
    moved = load_file(out / "checkpoint.safetensors")["stem.weight"]
    keys = spies.values("generator_of", "key")
    return {
        "given": json.loads((out / "config.json").read_text(), object_hook=with_tuples),
        "reward": trained[0]["reward"] / trained[0][f"reward_{WARMTH}"],
        "eval_reward": [name for name in judged[0] if name.startswith("heldout_")],
        "prompts": {prompt for call in spies.calls["warmth"] for prompt in call.prompts},
        "eval_prompts": {prompt for call in spies.calls["contrast"] for prompt in call.prompts},
        "tune": not torch.equal(moved, shapes_model.load().state_dict()["stem.weight"]),
        "iterations": len(trained),
        "out": (out / "config.json").is_file(),
        "device": spies.calls["describe"][0].device,
        "threads": summary["device"],
        "seed": {key for key in keys if len(key) == 3},
        "factors": {tuple(call.factors) for call in passes},
        "prompts_per_iteration": {len(call.generators) for call in spies.calls["draw_noise"]},
        "group_size": spies.values("draw_noise", "group_size"),
        "steps": {len(rollout.process.grid) - 1 for rollout in rollouts},
        "sde_steps": {step for rollout in rollouts for step in rollout.sde_steps},
        "window_every": windows,
        "window_by": windows[1][0] - windows[0][0],
        "shift": rollouts[0].process.grid[1].item(),
        "kernel": {rollout.process.kernel for rollout in rollouts},
        "eta": {rollout.process.eta for rollout in rollouts},
        "rollouts": {rollout.x_0.shape[1] for rollout in rollouts},
        "own_start": noise.own_start,
        "form": spies.values("policy_loss", "form"),  # in what is compared, too
        "step_weights": passes[0].term_weights[1].item() != 1,
        "advantages": abs(group.std().item() - 1) < 1e-3,
        "ratio_norm": {call.ratio_norm for call in passes},
        "reduction": spies.values("policy_loss", "reduction"),
        "updates": len(passes),
        "clip": {call.clip for call in passes},
        "kl": {call.kl for call in passes},
        "heldout": (sum(drawn) - shown) / 5,  # by two numbers of steps, by one, by two
        "eval_steps": sorted(summary["heldout"]["after"]),
        "eval_every": [line["iteration"] for line in judged],
        "compare_every": [json.loads(x)["iteration"] for x in compared.splitlines()],
        "eval_batch": set(drawn),
        "lr": adam.lr,
        "warmup": [line["lr"] for line in trained],
        "optimizer": [name for name in ("AdamW", "SGD") if spies.calls[name]],
        "weight_decay": adam.weight_decay,
        "max_grad_norm": spies.values("clip_grad_norm_", "max_norm"),
        "ema": spies.values("EMA", "decay"),
        "rollout_batch": max(sampled),
        "update_batch": {rollout.x_t.shape[:3].numel() for rollout in rollouts},
        "reward_batch": max(len(call.images) for call in spies.calls["warmth"]),
        "reward_timeout": spies.values("load_all", "limit"),
    }


@pytest.mark.parametrize("option", EMBEDDED)
def test_an_option_of_the_embedded_model_arrives(option, embedded):
    """What is seen of the run is what was typed."""
    assert embedded[option] == EMBEDDED[option][1]


@pytest.fixture(scope="module")
def released(tmp_path_factory, folders):
    """The same of adapters on SD3 and of the table RELEASED."""
    folder = tmp_path_factory.mktemp("released")
    words = [str(folders["sd3"]) if word == "PIPELINE" else word for word in typed(RELEASED)]
    more = (
        f"--reward {WARMTH} --prompts train.txt --eval-prompts heldout.txt --out out --heldout 4 "
        "--prompts-per-iteration 1 --group-size 4 --steps 2 --sde-steps 0 --iterations 1 --factors "
        "--device cpu --eval-steps 1"
    )
    spies = watched_run([*words, *more.split()], folder, ("a dog", "a bird"))
    (lora,) = spies.calls["add_lora"]
    rollout = spies.calls["policy_loss"][0].rollout
    pipeline = lora.flow.sigmas(2, 32, 64)
    moving = [p for p in lora.flow.transformer.parameters() if p.requires_grad]
    return {
        "given": json.loads((folder / "out/config.json").read_text(), object_hook=with_tuples),
        "model": {
            call.path.replace(str(folders["sd3"]), "PIPELINE") for call in spies.calls["outline"]
        },
        "tune": len(spies.calls["add_lora"]),
        "rank": min(min(p.shape) for p in moving),
        "alpha": lora.alpha,
        "size": tuple(spies.calls["warmth"][0].images.shape[1:]),
        "guidance": spies.values("velocity", "guidance"),
        "sigmas": torch.equal(rollout.process.grid, pipeline),
        "form": spies.values("policy_loss", "form"),
        "place": all(isinstance(call.u, torch.Tensor) for call in spies.calls["policy_loss"]),
        "optimizer": [name for name in ("AdamW", "SGD") if spies.calls[name]],
        "dtype": {lora.flow.transformer.dtype},
        "no_checkpointing": lora.flow.transformer.is_gradient_checkpointing,
        "decode_batch": max(len(call.z) for call in spies.calls["decode"]),
    }


@pytest.mark.parametrize("option", RELEASED)
def test_an_option_of_a_released_model_arrives(option, released):
    """What is seen of the run is what was typed."""
    assert released[option] == RELEASED[option][1]


@pytest.mark.parametrize(("fixture", "table"), [("embedded", EMBEDDED), ("released", RELEASED)])
def test_no_option_of_these_runs_is_at_its_default(fixture, table, request):
    """Otherwise an option that is dropped would be seen as one that arrives."""
    given = request.getfixturevalue(fixture)["given"]
    free = {"optimizer", "tune", "device"}  # of two values or three, each seen in one of the runs
    for typed_name in table:
        name = typed_name.removeprefix("no_")
        released = options.ABOUT[name].released
        default = getattr(options.Options, name)
        if fixture == "released" and released is not None:
            default = released
        assert name in free or given[name] != default, name


@pytest.mark.usefixtures("one_process")
def test_a_preset_tunes_in_full_and_a_dry_run_writes_nothing(flags):
    """Two options that no run above could have."""
    line = flags("sd3", "--preset paper-sd3")
    assert parse(line).tune == "full" and parse(flags("sd3")).tune == "lora"
    train.main([*line, "--dry-run"])
    assert not any(Path().iterdir())


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    """A folder has none; of a repository the name and the revision reach the policy."""
    asked = Mock()
    monkeypatch.setattr(options.policies, "Released", asked)
    options.policy_of(options.Options(model="owner/name", revision="abc"))
    assert asked.call_args.args == ("owner/name", "abc")


def test_the_way_to_the_picture_arrives(tmp_path):
    """Five grid steps after the stochastic one, as three ODE steps of the second order."""
    words = (
        "--steps 6 --sde-steps 0 --finish-stride 2 --finish-order 2 --prompts train.txt "
        "--eval-prompts heldout.txt --prompts-per-iteration 1 --group-size 2 --iterations 1 "
        "--heldout 4 --eval-steps 1 --draw-at --device cpu"
    )
    spies = watched_run(words.split(), tmp_path, ("a red circle", "two blue squares"))
    (call,) = spies.calls["finished"]
    assert (call.i, call.stride, call.order) == (1, 2, 2)
    sampled = [len(call.x) for call in spies.calls["forward"] if not call.graded]
    assert sampled.count(2) == 3  # of the group; what is drawn has rows in fours
