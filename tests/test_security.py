"""What is loaded runs no code: no pickle, no remote code, no shell; read off the tree."""

import ast
import json
from pathlib import Path

import pytest
from transformers import CLIPModel

from zoo.released import random_pipelines as pipelines
from zoo.rewards import dual_encoders

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "zoo").rglob("*.py")], key=lambda path: path.as_posix()
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "torch.hub.load", "torch.save"}
# The oracle runs pave_grpo.py with a known bug put in; re and torch have a compile of their own.
ALLOWED = {("zoo/oracle/bugs.py", "exec"), ("zoo/oracle/bugs.py", "compile")}


def findings(source, where=""):
    """What of a module could run code that comes with a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += of_call(node, where)
    return found


def of_call(node, where):
    name, told = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    found = [name] if name in CALLS and (where, name) not in ALLOWED else []
    if name == "torch.load" and told.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if told.get("shell", "False") != "False":
        found.append(f"{name} with a shell")
    anything = name.split(".")[0].startswith("Auto") or name.startswith("DiffusionPipeline")
    if anything and name.endswith("from_pretrained") and told.get("trust_remote_code") != "False":
        found.append(f"{name} without trust_remote_code=False")
    if told.get("trust_remote_code", "False") != "False":
        found.append(f"{name} with remote code")
    return found


def test_no_module_runs_what_a_file_holds():
    """Of every module of the tree."""
    assert len(SOURCES) > 50
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        assert not findings(path.read_text(), where), where


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "AutoTokenizer.from_pretrained(place)",
        "AutoModel.from_pretrained(place, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(place)",
        "CLIPModel.from_pretrained(place, trust_remote_code=flag)",
    ],
)
def test_what_could_is_seen(source):
    """So that the test above can fail."""
    assert findings(source)


def test_a_tokenizer_with_code_of_its_own_runs_none(tmp_path, monkeypatch):
    """Whatever is typed when one is asked."""
    folder = tmp_path / "clip"
    pipelines.clip_tokenizer(tmp_path / "words").save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nTheirs = None\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        dual_encoders.tokenizer_in(folder, "nowhere/at-all")
    except (OSError, ValueError, AttributeError) as problem:
        assert "trust_remote_code" in str(problem) or "Theirs" in str(problem)
    assert not (tmp_path / "ran").exists()


def test_revisions_of_model_and_tokenizer_are_apart(monkeypatch):
    """model@tokenizer, either of which may be left out; each reaches its repository."""
    assert dual_encoders.revisions(None) == (None, None)
    assert dual_encoders.revisions("a") == ("a", None)
    assert dual_encoders.revisions("@b") == (None, "b")
    asked = []

    def of_model(place, revision, use_safetensors):
        asked.append((place, revision))

    def of_tokenizer(place, revision=None, trust_remote_code=None):
        asked.append((place, revision))

    class Encoder:
        def __init__(self, *given, **how):
            pass

    monkeypatch.setattr(CLIPModel, "from_pretrained", of_model)
    monkeypatch.setattr(dual_encoders.AutoTokenizer, "from_pretrained", of_tokenizer)
    monkeypatch.setattr(dual_encoders, "DualEncoder", Encoder)
    dual_encoders.pickscore("their/model", "a@b")
    dual_encoders.clip("their/clip", "c")
    assert asked == [
        ("their/model", "a"),
        (dual_encoders.WORDS, "b"),
        ("their/clip", "c"),
        ("their/clip", "c"),
    ]
