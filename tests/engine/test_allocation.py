"""``auto:N``: what is chosen within a budget, what is refused, what is held."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.engine import Engine, sensitivity
from octo_run.engine.allocation import ERRORS, AutoFormats, allocate, parse_formats
from octo_run.engine.parts import held_bytes
from octo_run.engine.random_model import read_shape
from octo_run.errors import UsageError
from octo_run.kernels.codec import KVFormat, get
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.models.cache import DEMO_PATH

NAMES = tuple(ERRORS)
PAIRS = st.lists(st.tuples(*[st.floats(0, 1e3)] * 2), min_size=1, max_size=40)


def levels(formats: tuple[KVFormat, ...]) -> list[int]:
    return [NAMES.index(codec.name) for fmt in formats for codec in (fmt.k, fmt.v)]


def used(formats: tuple[KVFormat, ...]) -> int:
    return sum(fmt.k.bytes_per_vector + fmt.v.bytes_per_vector for fmt in formats)


def loss(pairs: list[tuple[float, float]], formats: tuple[KVFormat, ...]) -> float:
    flat = [value for pair in pairs for value in pair]
    return sum(value * ERRORS[NAMES[level]] for value, level in zip(flat, levels(formats), strict=True))


@given(pairs=PAIRS, head_dim=st.sampled_from(HEAD_DIMS), share=st.fractions(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_budget_is_kept_and_used(pairs: list[tuple[float, float]], head_dim: int, share: Fraction) -> None:
    """Never above it, and not a step left; how much is taken does not depend on what is sensitive."""
    sizes = [get(name, head_dim).bytes_per_vector for name in NAMES]
    budget = sizes[0] + share * (sizes[-1] - sizes[0])
    found, even = allocate(pairs, budget, head_dim), allocate([(1.0, 1.0)] * len(pairs), budget, head_dim)
    allowed = 2 * len(pairs) * budget
    assert used(found) == used(even) <= allowed
    assert used(found) > allowed - (sizes[1] - sizes[0])


@given(pairs=PAIRS, budgets=st.tuples(*[st.fractions(22, 38)] * 2))
@settings(max_examples=200, deadline=None)
def test_a_larger_budget_takes_nothing_away(
    pairs: list[tuple[float, float]], budgets: tuple[Fraction, Fraction]
) -> None:
    less, more = (levels(allocate(pairs, budget, 64)) for budget in sorted(budgets))
    assert all(a <= b for a, b in zip(less, more, strict=True))


@given(
    pairs=st.lists(st.tuples(*[st.floats(0, 10) | st.just(1.0)] * 2), min_size=1, max_size=3),
    budget=st.fractions(22, 38),
)
@settings(max_examples=100, deadline=None)
def test_no_other_choice_loses_less(pairs: list[tuple[float, float]], budget: Fraction) -> None:
    sizes = [get(name, 64).bytes_per_vector for name in NAMES]
    flat = [value for pair in pairs for value in pair]
    best = min(
        sum(value * ERRORS[NAMES[level]] for value, level in zip(flat, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(flat))
        if sum(sizes[level] for level in choice) <= len(flat) * budget
    )
    assert loss(pairs, allocate(pairs, budget, 64)) <= best * (1 + 1e-12)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_steps_are_alike_and_errors_are_the_codecs(head_dim: int) -> None:
    """What the choice rests on: as many bytes from oct2 to oct3 as from oct3 to oct4, and the errors' proportions."""
    codecs = [get(name, head_dim) for name in NAMES]
    sizes = [codec.bytes_per_vector for codec in codecs]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0
    x = torch.randn(1024, head_dim, generator=torch.Generator().manual_seed(0))
    errors = [float((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()) for codec in codecs]
    for (name, told), measured in zip(ERRORS.items(), errors, strict=True):
        assert measured / errors[0] == pytest.approx(told / ERRORS["oct2"], rel=0.15), name
        if head_dim == 128:
            assert measured == pytest.approx(told, rel=0.05)


def test_equal_sensitivities_give_equal_formats() -> None:
    for name in NAMES:
        found = allocate([(0.3, 0.3)] * 5, Fraction(get(name, 128).bytes_per_vector), 128)
        assert {(fmt.k.name, fmt.v.name) for fmt in found} == {(name, name)}


def test_what_is_sensitive_gets_the_better_formats() -> None:
    found = allocate([(100.0, 0.001), (1.0, 1.0), (0.001, 100.0)], Fraction(56), 128)
    assert [(fmt.k.name, fmt.v.name) for fmt in found] == [("oct4", "oct2"), ("oct3", "oct3"), ("oct2", "oct4")]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_sensitivities_that_are_none(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        allocate([(1.0, bad)], Fraction(56), 128)
    with pytest.raises(ValueError, match="fewer than 40"):
        allocate([(1.0, 1.0)], Fraction(39), 128)


SHAPE = read_shape(DEMO_PATH)


@pytest.mark.parametrize(
    "text",
    ["auto", "auto:", "auto:x", "auto:10", "auto:39", "auto:73", "auto:-56", "auto:56.5", "auto:99999", "auto:٥٦",
     "auto:bf16", "auto:oct3", "bf16:auto", "oct3:auto", "auto:auto", "auto:56:56", "auto: 56"],
)  # fmt: skip
def test_what_is_no_budget_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"auto:N with N = 40 to 72, the bytes of 128 numbers on average") as error:
        parse_formats(text, SHAPE)
    assert str(error.value).startswith(f"--kv '{text}': auto chooses")


@pytest.mark.parametrize("text", ["autos", "oct3,auto:56", "oct9", ""])
def test_other_words_are_unknown_formats(text: str) -> None:
    with pytest.raises(UsageError, match="unknown KV format"):
        parse_formats(text, SHAPE)


def test_budgets_count_bytes_of_128_numbers() -> None:
    """oct3 takes 30 bytes for 64 numbers: 60 for 128."""
    small = replace(SHAPE, head_dim=64)
    assert {fmt.k.name for fmt in parse_formats("auto:60", small)} == {"oct3"}
    assert parse_formats("auto:44", small).vector_bytes == 2 * SHAPE.num_layers * 22
    with pytest.raises(UsageError, match="N = 44 to 76"):
        parse_formats("auto:40", small)
    found = parse_formats("auto:57", small)
    assert isinstance(found, AutoFormats) and 56 < found.average <= 57
    with pytest.raises(UsageError, match="cannot store head_dim 48"):
        parse_formats("auto:56", replace(SHAPE, head_dim=48))


def test_an_engine_chooses_and_holds_what_was_planned(make_checkpoint: Callable[..., Path]) -> None:
    told: list[Any] = []
    engine = Engine.load(
        make_checkpoint(num_hidden_layers=3, head_dim=64), kv="auto:56", device="cpu", max_context=600,
        on_measure=lambda *state: told.append(state), on_plan=lambda plan: told.append((plan.kv, plan.bytes_per_token)),
    )  # fmt: skip
    assert told == [("auto:56", 2 * 164), (0, 3), (1, 3), (2, 3), (3, 3)]
    assert isinstance(engine.kv, AutoFormats) and engine.kv.name == engine.plan.kv == "auto:56"
    assert 2 * engine.kv.vector_bytes == engine.plan.bytes_per_token == 2 * 164  # 6 vectors, at most 28 bytes each
    assert str(engine.kv).startswith("auto:56 (K ") and str(engine.kv).endswith("; 54.67 bytes on average)")
    plan, keys = engine.memory_plan(), engine.forward.decoder.key_tensors
    assert plan["arena"] + plan["full_precision"] == sum(held_bytes(engine.arena)) + sum(held_bytes(keys))
    assert engine.arena.pages.shape[1] == 64 * engine.plan.bytes_per_token
    assert [*engine.arena.formats] == [*engine.kv]
    again = Engine.load(engine.name, kv="auto:56", device="cpu", max_context=600)
    assert [str(fmt.tag) for fmt in again.arena.page_formats] == [str(fmt.tag) for fmt in engine.arena.page_formats]
    ids = random.Random(0).choices(range(100, 8000), k=400)
    assert torch.equal(engine.logits(ids, 64), again.logits(ids, 64))


def test_a_model_of_few_tokens_takes_the_formats_as_they_come() -> None:
    """It never has a coded token to measure with."""
    shape = replace(SHAPE, num_layers=2, max_position_embeddings=sensitivity.FIRST)
    engine = Engine.load("short", kv="auto:48", random_weights=shape, device="cpu", dtype="float32")
    assert [(fmt.k.name, fmt.v.name) for fmt in engine.kv] == [("oct3", "oct3"), ("oct2", "oct2")]


def test_choosing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from octo_run.engine import plan as plan_module

    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "max_context": 600}
    less = plan_module.plan_memory(SHAPE, "oct3", **options).loading
    more = plan_module.plan_memory(SHAPE, "auto:56", **options).loading
    assert more > less and more - less < sensitivity.working_bytes(SHAPE, 768, torch.device("cpu")) + 1
