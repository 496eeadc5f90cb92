"""The engine on a CUDA GPU: against the CPU, recorded steps against unrecorded ones, the plan against the allocator."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, plan
from octo_run.engine.evaluation import perplexity
from octo_run.engine.evaluation.reading import Reader, pack, rows_at_once

if torch.cuda.is_available():  # they need Triton
    from octo_run.kernels import devices
    from octo_run.kernels.attention import dispatch

pytestmark = pytest.mark.gpu

TEXT = "I want to book a table for two in San Jose tonight. " * 24
FORMATS = ("bf16", "octopus3", "oct2", "oct3", "oct4")
GREEDY = SamplingParams()
#: Statistics of PyTorch's allocator that say what is held: not the counts of requests, which recording a step raises.
HELD = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current", "segment.all.current")


def prompt(engine: Engine) -> list[int]:
    return engine.tokenizer.encode(TEXT, add_bos=True)


def load(kv: str, **options: Any) -> Engine:
    engine = Engine.load("octo-demo", kv=kv, device="cuda", **options)
    engine.end_ids = frozenset()
    return engine


def forget(engine: Engine) -> None:
    """Nothing can be reused any more."""
    for sequence in engine.arena.table.rows:
        if sequence is not None:
            sequence.discard()


def answer(engine: Engine, ids: list[int], **params: Any) -> list[int]:
    forget(engine)  # a reused prefix takes another path than a fresh one
    return [token.id for token in engine.generate(ids, SamplingParams(**params))]


@pytest.mark.parametrize("kv", FORMATS)
def test_logits_agree_with_the_cpu(kv: str) -> None:
    """Both in float32 with the same rotation; codes may differ at ties, so coded formats get a wider bound."""
    cpu = Engine.load("octo-demo", kv=kv, device="cpu", dtype="float32", max_context=1024)
    gpu = load(kv, dtype="float32", max_context=1024)
    ids = prompt(cpu)
    for step, part in ((None, ids), (1, ids[:270])):
        want, got = cpu.logits(part, step), gpu.logits(part, step).cpu()
        error = float((got - want).norm() / want.norm())
        assert error < (1e-4 if kv == "bf16" else 5e-3), f"{kv}, step {step}: {error}"


@pytest.mark.parametrize("options", [{}, {"conditioning": "mean"}], ids=["usual", "key mean"])
@pytest.mark.parametrize("kv", FORMATS)
@torch.inference_mode()
def test_reading_is_decoding(kv: str, options: dict[str, bool]) -> None:
    """Two texts of unequal lengths read at once, against one token at a time. Codes may differ at ties."""
    engine = load(kv, dtype="float32", max_context=1024, sequences=3, **options)
    ids = (prompt(engine) * 4)[:900]
    texts = [ids, ids[300:701]]
    rows = rows_at_once(engine.plan, engine.config)
    assert rows == 3 * 1024
    reader, opened = Reader(engine, rows), [engine.sequence() for _ in texts]
    (pieces,) = pack([len(text) for text in texts], rows, 1024)
    got = reader.logits(reader.read(opened, texts, pieces)).split([len(text) for text in texts])
    for sequence in opened:
        sequence.discard()
    for text, logits in zip(texts, got, strict=True):
        want = engine.logits(text, 1)
        assert float((logits - want).norm() / want.norm()) < (1e-4 if kv == "bf16" else 5e-3)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.05), ("bfloat16", 0.5)])
def test_steps_agree_with_reading_where_pages_begin(dtype: str, most: float) -> None:
    """Log-probabilities of an answer that begins before there are pages, which another graph writes, and ends behind
    the first ones."""
    engine = load("oct4", dtype=dtype, max_context=2048)
    ids = prompt(engine)[:90]
    engine.end_ids = frozenset()
    tokens = list(engine.generate(ids, SamplingParams(temperature=0, max_tokens=160)))
    chosen = torch.tensor([token.id for token in tokens])
    logits = engine.logits([*ids, *chosen.tolist()], 1)[len(ids) - 1 : -1].float().cpu()
    want = logits.log_softmax(-1)[torch.arange(len(chosen)), chosen]
    assert float((torch.tensor([token.logprob for token in tokens]) - want).abs().max()) < most


def test_comparing_formats_waits_for_the_device_only_to_take_what_is_done() -> None:
    """No copy and no look at a value waits while windows are read and compared."""
    ids = (prompt(load("bf16", max_context=256)) * 8)[:2000]

    def run(mode: str) -> list[perplexity.Row]:
        comparison = perplexity.Comparison(
            lambda kv: load(kv, max_context=256, sequences=2), ["oct3", "oct2"], [ids], stride=200
        )
        try:
            for state in comparison.run():
                torch.cuda.set_sync_debug_mode(mode if state.done < state.to_do else "default")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return comparison.rows()

    run("default")  # compiles kernels
    rows = run("error")
    assert [row.tokens for row in rows] == [2000] * 3 and not rows[0].partial
    assert rows[2].kl_mean > rows[1].kl_mean > 0 and all(row.tokens_per_s > 0 for row in rows)


@pytest.mark.parametrize("kv", ["bf16", "octopus3", "oct3"])
@torch.inference_mode()
def test_recorded_steps_equal_unrecorded_ones_bit_for_bit(kv: str) -> None:
    """Over the coding of two pages and a change of the bound on lengths."""
    engine = load(kv)
    ids = (prompt(engine) * 4)[:950]
    tokens = ids[:150]
    sequence = engine.sequence()
    engine.prefill(sequence, ids)
    run, wanted = engine.step._run, []
    engine.step._run = lambda _key, work: work()  # type: ignore[method-assign, assign]
    for recorded in (False, True):
        sequence.cut(0)
        engine.prefill(sequence, ids)
        for place, token in enumerate(tokens):
            engine.step.start(sequence, token, GREEDY)
            engine.step.launch([sequence])
            engine.step.read(sequence)
            if recorded:
                assert torch.equal(engine.step.logits[0], wanted[place])
            else:
                wanted.append(engine.step.logits[0].clone())
        engine.step._run = run  # type: ignore[method-assign]


def test_telling_the_progress_of_a_prompt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CHUNK, "cuda", 512)  # the demo model's context is one chunk of the usual size
    engine = load("oct3")
    ids = (prompt(engine) * 4)[:1200]
    silent = answer(engine, ids, max_tokens=20)
    told: list[tuple[int, int]] = []
    forget(engine)
    generation = engine.generate(ids, SamplingParams(max_tokens=20), lambda *figures: told.append(figures))
    assert [token.id for token in generation] == silent
    assert told == [(0, 1200), (512, 1200), (1024, 1200), (1200, 1200)]


@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
def test_sequences_of_different_lengths_answer_as_if_alone(kv: str) -> None:
    """The first tokens: later ones may part where two are all but equal."""
    engine = load(kv, sequences=5, max_context=1500)
    ids = (prompt(engine) * 3)[:1200]
    prompts = [ids[:n] for n in (3, 70, 400, 1100, 200)]
    alone = [answer(engine, part, max_tokens=8) for part in prompts]
    forget(engine)
    sequences, answers = [engine.sequence() for _ in prompts], list[list[int]]()
    for sequence, part in zip(sequences, prompts, strict=True):
        answers.append([int(engine.prefill(sequence, part).argmax())])
        engine.step.start(sequence, answers[-1][0], GREEDY)
    for _ in range(7):
        engine.step.launch(sequences[::-1])
        for sequence, tokens in zip(sequences, answers, strict=True):
            tokens.append(engine.step.read(sequence)[0])
    assert sum(a[:4] == b[:4] for a, b in zip(answers, alone, strict=True)) >= 4


@pytest.mark.parametrize("kv", ["octopus3"])
def test_stops_and_seeds(kv: str) -> None:
    """An answer that stops while a step is under way leaves the cache as one that is cut there, and goes on alike."""
    engine = load(kv)
    ids = prompt(engine)
    rules: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
    whole = answer(engine, ids, max_tokens=120, **rules)
    assert whole == answer(engine, ids, max_tokens=120, **rules)
    assert whole != answer(engine, ids, max_tokens=120, **(rules | {"seed": 8}))
    stop = next(token for place, token in enumerate(whole) if place > 60 and token not in whole[:place])
    place = whole.index(stop)
    assert answer(engine, ids, stop_ids=(stop,), **rules) == whole[: place + 1]
    (sequence,) = engine.arena.table.rows
    assert sequence is not None and not sequence.ahead
    assert sequence.ids == ids + whole[: place + 1]  # the step ahead has fed the stop token, whose id is known
    both = [engine.generate(ids, SamplingParams(max_tokens=30, **rules)) for _ in range(2)]
    assert next(both[0]).id == next(both[1]).id == next(engine.generate(ids, SamplingParams(**rules))).id


@pytest.mark.parametrize("kv", ["bf16", "octopus3", "oct3"])
def test_two_thousand_steps_change_nothing_in_the_allocator(kv: str) -> None:
    engine = load(kv, sequences=2)
    ids = prompt(engine)
    sequences = [engine.sequence() for _ in range(2)]
    rules = [GREEDY, SamplingParams(temperature=1.0, top_p=0.9, seed=1)]
    for number, (sequence, params) in enumerate(zip(sequences, rules, strict=True)):
        engine.prefill(sequence, ids[: 200 + 30 * number])
        engine.step.start(sequence, ids[0], params)

    def run(steps: int) -> None:
        for _ in range(steps):
            engine.step.launch(sequences)
            for sequence in sequences:
                engine.step.read(sequence)

    run(300)  # records the step and the coding of pages
    before = torch.cuda.memory_stats()
    run(2000)
    after = torch.cuda.memory_stats()
    assert {key: after[key] for key in HELD} == {key: before[key] for key in HELD}


@pytest.mark.parametrize("length", [50, 3600])
@pytest.mark.parametrize("kv", FORMATS)
def test_plan_matches_the_allocator(kv: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first start on, which measures the model's keys."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gc.collect()  # engines of earlier tests
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts the workspaces, which an earlier engine may have taken
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = load(kv)
    ids = (prompt(engine) * 20)[:length]
    for _ in engine.generate(ids, SamplingParams(max_tokens=400)):
        pass
    peak, planned = torch.cuda.max_memory_allocated() - before, engine.memory_plan()["total"]
    assert abs(peak - planned) <= 0.02 * peak, (peak, engine.memory_plan())
    settled = torch.cuda.memory_allocated()
    for _ in engine.generate(ids, SamplingParams(max_tokens=100)):
        pass
    assert torch.cuda.memory_allocated() <= settled


def test_an_engine_after_another_one_holds_what_was_planned() -> None:
    """The first one leaves nothing behind but its format's tables: no workspace of a stream that recorded its steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    before, asked = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.current"]
    for kv in ("oct3", "bf16", "bf16"):
        engine = load(kv)
        ids = prompt(engine)
        torch.cuda.reset_peak_memory_stats()
        answer(engine, ids, max_tokens=200)  # records the step and the coding of a page
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - asked
        planned, now = engine.memory_plan()["total"], engine.memory_now()
        assert abs(peak - planned) <= 0.02 * planned, (kv, peak, engine.memory_plan())
        assert 0 <= now["rounding"] < 0.05 * planned and now["peak"] - before - now["rounding"] <= 1.02 * planned
        del engine
        gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() - before < 1_000_000


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="not a Hopper GPU"
)
def test_hopper_gets_the_fast_kernels() -> None:
    """Other GPUs take general ones, which nothing but the clock would tell."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert devices.runs_ptx(device) and devices.overlaps(device)
    assert dispatch.kind(device) is dispatch.Device.HOPPER
