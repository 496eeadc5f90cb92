"""Which cases of a test its mark ``few`` leaves quick, and which tests are for a GPU."""

import runpy
from pathlib import Path
from types import SimpleNamespace
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


def test_what_runs_on_a_gpu_is_marked_where_there_is_one() -> None:
    """A chunk of a recurrent layer once read memory that was not there; its tests had no mark and ran on no GPU."""
    hook = runpy.run_path(str(Path(__file__).parent / "kernels" / "conftest.py"))["pytest_collection_modifyitems"]

    class Item(Case):
        path = Path("somewhere/else.py")

        def __init__(self, **module: str) -> None:
            super().__init__("a")
            self.module, self.added = SimpleNamespace(**module), list[str]()

        def add_marker(self, mark: pytest.MarkDecorator) -> None:
            self.added.append(mark.name)

    items = [Item(DEVICE="cuda"), Item(DEVICE="cpu"), Item()]
    hook(items)
    assert [item.added for item in items] == [["gpu"], [], []]
