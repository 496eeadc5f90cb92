"""The measurement of coding: its comparison and its report, and a run in the interpreter; its times need a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from octo_run.kernels.codec import TrellisCodec


def test_report_says_what_ran(script: Callable[[str], ModuleType]) -> None:
    bench = script("bench_encode")
    text = bench.report([bench.Row("oct3", 64, "search", 2.0, 131.072)], 262144, "`a command` on one GPU")
    assert text.startswith("# Coding of pages\n\n`a command` on one GPU. 262,144 keys in bf16")
    assert text.endswith("| oct3 | 64 | search | 2.000 | 131 |\n")


@pytest.mark.parametrize("dim", [128, 64])
def test_a_difference_of_one_field_is_found(
    dim: int, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_encode")
    torch.manual_seed(0)
    y = torch.randn(1, 5, 1, 64, dim)
    codec = bench.parse_kv("oct3", dim).k
    assert isinstance(codec, TrellisCodec)
    right = codec.encode_fields(y).to(torch.uint16)
    wrong = right.int()
    wrong[0, 4, 0, 7, 3] ^= 1
    monkeypatch.setattr(bench, "encode_fields", lambda *_: right)
    monkeypatch.setattr(bench, "encode_fields_by_lanes", lambda *_: right)
    assert bench.differing("oct3", y) == 0
    monkeypatch.setattr(bench, "encode_fields_by_lanes", lambda *_: wrong.to(torch.uint16))
    assert bench.differing("oct3", y) == 1


@pytest.mark.slow
def test_a_run_in_the_interpreter(interpreted: Callable[..., tuple[list[dict[str, Any]], str]]) -> None:
    """Without the search by lanes, which is no Triton kernel."""
    argv = ("--formats", "oct2,octopus3", "--dims", "64", "--tokens", "64", "--heads", "1")
    changes = {"encode_fields_by_lanes": "bench.encode_fields", "median_ms": "lambda step: (step(), 1.0)[1]"}
    rows, text = interpreted("bench_encode", *argv, **changes)
    steps = ["search", "search by lanes", "packing", "all, as the engine does it"]
    assert [(row["kv"], row["head_dim"], row["what"]) for row in rows] == [
        *(("oct2", 64, what) for what in steps), ("octopus3", 64, steps[-1])
    ]  # fmt: skip
    rates = [row["vectors_per_us"] for row in rows]
    assert rates == pytest.approx([0.064] * 3 + [0.128] * 2), "keys alone are half of keys and values"
    assert "64 keys in bf16" in text
