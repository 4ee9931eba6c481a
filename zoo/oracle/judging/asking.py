"""The side of the judge: calls go out, replies come in, and what is seen on the way is kept."""

from __future__ import annotations

import contextlib
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

    def answer(self, call: Message, about: str) -> Message:
        """The reply to a call; `about` names the question. Raises CannotBeJudged."""


class Here:
    """A function in this process, for tests and for whoever trusts it."""

    def __init__(self, function: Callable):
        self.function = function
        try:
            self.parameters = dict(asked.parameters_of(function))
        except (TypeError, ValueError):
            raise CannotBeJudged(f"{function!r} is no function with named parameters") from None

    def answer(self, call: Message, about: str) -> Message:
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
        command = [sys.executable, "-P", asked.__file__, where, str(calls), str(replies)]
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
        words = self.next_reply("its import").words
        if words["failed"]:
            wanted = "must be an importable MODULE:FUNCTION"
            raise CannotBeJudged(f"{where} {wanted} ({words['failed']})")
        return dict(words["parameters"])

    def answer(self, call: Message, about: str) -> Message:
        with contextlib.suppress(BrokenPipeError):  # then it has ended, as the reply will tell
            asked.send(Pipe(self.to_child), call)
        return self.next_reply(about)

    def next_reply(self, about: str) -> Message:
        """What it sends next. Raises CannotBeJudged where it ends, or takes too long."""
        began = time.monotonic()
        pipe = Pipe(self.from_child, until=began + self.limit - self.spent)
        try:
            reply = asked.receive(pipe)
        except TimeoutError:
            raise CannotBeJudged(
                f"{about}: no answer within the {self.limit:g} s that it may take in all"
            ) from None
        except (ValueError, KeyError) as error:
            raise CannotBeJudged(f"{about}: its reply is no reply ({error})") from None
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
    """Its first 100,000 bytes."""
    file.seek(0)
    return file.read(100_000).decode(errors="replace")


class Pipe:
    """Reads and writes whole messages on a descriptor; reading raises TimeoutError past `until`."""

    def __init__(self, descriptor: int, until: float = float("inf")):
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
            data = data[os.write(self.descriptor, data) :]

    def flush(self) -> None:
        """Nothing is held back."""
