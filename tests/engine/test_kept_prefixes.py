"""What was read is found again when its row was taken by others, as long as nobody needs its pages."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.kept_prefixes import KeptPrefixes
from octo_run.engine.pool import GONE
from octo_run.models.config import KVHeads, ModelConfig
from octo_run.models.families import DeltaFields

from .conftest import TINY

pytestmark = pytest.mark.usefixtures("coded_windows")

Tiny = Callable[..., Engine]
IDS = torch.randint(0, 250, (3, 1400), generator=torch.Generator().manual_seed(5)).tolist()
WINDOWED = replace(
    TINY, num_layers=3, layer_types=("sliding_attention", "full_attention", "full_attention"), sliding_window=100
)
KINDS = replace(WINDOWED, layer_heads=(KVHeads(1, 64), KVHeads(1, 128), KVHeads(1, 128)))
RECURRENT = replace(
    TINY, architecture="Qwen3_5ForCausalLM", num_layers=3, rope_share=0.25, qk_norm=True,
    layer_types=("linear_attention", "full_attention", "full_attention"), delta=DeltaFields(1, 2, 16, 16, 4),
)  # fmt: skip
SETTINGS: dict[str, Any] = {"context": 1500, "sink": 16}


def read(engine: Engine, ids: list[int]) -> tuple[int, torch.Tensor]:
    """Read a prompt as ``generate`` does.

    Returns:
        How many of its tokens were found, and the logits behind it.
    """
    with engine.arena.open(ids) as sequence:
        found = len(sequence)
        return found, engine.prefill(sequence, ids[found:])


def check_pool(engine: Engine) -> None:
    table = engine.arena.table
    for pool in (table.pool, *(window.pool for window in table.windows)):
        held = Counter(page for pages in pool.held for page in pages if page != GONE)
        assert pool.free + len(held) == len(pool)
        assert all(pool.holders(page) == held[page] for page in range(len(pool)))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kv", "cfg"),
    [
        ("bf16", TINY), ("oct3", TINY), ("oct4:oct2", TINY), ("oct3", WINDOWED), ("oct3", KINDS),
        ("bf16", RECURRENT), ("oct3", RECURRENT),
    ],
    ids=["bf16", "oct3", "oct4:oct2", "windowed", "heads of two sizes", "bf16, recurrent", "recurrent"],
)  # fmt: skip
def test_a_text_is_found_again_when_others_had_its_row(tiny: Tiny, cfg: ModelConfig, kv: str) -> None:
    """What follows is computed to the bit as if the text had stayed in its row and had been cut to whole pages."""
    engine = tiny(kv, cfg=cfg, cache_bytes=2 << 20, **SETTINGS)
    read(engine, IDS[0][:900])
    assert read(engine, IDS[1][:700])[0] == 0
    found, logits = read(engine, IDS[0][:1000])
    assert found == 16 + 64 * (13 if cfg is RECURRENT else 12)  # a state is kept for the last page boundary
    check_pool(engine)

    alone = tiny(kv, cfg=cfg, **SETTINGS)
    with alone.sequence() as sequence:
        alone.prefill(sequence, IDS[0][:900])
        assert sequence.cut(found) == found
        assert torch.equal(alone.prefill(sequence, IDS[0][found:1000]), logits)

    assert read(engine, IDS[1][:750])[0] == 16 + 64 * (10 if cfg is RECURRENT else 9)  # and so is the other one


def test_both_ends_of_one_beginning_are_found_again(tiny: Tiny) -> None:
    """A row is cut to what two texts begin with; its pages are shared and what followed is kept."""
    engine = tiny("oct3", cache_bytes=2 << 20, **SETTINGS)
    one, two = IDS[0][:1000], [*IDS[0][:400], *IDS[1][:500]]
    read(engine, one)
    assert read(engine, two)[0] == 16 + 64 * 6
    pool = engine.arena.table.pool
    assert sorted(Counter(map(pool.holders, engine.arena.table.rows[0].page_ids))) == [1, 2]  # type: ignore[union-attr]
    assert read(engine, [*one, 7])[0] == 16 + 64 * 14
    assert read(engine, [*two, 7])[0] == 16 + 64 * 12
    check_pool(engine)


def test_a_part_of_what_was_kept_is_of_use(tiny: Tiny) -> None:
    engine = tiny("oct3", cache_bytes=2 << 20, **SETTINGS)
    read(engine, IDS[0][:1000])
    read(engine, IDS[1][:300])
    assert read(engine, [*IDS[0][:500], *IDS[2][:100]])[0] == 16 + 64 * 7


def test_the_longest_unused_goes_first_and_from_its_end(tiny: Tiny) -> None:
    engine = tiny("oct3", pages=40, **SETTINGS)
    for ids in IDS:
        read(engine, ids[:900])
    pool, kept = engine.arena.table.pool, engine.arena.table.kept
    before = [len(one.ids) for one in kept._kept]
    assert len(before) == 2 and before[0] < before[1] == 16 + 64 * 12
    assert pool.free == 0
    sequence = engine.arena.table.rows[0]
    assert sequence is not None
    engine.prefill(sequence, IDS[2][900:1028])
    assert len(kept) == 1 or [len(one.ids) for one in kept._kept] == [before[0] - 128, before[1]]
    assert read(engine, IDS[1][:1000])[0] == 16 + 64 * 12
    check_pool(engine)


def test_what_is_kept_never_stands_in_the_way(tiny: Tiny) -> None:
    """All pages of the pool can be had, and no parked sequence loses any while something is kept."""
    engine = tiny("oct3", pages=22, **SETTINGS)
    read(engine, IDS[0][:700])
    read(engine, IDS[1][:400])
    assert len(engine.arena.table.kept) == 1
    with engine.sequence() as sequence:
        for first in range(0, 1400, 350):
            engine.prefill(sequence, IDS[2][first : first + 350])
        assert sequence.packed == 20 and not len(engine.arena.table.kept)
        check_pool(engine)


def test_what_is_not_worth_it_is_not_kept(tiny: Tiny) -> None:
    engine = tiny("oct3", cache_bytes=2 << 20, **SETTINGS)
    kept = engine.arena.table.kept
    read(engine, IDS[0][:1000])
    read(engine, IDS[0][:960])  # an answer is drawn again: what the cut takes is short
    assert not len(kept)
    with engine.sequence() as sequence, torch.inference_mode():
        engine.arena.fill(sequence, 1000)
    sequence = engine.sequence()
    assert len(kept) == 1  # the text, not what was made up to measure
    sequence.discard()
    read(engine, IDS[0][:1000])
    engine.arena.table.rows[0].discard()  # type: ignore[union-attr]
    read(engine, IDS[1][:1000])
    assert len(kept) == 1
    for _ in range(3):  # the same ones again are no more to keep
        read(engine, IDS[0][:1000])
        read(engine, IDS[1][:1000])
    assert len(kept) == 2


def test_ids_are_compared_whatever_their_hashes_say(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(self: KeptPrefixes, ids: list[int]) -> list[int]:
        return [*range((len(ids) - 16) // 64)]

    monkeypatch.setattr(KeptPrefixes, "_keys", same)
    engine = tiny("oct3", cache_bytes=2 << 20, **SETTINGS)
    read(engine, IDS[0][:1000])
    read(engine, IDS[1][:1000])
    assert read(engine, [*IDS[0][:500], *IDS[2][:100]])[0] == 16 + 64 * 7
    assert engine.arena.table.reusable(IDS[2]) == 0


def test_a_batch_finds_what_an_earlier_one_read(tiny: Tiny) -> None:
    engine = tiny("oct3", cache_bytes=4 << 20, sequences=2, **SETTINGS)
    params = SamplingParams(max_tokens=3)
    common = IDS[0][:800]
    first = [*engine.generate_batch([[*common, n] for n in range(3)], params)]
    [*engine.generate_batch([IDS[1][:500], IDS[2][:500], IDS[1][500:]], params)]
    again = [*engine.generate_batch([[*common, n] for n in range(3)], params)]
    assert min(done.reused_tokens for done in again) >= 16 + 64 * 11
    assert {done.index: done.ids for done in again} == {done.index: done.ids for done in first}


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [TINY, WINDOWED, RECURRENT], ids=["full", "windowed", "recurrent"])
def test_an_interrupt_between_any_two_lines_costs_no_page(tiny: Tiny, cfg: ModelConfig) -> None:
    """Nothing is held by nobody, no row is lost, and what is found is right."""
    engine = tiny("bf16", cfg=cfg, pages=24, **SETTINGS)
    prompts = [IDS[0][:400], IDS[1][:400], [*IDS[0][:300], *IDS[2][:200]]]
    expected = []
    for ids in prompts:
        engine.arena.table.kept.clear()
        engine.sequence().discard()
        expected.append(read(engine, ids)[1])
    left, struck, turn = 0, 0, 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, struck
        if not frame.f_code.co_filename.endswith(("kept_prefixes.py", "sequence.py", "pool.py")):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                struck += 1
                raise KeyboardInterrupt
        return trace

    for start in range(1, 1200, 3 if cfg is TINY else 11):
        left, turn = start, turn + 1
        sys.settrace(trace)
        try:
            sequence = engine.arena.open(prompts[turn % 3])
            sys.settrace(None)
            sequence.close()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        for sequence in engine.arena.table.rows:  # type: ignore[assignment]
            if sequence is not None:
                sequence.close()
        _, logits = read(engine, prompts[(turn + 1) % 3])
        torch.testing.assert_close(logits, expected[(turn + 1) % 3], atol=1e-4, rtol=1e-4)
        check_pool(engine)
        assert all(one.ids for one in engine.arena.table.kept._kept)
    assert struck > 50 or cfg is not TINY
