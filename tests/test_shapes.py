"""The world of shapes: its grammar, its rule, which must be right and hard to fool, and the shipped model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.shapes import model as shapes_model
from zoo.shapes import pretrain as pretrain_shapes
from zoo.shapes import world as shapes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_rule_is_right_about_drawn_pictures():
    """At least 99 % of drawn pictures pass by their own prompt, and fail by another of the same family.

    With 1500 pictures and a true accuracy of 99.7 % or more, fewer than 99 % has a probability below 1e-4.
    """
    accepted, rejected = shapes.accuracy(1500, seeded(0))
    assert accepted >= 0.99 and rejected >= 0.99, (accepted, rejected)


def test_parts_of_the_score_are_credited_apart():
    """A picture judged by another prompt earns what it shows and no more: colours, number, objects, relation."""
    picture = shapes.draw(["a red circle and a blue square"], seeded(1))
    by = {
        prompt: shapes.judge(picture, [prompt])
        for prompt in (
            "a red circle and a blue square",
            "a red square and a blue square",
            "a red circle",
            "a green triangle",
        )
    }
    scores = [verdict.score.item() for verdict in by.values()]
    assert scores[0] == 1 and by["a red circle and a blue square"].right.item()
    assert (
        scores == sorted(scores, reverse=True)
        and len(set(scores)) == 4
        and all(0 <= x <= 1 for x in scores)
    )
    one = by["a red circle"]
    assert (
        not one.right.item() and one.number.item() == 0 and one.objects.item() == 0.5
    )  # one object too many
    left = shapes.draw(["a red circle left of a blue square"], seeded(2))
    assert shapes.judge(left, ["a red circle left of a blue square"]).right.item()
    wrong = shapes.judge(left, ["a red circle right of a blue square"])
    assert wrong.relation.item() == 0 and wrong.objects.item() == 1 and not wrong.right.item()


def loopholes(prompt: str) -> dict[str, torch.Tensor]:
    """Pictures that a careless rule would like."""
    clean = shapes.draw([prompt], seeded(3))[0]
    red = torch.tensor(shapes.PALETTE[0])[:, None, None]
    noise = torch.rand(3, 32, 32, generator=seeded(4))
    specks = clean.clone()
    specks[:, ::6, ::6] = red
    four = shapes.draw(["three red circles"], seeded(5))[0]
    return {
        "noise": noise,
        "red everywhere": red.expand(3, 32, 32),
        "specks": specks,
        "too many": four,
        "nothing": torch.tensor(shapes.BACKGROUND)[:, None, None].expand(3, 32, 32).clone(),
        "grey": torch.full((3, 32, 32), 0.5),
        "fog": 0.6 * clean + 0.4 * noise,
        "pale": 0.35 * clean + 0.65 * torch.tensor(shapes.BACKGROUND)[:, None, None],
        "black ground": clean * 0.5,
    }


@pytest.mark.parametrize("name", loopholes("a red circle"))
def test_loopholes_of_the_rule_are_closed(name):
    """Noise, floods, specks, fog, pale or extra objects are not fully right, and score below a clean picture."""
    picture = loopholes("a red circle")[name]
    verdict = shapes.judge(picture[None], ["a red circle"])
    assert not verdict.right.item() and verdict.score.item() < 0.9, (name, verdict)


@given(st.integers(0, 10**6), st.integers(0, len(shapes.PROMPTS) - 1))
def test_a_judgement_belongs_to_its_own_row(seed, i):
    """Judged alone, in a batch or in another order, a picture gets the same score; right is a complete score."""
    prompts = [
        shapes.PROMPTS[i],
        shapes.PROMPTS[(7 * i + 3) % len(shapes.PROMPTS)],
        "two red circles",
    ]
    pictures = shapes.draw([prompts[1], prompts[1], prompts[2]], seeded(seed))
    together = shapes.judge(pictures, prompts)
    alone = torch.cat([shapes.reward(x[None], [p]) for x, p in zip(pictures, prompts)])
    assert torch.equal(together.score, alone)
    assert torch.equal(shapes.reward(pictures.flip(0), prompts[::-1]), together.score.flip(0))
    assert torch.equal(together.right, together.score == 1)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red",
        "red circle",
        "a purple circle",
        "two red circle",
        "four red circles",
        "a red circle left of a red square",
        "A red circle",
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt):
    """One line that names the prompt."""
    with pytest.raises(ValueError, match="grammar") as error:
        shapes.parse(prompt)
    assert repr(prompt) in str(error.value) and "\n" not in str(error.value)


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
        shapes.reward(images, ["a red circle"])


def test_heldout_scenes_are_held_out_in_every_wording():
    """No training prompt asks for the scene of a held-out one; every word and every object is still trained."""
    key = {p: shapes.parse(p).key() for p in shapes.PROMPTS}
    assert (
        len(set(shapes.PROMPTS))
        == len(shapes.PROMPTS)
        == len(shapes.TRAIN_PROMPTS) + len(shapes.HELDOUT_PROMPTS)
    )
    assert not {key[p] for p in shapes.HELDOUT_PROMPTS} & {key[p] for p in shapes.TRAIN_PROMPTS}
    assert 0.1 < len(shapes.HELDOUT_PROMPTS) / len(shapes.PROMPTS) < 0.25
    assert {w for p in shapes.TRAIN_PROMPTS for w in p.split()} == {
        w for p in shapes.PROMPTS for w in p.split()
    }
    objects = [
        {(g.colour, g.shape) for p in prompts for g in shapes.parse(p).groups}
        for prompts in (shapes.TRAIN_PROMPTS, shapes.PROMPTS)
    ]
    assert objects[0] == objects[1]


def test_the_shipped_checkpoint_fits_and_knows_how_it_was_made():
    """At most 6 MiB, with the command, seed, steps and validation score that made it."""
    from safetensors import safe_open

    assert shapes_model.CHECKPOINT.stat().st_size <= 6 * 2**20
    with safe_open(shapes_model.CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    assert "pretrain_shapes" in metadata["command"] and {"seed", "steps", "config"} <= set(metadata)


def test_the_model_is_a_velocity_of_rows():
    """A row's velocity depends on its own x, t and prompt; the clean prediction is consistent; float64 works."""
    model = shapes_model.load().double()
    tokens = shapes_model.tokenize(["two red circles", "a blue square left of a green triangle"])
    x = torch.randn(2, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        v = model(x, t, tokens)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], tokens[i : i + 1]) for i in range(2)])
        swapped = model(x, t, tokens.flip(0))
        clean = model.clean(x, t, tokens)
    assert v.dtype == torch.float64 and v.shape == x.shape
    torch.testing.assert_close(v, alone, rtol=1e-11, atol=1e-11)
    assert (v - swapped).abs().max() > 1e-3
    torch.testing.assert_close(x - t[:, None, None, None] * v, clean, rtol=1e-11, atol=1e-11)


def test_a_saved_model_is_the_model(tmp_path):
    """float32 weights come back bit for bit; a file of another kind is refused in one line."""
    torch.manual_seed(0)
    model = shapes_model.ShapesFlow()
    shapes_model.save(model, tmp_path / "m.safetensors", {"note": "test"}, torch.float32)
    again = shapes_model.load(tmp_path / "m.safetensors")
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    for path in ("x.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=path) as error:
            shapes_model.load(tmp_path / path)
        assert "\n" not in str(error.value)


def test_pretraining_learns_in_a_few_steps():
    """The pretraining loss vanishes for the exact velocity (x - x_0)/t, and twelve steps halve it for the network."""
    loss = pretrain_shapes.flow_loss
    torch.manual_seed(0)
    model = shapes_model.ShapesFlow()
    images = shapes.draw(["a red circle"] * 8, seeded(7)) * 2 - 1
    tokens = shapes_model.tokenize(["a red circle"] * 8)
    exact = loss(lambda x, t, tokens: (x - images) / t.view(-1, 1, 1, 1), images, tokens, seeded(8))
    assert (
        exact.item() < 1e-8
    )  # float32 states of order 1, divided by t > 0.01: errors of 1e-5, squared and averaged
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        value = loss(model, images, tokens, seeded(8))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
