"""The comparison and the report of the measurement of coding; the measurement itself needs a GPU."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from octo_run.kernels.codec import TrellisCodec


def test_report_says_what_ran(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_encode")
    text = bench.report([bench.Row("oct3", "search", 2.0, 131.072)], 262144, "`a command` on one GPU")
    assert text.startswith("# Coding of pages\n\n`a command` on one GPU. 262,144 keys of 128 coordinates")
    assert text.endswith("| oct3 | search | 2.000 | 131 |\n")


def test_a_difference_of_one_field_is_found(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_encode")
    torch.manual_seed(0)
    y = torch.randn(1, 5, 1, 64, 128)
    codec = bench.parse_kv("oct3", 128).k
    assert isinstance(codec, TrellisCodec)
    right = codec.encode_fields(y).to(torch.uint16)
    wrong = right.int()
    wrong[0, 4, 0, 7, 3] ^= 1
    monkeypatch.setattr(bench, "encode_fields", lambda *_: right)
    monkeypatch.setattr(bench, "encode_fields_by_lanes", lambda *_: right)
    assert bench.differing("oct3", y) == 0
    monkeypatch.setattr(bench, "encode_fields_by_lanes", lambda *_: wrong.to(torch.uint16))
    assert bench.differing("oct3", y) == 1
