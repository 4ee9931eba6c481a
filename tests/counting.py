"""What a piece of work holds at its peak, and how often it waits for its device."""

import itertools

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def peak(work):
    """(what work() returns, the most bytes held at once during it, beyond those held before)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return result, max(itertools.accumulate(change for _, change in changes))


class Waits(TorchDispatchMode):
    """Counts what a host waits for, of an accelerator that the device "meta" plays.

    These are numbers and tensors brought from it, and tensors sent to it unless non_blocking. Every
    number of it is 1.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is aten._local_scalar_dense.default and args[0].is_meta:
            self.count += 1
            return args[0].dtype == torch.bool or 1.0
        if op is aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            fetches = args[0].is_meta
            self.count += fetches or not kwargs.get("non_blocking", False)
            if fetches:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if op is aten.equal.default and args[0].is_meta:
            self.count += 1
            return True
        return op(*args, **kwargs)


class Made(TorchFunctionMode):
    """Counts tensors made of numbers on the device, which are sent and waited for."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.waits.count += torch.device(kwargs["device"]).type == "meta"
        return f(*args, **kwargs)


def waited(work):
    """(what work() returns, how often the host waited)."""
    waits = Waits()
    with waits, Made(waits):
        result = work()
    return result, waits.count
