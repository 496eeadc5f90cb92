"""What prompts of a batch have in common."""

import random

import pytest

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.kept_prefixes import common_length
from octo_run.engine.shared_beginning import MOST, shared_beginnings
from octo_run.errors import UsageError


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_finds_what_it_has_in_common_with_those_before(seed: int) -> None:
    """As if each prompt were read from its longest known length on, and known were only the lengths that were told."""
    source = random.Random(seed)
    prompts = [[source.randrange(2) for _ in range(source.randrange(1, 9))] for _ in range(source.randrange(1, 12))]
    told = shared_beginnings(prompts)
    for number, ids in enumerate(prompts):
        most = max((common_length(ids, other) for other in prompts[:number]), default=0)
        known = 0
        for before, (other, lengths) in enumerate(zip(prompts[:number], told, strict=False)):
            begun = max((common_length(other, one) for one in prompts[:before]), default=0)
            known = max([known, *(one for one in lengths if begun < one <= common_length(ids, other))])
        assert known == most, (number, prompts, told)


def test_few_lengths_of_one_prompt() -> None:
    """Those that most prompts have in common with it, and the longest."""
    whole = list(range(100, 200))
    parts = [[*whole[:length], 1] for length in range(10, 40)] + [[*whole[:12], 2], [*whole[:12], 3], [*whole[:50], 2]]
    (first, *_) = shared_beginnings([whole, *parts])
    assert first == [12, *range(34, 40), 50] and len(first) == MOST


def test_many_prompts_take_no_time() -> None:
    head = list(range(2000))
    found = shared_beginnings([[*head, n % 7, n] for n in range(3000)])
    assert found[0] == [2000, 2001] and sum(map(len, found)) < 20


def test_shared_is_no_negative_number(tiny: "type[Engine]") -> None:
    with pytest.raises(UsageError, match="shared is -1; give 0 or more tokens"):
        tiny().generate([1, 2], SamplingParams(), shared=-1)
