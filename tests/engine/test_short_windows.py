"""Layers with a short window: they store keys and values as ``--kv bf16`` does, whatever format is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams, allocation, calibration, plan, sensitivity, session_identity
from octo_run.engine.allocation import SHORT_WINDOW, AutoFormats, parse_formats
from octo_run.engine.arena import Chunk
from octo_run.engine.evaluation.reading import Piece, Reader, rows_at_once
from octo_run.engine.parts import held_bytes
from octo_run.engine.plan import plan_memory
from octo_run.engine.pool import GONE
from octo_run.engine.saved_session import SessionMismatch, layout
from octo_run.engine.sequence import Sequence
from octo_run.errors import UsageError
from octo_run.kernels.attention import dispatch
from octo_run.models.config import ModelConfig

from .conftest import TINY, Counter, ScriptedForward
from .test_long_chats import CHATS
from .test_saved_session import GREEDY, LONG, saved, talk

SLIDING, FULL = "sliding_attention", "full_attention"
IDS = torch.randint(0, 250, (3000,), generator=torch.Generator().manual_seed(3)).tolist()
#: As gpt-oss has them: every second layer, the first one too.
KINDS = (SLIDING, FULL) * 2
GPT_OSS = CHATS["gpt-oss"]
Tiny = Callable[..., Engine]


def windowed(window: int = 128, kinds: tuple[str, ...] = KINDS) -> ModelConfig:
    return replace(TINY, num_layers=len(kinds), layer_types=kinds, sliding_window=window, max_position_embeddings=4096)


def greedy(engine: Engine, ids: list[int], count: int) -> list[tuple[int, float]]:
    engine.end_ids = frozenset()
    return [(token.id, token.logprob) for token in engine.generate(ids, SamplingParams(max_tokens=count))]


@contextmanager
def all_coded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that are made here have codes in all layers."""
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "SHORT_WINDOW", 0)
        yield


def stored(engine: Engine, sequence: Sequence, layer: int) -> list[Tensor]:
    """All that a layer holds of a sequence: sinks and ring, and the pages that are held, by their numbers."""
    arena, row = engine.arena, sequence.row
    group = arena._group.get(layer)
    ids = (arena.table.pool if group is None else group.pool).held[row][: sequence.packed]
    pages = [arena.layer_pages[layer][page] for page in ids if page != GONE]
    return [part[row] for part in arena.full(layer)] + pages


def names(kv: str, cfg: ModelConfig) -> list[str]:
    return [f"{fmt.k.name}:{fmt.v.name}" for fmt in parse_formats(kv, cfg, 0, torch.float32)]


def test_which_layers_have_no_codes() -> None:
    """Those whose window is short; the name that is shown is the one that was given."""
    plain, coded = "bf16:bf16", "oct3:oct2"
    assert names("oct3:oct2", windowed(SHORT_WINDOW)) == [plain, coded] * 2
    assert names("oct3:oct2", windowed(SHORT_WINDOW + 1)) == [coded] * 4
    assert names("bf16:oct3", windowed()) == [plain, "bf16:oct3"] * 2
    assert names("oct3", replace(windowed(), sliding_window=None)) == ["oct3:oct3"] * 4
    formats = parse_formats("oct3", windowed(), 0, torch.float32)
    assert formats.name == "oct3" and str(formats) == "oct3 (K 2 x bf16, 2 x oct3; V 2 x bf16, 2 x oct3)"
    assert {fmt.k.bytes_per_vector for fmt in formats if not fmt.k.bits} == {4 * 64}, "the dtype of the arithmetic"
    assert len(parse_formats("bf16", windowed()).runs) == 1, "neighbours are still coded by one call"
    with pytest.raises(UsageError, match="unknown KV format 'oct9'"):
        parse_formats("oct9", windowed(kinds=(SLIDING,) * 2))


@pytest.mark.parametrize("name", ["gemma4-small", "gpt-oss", "tiny"])
def test_nothing_is_done_to_keys_and_values_without_codes(tiny: Tiny, name: str) -> None:
    """No rotation, in weights or beside them, no maps and no mean, also where later layers see them; all of that for
    the others."""
    cfg = windowed() if name == "tiny" else CHATS[name]
    engine, exact = (tiny(kv, cfg=cfg, context=600) for kv in ("oct3", "bf16"))
    assert engine.plan.conditioning == "full" and engine.plan.coded and not exact.plan.coded
    seen = set()
    for index, (layer, other) in enumerate(
        zip(engine.forward.decoder.layers, exact.forward.decoder.layers, strict=True)
    ):
        number = engine.forward.decoder.places[index]
        part, wanted = layer.attention, other.attention
        short = layer.spec.attention.window is not None
        seen.add((short, layer.spec.kv_source is None))
        done = (part.maps, part.key_mean, part.v_rotation)
        alike = torch.equal(part.out.weight, wanted.out.weight)  # type: ignore[arg-type]
        assert (done == (None,) * 3 and alike) if short else (done[0] is not None and done[1] is not None and not alike)
        assert engine.arena.means is not None
        assert (engine.arena.means.of_queries(number, None) is None) == short
        fmt = engine.arena.formats[number]
        kind = dispatch.stored(fmt, torch.float32, mean=not short)
        assert kind == (dispatch.Stored.PLAIN if short else dispatch.Stored.TRELLIS)
    assert {short for short, _ in seen} == {True, False}
    assert ({own for _, own in seen} == {True, False}) == (name == "gemma4-small")


@pytest.mark.parametrize("conditioning", ["off", "mean", "full"])
def test_what_is_stored_is_what_bf16_stores(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, conditioning: str) -> None:
    """Of all windowed layers, bit for bit, for keys and values that depend on no other layer."""
    monkeypatch.setattr(Chunk, "_attend", lambda _self, _layer, q, *_rest: q)
    rows = []
    for kv in ("oct3", "bf16"):
        engine = tiny(kv, cfg=windowed(), context=1300, conditioning=conditioning)
        engine.forward = engine.step.forward = script = ScriptedForward(engine.forward)
        script.say(0, IDS)
        with engine.sequence() as sequence:
            engine.prefill(sequence, IDS[:300])
            engine.prefill(sequence, IDS[300:700])
            engine.step.start(sequence, 7, SamplingParams())
            for _ in range(200):  # pages are coded between steps, for all layers at once
                engine.step.launch([sequence])
                engine.step.read(sequence)
            assert sequence.packed > 10
            rows.append([stored(engine, sequence, layer) for layer in range(4)])
    for layer in (0, 2):
        ours, theirs = (found[layer] for found in rows)
        assert len(ours) == len(theirs) > 4
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for layer in (1, 3):
        ours, theirs = (found[layer] for found in rows)
        assert ours[-1].numel() < theirs[-1].numel()


@pytest.mark.parametrize("cfg", [windowed(), GPT_OSS], ids=["tiny", "gpt-oss"])
def test_the_first_layer_s_pages_are_those_of_bf16(tiny: Tiny, cfg: ModelConfig) -> None:
    """What it stores depends on tokens alone: prompts, steps, and pages that are coded in between."""
    found = []
    for kv in ("oct3", "bf16"):
        engine = tiny(kv, cfg=cfg, context=900)
        with engine.sequence() as sequence:
            for first in (0, 130, 470):
                engine.prefill(sequence, IDS[first : {0: 130, 130: 470, 470: 600}[first]])
            engine.step.start(sequence, 7, SamplingParams())
            for token in IDS[600:740]:
                engine.step.launch([sequence])
                engine.step.read(sequence)
                engine.step.start(sequence, token, SamplingParams())
            found.append(stored(engine, sequence, 0))
    assert len(found[0]) == len(found[1]) > 4
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kv", ["oct3", "oct2:oct4", "auto:56"])
def test_where_all_windows_are_short_everything_is_as_with_bf16(tiny: Tiny, kv: str) -> None:
    given: dict[str, Any] = {"cfg": windowed(kinds=(SLIDING,) * 2), "context": 1300}
    ours, theirs = tiny(kv, **given), tiny("bf16", **given)
    for step in (512, 90):
        assert torch.equal(ours.logits(IDS[:1100], step), theirs.logits(IDS[:1100], step))
    assert torch.equal(ours.logits(IDS[:300], 1), theirs.logits(IDS[:300], 1))
    assert greedy(ours, IDS[:700], 200) == greedy(theirs, IDS[:700], 200)
    assert ours.plan.as_dict() == theirs.plan.as_dict()
    assert (ours.plan.kv, ours.plan.conditioning, ours.plan.coded) == (kv, "off", False)
    assert ours.arena.means is None


def divergence(engine: Engine, exact: Engine, ids: list[int]) -> float:
    """Of what a token's own step would say from what bf16 says: nats, on average."""

    def logs(engine: Engine) -> Tensor:
        reader = Reader(engine, rows_at_once(engine.plan, engine.config))
        with engine.sequence() as sequence, torch.inference_mode():
            parts = [
                reader.logits(reader.read([sequence], [ids], [Piece(0, first, min(len(ids), first + 200))])).clone()
                for first in range(0, len(ids), 200)
            ]
        return torch.cat(parts).double().log_softmax(-1)

    wanted = logs(exact)
    return float((wanted.exp() * (wanted - logs(engine))).sum(-1)[256:].mean())


@pytest.mark.few("oct3")
@pytest.mark.parametrize("kv", ["oct2", "oct3", "oct4"])
def test_answers_are_nearer_to_those_of_bf16(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    """Than they are with codes in all layers."""
    given: dict[str, Any] = {"cfg": GPT_OSS, "context": 1000}
    exact, ours = tiny("bf16", **given), tiny(kv, **given)
    with all_coded(monkeypatch):
        coded = tiny(kv, **given)
    near, far = divergence(ours, exact, IDS[:900]), divergence(coded, exact, IDS[:900])
    assert 0 < near < 0.9 * far, (near, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cfg", [windowed(), windowed(kinds=(SLIDING, SLIDING, FULL)), GPT_OSS], ids=["a", "b", "oss"])
def test_the_plan_is_what_is_held(tiny: Tiny, cfg: ModelConfig, dtype: torch.dtype) -> None:
    engine = tiny("oct3", cfg=cfg, context=2000, sequences=2, dtype=dtype)
    told, keys = engine.memory_plan(), engine.forward.decoder.key_tensors
    assert told["arena"] + told["full_precision"] == sum(held_bytes(engine.arena)) + sum(held_bytes(keys))
    full = sum(spec.attention.window is None for spec in engine.forward.decoder.specs)
    vectors = 2 * cfg.num_kv_heads
    assert told["bytes_per_token"] == full * vectors * 30
    (window,) = engine.plan.windows
    layers = cfg.num_layers - full
    assert window["layers"] == layers and window["bytes_per_token"] == layers * vectors * 64 * dtype.itemsize
    assert window["bytes"] == engine.arena.windows[0].pages.nbytes


MODULES = ("attention", "encode", "linear", "replay", "step")


@pytest.mark.parametrize("cfg", [windowed(), GPT_OSS], ids=["tiny", "gpt-oss"])
def test_pytorch_computes_what_the_compiled_kernels_do(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, cfg: ModelConfig
) -> None:
    """Chunks and steps, means in every second layer."""
    engine, found = tiny("oct3", cfg=cfg, context=700), list[Tensor]()
    found += [engine.logits(IDS[:500], 100), engine.logits(IDS[:400], 1)]
    for name in MODULES:
        monkeypatch.setattr(f"octo_run.kernels.cpu.{name}.library", lambda: None)
    other = tiny("oct3", cfg=cfg, context=700)
    found += [other.logits(IDS[:500], 100), other.logits(IDS[:400], 1)]
    for one, two in ((found[0], found[2]), (found[1], found[3])):
        assert float((one - two).norm() / two.norm()) < 2e-3  # a code of a key that is a near tie may be another one
        assert float((one - two).abs().max()) > 0, "it was not the same path"


def test_prefixes_are_shared_and_an_answer_is_written_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine does it that has all pages of all layers."""
    given: dict[str, Any] = {"cfg": windowed(), "context": 3000, "sequences": 2}
    engine = tiny("oct3", **given)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "window_shapes", lambda *_: ())
        other = tiny("oct3", **given)
    assert engine.arena.windows and not other.arena.windows
    counter, texts, found = Counter(engine, monkeypatch), (IDS[:900], IDS[:900], [*IDS[:1000], 5, 6, 7]), []
    for ids, most in zip(texts, (900, 256, 256 + 103), strict=True):
        found.append(greedy(engine, ids, 300))
        assert 0 < counter.taken() <= most
    assert found == [greedy(other, ids, 300) for ids in texts]
    for one in (engine, other):
        donor = one.arena.open(IDS[:900])
        shared = one.arena.open([*IDS[:900], 8])
        assert len(shared) == len(donor) > 800
        found.append(one.prefill(shared, IDS[900:950]))
    assert torch.equal(found[-1], found[-2])


def test_prompts_of_a_batch_are_answered_as_alone(tiny: Tiny) -> None:
    engine, other = (tiny("oct3", cfg=windowed(), context=900, sequences=count) for count in (3, 1))
    engine.end_ids = other.end_ids = frozenset()
    prompts = [IDS[start : start + count] for start, count in ((0, 500), (700, 90), (900, 333), (40, 610))]
    rules = SamplingParams(max_tokens=80)
    done = {one.index: one.ids for one in engine.generate_batch(prompts, rules)}
    for number, prompt in enumerate(prompts):
        assert done[number] == [token.id for token in other.generate(prompt, rules)], number


@pytest.mark.parametrize("undone", [False, True])
def test_a_conversation_is_saved_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    monkeypatch.setattr(session_identity, "fingerprint", lambda engine: str(hash(repr(engine.config))))
    before = talk(tiny("oct3", 2048, cfg=windowed()), LONG[:1400], "and then?")
    if undone:
        before.undo()
    file = saved(before, tmp_path / "s.safetensors")
    assert file.entries["key_maps0"].shape[0] == file.entries["key_means0"].shape[0] == 2, "of layers with codes"
    engine = tiny("oct3", 2048, cfg=windowed())
    assert file.restore(engine) == file.tokens > 1200
    after = file.session(engine)
    for question in ("more", LONG[:500]):
        one, two = before.ask(question, GREEDY), after.ask(question, GREEDY)
        assert [*one] == [*two] and one.ids == two.ids and two.reused_tokens > 1200


@torch.inference_mode()
def test_an_engine_takes_the_file_s_conditioning(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the layers with codes, each its own."""
    monkeypatch.setattr(session_identity, "fingerprint", lambda engine: str(hash(repr(engine.config))))
    engine, other = (tiny("oct3", 2048, cfg=windowed()) for _ in range(2))
    parts = layout.attention_layers(engine)
    for number, layer in enumerate(parts):
        if layer.key_mean is not None:
            layer.key_mean.mul_(1.1 + number)
            engine.arena.means.adopt(number, layer.key_mean, layer.maps[1])  # type: ignore[union-attr, index]
    before = talk(engine, LONG[:900])
    file = saved(before, tmp_path / "s.safetensors")
    file.restore(other)
    for number, (one, two) in enumerate(zip(parts, layout.attention_layers(other), strict=True)):
        assert (one.key_mean is None) == (two.key_mean is None) == (number % 2 == 0)
        if one.key_mean is not None:
            assert torch.equal(one.key_mean, two.key_mean)  # type: ignore[arg-type]
            maps = [of.arena.means.maps(number) for of in (engine, other)]  # type: ignore[union-attr]
            assert torch.equal(*maps)
    assert [*before.ask("more", GREEDY)] == [*file.session(other).ask("more", GREEDY)]


def test_a_conversation_with_codes_in_all_layers_is_another_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it: one sentence, and the text can be read again."""
    monkeypatch.setattr(session_identity, "fingerprint", lambda engine: str(hash(repr(engine.config))))
    with all_coded(monkeypatch):
        before = talk(tiny("oct3", 2048, cfg=windowed()), LONG[:900])
    file = saved(before, tmp_path / "s.safetensors")
    engine = tiny("oct3", 2048, cfg=windowed())
    says = (
        "^the KV cache of this session cannot be used: it was saved with the KV cache oct3 and this is bf16 and oct3 in"
    )
    with pytest.raises(SessionMismatch, match=rf"{says} 4 layers\.$"):
        file.restore(engine)
    assert file.session(engine).messages == before.messages


def test_a_budget_is_of_the_layers_with_codes(tiny: Tiny) -> None:
    """Pages of the others are given back behind their window; what the plan counts does not depend on the choice."""
    cfg = windowed()
    formats = parse_formats("auto:56", cfg, 0, torch.float32)
    assert isinstance(formats, AutoFormats) and [*formats.plain] == [0, 2] and 55 < formats.average <= 56
    chosen = formats.chosen(torch.tensor([[1e9, 1e9], [1.0, 5.0], [1e9, 1e9], [7.0, 1.0]]))
    assert [(fmt.k.name, fmt.v.name) for fmt in chosen][::2] == [("bf16", "bf16")] * 2
    assert chosen.average == formats.average and chosen.plain == formats.plain
    assert [(fmt.k.name, fmt.v.name) for fmt in chosen][1::2] != [(fmt.k.name, fmt.v.name) for fmt in formats][1::2]
    planned, later = (
        plan_memory(cfg, kv, device=torch.device("cpu"), dtype=torch.float32, max_context=3000)
        for kv in (formats, chosen)
    )
    assert planned.as_dict() == later.as_dict()
    (window,) = planned.windows
    assert window["layers"] == 2 and window["bytes_per_token"] == 2 * 2 * 64 * 4
    assert planned.bytes_per_token == sum(formats.layer_bytes(layer) for layer in (1, 3))
    engine = tiny("auto:56", cfg=cfg, context=900)
    assert len(greedy(engine, IDS[:600], 100)) == 100 and engine.arena.windows


def test_only_layers_with_codes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found of them does not depend on the others' windows being without codes."""
    monkeypatch.setattr(calibration, "FEWER", 333)
    seen = list[Tensor]()
    measure = sensitivity.measure

    def measured(*args: Any) -> Tensor:
        seen.append(measure(*args))
        return seen[-1]

    monkeypatch.setattr(sensitivity, "measure", measured)
    engine = Engine.load(random_weights=windowed(), kv="auto:56", device="cpu", dtype="float32", max_context=600)
    (found,) = seen
    assert found.shape == (4, 2) and bool((found[[1, 3]] > 0).all()) and float(found[[0, 2]].max()) < 1e-6
    assert float(found[[0, 2]].max()) < 1e-3 * float(found[[1, 3]].min())
    assert [fmt.k.name == "bf16" for fmt in engine.kv] == [True, False] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("full_layers", [0, 2])
def test_on_a_gpu(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, full_layers: int) -> None:
    """Recorded steps, of which the layers take turns between kernels, are the unrecorded ones; where all layers have
    short windows, they are those of bf16."""
    kinds = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": full_layers}
    path = make_checkpoint(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", max_position_embeddings=8192, num_hidden_layers=4,
        **kinds,
    )  # fmt: skip
    found = []
    for kv, recorded in (("oct3", True), ("oct3", False), ("bf16", True)):
        with Engine.load(path, kv=kv, device="cuda", dtype="bfloat16", max_context=6000) as engine:
            if not recorded:
                monkeypatch.setattr(engine.step, "_run", lambda _key, work: work())
            short = {engine.arena.formats[layer].k.bits == 0 for layer in engine.arena.windows[0].shape.layers}
            assert short == {True}
            found.append((greedy(engine, IDS[:2500], 400), greedy(engine, IDS[:2600], 50)))
    assert found[0] == found[1] and (found[0] == found[2]) == (full_layers == 0)
