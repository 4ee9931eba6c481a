"""What a run is asked: prompts of files and of the embedded world, and the noise of each."""

import pytest
import torch

from zoo.shapes import world
from zoo.training import policies, prompts
from zoo.training.ranks import Ranks


def test_every_key_has_a_stream_of_its_own():
    """Keys of other lengths or with zeros at their end too: no run draws held-out noise."""
    keys = [(0,), (0, 0), (0, 0, 0), (0, 1), (0, 1, 0), (1,), (1, 0), (1, 0, 0), (1, 1, 0)]
    keys += [(seed, i, j) for seed in (2, 3) for i in range(3) for j in range(3)]
    draws = [torch.randn(4, generator=prompts.generator_of(*key)) for key in keys]
    assert len({tuple(z.tolist()) for z in draws}) == len(keys)
    assert torch.equal(draws[-1], torch.randn(4, generator=prompts.generator_of(3, 2, 2)))


def test_what_is_drawn_belongs_to_the_prompt_and_not_to_the_rank():
    """Four ranks draw, in their order, what one draws: prompts, and noise after them."""
    data = prompts.Prompts()
    shares = [Ranks(rank, 4, torch.device("cpu")).share(8) for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(8))
    alone, generators = data.draw(0, 1, range(8))
    noise = [torch.randn(4, generator=g) for g in generators]
    for share in shares:
        shared, generators = data.draw(0, 1, share)
        assert shared == [alone[i] for i in share]
        for i, g in zip(share, generators):
            assert torch.equal(torch.randn(4, generator=g), noise[i])
    assert len(set(alone)) > 1 and set(alone) <= set(world.TRAIN_PROMPTS)
    assert data.draw(0, 2, range(8))[0] != alone != data.draw(1, 1, range(8))[0]


def test_heldout_pairs_are_fixed_and_never_trained_on():
    """512 pairs, the same every time, 4 noises a prompt, from prompts that training never draws."""
    asked, noise = prompts.Prompts().pairs((3, 32, 32), 512)
    again, same = prompts.Prompts().pairs((3, 32, 32), 512)
    assert asked == again and torch.equal(noise, same) and noise.shape == (512, 3, 32, 32)
    assert len({tuple(z.flatten()[:8].tolist()) for z in noise}) == 512
    assert not set(asked) & set(world.TRAIN_PROMPTS)
    assert {world.parse(p).family for p in asked} == {"count", "conjunction", "relation"}


def test_a_prompt_file_is_accounted_for_line_by_line(tmp_path):
    """Distinct prompts in their order; empty lines and repetitions, and no others, are reported."""
    path = tmp_path / "prompts.txt"
    path.write_text(" a cat\n\na dög\na cat \n   \na cat on a mat\n", encoding="utf-8")
    found, report = prompts.read(path)
    assert found == ["a cat", "a dög", "a cat on a mat"]
    assert report == [
        f"{path}, line 2: empty, left out",
        f"{path}, line 4: 'a cat' is line 1 again, left out",
        f"{path}, line 5: empty, left out",
    ]
    path.write_bytes("\ufeffa bird\n".encode())  # a byte order mark is no part of a prompt
    assert prompts.read(path) == (["a bird"], [])
    for content, said in ((b"\n\n", "at least one prompt"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            prompts.read(path)


def test_shown_prompts_are_of_all_kinds_and_few_are_enough():
    """Eight of the embedded world, kinds in equal parts; a file of one prompt shows one."""
    data, policy = prompts.Prompts(), policies.Embedded()
    shown, noise = data.shown(policy.shape, policy.kind)
    kinds = [policy.kind(prompt) for prompt in shown]
    assert len(set(shown)) == 8 and noise.shape == (8, 4, 3, 32, 32)
    assert {kinds.count(kind) for kind in ("count", "conjunction", "relation")} == {2, 3}
    one = prompts.Prompts(("a",), ("b",))
    assert one.shown((2,), lambda prompt: "")[1].shape == (1, 4, 2)


def draws(*key, n=4, shape=(2,)):
    """n standard normal states of the stream of a key."""
    return torch.randn(n, *shape, generator=prompts.generator_of(*key))


def test_pairs_go_round_the_heldout_prompts():
    """Four pictures of each in a random order, then the first again, each from noise of its own."""
    data = prompts.Prompts(("t",), ("a", "b", "c"))
    order = data.in_order()
    assert sorted(order) == ["a", "b", "c"] and len(prompts.Prompts().in_order()) == 151
    assert prompts.Prompts().in_order() != sorted(prompts.Prompts().heldout)
    asked, noise = data.pairs((2,), 20)
    assert asked == [prompt for prompt in [*order, *order[:2]] for _ in range(4)]
    for turn in range(5):
        assert torch.equal(noise[4 * turn : 4 * turn + 4], draws(0, turn))


def test_pictures_show_heldout_prompts_kind_by_kind():
    """Three of five, as many of each kind as can be; their noise is no pair's."""
    data = prompts.Prompts(("t",), ("a1", "a2", "a3", "b1", "c1"))

    def kind(prompt):
        return prompt[0]

    shown, noise = data.shown((2,), kind, 3)
    assert [kind(prompt) for prompt in shown] == ["a", "b", "c"]
    four, _ = data.shown((2,), kind, 4)
    assert [kind(prompt) for prompt in four] == ["a", "a", "b", "c"]
    assert set(four) <= set(data.heldout)
    for i in range(3):
        assert torch.equal(noise[i], draws(1, i))


def test_two_files_are_reported_and_kept_apart(tmp_path):
    """Lines left out of either are said; the first file is trained on, the second is held out."""
    train, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    train.write_text("a\n\nb\n")
    heldout.write_text("c\nc\n")
    data = prompts.Prompts.of_files(train, heldout)
    assert (data.train, data.heldout) == (("a", "b"), ("c",))
    assert [line.split(": ")[0] for line in data.report] == [
        f"{train}, line 2",
        f"{heldout}, line 2",
    ]
    heldout.write_text("c\nb\n")
    with pytest.raises(ValueError, match="'b' is a training prompt; must be held out"):
        prompts.Prompts.of_files(train, heldout)


def test_a_line_ends_where_a_line_ends(tmp_path):
    """At \\n or \\r\\n; not at what Unicode also calls an end of a line, nor at \\r alone."""
    path = tmp_path / "prompts.txt"
    odd = ["a\u2028cat", "a\x85dog", "a\x0bbird", "a\x0cfish", "a\x1cgoat", "a\rhen"]
    path.write_bytes("\r\n".join(odd).encode() + b"\na bee\n")
    assert prompts.read(path) == ([*odd, "a bee"], [])
    path.write_bytes(b"a cat\na\0dog\n")
    with pytest.raises(ValueError, match=r"prompts.txt', line 2: holds a NUL; must be text"):
        prompts.read(path)


@pytest.mark.parametrize("prompt", ["A DÖG", "a do\u0308g", "A DO\u0308G"])
def test_a_training_prompt_in_other_letters_is_not_held_out(prompt, tmp_path):
    """In capitals, or with its accents encoded otherwise."""
    train, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    train.write_text("a dög\n", encoding="utf-8")
    heldout.write_text(f"a cat\n{prompt}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is a training prompt; must be held out"):
        prompts.Prompts.of_files(train, heldout)


def test_long_files_are_read_soon_and_reported_briefly(tmp_path):
    """A hundred thousand lines of each, half of them again; a few lines of report."""
    train, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    train.write_text("".join(f"prompt {i // 2}\n" for i in range(100_000)))
    heldout.write_text("".join(f"other {i}\n\n" for i in range(50_000)))
    data = prompts.Prompts.of_files(train, heldout)
    assert len(data.train) == len(data.heldout) == 50_000
    assert len(data.report) == 18 and data.report[8] == "... and 49992 lines more of this kind"
    assert data.digest() != prompts.Prompts.of_files(heldout, train).digest()
    assert prompts.summarised(["a"] * 8) == ["a"] * 8
