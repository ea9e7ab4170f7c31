"""How much memory a call allocates, counted one by one: unlike a process's size, the same at every run."""

from torch.profiler import ProfilerActivity, profile


def sizes(call, *inputs) -> list[float]:
    """MiB allocated since the call began, after each allocation and release, up to its return; its result lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = call(*inputs)
    held = [0.0]
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held.append(held[-1] + event.nbytes() / 2**20)
    del result
    return held


def peak(call, *inputs) -> float:
    """MiB that a call allocates at its height beyond what it leaves behind."""
    held = sizes(call, *inputs)
    return max(held) - held[-1]
