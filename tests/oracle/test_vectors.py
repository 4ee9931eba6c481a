"""Golden vectors: written, read back, and found wrong where they are."""

import json
import math

import verify_equivalence as oracle
from zoo.oracle import vectors


def test_vectors_are_written_read_back_and_rechecked(tmp_path, capsys):
    """Every case recomputes; a changed number, a changed file and a missing folder are found."""
    folder = tmp_path / "vectors"
    assert (
        oracle.main(["--vectors", str(folder)]) == 0
        and oracle.main(["--check-vectors", str(folder)]) == 0
    )
    described = json.loads((folder / "vectors.json").read_text())
    assert described["version"] == vectors.VERSION and len(described["cases"]) == len(vectors.CASES)
    tensors = vectors.load_file(folder / "vectors.safetensors")
    ratios, A = (
        tensors[f"ratios on both sides of the clip/{name}"] for name in ("ratio_2", "advantages")
    )
    assert (ratios[A > 0] > 1.05).any() and (
        ratios[A < 0] < 0.95
    ).any()  # members cut on either side
    silent = tensors["equal rewards/advantages"]
    assert (
        not silent[0].any()
        and silent[1].any()
        and tensors["a clamp that acts/advantages"].abs().max() == 0.8
    )
    tensors["k = 5/mean_5"][0, 0, 0, 0] += 1e-6
    vectors.save_file(tensors, folder / "vectors.safetensors")
    capsys.readouterr()
    assert oracle.main(["--check-vectors", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "SHA-256" in out and "k = 5/mean_5: off by 1e-06" in out and len(out.splitlines()) == 2
    del tensors["k = 5/mean_5"]
    vectors.save_file(
        tensors | {"k = 5/x_0": tensors["k = 5/x_0"] * math.nan}, folder / "vectors.safetensors"
    )
    assert oracle.main(["--check-vectors", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "k = 5/mean_5: missing" in out and "k = 5/x_0: off by nan" in out
    (folder / "vectors.safetensors").write_bytes(b"no tensors")
    assert oracle.main(["--check-vectors", str(folder)]) == 2
    assert (
        oracle.main(["--vectors", str(folder)]) == 2
        and oracle.main(["--check-vectors", str(tmp_path / "no")]) == 2
    )
