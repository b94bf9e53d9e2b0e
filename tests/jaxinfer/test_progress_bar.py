"""The bar of the start is for people: none where nobody looks, since it would end up in a log."""

import io
from functools import partial
from typing import Any, cast

import pytest
from tqdm import tqdm

from jaxinfer import startup


class Programs:
    """As an executor."""

    num_declared = 3

    def warm_up(self, workers: int, progress: Any) -> int:
        for name in "abc":
            progress(name)
        return 3


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(("terminal", "wanted", "shown"), [(True, True, True), (True, False, False),
                                                           (False, True, False), (False, False, False)])  # fmt: skip
def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool, wanted: bool, shown: bool):
    def at_once(**arguments: Any) -> tqdm:
        return tqdm(**arguments | {"delay": 0.0, "mininterval": 0.0})

    stream = Stream(terminal=terminal)
    monkeypatch.setattr(startup, "tqdm", partial(at_once, file=stream))
    assert startup.warm_up(cast(Any, Programs()), wanted) == 3
    assert bool(stream.getvalue()) == shown
