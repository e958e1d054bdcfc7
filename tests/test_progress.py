"""Progress bars are shown in terminals, not in redirected output."""

from __future__ import annotations

import inspect
import io
import sys

import pytest

import mechlens
from mechlens.progress import announce, progress_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO, progress: bool | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("mechlens.progress.DELAY", 0.0)
    for _ in progress_bar(range(3), desc="work", progress=progress):
        pass
    return stream.getvalue()


@pytest.mark.parametrize(
    ("stream", "progress", "expected"),
    [
        (Screen, None, True),
        (Screen, False, False),
        (Screen, True, True),
        (io.StringIO, None, False),
        (io.StringIO, True, True),
    ],
)
def test_a_bar_is_shown_in_a_terminal_or_on_request(monkeypatch, stream, progress, expected):
    assert ("work" in shown(monkeypatch, stream(), progress)) == expected


@pytest.mark.parametrize(
    ("stream", "progress", "seconds", "expected"),
    [
        (Screen, None, 2, True),
        (Screen, None, 0.5, False),
        (Screen, True, 0.5, True),
        (Screen, False, 2, False),
        (io.StringIO, None, 2, False),
        (io.StringIO, True, 2, True),
    ],
)
def test_long_work_is_announced_if_a_bar_is_shown(monkeypatch, stream, progress, seconds, expected):
    where = stream()
    monkeypatch.setattr(sys, "stderr", where)
    announce("two minutes", seconds=seconds, progress=progress)
    assert (where.getvalue() == "two minutes\n") == expected


def test_progress_without_standard_error_does_nothing(monkeypatch):
    """As under pythonw."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(range(3), desc="work", progress=None)) == [0, 1, 2]


def test_progress_is_automatic_by_default_in_every_function():
    seen = {}
    for name in mechlens.__all__:
        function = getattr(mechlens, name)
        if callable(function) and not inspect.isclass(function):
            parameter = inspect.signature(function).parameters.get("progress")
            if parameter is not None:
                seen[name] = parameter.default
    assert {"score_heads", "ablate_heads", "find_induction_circuits", "sample_tokens"} <= set(seen)
    assert set(seen.values()) == {None}
