"""What is computed of a card's memory, against tiny networks that run, and by hand."""

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from zoo.released import footprint
from zoo.released.footprint import GIB, Footprint

FAMILIES = ("sd3", "flux")
PAGE = Path(__file__).parents[2] / "docs/COSTS.md"


def on_the_cpu(network):
    """The same with numbers, whatever they are."""
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(0.01)
    return network


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_alone_tell_what_a_graph_keeps(family, tune, checkpointing):
    """What a network with numbers keeps, of one state and of three.

    But for the mean and the scale of a normalisation, which the kernels of a CPU keep in bfloat16:
    4 bytes of some 500 that a block of width 32 keeps for each token.
    """
    network = footprint.network_of(family, tune, real=False)
    if checkpointing:
        network.enable_gradient_checkpointing()
    computed = [footprint.kept(network, (32, 64), rows) for rows in (1, 3)]
    network = on_the_cpu(network)
    assert computed == pytest.approx(
        [footprint.kept(network, (32, 64), rows) for rows in (1, 3)], rel=0.01
    )
    assert 2.5 * computed[0] < computed[1] <= 3 * computed[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_keeps_what_a_fused_one_does(family):
    """Without it torch's own keeps the scores of all pairs, or what its kernel on a CPU keeps."""
    network = on_the_cpu(footprint.network_of(family, "full", real=False))
    held = []

    def keep(x):
        held.append(x.shape)
        return x

    with saved_tensors_hooks(keep, lambda x: x), footprint.as_trained():
        footprint.call(network, (32, 32))
    heads, words, patches = 2, 512, 4
    sums = [shape for shape in held if shape == (1, heads, words + patches)]
    joint = 2  # blocks in either family: 2 of SD3, 1 + 1 of FLUX
    assert len(sums) == joint and network.config.num_attention_heads == heads


def test_norms_are_kept_in_float32_and_products_in_bfloat16():
    """As autocast has them: a norm and a product keep the sizes that are worked out here."""
    x = torch.zeros(5, 8, dtype=torch.bfloat16, requires_grad=True)
    w = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    held = []

    def keep(z):
        held.append((z.dtype, tuple(z.shape)))
        return z

    with saved_tensors_hooks(keep, lambda z: z), footprint.as_trained():
        normed = torch.nn.functional.layer_norm(x, (8,))
        torch.nn.functional.linear(normed, w)
        scaled = torch.nn.functional.rms_norm(x[:4], (8,))
    assert scaled.dtype == torch.float32 and (torch.float32, (4, 8)) in held
    assert normed.dtype == torch.float32 and (torch.float32, (5, 8)) in held
    assert (torch.bfloat16, (5, 8)) in held and (torch.bfloat16, (8, 3)) in held
    assert torch.nn.functional.linear is footprint.PLAIN["linear"]


def test_checkpointing_keeps_less():
    """Of blocks what enters them alone."""
    found = footprint.footprint("flux", "lora", (64, 64), real=False)
    assert 0 < found.checkpointed < found.plain / 3


def test_what_is_fixed_is_counted_by_hand():
    """Float32 masters, gradients, two moments: 16 bytes a trained weight; 2 a frozen one."""
    network = footprint.network_of("sd3", "lora", real=False)
    tuned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    adapters = footprint.footprint("sd3", "lora", (32, 32), real=False)
    assert adapters.fixed == 16 * tuned + 2 * frozen and adapters.copies == 2 * tuned
    alone, shared = (
        footprint.footprint("sd3", "full", (32, 32), ranks, real=False) for ranks in (1, 8)
    )
    assert alone.fixed == 16 * frozen and alone.copies == 2 * frozen and shared.copies == 0
    blocks = footprint.network_of("sd3", "full", real=False).transformer_blocks
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    assert shared.fixed == 2 * frozen + 10 * largest  # an eighth of 16; 2 x 2, and 2 and 4


def test_the_most_states_are_the_most():
    """1 + 1 + 2 evaluations of a state for S = {2, 3}; one more state would not fit."""
    found = Footprint(fixed=10.0, copies=0.25, plain=3.0, checkpointed=0.5, block=1.0)
    assert found.update(2, (2, 3), False) == 10 + 4 * 0.25 + 2 * (4 * 3 + 1)
    assert found.update(2, (), True) == 10 + 2 * 1.5
    for room in (9, 12, 23.9, 24, 100):
        most = found.most(room, (2, 3), False)
        assert most == 0 or found.update(most, (2, 3), False) <= room
        assert found.update(most + 1, (2, 3), False) > room
    lines = footprint.table(Footprint(4 * GIB, 0.0, 2 * GIB, GIB, 0.0), 10.0)
    assert lines[4] == "  {}              no                     5      17      33"
    assert lines[7] == "  {2, 3}          yes                    2       8      16"


@pytest.mark.parametrize(
    "words, named",
    [
        ("sd3 --size 500 512", "--size 500 512: must be positive multiples of 16"),
        ("sd3 --size 8192 512", "--size 8192 512: must be positive multiples of 16, 6144 at most"),
        ("sd3 --ranks 8", "--ranks 8: must be 1, or more with --tune full"),
        ("sd3 --reserve 24", "--reserve 24.0: must be at least 0 and below 24"),
        ("sdxl", "sdxl"),
    ],
)
def test_bad_options_are_refused(words, named, capsys):
    """By name, with what would be right."""
    with pytest.raises(SystemExit):
        footprint.main(words.split())
    assert named in capsys.readouterr().err


def test_the_page_shows_what_is_computed(capsys):
    """The table of docs/COSTS.md for SD3.5 Medium, line by line."""
    footprint.main(["sd3"])
    for line in capsys.readouterr().out.splitlines():
        assert line in PAGE.read_text(), line
