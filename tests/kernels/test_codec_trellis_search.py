"""The trellis searches against every path there is, and the stored tables against the script that fits them."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.kernels.codec import TrellisCodec, get
from octo_run.kernels.codec.trellis import FORMATS
from octo_run.kernels.codec.trellis_search import nearest_entries, trellis_codes

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fit_trellis_tables.py"


def windows(codes: tuple[int, ...], stream: int, state: int) -> list[int]:
    """Table indices of the codes of a closed chain."""
    following = codes[1:] + codes[:1]
    return [(after % (1 << state)) << stream | code for code, after in zip(codes, following, strict=True)]


@given(
    slots=st.integers(1, 3),
    shape=st.sampled_from([(3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (2, 0)]),
    reach=st.sampled_from([2, 300]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_search_finds_the_best_of_all_closed_paths(slots: int, shape: tuple[int, int], reach: int, seed: int) -> None:
    stream, state = shape
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-reach, reach + 1, (1 << (stream + state), 3), generator=generator).float()
    triplets = torch.randint(-reach, reach + 1, (slots, 3, 5), generator=generator).float()
    found = trellis_codes(points, triplets, stream, state)
    assert found.shape == (slots, 5)
    costs = points.square().sum(1)[:, None] - 2 * torch.einsum("ea,sac->sec", points, triplets)  # [slot, entry, chain]
    paths = list(itertools.product(range(1 << stream), repeat=slots))
    index = torch.tensor([windows(path, stream, state) for path in paths])
    totals = sum(costs[slot][index[:, slot]] for slot in range(slots))
    assert isinstance(totals, torch.Tensor)
    for chain in range(5):
        chosen = tuple(found[:, chain].tolist())
        assert float(totals[paths.index(chosen), chain]) == float(totals[:, chain].min())


def slow_search(points: torch.Tensor, triplet: torch.Tensor, stream: int, state: int) -> list[int]:
    """One chain, word for word as the ties are described; triplet [n, 3]."""
    states, slots = range(1 << state), len(triplet)
    cost = (points.square().sum(1) - 2 * triplet @ points.T).tolist()
    best_code = {}
    for slot, before, after in itertools.product(range(slots), states, states):
        codes = range(after, 1 << stream, 1 << state)
        best_code[slot, before, after] = min(codes, key=lambda c: cost[slot][before << stream | c])

    def cell(slot: int, before: int, after: int) -> float:
        return float(cost[slot][before << stream | best_code[slot, before, after]])

    ends = []
    for start in states:
        reach, path = {after: cell(slots - 1, start, after) for after in states}, {s: [(start, s)] for s in states}
        for slot in range(slots - 2, -1, -1):
            came = {a: min(states, key=lambda b: reach[b] + cell(slot, b, a)) for a in states}
            path = {a: [(came[a], a), *path[came[a]]] for a in states}
            reach = {a: reach[came[a]] + cell(slot, came[a], a) for a in states}
        ends.append((reach[start], path[start]))
    _, path_of_best = min(ends, key=lambda end: end[0])
    return [best_code[slot, before, after] for slot, (before, after) in enumerate(path_of_best)]


@pytest.mark.parametrize(("stream", "state", "slots"), [(4, 2, 3), (5, 3, 4), (6, 1, 5), (3, 2, 1)])
def test_ties_are_broken_as_described(stream: int, state: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(stream)
    points = torch.randint(0, 3, (1 << (stream + state), 3), generator=generator).float()  # few values: many ties
    triplets = torch.randint(0, 3, (slots, 3, 20), generator=generator).float()
    found = trellis_codes(points, triplets, stream, state)
    for chain in range(20):
        assert found[:, chain].tolist() == slow_search(points, triplets[:, :, chain], stream, state)


@pytest.mark.parametrize("used", [1, 2, 3])
def test_memoryless_search_leaves_padding_out(used: int) -> None:
    generator = torch.Generator().manual_seed(used)
    points = torch.randint(-4, 5, (64, 3), generator=generator).float()
    triplets = torch.randint(-4, 5, (3, 200), generator=generator).float()
    distance = (points[:, :used, None] - triplets[None, :used]).square().sum(1)
    first = torch.tensor([int((column == column.min()).nonzero()[0]) for column in distance.t()])
    assert torch.equal(nearest_entries(points, triplets, used), first)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_search_is_exact(name: str) -> None:
    """Far triplets make the largest costs; float64 finds the same codes."""
    codec = get(name)
    assert isinstance(codec, TrellisCodec)
    points = codec.table.float() * 2 + 1
    generator = torch.Generator().manual_seed(2)
    triplets = torch.randint(-1020, 1021, (10, 3, 64), generator=generator).float() / 4
    triplets[..., :8] = triplets[..., :8].sign() * 255
    if codec.signed:
        triplets = triplets.abs()
    single = trellis_codes(points, triplets, codec.stream, codec.state_bits)
    double = trellis_codes(points.double(), triplets.double(), codec.stream, codec.state_bits)
    assert torch.equal(single, double)


@pytest.mark.parametrize("name", FORMATS)
def test_stored_tables_are_fitted(name: str) -> None:
    """Entries differ, and the step is exact in float32."""
    codec = get(name)
    assert isinstance(codec, TrellisCodec)
    assert codec.step * 1024 == int(codec.step * 1024)
    distinct = codec.table[: 1 << (codec.stream + codec.state_bits)].unique(dim=0)
    assert len(distinct) > 0.97 * (1 << (codec.stream + codec.state_bits))


@pytest.mark.slow
def test_script_fits_and_repeats_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On little data; `fit_trellis_tables.py --check` compares the stored tables with a full fit, which takes long."""
    spec = importlib.util.spec_from_file_location("fit_trellis_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setitem(script.VECTORS, "oct2", 1000)
    monkeypatch.setitem(script.CANDIDATES, "oct2", (30, 32))
    monkeypatch.setitem(script.ITERATIONS, "oct2", 4)
    for name, value in {"TRIAL_VECTORS": 400, "TRIAL_ITERATIONS": 1, "LAST_ITERATIONS": 1}.items():
        monkeypatch.setattr(script, name, value)
    table, step = script.fit("oct2")
    distortion = float(re.findall(r"distortion ([0-9.]+)", capsys.readouterr().out)[-1])
    again, same = script.fit("oct2")
    assert np.array_equal(table, again) and step == same
    assert table.dtype == np.int8 and table.shape == get("oct2").table.shape
    assert distortion < 0.06, "1.1 times the error of the stored table, on data that the fit has seen"
