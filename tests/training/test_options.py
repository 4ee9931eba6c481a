"""The options: what a command line may say, what is refused in one line, what --help shows."""

import re
from pathlib import Path

import pytest

import train
from zoo.training import draw, evaluate, options

pytestmark = pytest.mark.usefixtures("one_process")
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


def test_prompts_must_divide_among_the_ranks(monkeypatch, capsys):
    """Eight prompts on three ranks are refused: unequal shares would weigh prompts unequally."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        train.parse([])
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
    assert train.parse([]) == options.Options()
