"""Typical-p, top-n-sigma, XTC, DRY, bias, ranges of penalties and alternatives against plain definitions."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.engine import SamplingParams
from octo_run.engine.sampling import BatchSampler
from octo_run.engine.sampling_rules import HISTORY, MAX_TOP
from octo_run.errors import UsageError

CPU = torch.device("cpu")
ONE = torch.zeros(1, dtype=torch.int32)


def sampler_of(params: list[SamplingParams], vocab: int, seen: list[list[int]] | None = None, drawn: int = 0) -> Any:
    sampler = BatchSampler(len(params), vocab, CPU)
    before = seen or [[]] * len(params)
    sampler.arrange(
        [sampler.enter(row, p, ids, drawn) for row, (p, ids) in enumerate(zip(params, before, strict=True))]
    )
    return sampler


def allowed(params: SamplingParams, logits: list[float]) -> set[int]:
    """The tokens that many draws give."""
    count = 600
    sampler = sampler_of([replace(params, seed=i) for i in range(count)], len(logits))
    sampler.draw(torch.tensor(logits).expand(count, -1).contiguous(), torch.arange(count, dtype=torch.int32))
    return set(sampler.tokens.tolist())


def kept(params: SamplingParams, logits: list[float]) -> set[int]:
    """The tokens that the rules leave in."""
    sampler = sampler_of([params], len(logits))
    draws = sampler._draws(1, ONE)
    top_p, min_p = sampler._rules[4:6, :1, None]
    given = torch.tensor([logits])
    mask = sampler.rules.chosen(draws.scores(given), draws, sampler._whole[2, :1, None], top_p, min_p)
    return set(mask[0].nonzero().flatten().tolist())


def shares(scores: dict[int, float]) -> dict[int, float]:
    best = max(scores.values())
    weights = {i: math.exp(s - best) for i, s in scores.items()}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def definition(logits: list[float], p: SamplingParams) -> set[int]:
    """Top-n-sigma, top-k, typical-p, top-p and min-p in plain Python."""
    scores = dict(enumerate(logits))
    if p.top_n_sigma:
        mean = sum(logits) / len(logits)
        sigma = math.sqrt(sum((x - mean) ** 2 for x in logits) / len(logits))
        scores = {i: s for i, s in scores.items() if s >= max(logits) - p.top_n_sigma * sigma}
    if p.top_k:
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[: p.top_k])
    scores = {i: s / p.temperature for i, s in scores.items()}
    if p.typical_p < 1:
        share = shares(scores)
        entropy = -sum(q * math.log(q) for q in share.values())
        mass, found = 0.0, {}
        for i in sorted(scores, key=lambda i: (abs(-math.log(share[i]) - entropy), -scores[i])):
            if mass >= p.typical_p:
                break
            found[i] = scores[i]
            mass += share[i]
        scores = found
    if p.top_p < 1:
        share, mass, found = shares(scores), 0.0, {}
        for i in sorted(scores, key=lambda i: -scores[i]):
            if mass >= p.top_p:
                break
            found[i] = scores[i]
            mass += share[i]
        scores = found
    if p.min_p:
        share = shares(scores)
        scores = {i: s for i, s in scores.items() if share[i] >= p.min_p * max(share.values())}
    return set(scores)


@pytest.mark.slow
@given(
    logits=st.lists(st.integers(-400, 400).map(lambda i: i / 57), min_size=2, max_size=30, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 3, 35]),
    top_p=st.sampled_from([0.313, 0.777, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123]),
    typical_p=st.sampled_from([0.2113, 0.513, 0.931, 1.0]),
    top_n_sigma=st.sampled_from([0.0, 0.7131, 1.517]),
)
@settings(max_examples=400, deadline=None)
def test_choices_are_their_definitions(logits: list[float], **rules: Any) -> None:
    params = SamplingParams(**rules)
    assert kept(params, logits) == definition(logits, params)


@pytest.mark.slow
def test_xtc_leaves_the_least_likely_of_the_likely_ones() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]
    rules = SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.12)
    assert kept(replace(rules, seed=0), logits) == {2, 3, 4}
    assert kept(replace(rules, xtc_threshold=0.35), logits) == {0, 1, 2, 3, 4}, "one likely token stays"
    assert allowed(rules, logits) == {2, 3, 4}
    struck = [kept(replace(rules, xtc_probability=0.3, seed=i), logits) == {2, 3, 4} for i in range(2000)]
    assert 0.26 < sum(struck) / 2000 < 0.34


def test_greedy_is_greedy_whatever_is_chosen() -> None:
    rules = SamplingParams(temperature=0, typical_p=0.1, top_n_sigma=0.1, xtc_probability=1.0)
    assert allowed(rules, [0.0, 3.0, 2.9]) == {1}
    mixed = sampler_of([rules, SamplingParams(temperature=1.0, xtc_probability=1.0, seed=1)], 3)
    mixed.draw(torch.tensor([[0.0, 3.0, 2.9]] * 2), torch.tensor([0, 1], dtype=torch.int32))
    assert int(mixed.tokens[0]) == 1


def test_a_bias_is_added_and_minus_100_is_never() -> None:
    logits = [0.0, 3.0, 2.0]
    assert allowed(SamplingParams(logit_bias={0: 5.0}), logits) == {0}
    assert allowed(SamplingParams(logit_bias=((1, -100),)), logits) == {2}
    assert allowed(SamplingParams(temperature=50.0, logit_bias={1: -100, 2: -100}), logits) == {0}
    other = sampler_of([SamplingParams(logit_bias={0: 9.0}), SamplingParams(temperature=0.0)], 3)
    other.draw(torch.tensor([logits] * 2), torch.tensor([0, 1], dtype=torch.int32))
    assert other.tokens.tolist() == [0, 1], "the neighbour has none"
    for wrong in ({-1: 1.0}, {1: 101.0}, {1: "x"}, [1], dict.fromkeys(range(300), 0.0), "ab", {1.5: 1.0}):
        with pytest.raises(UsageError, match="logit_bias"):
            SamplingParams(logit_bias=wrong)  # type: ignore[arg-type]


def dry_definition(history: list[int], p: SamplingParams, breakers: set[int]) -> dict[int, float]:
    """For each token what it loses: the longest repetition that it would go on with."""
    found = dict[int, float]()
    reach = p.dry_range or HISTORY
    for j in range(len(history) - 1):
        if len(history) - 1 - j >= reach or history[j + 1] in breakers:
            continue
        n = 0
        while n <= j and history[j - n] == history[-1 - n] and history[j - n] not in breakers:
            n += 1
        if n >= p.dry_allowed_length:
            lost = p.dry_multiplier * p.dry_base ** (n - p.dry_allowed_length)
            found[history[j + 1]] = max(found.get(history[j + 1], 0.0), lost)
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("reach", [0, 12])
def test_dry_is_its_definition_step_by_step(reach: int) -> None:
    """From any prompt on, while tokens are drawn."""
    chance = random.Random(7)
    for _ in range(30):
        params = SamplingParams(
            dry_multiplier=0.8, dry_allowed_length=chance.randint(1, 3), dry_range=reach, logit_bias={0: 0.0}
        )
        breakers = {4}
        prompt = [chance.randrange(5) for _ in range(chance.randint(1, 30))]
        sampler = BatchSampler(2, 5, CPU)
        sampler.rules.breakers[4] = True
        sampler.arrange([sampler.enter(0, SamplingParams(), [1]), sampler.enter(1, params, prompt)])
        rows = torch.tensor([0, 1, -1], dtype=torch.int32)[:2]
        history = list(prompt)
        for _ in range(12):
            lost = -sampler.rules.edits(rows)[1]
            wanted = dry_definition(history, params, breakers)
            assert lost.tolist() == pytest.approx([wanted.get(token, 0.0) for token in range(5)], rel=1e-5)
            logits = torch.tensor([[chance.random() * 2 for _ in range(5)]] * 2)
            sampler.draw(logits, rows)
            history.append(int(sampler.tokens[1]))


def test_filler_leaves_histories_alone() -> None:
    params = SamplingParams(dry_multiplier=1.0, temperature=1.0, seed=3)
    sampler = sampler_of([params, params], 5, [[1, 2, 1], [3, 4, 3]])
    before = sampler.rules._history[1].clone()
    sampler.draw(torch.zeros(2, 5), torch.tensor([0, -1], dtype=torch.int32))
    assert torch.equal(sampler.rules._history[1], before)
    assert sampler.rules._history[0, -4:-1].tolist() == [1, 2, 1]


def test_a_penalty_s_range_forgets() -> None:
    """Frequency counts the drawn tokens of the last three alone; repetition the prompt's, too, while they are near."""
    rules = SamplingParams(frequency_penalty=1.0, penalty_range=3)
    sampler, logits, tokens = sampler_of([rules], 3, [[0, 0]]), torch.tensor([[3.0, 2.5, 2.2]]), list[int]()
    for _ in range(9):
        sampler.draw(logits, ONE)
        tokens.append(int(sampler.tokens[0]))
    wanted = list[int]()
    for _ in range(9):
        last = wanted[-3:]
        scores = [value - last.count(token) for token, value in enumerate((3.0, 2.5, 2.2))]
        wanted.append(max(range(3), key=lambda token: scores[token]))
    assert tokens == wanted
    near = SamplingParams(repetition_penalty=2.0, penalty_range=2)
    for prompt, first in (([0, 1, 1], 0), ([1, 1, 0], 2), ([1, 0], 2)):
        sampler = sampler_of([near], 3, [prompt])
        sampler.draw(logits, ONE)
        assert int(sampler.tokens[0]) == first, prompt


def test_alternatives_are_the_model_s_own() -> None:
    logits = torch.randn(3, 50)
    params = [SamplingParams(logprobs=k, temperature=2.0, top_k=1, seed=k) for k in (0, 3, MAX_TOP)]
    sampler = sampler_of(params, 50)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32)
    sampler.draw(logits, rows)
    values, ids = logits.log_softmax(-1).topk(MAX_TOP, -1)
    for number, row in enumerate(rows.tolist()):
        assert sampler.drawn[2 : 2 + MAX_TOP, row].tolist() == ids[number].tolist()
        got = sampler.drawn[2 + MAX_TOP :, row].contiguous().view(torch.float32)
        assert torch.allclose(got, values[number])
    small = sampler_of([SamplingParams(logprobs=20)], 4)
    small.draw(torch.zeros(1, 4), ONE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.0), ("typical_p", 1.1), ("top_n_sigma", -1.0), ("xtc_probability", 2.0), ("xtc_threshold", 0.6),
        ("dry_multiplier", -0.1), ("dry_base", 0.5), ("dry_allowed_length", 0), ("dry_range", HISTORY + 1),
        ("penalty_range", -1), ("logprobs", 21), ("logprobs", 1.5), ("grammar", "x"), ("typical_p", math.nan),
    ],
)  # fmt: skip
def test_rules_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_tokens_whatever_runs_beside() -> None:
    params = SamplingParams(temperature=1.0, typical_p=0.9, xtc_probability=0.5, dry_multiplier=0.5, seed=5)
    logits = torch.randn(8, 40)

    def run(beside: list[SamplingParams], row: int) -> list[int]:
        sampler = BatchSampler(4, 40, CPU)
        others = [r for r in range(4) if r != row][: len(beside)]
        samplings = [sampler.enter(r, p, [1, 2]) for r, p in zip(others, beside, strict=True)]
        sampler.arrange([*samplings, sampler.enter(row, params, [1, 2, 3])])
        rows = torch.tensor([*others, row], dtype=torch.int32)
        found = []
        for line in logits:
            sampler.draw(line.expand(len(rows), -1).contiguous(), rows)
            found.append(int(sampler.tokens[row]))
        return found

    alone = run([], 0)
    assert run([SamplingParams(), SamplingParams(temperature=2.0, top_k=3, seed=1, logprobs=2)], 3) == alone


def test_a_bias_of_a_token_that_there_is_not_is_refused(tiny: Any) -> None:
    engine, rule = tiny(), SamplingParams(logit_bias={260: 1.0})
    with pytest.raises(UsageError, match="names the token 260 and the vocabulary has 260"):
        engine.generate([1, 2], rule)
    with pytest.raises(UsageError, match="Prompt 1: logit_bias"):
        engine.generate_batch([[1], [2]], [SamplingParams(), rule])
    assert list(engine.generate([1, 2], SamplingParams(logit_bias={259: 1.0}, max_tokens=2)))
