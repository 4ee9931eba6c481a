"""The side of the judged code: one call of a function, and what came of it.

A call travels as a `Message`: numbers and words, which JSON can carry, and tensors, which
safetensors can. So the same lines serve a function in this process (`perform`) and one in a process
of its own (`main`): there nothing that the judged code does can touch what its answers are compared
with, and what it prints, changes or ends is seen from outside.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import random
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

Tensors = dict[str, Tensor]

LARGEST_FILE = 2**30  # bytes that the judged code may write into a file


class Message(NamedTuple):
    """A call or its reply: `words` for JSON, `tensors` for safetensors."""

    words: dict[str, Any]
    tensors: Tensors


# ---- What a function is given --------------------------------------------------------------------


class Field(nn.Module):
    """v = tanh([x, t, prompt] W_1) W_2, float64, on states of any shape."""

    def __init__(self, w1: Tensor, w2: Tensor):
        super().__init__()
        self.w1 = nn.Parameter(w1.clone())
        self.w2 = nn.Parameter(w2.clone())

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        states = x.reshape(len(x), -1)
        rows = torch.cat([states, t[:, None], (prompt % 5)[:, None] / 2 - 1], dim=1)
        return (torch.tanh(rows @ self.w1) @ self.w2).reshape(x.shape)


def velocity_of(field: Field, prompted: bool) -> Callable[..., Tensor]:
    """velocity(x, t), or velocity(x, t, prompt): t a number or one a row, v in x's dtype."""

    def evaluate(x: Tensor, t: Tensor | float, prompt: Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
        v: Tensor = field(x.double(), times, prompt.double()).to(x.dtype)
        return v

    def of_one_prompt(x: Tensor, t: Tensor | float) -> Tensor:
        return evaluate(x, t, torch.zeros(len(x)))

    return evaluate if prompted else of_one_prompt


def arguments_of(call: Message) -> tuple[dict[str, Any], dict[str, Field]]:
    """The keyword arguments of a call, and the fields among them.

    words: "numbers" as they are; "tensors" and "velocities", the names of the others; "prompted",
    what a velocity takes; "times", how t and s are handed over.
    """
    words, tensors = call
    given: dict[str, Any] = dict(words["numbers"])
    if "factors" in given:
        given["factors"] = tuple(given["factors"])
    for name in words["tensors"]:
        given[name] = tensors[name].clone()
    fields = {}
    for name in words["velocities"]:
        fields[name] = Field(tensors[f"{name}.w1"], tensors[f"{name}.w2"])
        given[name] = velocity_of(fields[name], words["prompted"])
    if words["times"] != "numbers":
        rows = () if words["times"] == "tensors" else (words["rows"],)
        for name in ("t", "s"):
            given[name] = torch.full(rows, given[name], dtype=torch.float64)
    return given, fields


# ---- What it leaves behind -----------------------------------------------------------------------


def state_of_the_process() -> dict[str, Any]:
    """What a function should leave alone, by name."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the gradient mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the matmul precision": torch.get_float32_matmul_precision(),
        "torch's random state": bytes(torch.random.get_rng_state().numpy()),
        "numpy's random state": repr([*map(bytes, map(numpy.array, numpy.random.get_state()))]),
        "Python's random state": random.getstate(),
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what would change the next answer, or the judge's own numbers; no random state."""
    torch.set_default_dtype(state["the default dtype"])
    if torch.get_default_device() != state["the default device"]:  # setting one slows all of torch
        torch.set_default_device(None)
    torch.set_grad_enabled(state["the gradient mode"])
    torch.set_num_threads(state["the number of threads"])
    deterministic = state["deterministic algorithms"]
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports much
        torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(state["the matmul precision"])
    os.chdir(state["the working directory"])


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what changed."""
    return [name for name in before if before[name] != after[name]]


def first_line(error: BaseException) -> str:
    """Of its message, at most 200 characters."""
    try:
        line = (str(error).splitlines() or [""])[0][:200]
        return "".join(letter if letter.isprintable() else "?" for letter in line)
    except Exception:  # somebody else's __str__
        return ""


def plain(value: Any) -> Tensor | None:
    """A returned number, array or tensor as a tensor on the CPU; None for anything else."""
    try:
        if isinstance(value, Tensor):
            tensor = value.detach().as_subclass(Tensor).cpu()
            return tensor.clone().contiguous() if tensor.is_floating_point() else None
        if isinstance(value, (float, numpy.ndarray, numpy.floating)):
            return torch.tensor(numpy.array(value), dtype=torch.float64)
    except Exception:  # sparse tensors, those of no device, arrays of objects
        return None
    return None


class Heard(io.TextIOBase):
    """Somewhere to print to, which keeps the first 200 characters."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[:200]
        return len(text)


# ---- One call ------------------------------------------------------------------------------------


def perform(function: Callable, call: Message) -> Message:
    """Call the function. The reply has its values, and its gradient where that is asked for.

    words: "error" and "message" where it raised; "exit" where it wanted to end the process;
    "returned", a word for each value (tensor, None or its type); "changed", inputs that it changed;
    "state", what else it changed; "printed". Gradients: "theta" is that of the value by the
    parameters of `velocity`, "v" that of the sum of the second value by v.
    """
    given, fields = arguments_of(call)
    before = {name: z.clone() for name, z in given.items() if isinstance(z, Tensor)}
    held = {name: given[name] for name in before}
    wanted = call.words["gradient"]
    if wanted == "v":
        given["v"].requires_grad_(True)
    state = state_of_the_process()
    heard = Heard()
    out: Any = None
    gradient: Tensors = {}
    words: dict[str, Any] = {"error": "", "message": "", "exit": ""}
    try:
        with contextlib.redirect_stdout(heard):
            out = called(function, given)
            if wanted:
                gradient = gradient_of(wanted, out, given, fields)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is its answer
        words["error"] = type(error).__name__
        words["message"] = first_line(error)
    except BaseException as error:
        words["exit"] = f"{type(error).__name__}({first_line(error)})"
    words["state"] = differences(state, state_of_the_process())
    words["printed"] = heard.text
    restore(state)
    words["changed"] = [name for name, z in before.items() if not torch.equal(held[name], z)]
    return packed(words, out, gradient)


def called(function: Callable, given: dict[str, Any]) -> Any:
    """function(**given), by position where it takes no names."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function(**given)
    by_position = []
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY and name in given:
            by_position.append(given.pop(name))
    return function(*by_position, **given)


def packed(words: dict[str, Any], out: Any, gradient: Tensors) -> Message:
    """The reply: what was returned, one value or several, as tensors by their places."""
    words["many"] = isinstance(out, (tuple, list))
    words["returned"] = []
    tensors = dict(gradient)
    for i, value in enumerate(list(out) if words["many"] else [out]):
        tensor = plain(value)
        words["returned"].append("tensor" if tensor is not None else type(value).__name__)
        if tensor is not None:
            tensors[str(i)] = tensor
    return Message(words, tensors)


def gradient_of(wanted: str, out: Any, given: dict[str, Any], fields: dict[str, Field]) -> Tensors:
    """{"gradient": ...}, zero where the value does not depend on what it is taken by.

    {} where a step's log-probability carries no gradient at all.
    """
    if wanted == "theta":
        inputs = list(fields["velocity"].parameters())
        value = out
    else:
        inputs = [given["v"]]
        value = out[1] if isinstance(out, (tuple, list)) and len(out) > 1 else None
    if not isinstance(value, Tensor) or not value.requires_grad:
        zeros = torch.zeros(sum(z.numel() for z in inputs), dtype=torch.float64)
        return {"gradient": zeros} if wanted == "theta" else {}
    parts = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    return {"gradient": torch.cat([part.flatten().double() for part in parts])}


# ---- In a process of its own ---------------------------------------------------------------------


class Readable(Protocol):
    """Something to read bytes from."""

    def read(self, size: int, /) -> bytes:
        """That many bytes; fewer at the end."""


class Writable(Protocol):
    """Something to write bytes to."""

    def write(self, data: bytes, /) -> Any:
        """All of them."""

    def flush(self) -> None:
        """None is held back."""


def send(to: Writable, message: Message) -> None:
    """Two lengths, then the words, then the tensors."""
    words = json.dumps(message.words).encode()
    tensors = save(message.tensors)
    to.write(struct.pack("<QQ", len(words), len(tensors)) + words + tensors)
    to.flush()


def receive(source: Readable) -> Message | None:
    """The next message; None at the end."""
    head = source.read(16)
    if len(head) < 16:
        return None
    n_words, n_tensors = struct.unpack("<QQ", head)
    words = source.read(n_words)
    tensors = source.read(n_tensors)
    if len(words) < n_words or len(tensors) < n_tensors:
        return None
    return Message(json.loads(words), load(tensors))


def parameters_of(function: Any) -> list[tuple[str, str | None]]:
    """(name, default) of each parameter, "required" where there is no default.

    A default that JSON cannot carry is said to be "other". Raises TypeError for what has none.
    """
    if isinstance(function, torch.jit.ScriptFunction):
        schema: Any = function.schema
        return [(argument.name, "required") for argument in schema.arguments]
    target = function.forward if isinstance(function, nn.Module) else function
    found: list[tuple[str, str | None]] = []
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        if default is parameter.empty:
            found.append((name, "required"))
        else:
            found.append((name, default if isinstance(default, (str, type(None))) else "other"))
    return found


def confine(calls: int, replies: int, seconds: int) -> None:
    """Nothing that it starts holds the pipes, and it ends by itself if its judge is gone."""
    os.set_inheritable(calls, False)
    os.set_inheritable(replies, False)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def found(where: str) -> Any:
    """MODULE:FUNCTION, first of all in the working directory."""
    module, _, name = where.partition(":")
    sys.path.insert(0, os.getcwd())
    sys.argv[:] = [where]  # nothing of ours, should it read the command line
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function


def main(where: str, calls: int, replies: int, seconds: int) -> int:
    """Import MODULE:FUNCTION and answer calls until there are no more."""
    confine(calls, replies, seconds)
    own = os.getpid()
    with os.fdopen(calls, "rb") as source, os.fdopen(replies, "wb") as to:
        before = state_of_the_process()
        try:
            function = found(where)
            parameters = parameters_of(function)
        except Exception as error:  # whatever their module does on import
            send(to, Message({"failed": f"{type(error).__name__}: {first_line(error)}"}, {}))
            return 0
        state = differences(before, state_of_the_process())
        send(to, Message({"failed": "", "parameters": parameters, "state": state}, {}))
        while (call := receive(source)) is not None:
            reply = perform(function, call)
            if os.getpid() != own:  # a copy that the judged code forked
                os._exit(0)
            send(to, reply)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
