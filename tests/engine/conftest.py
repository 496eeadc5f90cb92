"""Small engines for the engine's tests: random models, scripted models, a byte tokenizer with a chat template."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, allocation, plan_memory
from octo_run.engine.allocation import parse_formats
from octo_run.engine.arena import Chunk
from octo_run.engine.calibration import Calibration
from octo_run.engine.forward import Forward
from octo_run.engine.random_model import NoTokenizer
from octo_run.engine.sequence import Sequence as Held
from octo_run.engine.step import StepState
from octo_run.kernels.codec import LayerFormats, parse_kv
from octo_run.models.config import GenerationDefaults, ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.weights import random_weights
from octo_run.tokenizer.stream import StreamingDetokenizer
from octo_run.tokenizer.thinking import Thinking

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=260,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


@pytest.fixture(scope="module", autouse=True)
def _small_models_are_measured_quickly(short_calibration: None) -> None: ...


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 begins a text, 257 ends a turn, 258 begins one."""

    vocab_size, bos_id, eos_ids, adds_bos, opening = 260, 256, (257,), True, [256]
    special: ClassVar = {"<s>": 256, "<end>": 257, "<turn>": 258}
    special_ids = frozenset(special.values())
    has_chat_template = True
    template_source = ""

    def __init__(self) -> None:
        self.thinking = Thinking(self)  # type: ignore[arg-type]

    def special_id(self, text: str) -> int | None:
        return self.special.get(text)

    def encode(self, text: str, **_: bool) -> list[int]:
        return list(text.encode())

    def prompt(self, text: str) -> list[int]:
        return [256, *self.encode(text)]

    def stream(self, after: Sequence[int] = (), *, skip_special: bool = True) -> StreamingDetokenizer:
        written = {token: text.encode() for text, token in self.special.items()}
        skipped = self.special_ids if skip_special else frozenset()
        stream = StreamingDetokenizer(lambda i: bytes([i]) if i < 256 else written.get(i, b""), skipped, False)
        stream.skip(after)
        return stream

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        ids = [256]
        for message in messages:
            if message["content"] == "refuse":
                raise ValueError("the template refuses")
            ids += [258, ord(message["role"][0]), *message["content"].encode(), 257]
        return [*ids, 258, ord("a")] if add_generation_prompt else ids


class ScriptedForward(Forward):
    """A model that says what it is told: the token after position p is ``script[p + 1]`` (257, the end, beyond it).

    Its keys and values depend on token, position and layer. ``fail_at`` = (position, layer) raises there, once.
    """

    def __init__(self, forward: Forward) -> None:
        vars(self).update(vars(forward))
        self.cfg, self.script = forward.decoder.cfg, dict[int, int]()
        self.fail_at: tuple[int, int] | None = None
        self.failure: type[BaseException] = KeyboardInterrupt
        self.fed: list[list[int]] = []

    def _vectors(self, ids: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Keys ``[n, kv_heads, d]``."""
        if self.fail_at is not None and self.fail_at[0] in positions and self.fail_at[1] == layer:
            self.fail_at = None
            raise self.failure
        keys = (ids + positions * 0.1 + layer)[:, None, None]
        return keys.expand(len(ids), self.cfg.num_kv_heads, self.cfg.head_dim).to(torch.float32).contiguous()

    def chunks(self, chunks: list[Chunk]) -> Tensor:
        return torch.cat([self._chunk(chunk) for chunk in chunks])

    def _chunk(self, chunk: Chunk) -> Tensor:
        ids = torch.tensor(chunk.ids)
        self.fed.append(chunk.ids)
        positions = torch.arange(chunk.start, chunk.end)
        for layer in range(self.cfg.num_layers):
            k = self._vectors(ids, positions, layer)
            q = k[None].repeat_interleave(self.cfg.num_heads // self.cfg.num_kv_heads, 2)
            chunk.attend(layer, q, torch.stack((k, -k)), self.decoder.specs[layer].attention, None)
        return positions[:, None].to(torch.float32)

    def step(self, ids: Tensor, state: StepState, max_length: int) -> Tensor:
        self.fed.append(ids.tolist())
        for layer in range(self.cfg.num_layers):
            k = self._vectors(ids, state.positions, layer)
            for full, new in zip(self.arena.full(layer), (k, -k), strict=True):
                full[state.rows.long(), :, state.places.long()] = new
        return state.positions[:, None].to(torch.float32)

    def logits(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        following = [self.script.get(int(p) + 1, 257) for p in normed.flatten()]
        logits = torch.zeros(len(following), self.cfg.vocab_size)
        logits[torch.arange(len(following)), following] = 9.0
        return logits if out is None else out.copy_(logits)

    def say(self, start: int, text: str | bytes | list[int]) -> None:
        """From position ``start`` on, say ``text``, then end."""
        ids = list(text.encode() if isinstance(text, str) else text)
        self.script = {start + i: token for i, token in enumerate(ids)}


class Counter:
    """Counts the tokens that an engine reads in chunks."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.read, chunks = 0, engine.forward.chunks

        def counted(given: list[Chunk]) -> Tensor:
            self.read += sum(chunk.count for chunk in given)
            return chunks(given)

        patch.setattr(engine.forward, "chunks", counted)

    def taken(self) -> int:
        """Since the last call."""
        self.read, read = 0, self.read
        return read


def only(engine: Engine) -> Held:
    """The engine's only sequence."""
    (sequence,) = engine.arena.table.rows
    assert sequence is not None
    return sequence


def layer_formats(kv: str, cfg: ModelConfig, dtype: torch.dtype) -> LayerFormats:
    """The formats of ``--kv``; with slashes between them those of each layer."""
    if "/" not in kv:
        return parse_formats(kv, cfg, 0, dtype)
    return LayerFormats(kv, tuple(parse_kv(part, cfg.head_dim, plain_dtype=dtype) for part in kv.split("/")))


def build_engine(
    cfg: ModelConfig, kv: str, context: int | None, pages: int | None = None, **plan_options: Any
) -> Engine:
    """``pages``: those that all sequences share (None: as many as they hold at full context); ``change``: is given the
    weights; ``tokenizer``: in place of the :class:`ByteTokenizer`."""
    dtype, defaults = plan_options.pop("dtype", torch.float32), plan_options.pop("defaults", GenerationDefaults())
    tokenizer = plan_options.pop("tokenizer", None) or ByteTokenizer()
    cfg = replace(cfg, vocab_size=max(cfg.vocab_size, tokenizer.vocab_size))
    weights = random_weights(cfg, "cpu", dtype, seed=1)
    plan_options.pop("change", lambda _: None)(weights)
    fmt = layer_formats(kv, cfg, dtype)
    if pages is not None:
        plan_options["cache_bytes"] = pages * 64 * cfg.num_kv_heads * fmt.vector_bytes
    plan = plan_memory(cfg, fmt, device=torch.device("cpu"), dtype=dtype, max_context=context, **plan_options)
    with torch.inference_mode():
        decoder = Decoder(cfg, weights, None, fmt.rotations("v"), context=plan.context)
        found = Calibration(decoder, NoTokenizer(cfg.vocab_size), None).conditioning(plan.conditioning)
        decoder.store_keys(fmt.rotations("k"), found)
        return Engine("tiny", cfg, decoder, tokenizer, plan, fmt, defaults, 0)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Engine]:
    """``tiny(kv="bf16", context=500, sink=64, window=64, cfg=TINY)``: a random model of two layers, float32."""

    def make(kv: str = "bf16", context: int | None = 500, cfg: ModelConfig = TINY, **plan_options: Any) -> Engine:
        return build_engine(cfg, kv, context, **plan_options)

    return make


@pytest.fixture
def coded_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window have codes, however short it is: what is tested of coded pages has short windows here."""
    monkeypatch.setattr(allocation, "SHORT_WINDOW", 0)


@pytest.fixture(scope="session")
def scripted() -> Callable[..., tuple[Engine, ScriptedForward]]:
    """``scripted(kv="bf16", context=500, ...)``: an engine and the :class:`ScriptedForward` that it runs."""

    def make(kv: str = "bf16", context: int = 500, **plan_options: Any) -> tuple[Engine, ScriptedForward]:
        engine = build_engine(TINY, kv, context, **plan_options)
        engine.forward = engine.step.forward = script = ScriptedForward(engine.forward)
        return engine, script

    return make


@pytest.fixture(scope="session")
def demo() -> Iterator[Callable[..., Engine]]:
    """``demo(kv, dtype="float32")``: the embedded model on the CPU, loaded once for each choice."""
    engines: dict[tuple[str, str], Engine] = {}

    def load(kv: str, dtype: str = "float32") -> Engine:
        if (kv, dtype) not in engines:
            engines[kv, dtype] = Engine.load("octo-demo", kv=kv, dtype=dtype, device="cpu")
        return engines[kv, dtype]

    yield load
    engines.clear()


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., list[int]]:
    """``random_ids(n, seed=0)``: n ids of the tiny model that end nothing."""

    def make(count: int, seed: int = 0, vocab: int = 256) -> list[int]:
        return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    return make


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers sum exactly and round once: else the order of sums depends on how many matrices were joined."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.double() @ weight.double().T
        return (y if bias is None else y + bias).to(x.dtype)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
