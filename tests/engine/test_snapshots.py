"""Layers with a state or a window cost no second reading: what is read is counted, tokens are a fresh engine's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, Session, plan
from octo_run.models.config import ModelConfig
from octo_run.models.families import DeltaFields

from .conftest import TINY

Tiny = Callable[..., Engine]
WINDOWED = replace(
    TINY, num_layers=3, layer_types=("sliding_attention", "full_attention", "full_attention"), sliding_window=100,
    max_position_embeddings=8192,
)  # fmt: skip
RECURRENT = replace(
    TINY, architecture="Qwen3_5ForCausalLM", num_layers=3, rope_share=0.25, qk_norm=True,
    layer_types=("linear_attention", "full_attention", "full_attention"), delta=DeltaFields(1, 2, 16, 16, 4),
    max_position_embeddings=8192,
)  # fmt: skip
BOTH = replace(RECURRENT, layer_types=("linear_attention", "sliding_attention", "full_attention"), sliding_window=100)
KINDS = pytest.mark.parametrize("cfg", [RECURRENT, WINDOWED, BOTH], ids=["recurrent", "windowed", "both"])
CONTEXT = 5000


def remember(weights: dict[str, torch.Tensor]) -> None:
    """States that last, so that a wrong one is seen."""
    for name, weight in weights.items():
        if name.endswith("A_log"):
            weight.fill_(-5)


@pytest.fixture(autouse=True)
def _chunks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CHUNK, "cpu", 4096)


@pytest.fixture
def make(tiny: Tiny) -> Tiny:
    def made(cfg: ModelConfig, kv: str = "bf16", **options: Any) -> Engine:
        engine = tiny(kv, context=CONTEXT, cfg=cfg, change=remember, cache_bytes=24 << 20, **options)
        engine.end_ids = frozenset()
        return engine

    return made


def numbers(count: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Asked:
    """An engine that is asked, and one beside it that forgets everything before each question."""

    def __init__(self, make: Tiny, cfg: ModelConfig, **options: Any) -> None:
        self.engine, self._fresh = make(cfg, **options), make(cfg)

    def fresh(self, ids: list[int]) -> list[int]:
        for sequence in self._fresh.arena.table.rows:
            if sequence is not None:
                sequence.discard()
        self._fresh.arena.table.kept.clear()
        return self._answer(self._fresh, ids)[0]

    @staticmethod
    def _answer(engine: Engine, ids: list[int], shared: int = 0) -> tuple[list[int], int]:
        generation = engine.generate(list(ids), SamplingParams(max_tokens=6, temperature=0.0), shared=shared)
        found = [token.id for token in generation]
        return found, generation.read_tokens

    def __call__(self, ids: list[int], shared: int = 0) -> int:
        """The tokens that are read for a prompt, whose answer is right."""
        found, read = self._answer(self.engine, ids, shared)
        assert found == self.fresh(ids)
        return read


@KINDS
def test_prompts_that_begin_alike_read_the_beginning_once(make: Tiny, cfg: ModelConfig) -> None:
    """The second one goes back to a snapshot on the way, the third one to where the two part."""
    asked, common = Asked(make, cfg), numbers(3000, 1)
    assert asked([*common, *numbers(40, 2)]) == 3040
    assert asked([*common, *numbers(44, 3)]) <= 44 + 16 * 64
    assert asked([*common, *numbers(50, 4)]) <= 50 + 64
    assert asked([*common, *numbers(200, 5)]) <= 200 + 64
    assert asked([*common[:1500], *numbers(60, 6)]) <= 60 + 16 * 64
    assert asked([*common[:1500], *numbers(60, 7)]) <= 60 + 64


@KINDS
def test_what_is_said_to_be_shared_is_read_once(make: Tiny, cfg: ModelConfig) -> None:
    asked, common = Asked(make, cfg), numbers(2600, 1)
    assert asked([*common, *numbers(1400, 2)], shared=2600) == 4000  # the windows' history does not reach so far
    for seed in (3, 4):
        assert asked([*common, *numbers(44, seed)]) <= 44 + 64


@KINDS
def test_chats_read_their_system_prompt_once(make: Tiny, cfg: ModelConfig) -> None:
    engine, system = make(cfg), "Be brief. " * 200
    params = SamplingParams(max_tokens=4, temperature=0.0)
    reads = []
    for question in ("What is a knot?", "Who is it?", "?"):
        reply = Session(engine, system).ask(question, params)
        "".join(reply)
        reads.append(reply.prompt_tokens - reply.reused_tokens)
    messages = [{"role": "system", "content": system[:1900]}, {"role": "user", "content": "Where?"}]
    for text in ("Where? " * 40, "When?"):
        reply = engine.chat([messages[0], {"role": "user", "content": text}], params)
        "".join(reply)
        reads.append(reply.prompt_tokens - reply.reused_tokens)
    first, second, third, _, again = reads
    assert first > 2000 and max(second, third, again) < 64 + 30


@KINDS
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_document_is_edited_after_others_had_its_row(make: Tiny, cfg: ModelConfig, sequences: int) -> None:
    asked, document = Asked(make, cfg, sequences=sequences), numbers(4500, 1)
    assert asked(document) == 4500
    for seed in range(sequences):
        asked(numbers(500, 10 + seed))
    assert asked([*document, *numbers(20, 3)]) <= 20 + 128
    for seed in range(sequences):
        asked(numbers(500, 20 + seed))
    for place in (3000, 1200, 4000):
        assert asked([*document[:place], *numbers(20, place)]) <= 20 + 18 * 64, place
        assert asked([*document[:place], *numbers(20, place + 1)]) <= 20 + 128, place
        assert asked(document) <= 128, place


@KINDS
def test_a_text_that_is_short_for_what_it_has_is_kept_to_its_snapshot(make: Tiny, cfg: ModelConfig) -> None:
    """A copy of what its end has would take more pages than are free."""
    asked, one = Asked(make, cfg), numbers(700, 1)
    table = asked.engine.arena.table
    asked(one)
    taken = table.pool.take(table.pool.add_holder(), table.pool.free - 12)
    assert len(taken) > 12
    parts = table.store.row_parts(0, *table.rows[0].after_cut(600))  # type: ignore[union-attr]
    assert sum(part.nbytes for part in parts) > 0
    asked(numbers(100, 2))
    assert asked([*one, 5]) <= 128 + 16 * 64


@KINDS
def test_a_batch_finds_them_too(make: Tiny, cfg: ModelConfig) -> None:
    asked, common = Asked(make, cfg, sequences=2), numbers(2500, 1)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompts = [[*common, *numbers(40 + n, n)] for n in range(3)]
    prompts += [[*common[:1300], *numbers(40, n)] for n in range(3, 6)]
    asked(prompts[0])
    for seed in (7, 8):
        asked(numbers(300, seed))
    done = sorted(asked.engine.generate_batch(prompts[1:], params), key=lambda one: one.index)
    assert [one.ids for one in done] == [asked.fresh(ids) for ids in prompts[1:]]
    reads = [one.prompt_tokens - one.reused_tokens for one in done]
    assert all(read <= 60 + 17 * 64 for read in reads)
    assert sum(reads) <= 2 * 17 * 64 + 5 * 110


@pytest.mark.parametrize("cfg", [RECURRENT, BOTH], ids=["recurrent", "both"])
def test_few_places_are_enough_to_be_right(make: Tiny, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are taken from each other; each must be what it is said to be."""
    with_snapshots = plan._with_snapshots
    monkeypatch.setattr(plan, "_with_snapshots", lambda *args: replace(with_snapshots(*args), snapshots=3))  # type: ignore[type-var]
    asked, document = Asked(make, cfg), numbers(3000, 1)
    source = torch.Generator().manual_seed(3)
    for seed in range(8):
        place = int(torch.randint(100, 3000, (), generator=source))
        asked([*document[:place], *numbers(30, seed)])
        if seed % 3 == 0:
            asked(numbers(150, 100 + seed))


def test_snapshots_on_the_way_do_not_change_what_is_computed(make: Tiny) -> None:
    """Blocks of the recurrence end where they would end without them: results agree to the bit."""
    found = []
    for snapshots in (None, 30):
        engine, ids = make(RECURRENT), numbers(4500, 1)
        if snapshots is None:
            states = engine.arena.states
            assert states is not None
            whole = states.plan
            states.plan = lambda *args, whole=whole: whole(*args)[-1:]  # type: ignore[method-assign]
        found.append(engine.logits(ids[:4400])[::50])
    assert torch.equal(*found)


@KINDS
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_batch_reads_what_its_prompts_have_in_common_once(make: Tiny, cfg: ModelConfig, sequences: int) -> None:
    """A common beginning, two documents behind it, and questions: in a new engine and in any order."""
    asked, head, documents = Asked(make, cfg, sequences=sequences), numbers(1500, 1), [numbers(900, 2), numbers(700, 3)]
    order = (0, 1, 0, 1, 0)
    prompts = [[*head, *documents[which], *numbers(50 + n, 10 + n)] for n, which in enumerate(order)]
    params = SamplingParams(max_tokens=6, temperature=0.0)
    done = sorted(asked.engine.generate_batch(prompts, params), key=lambda one: one.index)
    assert [one.ids for one in done] == [asked.fresh(ids) for ids in prompts]
    reads = [one.prompt_tokens - one.reused_tokens for one in done]
    assert reads[0] == len(prompts[0]) and reads[1] <= 700 + 51 + 64
    assert all(read <= 60 + 64 for read in reads[2:]), reads
