"""The embedded model as a policy: what of it is trained, what it weighs, what it leaves."""

import pytest
import torch
from safetensors.torch import load_file

from zoo.shapes import model as shapes_model
from zoo.training import policies


def counted(kept):
    """How many numbers the shipped model has in the weights whose name is kept."""
    weights = load_file(shapes_model.CHECKPOINT)
    return sum(w.numel() for name, w in weights.items() if kept(name))


@pytest.mark.parametrize("tune", ["transformer", "full"])
@pytest.mark.parametrize("reference", [True, False])
def test_sizes_are_those_of_the_shipped_file(tune, reference):
    """Four bytes a number; the frozen ones are those not trained, and a reference's."""
    policy = policies.Embedded(tune=tune, reference=reference)

    def trained(name):
        return tune == "full" or name.split(".")[0] not in shapes_model.PIXEL_LAYERS

    weights, tuned = counted(lambda name: True), counted(trained)
    assert (tuned < weights) == (tune == "transformer")
    frozen = weights - tuned + weights * reference
    assert policy.sizes == (weights, tuned, 1, 4 * frozen, 4 * tuned, 0)
    assert sum(p.numel() for p in policy.tuned) == tuned and not policy.sharded
    assert (policy.reference is None) != reference


def test_a_checkpoint_keeps_small_updates(tmp_path):
    """float32: an update below the rounding of float16 is not lost."""
    policy = policies.Embedded()
    with torch.no_grad():
        for p in policy.network.parameters():
            p.mul_(1 + 1e-5)
    assert policy.save(tmp_path, main=False) == "checkpoint.safetensors"
    assert not any(tmp_path.iterdir())
    assert policy.save(tmp_path, main=True) == "checkpoint.safetensors"
    kept = load_file(tmp_path / "checkpoint.safetensors")
    for name, p in policy.network.state_dict().items():
        assert kept[name].dtype == torch.float32 and torch.equal(kept[name], p), name


def test_the_reference_stays_where_training_began():
    """A copy that no update reaches; the policy itself moves."""
    policy = policies.Embedded(reference=True)
    x, t = torch.ones(1, *policy.shape), torch.tensor([0.5])
    prompt, asked = torch.zeros(1, dtype=torch.long), ["a red circle"]
    before = policy.velocity(asked)(x, t, prompt)
    assert torch.equal(policy.reference_velocity(asked)(x, t, prompt), before)
    with torch.no_grad():
        for p in policy.tuned:
            p.add_(0.01)
    assert torch.equal(policy.reference_velocity(asked)(x, t, prompt), before)
    assert not torch.equal(policy.velocity(asked)(x, t, prompt), before)
    assert not any(p.requires_grad for p in policy.reference.parameters())
