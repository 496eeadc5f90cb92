"""Notices about what is loaded: once, however many formats a run loads."""

from collections.abc import Callable
from typing import Any

import pytest

from octo_run.cli import runtime


@pytest.mark.slow
def test_device_and_plan_are_told_once_for_many_formats(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setattr(runtime, "_planned", set())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = ("bench", "--tests", "pp8", "--kv", "oct2,oct3,bf16", "-r", "1", "-o", "jsonl")
    shown = octo(*argv)
    assert shown.code == 0, shown.err
    assert shown.err.count("no CUDA device found") == 1 and shown.err.count("memory: weights") == 1
    assert shown.err.count("octo-demo on cpu") == 1
    assert [shown.err.count(f"KV cache {kv}: context 8 tokens") for kv in ("oct2", "oct3", "bf16")] == [1, 1, 1]
