"""The line at the bottom of a chat, on terminals of any width."""

from octo_run.cli.gauge import Gauge
from octo_run.cli.tables import cell_width


def line(gauge: Gauge, room: int) -> str:
    return "".join(text for _, text in gauge.fragments(room))


def test_what_matters_least_is_left_out_first() -> None:
    gauge = Gauge(1234, 4096, (18, 66), 100, 8.0, "a-chat")
    forms = [line(gauge, room) for room in range(100, 0, -1)]
    assert [*dict.fromkeys(forms)] == [
        "a-chat · context 1,234 of 4,096 tokens (30 %) · 18 of 66 pages · 12.5 tokens/s",
        "a-chat · context 1,234 of 4,096 tokens (30 %) · 12.5 tokens/s",
        "context 1,234 of 4,096 tokens (30 %) · 12.5 tokens/s",
        "context 1,234 of 4,096 tokens (30 %)",
        "1,234 of 4,096 (30 %)",
        "30 %",
    ]
    assert all(len(form) <= room or form == "30 %" for form, room in zip(forms, range(100, 0, -1), strict=True))


def test_a_huge_context_fits_eighty_columns() -> None:
    gauge = Gauge(1_048_575, 1_048_576, (16_382, 16_384), 10**6, 10.0)
    shown = line(gauge, 79)
    assert shown == "context 1,048,575 of 1,048,576 tokens (99 %, nearly full) · 100,000.0 tokens/s", "not yet 100 %"


def test_from_ninety_per_cent_on_it_stands_out() -> None:
    for held, full in ((3686, False), (3687, True), (4096, True)):
        before, context, after = Gauge(held, 4096, None, 0, 0.0).fragments(80)
        assert (context[0] == "bold") is ("nearly full" in context[1]) is full
        assert before == ("", "") and after == ("", "")


def test_wide_characters_count_as_wide() -> None:
    gauge = Gauge(1, 4096, (0, 66), 0, 0.0, "日本語のチャット")
    for room in range(20, 100):
        assert cell_width(line(gauge, room)) <= room or line(gauge, room) == "0 %"
    assert "\x1b" not in line(Gauge(1, 4096, None, 0, 0.0, "\x1b[31m"), 100)
