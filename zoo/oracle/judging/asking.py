"""The side of the judge: calls go out, replies come in, and what is seen on the way is kept."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, Protocol

from zoo.oracle.judging import asked
from zoo.oracle.judging.asked import Message


class CannotBeJudged(Exception):
    """There is no verdict: the reason completes "cannot be judged:"."""


class Answerer(Protocol):
    """Whoever answers: a function here, or one in a process of its own."""

    parameters: dict[str, Any]  # {name: default}, "required" without one
    state: list[str]  # what its import changed, in words

    def answer(self, call: Message, about: str) -> Message:
        """The reply to a call; `about` names the question. Raises CannotBeJudged."""


class Here:
    """A function in this process, for tests and for whoever trusts it."""

    def __init__(self, function: Callable):
        self.function = function
        self.state: list[str] = []
        try:
            self.parameters = dict(asked.parameters_of(function))
        except (TypeError, ValueError):
            raise CannotBeJudged(f"{function!r} is no function with named parameters") from None

    def answer(self, call: Message, about: str) -> Message:
        """The reply; about is not needed, since nothing ends here."""
        return asked.perform(self.function, call)


class Elsewhere:
    """MODULE:FUNCTION in a process of its own, found from the working directory.

    It may take `limit` seconds in all, its import included. What it prints goes to a file. The
    process and whatever it started are killed on leaving.
    """

    def __init__(self, where: str, limit: float):
        self.limit = limit
        self.spent = 0.0
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115
        calls, self.to_child = os.pipe()
        self.from_child, replies = os.pipe()
        # -P: nothing but what MODULE says is found beside this file.
        command = [sys.executable, "-P", "-u", asked.__file__, where]
        command += [str(calls), str(replies), str(math.ceil(limit) + 10)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.printed,
            stderr=self.complaints,
            pass_fds=(calls, replies),
            start_new_session=True,
        )
        os.close(calls)
        os.close(replies)
        try:
            self.parameters = self.imported(where)
        except BaseException:
            self.close()
            raise

    def imported(self, where: str) -> dict[str, Any]:
        """The parameters of the function, once it is there."""
        words = self.next_reply("its import", time.monotonic() + self.limit).words
        if words["failed"]:
            wanted = "must be an importable MODULE:FUNCTION"
            raise CannotBeJudged(f"{where} {wanted} ({words['failed']})")
        self.state = [f"it changes {name} on import" for name in words["state"]]
        return dict(words["parameters"])

    def answer(self, call: Message, about: str) -> Message:
        """The reply, within what is left of the limit. Raises CannotBeJudged."""
        until = time.monotonic() + self.limit - self.spent
        # Where it has ended, or reads nothing, that is what its reply will tell.
        with contextlib.suppress(BrokenPipeError, TimeoutError):
            asked.send(Pipe(self.to_child, until), call)
        return self.next_reply(about, until)

    def next_reply(self, about: str, until: float) -> Message:
        """What it sends next. Raises CannotBeJudged where it ends, or takes too long."""
        began = time.monotonic()
        pipe = Pipe(self.from_child, until)
        try:
            reply = asked.receive(pipe)
        except TimeoutError:
            raise CannotBeJudged(
                f"{about}: no answer within the {self.limit:g} s that it may take in all"
            ) from None
        except Exception as error:  # of whatever it wrote there
            what = f"{type(error).__name__}: {error}"
            raise CannotBeJudged(f"{about}: its reply is no reply ({what})") from None
        self.spent += time.monotonic() - began
        if reply is None:
            raise CannotBeJudged(f"{about}: {self.how_it_ended()}")
        return reply

    def how_it_ended(self) -> str:
        """In words, with the last line that it printed."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closes its pipe"
        name = f"signal {-status}" if status < 0 else f"status {status}"
        last = text_of(self.complaints).splitlines()[-1:]
        return f"it ends its process with {name}" + (f" ({last[0]})" if last else "")

    def output(self) -> str:
        """What it printed to stdout so far."""
        return text_of(self.printed)

    def close(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for end in (self.to_child, self.from_child):
            with contextlib.suppress(OSError):
                os.close(end)
        self.printed.close()
        self.complaints.close()


def text_of(file: IO[bytes]) -> str:
    """Its last 10,000 bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 10_000))
    return file.read().decode(errors="replace")


class Pipe:
    """Reads and writes whole messages on a descriptor. Raises TimeoutError past `until`."""

    def __init__(self, descriptor: int, until: float):
        self.descriptor = descriptor
        self.until = until

    def read(self, size: int) -> bytes:
        """That many bytes; fewer at the end."""
        parts: list[bytes] = []
        while size > 0:
            left = self.until - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.descriptor, min(size, 1 << 16))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def write(self, data: bytes) -> None:
        """All of it."""
        while data:
            left = self.until - time.monotonic()
            if left <= 0 or not select.select([], [self.descriptor], [], left)[1]:
                raise TimeoutError
            data = data[os.write(self.descriptor, data[: select.PIPE_BUF]) :]

    def flush(self) -> None:
        """Nothing is held back."""
