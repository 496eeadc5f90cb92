"""Which cases of a test its mark ``few`` leaves quick."""

import runpy
from pathlib import Path
from typing import Any

import pytest

quick_cases = runpy.run_path(str(Path(__file__).parent / "conftest.py"))["quick_cases"]


class Case:
    """What is asked of an item of pytest."""

    def __init__(self, name: str, *marks: pytest.MarkDecorator) -> None:
        self.name, self.nodeid, self._marks = f"test[{name}]", name, {one.name: one.mark for one in marks}

    def get_closest_marker(self, name: str) -> Any:
        return self._marks.get(name)


def names(few: pytest.MarkDecorator, slow: str = "") -> str:
    """The quick ones of the cases a to h, of which some are slow already."""
    cases = [Case(name, few, *([pytest.mark.slow] if name in slow else [])) for name in "abcdefgh"]
    return "".join(case.nodeid for case in quick_cases(cases))


def test_as_many_as_it_says_or_those_that_it_names() -> None:
    assert names(pytest.mark.few(1)) == "a" and names(pytest.mark.few(4)) == "aceg"
    assert names(pytest.mark.few("b", "h")) == "bh"
    with pytest.raises(AssertionError, match="no case is called"):
        names(pytest.mark.few("b", "x"))


def test_cases_that_are_slow_anyway_do_not_count() -> None:
    assert names(pytest.mark.few(2), slow="cdefgh") == "ab"
    assert names(pytest.mark.few(1), slow="ab") == "c"
