"""Nothing that the kernels keep on a device is left for later."""

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from octo_run.kernels import prepare, trellis_tables
from octo_run.kernels.attention import constants
from octo_run.kernels.codec import OctopusCodec, TrellisCodec, parse_kv
from octo_run.kernels.encode import trellis_launch


def kept() -> list[Any]:
    """The functions that keep tensors of a format for a device."""
    found = [
        f
        for module in (trellis_tables, constants, trellis_launch)
        for f in vars(module).values()
        if hasattr(f, "cache_info")
    ]
    places = {"codec", "side", "device"}
    return [f for f in dict.fromkeys(found) if {"codec", "device"} <= inspect.signature(f).parameters.keys() <= places]


@pytest.mark.parametrize("kv", ["oct3", "oct4:oct2"])
def test_every_table_of_a_trellis_format_is_made(kv: str) -> None:
    functions, fmt, device = kept(), parse_kv(kv, 64), torch.device("cpu")
    assert {f.__name__ for f in functions} >= {"read_map", "search_tables", "lane_tables", "inverse_bits"}
    for function in functions:
        function.cache_clear()
    prepare(fmt, device)
    made = [function.cache_info().misses for function in functions]
    assert all(made)
    for side, codec in (("k", fmt.k), ("v", fmt.v)):
        assert isinstance(codec, TrellisCodec) and device in codec._table_words
        for function in functions:
            places = {"codec": codec, "side": side, "device": device}
            function(*(places[name] for name in inspect.signature(function).parameters))
    assert [function.cache_info().misses for function in functions] == made


def test_tables_of_octopus_are_made() -> None:
    fmt = parse_kv("octopus3", 64)
    assert isinstance(fmt.k, OctopusCodec)
    prepare(fmt, torch.device("cpu"))
    assert (torch.float32, torch.device("cpu")) in fmt.k._tables
