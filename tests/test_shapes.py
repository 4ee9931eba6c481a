"""The world of shapes: its grammar; its rule, right and hard to fool; its model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import pave_grpo as pave
from zoo.shapes import model, pretrain, rule, world


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- The grammar ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        *("", "a red", "red circle", "a purple circle", "two red circle", "four red circles"),
        *("a red circle left of a red square", "A red circle"),
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt):
    """One line that names the prompt."""
    with pytest.raises(ValueError, match="grammar") as error:
        world.parse(prompt)
    assert repr(prompt) in str(error.value) and "\n" not in str(error.value)


def test_heldout_scenes_are_held_out_in_every_wording():
    """No training prompt asks for a held-out scene; every word and object is still trained."""
    train, heldout = set(world.TRAIN_PROMPTS), set(world.HELDOUT_PROMPTS)
    assert train | heldout == set(world.PROMPTS) and not train & heldout
    assert (len(world.PROMPTS), len(world.HELDOUT_PROMPTS)) == (792, 151)
    assert not {world.parse(p).key() for p in train} & {world.parse(p).key() for p in heldout}
    words = {word for p in world.PROMPTS for word in p.split()}
    assert {word for p in train for word in p.split()} == words
    objects = {(g.colour, g.shape) for p in train for g in world.parse(p).groups}
    assert len(objects) == len(world.COLOURS) * len(world.SHAPES)


# ---- The rule ------------------------------------------------------------------------------------


def test_the_rule_is_right_about_drawn_pictures():
    """At least 99 % of drawn pictures pass by their own prompt, and fail by another of the family.

    With 1500 pictures and a true accuracy of 99.7 % or more, fewer than 99 % has a probability
    below 1e-4.
    """
    accepted, rejected = rule.accuracy(1500, seeded(0))
    assert accepted >= 0.99 and rejected >= 0.99, (accepted, rejected)


def test_parts_of_the_score_are_credited_apart():
    """By another prompt a picture earns what it shows: colours, number, objects, relation."""
    picture = world.draw(["a red circle and a blue square"], seeded(1))
    own = rule.judge(picture, ["a red circle and a blue square"])
    one_shape_wrong = rule.judge(picture, ["a red square and a blue square"])
    one_too_many = rule.judge(picture, ["a red circle"])
    all_wrong = rule.judge(picture, ["a green triangle"])
    assert own.score == 1 and own.right
    assert 1 > one_shape_wrong.score > one_too_many.score > all_wrong.score >= 0
    assert not one_too_many.right and one_too_many.number == 0 and one_too_many.objects == 0.5
    # Without a relation, what it would weigh counts for nobody: (0.4 / 2 + 0.2 / 2) / 0.8.
    assert one_too_many.score.item() == pytest.approx(0.375)
    left = world.draw(["a red circle left of a blue square"], seeded(2))
    assert rule.judge(left, ["a red circle left of a blue square"]).right
    wrong = rule.judge(left, ["a red circle right of a blue square"])
    assert wrong.relation == 0 and wrong.objects == 1 and not wrong.right


def loopholes() -> dict[str, torch.Tensor]:
    """Pictures that a careless rule would like as "a red circle"."""
    clean = world.draw(["a red circle"], seeded(3))[0]
    ground = torch.tensor(world.BACKGROUND)[:, None, None].expand(3, 32, 32)
    red, green, _, _ = torch.tensor(world.PALETTE)[..., None, None]
    noise = torch.rand(3, 32, 32, generator=seeded(4))
    specks = clean.clone()
    specks[:, ::6, ::6] = red
    blob = ground.clone()
    blob[:, 8:24, 13:19] = red
    tint = 0.6 * ground + 0.4 * green
    middle = torch.full((2,), 16.0)
    circle, giant = world.outlines(middle, middle, torch.tensor([5.5, 12.0]))[:, :1]
    return {
        "noise": noise,
        "red everywhere": red.expand(3, 32, 32),
        "specks": specks,
        "too many": world.draw(["three red circles"], seeded(5))[0],
        "nothing": ground,
        "grey": torch.full((3, 32, 32), 0.5),
        "fog": 0.6 * clean + 0.4 * noise,
        "pale": 0.35 * clean + 0.65 * ground,
        "tinted ground": tint + circle * (red - tint),
        "blob": blob,
        "giant": ground + giant * (red - ground),
        "black ground": clean * 0.5,
    }


@pytest.mark.parametrize(("name", "picture"), loopholes().items())
def test_loopholes_of_the_rule_are_closed(name, picture):
    """Noise, floods, fog, tints; pale, misshapen, giant or extra objects: not right, and less."""
    verdict = rule.judge(picture[None], ["a red circle"])
    assert not verdict.right.item() and verdict.score.item() < 0.9, (name, verdict)


@given(st.integers(0, 10**6), st.integers(0, len(world.PROMPTS) - 1))
def test_a_judgement_belongs_to_its_own_row(seed, i):
    """Alone, in a batch or in another order: the same score. Right is a complete score."""
    other = world.PROMPTS[(7 * i + 3) % len(world.PROMPTS)]
    prompts = [world.PROMPTS[i], other, "two red circles"]
    pictures = world.draw([other, other, "two red circles"], seeded(seed))
    together = rule.judge(pictures, prompts)
    alone = torch.cat([rule.reward(x[None], [p]) for x, p in zip(pictures, prompts)])
    assert torch.equal(together.score, alone)
    assert torch.equal(rule.reward(pictures.flip(0), prompts[::-1]), together.score.flip(0))
    assert torch.equal(together.right, together.score == 1)
    assert torch.equal(rule.right(pictures, prompts), together.right.float())


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 16, 16),
        torch.full((1, 3, 32, 32), float("nan")),
        torch.full((1, 3, 32, 32), 2.0),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_pictures_outside_the_contract_are_refused(images):
    """The reward contract is float [B, 3, 32, 32] in [0, 1]: anything else is one clear line."""
    with pytest.raises(ValueError, match="images"):
        rule.reward(images, ["a red circle"])


# ---- The model -----------------------------------------------------------------------------------


def test_the_shipped_checkpoint_fits_and_knows_how_it_was_made():
    """At most 6 MiB, with the command, seed, steps and validation score that made it."""
    assert model.CHECKPOINT.stat().st_size <= 6 * 2**20
    with safe_open(model.CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    assert {"command", "seed", "steps", "validation", "config"} <= set(metadata)
    assert "pretrain" in metadata["command"]


def test_the_model_is_a_velocity_of_rows():
    """A row's v depends on its own x, t and prompt; x - t v is the clean picture; in float64."""
    network = model.load().double()
    prompts = ["two red circles", "a blue square left of a green triangle"]
    tokens = model.tokenize(prompts)
    x = torch.randn(2, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        v = network(x, t, tokens)
        alone = [network(x[i : i + 1], t[i : i + 1], tokens[i : i + 1]) for i in range(2)]
        swapped = network(x, t, tokens.flip(0))
        by_index = model.velocity_of(network, prompts)(x, t, torch.tensor([1, 0]))
        clean = network.clean(x, t, tokens)
    assert v.dtype == torch.float64 and v.shape == x.shape
    torch.testing.assert_close(v, torch.cat(alone), rtol=1e-11, atol=1e-11)
    assert (v - swapped).abs().max() > 1e-3 and torch.equal(by_index, swapped)
    torch.testing.assert_close(x - pave.per_row(t, x) * v, clean, rtol=1e-11, atol=1e-11)


def test_a_saved_model_is_the_model(tmp_path):
    """float32 weights come back bit for bit; a file of another kind is refused in one line."""
    torch.manual_seed(0)
    network = model.ShapesFlow()
    model.save(network, tmp_path / "m.safetensors", {"note": "test"}, torch.float32)
    again = model.load(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(w, again[name]) for name, w in network.state_dict().items())
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    for path in ("x.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=path) as error:
            model.load(tmp_path / path)
        assert "\n" not in str(error.value)


# ---- Pretraining ---------------------------------------------------------------------------------


def test_pretraining_learns_in_a_few_steps():
    """The loss vanishes for the exact v = (x - x_0)/t; twelve steps halve it for the network."""
    torch.manual_seed(0)
    network = model.ShapesFlow()
    images = world.draw(["a red circle"] * 8, seeded(7)) * 2 - 1
    tokens = model.tokenize(["a red circle"] * 8)

    def exact(x, t, tokens):
        return (x - images) / pave.per_row(t, x)

    # float32 states of order 1, divided by t > 0.01: errors of 1e-5, squared and averaged.
    assert pretrain.flow_loss(exact, images, tokens, seeded(8)).item() < 1e-8
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = pretrain.flow_loss(network, images, tokens, seeded(8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_orthogonal_levels_singular_values():
    """U S V^T becomes U f(S) V^T with f near 1: directions stay, for wide and for tall matrices."""
    wide = torch.randn(3, 4, 9, generator=seeded(9), dtype=torch.float64)
    for m in (wide, wide.mT):
        levelled = pretrain.orthogonal(m)
        U, _, Vh = torch.linalg.svd(m, full_matrices=False)
        middle = U.mT @ levelled @ Vh.mT
        level = middle.diagonal(dim1=-2, dim2=-1)
        assert ((level > 0.6) & (level < 1.35)).all()
        torch.testing.assert_close(middle, torch.diag_embed(level), rtol=0, atol=1e-10)
