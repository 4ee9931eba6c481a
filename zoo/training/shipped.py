"""What judging the embedded model gives before any training: kept beside its weights.

It is the same for every run of the default setting, and takes longer than some iterations.

python -m zoo.training.shipped
    judges anew, in about a minute, and writes zoo/shapes/before.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.rewards import spec as rewards
from zoo.shapes import model as shapes_model
from zoo.training.draw import draw_block
from zoo.training.evaluate import Judged, judge_pairs, means_of
from zoo.training.files import replacing
from zoo.training.options import Options, policy_of
from zoo.training.pictures import Block
from zoo.training.prompts import Prompts
from zoo.training.ranks import Ranks

FILE = shapes_model.CHECKPOINT.with_name("before.safetensors")
# Options that decide the numbers; batches by their rounding, if at all.
DECIDING = ("model", "eval_reward", "heldout", "eval_steps", "shift", "eval_batch", "rollout_batch")


def conditions(o: Options, data: Prompts, ranks: Ranks) -> str:
    """What the numbers depend on, as JSON: the weights, prompts, device, and options."""
    return json.dumps(
        {
            "weights": hashlib.sha256(shapes_model.CHECKPOINT.read_bytes()).hexdigest(),
            "prompts": data.digest(),
            "device": ranks.device.type,
            **{name: getattr(o, name) for name in DECIDING},
        }
    )


def judgement(o: Options, data: Prompts, block: Block, ranks: Ranks) -> dict[str, Any] | None:
    """The shipped judgement, as `judge_heldout` returns it, where it is that of this run.

    That is under the same conditions, and where the pictures drawn by this run before training are
    those that were drawn then: they know of the code, of torch and of this machine.
    """
    kept = None
    if not o.model:
        kept = read(FILE, conditions(o, data, ranks))
    if not ranks.all(kept is not None and alike(block, kept)):
        return None
    assert kept is not None
    policy = policy_of(o)
    prompts, _ = data.pairs(policy.shape, o.heldout)
    found = [
        Judged(steps, 0, scores_of(o, kept, steps), kept["distances"][i].tolist())
        for i, steps in enumerate(o.eval_steps)
    ]
    return means_of(found, [policy.kind(prompt) for prompt in prompts], o.eval_steps)


def read(path: Path, conditions: str) -> dict[str, Tensor] | None:
    """What the file holds; None where there is none, or one made under other conditions."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("conditions") != conditions:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def alike(block: Block, kept: dict[str, Tensor]) -> bool:
    """The same verdicts on the same pictures: another CPU may round one of 255 values away."""
    images = eight_bits(block.images).int()
    if images.shape != kept["images"].shape or not torch.equal(block.scores, kept["verdicts"]):
        return False
    return bool((images - kept["images"].int()).abs().max() <= 1)


def eight_bits(images: Tensor) -> Tensor:
    """Pictures of [0, 1] as uint8."""
    return (255 * images).round().to(torch.uint8)


def scores_of(o: Options, kept: dict[str, Tensor], steps: int) -> dict[str, list[float]]:
    """{judge: its score of every pair}, drawn with so many ODE steps."""
    i = o.eval_steps.index(steps)
    return {judge: z.tolist() for judge, z in zip(o.eval_reward, kept["scores"][i], strict=True)}


def judged(o: Options, data: Prompts, ranks: Ranks) -> dict[str, Tensor]:
    """What the file holds, computed.

    images, verdicts   what a run draws before training, in 8 bits, and the first judge's scores
    scores      [numbers of ODE steps, judges, pairs]
    distances   [numbers of ODE steps, prompts], between pictures of one prompt
    """
    policy = policy_of(o).load((), ranks.device)
    (judges,) = rewards.load_all([o.eval_reward], ranks.device)
    shown, noise = data.shown(policy.shape, policy.kind)
    block = draw_block(o, policy, judges, shown, noise, ranks)
    found = judge_pairs(
        o, policy, judges, *data.pairs(policy.shape, o.heldout), o.eval_steps, ranks
    )
    batches = [[batch for batch in found if batch.steps == steps] for steps in o.eval_steps]
    scores = [[[z for b in own for z in b.scores[j]] for j in o.eval_reward] for own in batches]
    distances = [[z for b in own for z in b.distances] for own in batches]
    return {
        "images": eight_bits(block.images).contiguous(),
        "verdicts": block.scores.contiguous(),
        "scores": torch.tensor(scores),
        "distances": torch.tensor(distances, dtype=torch.float64),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Judge the shipped model, and write the file."""
    parser = argparse.ArgumentParser(
        "python -m zoo.training.shipped",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FILE, help="file to write")
    path = parser.parse_args(argv).out
    o, data = Options(), Prompts()
    ranks = Ranks.start("cpu", o.threads)
    told = {"conditions": conditions(o, data, ranks)}
    content = judged(o, data, ranks)
    with replacing(path) as part:
        save_file(content, part, metadata=told)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
