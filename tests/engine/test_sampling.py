"""Sampling against plain definitions, reproducibility, refusals."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.engine import SamplingParams
from octo_run.engine.sampling import BatchSampler
from octo_run.errors import UsageError
from octo_run.models.config import GenerationDefaults

CPU = torch.device("cpu")
ONE = torch.zeros(1, dtype=torch.int32)
"""The map of a batch of one sequence in the first row."""


def definition(logits: list[float], params: SamplingParams, seen: set[int]) -> list[float]:
    """The distribution in plain Python: penalty, temperature, top-k, top-p, min-p, one after the other."""
    scores = list(logits)
    for i in seen:
        scores[i] = scores[i] / params.repetition_penalty if scores[i] > 0 else scores[i] * params.repetition_penalty
    scores = [s / params.temperature for s in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[: params.top_k] if params.top_k else order

    def shares(of: list[int]) -> dict[int, float]:
        weights = {i: math.exp(scores[i] - scores[order[0]]) for i in of}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    if params.top_p < 1:
        mass, nucleus = 0.0, list[int]()
        for i in kept:
            if mass >= params.top_p:
                break
            nucleus.append(i)
            mass += shares(kept)[i]
        kept = nucleus
    if params.min_p > 0:
        best = max(shares(kept).values())
        kept = [i for i in kept if shares(kept)[i] >= params.min_p * best]
    final = shares(kept)
    return [final.get(i, 0.0) for i in range(len(scores))]


@given(
    logits=st.lists(st.integers(-400, 400).map(lambda i: i / 50), min_size=2, max_size=30, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.05, 0.313, 0.777, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.277]),
)
@settings(max_examples=300, deadline=None)
def test_filters_are_their_definitions(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Scores below the floor are exactly those that the rules leave out."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = [share > 0 for share in definition(logits, params, set())]
    sampler = sampled([params], torch.tensor(logits))
    if not sampler._filtered:
        assert all(wanted)
        return
    floor = float(sampler.floor(torch.tensor([logits]), ONE)[0])
    assert [score >= floor for score in torch.tensor(logits).tolist()] == wanted


def answer_of(rules: dict[str, Any], prompt: list[int], logits: tuple[float, ...] = (3.0, 2.0, 1.2)) -> list[int]:
    """Six greedy tokens, the rules set anew each time, as for a generation that goes on after another one."""
    params, tokens = SamplingParams(**rules), list[int]()
    several = BatchSampler(2, 3, CPU)
    for drawn in range(6):
        several.arrange([several.enter(0, SamplingParams(), []), several.enter(1, params, prompt + tokens, drawn)])
        several.draw(torch.tensor(logits).expand(2, 3).contiguous(), torch.tensor([0, 1], dtype=torch.int32))
        tokens.append(int(several.tokens[1]))
    return tokens


def test_penalty_grows_with_the_answer() -> None:
    assert answer_of({"repetition_penalty": 2.0}, [0])[:3] == [1, 0, 0]
    assert answer_of({"repetition_penalty": 2.0}, [0], (-0.5, -0.9, -1.6))[0] == 1


def test_presence_and_frequency_count_the_answer_alone() -> None:
    assert answer_of({"presence_penalty": 1.5}, [0, 0]) == [0, 1, 0, 0, 0, 0]
    assert answer_of({"frequency_penalty": 0.7}, [0, 0]) == [0, 0, 1, 0, 1, 2]
    assert answer_of({"frequency_penalty": -1.0}, []) == [0] * 6
    both = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.25}
    # 3 / 1.25 = 2.4 at first; drawn n times: 2.4 - .5 - .25 n, 1.6 - .5 - .25 n and .96 - .5 - .25 n
    assert answer_of(both, [0]) == [0, 1, 0, 0, 2, 0]


def drawn(sampler: BatchSampler, row: int = 0) -> tuple[int, float]:
    return int(sampler.tokens[row]), float(sampler.drawn[1].view(torch.float32)[row])


def test_greedy_takes_the_best_and_reports_its_probability() -> None:
    logits = torch.tensor([0.1, 4.0, 3.9])
    token, logprob = drawn(sampled([SamplingParams()], logits))
    assert token == 1
    assert logprob == pytest.approx(float(logits.log_softmax(-1)[1]))


def test_logprob_is_the_models_own_whatever_the_rules() -> None:
    logits = torch.tensor([0.1, 4.0, 3.9])
    rules = SamplingParams(temperature=0.7, top_k=1, repetition_penalty=1.5, seed=0)
    assert drawn(sampled([rules], logits, [[2]]))[1] == pytest.approx(float(logits.log_softmax(-1)[1]))


def tokens_of(params: SamplingParams, logits: torch.Tensor, count: int) -> list[int]:
    """Draws of one sequence, one after the other."""
    sampler, found = sampled([params], logits), []
    for _ in range(count):
        found.append(int(sampler.tokens[0]))
        sampler.draw(logits[None], ONE)
    return found


def test_seeds_reproduce_and_differ() -> None:
    def run(seed: int | None) -> list[int]:
        return tokens_of(SamplingParams(temperature=1.0, seed=seed), torch.zeros(1000), 20)

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in (7, 8, 2**64 - 1, None, None)}) == 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    found = set(tokens_of(SamplingParams(temperature=temperature, seed=1), torch.tensor([30.0, 10.0, 20.0]), 50))
    assert found == ({0} if temperature < 1 else {0, 1, 2})


def test_ties_and_large_vocabularies() -> None:
    sampler = sampled([SamplingParams(temperature=1.0, top_p=0.5)], torch.zeros(50_000))
    assert float(sampler.floor(torch.zeros(1, 50_000), ONE)[0]) == 0, "equal scores are not told apart"
    strict = sampled([SamplingParams(temperature=1.0, top_p=1e-30)], torch.tensor([5.0, 1.0]))
    assert float(strict.floor(torch.tensor([[5.0, 1.0]]), ONE)[0]) == 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show_in_the_probability(bad: float) -> None:
    """Which is what a step's reader looks at."""
    assert not math.isfinite(drawn(sampled([SamplingParams()], torch.tensor([0.0, bad, 1.0])))[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -101.0),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("stop", ("a", "")),
        ("stop", "end"),
        ("stop", None),
        ("stop", 7),
        ("stop", {"end"}),
        ("stop", ("a", 7)),
        ("stop", ("a", b"b")),
        ("stop", ("a\ud800",)),
        ("stop_ids", "12"),
        ("stop_ids", 12),
        ("stop_ids", (1, "2")),
        ("stop_ids", (1, 2.0)),
        ("stop_ids", (True,)),
        ("temperature", 1e39),
        pytest.param("temperature", 10**400, id="temperature of 401 digits"),
        ("temperature", "0.7"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 1j),
        ("temperature", torch.tensor(0.7)),
        ("temperature", np.float32("nan")),
        ("temperature", np.bool_(True)),
        ("temperature", np.array([0.7])),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_k", math.nan),
        ("top_k", 2**63),
        pytest.param("top_k", 10**5000, id="top_k of 5,001 digits"),
        ("top_p", False),
        ("min_p", math.nan),
        ("min_p", [0.1]),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", np.float64(1e-46)),
        ("presence_penalty", True),
        ("frequency_penalty", "1"),
        ("seed", 1.0),
        ("seed", True),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", math.inf),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*; give .*\\.$") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    given = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert given == SamplingParams(temperature=0.5, top_k=3, top_p=1.0, seed=2**64 - 1)
    assert [type(value) for value in (given.temperature, given.top_k, given.top_p, given.seed)] == [float, int] * 2
    assert SamplingParams(stop=["a"], stop_ids={np.int32(5)}) == SamplingParams(stop=("a",), stop_ids=(5,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"temperature": 1e-50},
        {"temperature": 1e30, "repetition_penalty": 1e30},
        {"temperature": 1.0, "min_p": 1e-300},
        {"temperature": 1.0, "min_p": 1 - 1e-16},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_k": 2**31 - 1},
        {"presence_penalty": 1e-300, "frequency_penalty": 100},
    ],
)
def test_the_ends_of_the_ranges_work(rules: dict[str, Any]) -> None:
    """Also with logits as large as float16 has them: a token is drawn, and its probability is finite."""
    logits = torch.tensor([6e4, 2.0, -6e4, 0.0])
    token, logprob = drawn(sampled([SamplingParams(seed=1, **rules)], logits, [[0, 2]]))
    assert 0 <= token < 4 and math.isfinite(logprob)


def test_from_defaults() -> None:
    sampled = GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    params = SamplingParams.from_defaults(sampled, top_k=None, top_p=0.5, max_tokens=9)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 0.5, 9)
    assert params.repetition_penalty == 1.1
    greedy = SamplingParams.from_defaults(GenerationDefaults(temperature=0.6, top_k=50))
    assert greedy == SamplingParams()
    assert SamplingParams.from_defaults(sampled, temperature=0.0).temperature == 0
    with pytest.raises(TypeError, match="warmth"):
        SamplingParams.from_defaults(GenerationDefaults(), warmth=1)


# Several sequences at once, on the device


def sampled(params: list[SamplingParams], logits: torch.Tensor, seen: list[list[int]] | None = None) -> BatchSampler:
    sampler = BatchSampler(len(params), logits.shape[-1], CPU)
    before = seen or [[] for _ in params]
    sampler.arrange([sampler.enter(row, rule, ids) for row, (rule, ids) in enumerate(zip(params, before, strict=True))])
    sampler.draw(logits.expand(len(params), -1), torch.arange(len(params), dtype=torch.int32))
    return sampler


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "repetition_penalty": 1.7},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 3.0, "frequency_penalty": 3.0},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.6},
    ],
)
def test_draws_follow_the_definition(rules: dict[str, Any]) -> None:
    logits, count = [2.0, 1.5, 0.5, 0.25, -0.5, -1.0, -1.5, 1.0], 6000
    params = SamplingParams(**rules)
    sampler = sampled([replace(params, seed=i) for i in range(count)], torch.tensor(logits), [[1, 5, 5]] * count)
    wanted = torch.tensor(definition(logits, params, {1, 5}))
    got = torch.bincount(sampler.tokens.long(), minlength=8) / count
    assert bool((got[wanted == 0] == 0).all())
    assert bool(((got - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / count).sqrt() + 1e-4).all())


def test_draws_of_one_sequence_differ_and_repeat() -> None:
    sampler = BatchSampler(1, 1000, CPU)
    runs = []
    for drawn_before in (0, 0, 10):
        sampler.arrange([sampler.enter(0, SamplingParams(temperature=1.0, seed=2**64 - 1), [], drawn_before)])
        tokens = []
        for _ in range(20):
            sampler.draw(torch.zeros(1, 1000), ONE)
            tokens.append(int(sampler.tokens[0]))
        runs.append(tokens)
    assert runs[0] == runs[1] and len(set(runs[0])) > 15
    assert runs[2][:10] == runs[0][10:]


def test_greedy_beside_noise_and_the_models_own_probability() -> None:
    logits = torch.tensor([0.1, 4.0, 3.9, 1.0])
    sampler = sampled([SamplingParams(), SamplingParams(temperature=5.0, seed=1), SamplingParams()], logits)
    assert sampler.tokens[0] == sampler.tokens[2] == 1
    own = logits.log_softmax(-1)[sampler.tokens.long()]
    assert torch.allclose(sampler.drawn[1].view(torch.float32), own, atol=1e-6)


def test_sequences_draw_in_their_own_rows_in_any_order() -> None:
    """The third row rests; what is drawn depends on seed and count, not on place."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    rules = [SamplingParams(temperature=1.0, seed=seed, repetition_penalty=1.3) for seed in (1, 2, 3)]
    alone = [tokens_of(rule, logits[0], 6) for rule in rules]
    sampler = BatchSampler(4, 500, CPU)
    samplings = {row: sampler.enter(row, rule, []) for row, rule in zip((3, 0, 1), rules, strict=True)}
    sampler.tokens[2] = 77
    found: dict[int, list[int]] = {3: [], 0: [], 1: []}
    for order in ((3, 0, 1), (1, 3), (0, 1, 3), (0,), (1, 0), (3, 0), (0, 3, 1)):
        sampler.arrange([samplings[row] for row in order])
        rows = torch.tensor([*order, -1], dtype=torch.int32)
        sampler.draw(logits.expand(len(rows), -1), rows)
        for row in order:
            samplings[row].drawn += 1
            found[row].append(int(sampler.tokens[row]))
    assert [tokens[: len(found[row])] for tokens, row in zip(alone, (3, 0, 1), strict=True)] == [*found.values()][:3]
    assert sampler.tokens[2] == 77
