"""The measurements behind ``octo-run bench``, on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, benchmark
from octo_run.engine.random_model import read_shape
from octo_run.engine.sequence import Sequence
from octo_run.engine.shapes import SHAPES
from octo_run.engine.working_bytes import products_of
from octo_run.kernels.linear.launch import rows_at_once
from octo_run.models.decoder import Decoder
from octo_run.models.linear import PackedLinear
from octo_run.models.quantisation.schemes import head_scheme, scheme_of
from octo_run.models.tensors import num_parameters
from octo_run.models.weights import RandomWeights


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("octo-demo", kv="oct3", device="cpu", max_context=300, sequences=2)


def test_bandwidth_is_that_of_a_memory() -> None:
    assert 1e8 < benchmark.copy_bandwidth(torch.device("cpu")) < 1e13


def test_rounds_begin_at_the_depth(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[tuple[int, int]] = []
    ends: list[int] = []
    fill, discard = engine.fill, Sequence.discard
    monkeypatch.setattr(engine, "fill", lambda seq, n, seed: (filled.append((seq.row, n)), fill(seq, n, seed)))
    monkeypatch.setattr(Sequence, "discard", lambda seq: (ends.append(len(seq)), discard(seq)))
    settings: dict[str, Any] = {"depth": 130, "batch": 2, "repetitions": 2, "bandwidth": 1e9}
    row = benchmark.measure(engine, ("tg", 5), **settings)
    assert filled == [(0, 130), (1, 130)] * 3 and ends == [135] * 6
    assert (row.kv, row.test, row.depth, row.batch) == ("oct3", "tg5", 130, 2)
    assert 0 < row.least <= row.tokens_per_s <= row.most
    assert row.ms_per_token == pytest.approx(2000 / row.tokens_per_s)
    step = benchmark.step_weight_bytes(engine, 2) + 2 * engine.plan.bytes_per_token * 132.5
    assert row.gb_per_s == pytest.approx(step * row.tokens_per_s / 2 * 1e-9)
    assert row.of_bandwidth == pytest.approx(row.gb_per_s)
    prompt = benchmark.measure(engine, ("pp", 70), **settings)
    assert prompt.gb_per_s is None and ends[6:] == [200] * 6


@pytest.mark.parametrize(("tied", "read"), [(True, 1000), (False, 1000 - 4 * 10 * 8)])
def test_an_embedding_of_its_own_is_not_read_by_a_step(tied: bool, read: int) -> None:
    table = torch.zeros(10, 8)
    head = SimpleNamespace(weight=table if tied else torch.zeros(10, 8))
    forward = SimpleNamespace(decoder=SimpleNamespace(embedding=table, head=head, layers=[]))
    fake: Any = SimpleNamespace(forward=forward, plan=SimpleNamespace(weights=1000))
    assert benchmark.step_weight_bytes(fake) == read


def test_named_shapes_are_those_of_the_models() -> None:
    shapes = {name: read_shape(name) for name in SHAPES}
    assert (shapes["llama-3.1-8b"].num_layers, shapes["llama-3.1-8b"].hidden_size) == (32, 4096)
    sparse = {name: shapes[name].experts for name in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")}
    found = [(one.count, one.chosen, one.inner) for one in sparse.values() if one is not None]
    assert found == [(8, 2, 14336), (128, 8, 768), (32, 4, 2880)]
    assert shapes["qwen2.5-7b"].qkv_bias and shapes["qwen3-0.6b"].qk_norm


#: Parameters of the text parts, in millions, as published; those of qwen3.5-9b and gemma-4-12b are what they were when
#: this was written.
PARAMETERS = {
    "llama-3.1-8b": 8030, "llama-3.1-70b": 70554, "llama-3.2-1b": 1236, "mistral-7b": 7242, "qwen2.5-0.5b": 494,
    "qwen2.5-7b": 7616, "qwen3-0.6b": 596, "qwen3.5-9b": 8954, "gemma-3-12b": 11766, "gemma-4-12b": 11907,
    "gemma-4-31b": 30697, "smollm2-1.7b": 1711, "mixtral-8x7b": 46703, "qwen3-30b-a3b": 30532, "gpt-oss-20b": 20915,
}  # fmt: skip


def test_named_shapes_have_the_parameters_of_the_models() -> None:
    """A field that is left out may mean another model: that of 31B had four billion more."""
    assert {*PARAMETERS} == {*SHAPES}
    for name, millions in PARAMETERS.items():
        found = num_parameters(read_shape(name)) / 1e6
        assert abs(found - millions) < 0.002 * millions, (name, found)


@pytest.mark.parametrize("weights", ["int4-128", "int8"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_matrix_has_room_for_its_fused_product_on_a_gpu(name: str, weights: str) -> None:
    """Otherwise it is decoded for each token, which is ten times slower and fails no other test."""
    cfg = read_shape(name)
    source = RandomWeights(cfg, "meta", torch.bfloat16)
    decoder = Decoder(cfg, source, None, None, scheme_of(weights), None, head_scheme("int8"))
    parts = [part.weight for layer in decoder.layers for part in products_of(layer) if isinstance(part, PackedLinear)]
    assert parts and min(map(rows_at_once, parts)) >= 8
    assert isinstance(decoder.head, PackedLinear) and rows_at_once(decoder.head.weight) >= 1
