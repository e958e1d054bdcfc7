"""Count how much of a model runs, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile


def positions_run(model: Any, names: Sequence[str], work: Callable[[], Any]) -> dict[str, int]:
    """Positions (rows x length) that pass each hook point during `work`.

    Hooks are not used, because shortcuts are not taken past user hooks.
    """
    seen = dict.fromkeys(names, 0)

    def counting(name: str) -> Callable[[Any], Any]:
        def forward(activation: Any) -> Any:
            seen[name] += activation.shape[0] * activation.shape[1]
            return activation

        return forward

    points = {name: model.hook_dict[name] for name in names}
    for name, point in points.items():
        point.forward = counting(name)
    try:
        work()
    finally:
        for point in points.values():
            del point.forward
    return seen


def peak_bytes(work: Callable[[], Any], *, mapped: int) -> int:
    """Peak memory of tensors during `work`.

    Args:
        mapped: size of the weights file, which is memory-mapped and not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    for each in sorted(events, key=lambda each: each.start_ns()):
        if abs(each.nbytes()) != mapped:
            held += each.nbytes()
            peak = max(peak, held)
    return peak
