"""Small engines for the engine's tests: random models, scripted models, a byte tokenizer with a chat template."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, plan_memory
from octo_run.kernels.codec import parse_kv
from octo_run.models.config import GenerationDefaults, ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.weights import random_weights
from octo_run.tokenizer.stream import StreamingDetokenizer

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


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 begins a text, 257 ends a turn, 258 begins one."""

    vocab_size, bos_id, eos_ids, adds_bos, opening = 260, 256, (257,), True, [256]
    has_chat_template = True

    def encode(self, text: str, **_: bool) -> list[int]:
        return list(text.encode())

    def prompt(self, text: str) -> list[int]:
        return [256, *self.encode(text)]

    def stream(self, after: Sequence[int] = ()) -> StreamingDetokenizer:
        return StreamingDetokenizer(lambda i: bytes([i]) if i < 256 else b"", frozenset(), False)

    def decode(self, ids: list[int]) -> str:
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.finish()

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        ids = [256]
        for message in messages:
            if message["content"] == "refuse":
                raise ValueError("the template refuses")
            ids += [258, ord(message["role"][0]), *message["content"].encode(), 257]
        return [*ids, 258, ord("a")]


class ScriptedDecoder:
    """A model that says what it is told: the token after position p is ``script[p + 1]`` (257, the end, beyond it).

    Its keys and values depend on token, position and layer. ``fail_at`` = (position, layer) raises there, once.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg, self.script = cfg, dict[int, int]()
        self.fail_at: tuple[int, int] | None = None
        self.failure: type[BaseException] = KeyboardInterrupt
        self.fed: list[list[int]] = []

    def hidden(
        self, ids: Tensor, positions: Tensor, attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        self.fed.append(ids[0].tolist())
        shape = (*ids.shape, self.cfg.num_kv_heads, self.cfg.head_dim)
        for layer in range(self.cfg.num_layers):
            if self.fail_at is not None and self.fail_at[0] in positions[0] and self.fail_at[1] == layer:
                self.fail_at = None
                raise self.failure
            k = (ids + positions * 0.1 + layer)[..., None, None].expand(shape).to(torch.float32).contiguous()
            attention(layer, k.repeat_interleave(self.cfg.num_heads // self.cfg.num_kv_heads, 2), k, -k)
        return positions[..., None].to(torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        following = [self.script.get(int(p) + 1, 257) for p in hidden.flatten()]
        logits = torch.zeros(len(following), self.cfg.vocab_size)
        logits[torch.arange(len(following)), following] = 9.0
        return logits.view(*hidden.shape[:-1], -1)

    def say(self, start: int, text: str | bytes | list[int]) -> None:
        """From position ``start`` on, say ``text``, then end."""
        ids = list(text.encode() if isinstance(text, str) else text)
        self.script = {start + i: token for i, token in enumerate(ids)}


def build_engine(decoder: Any, cfg: ModelConfig, kv: str, context: int | None, **plan_options: Any) -> Engine:
    dtype = plan_options.pop("dtype", torch.float32)
    fmt = parse_kv(kv, cfg.head_dim, plain_dtype=dtype)
    plan = plan_memory(cfg, fmt, device=torch.device("cpu"), dtype=dtype, max_context=context, **plan_options)
    with torch.inference_mode():
        if decoder is None:
            rotations = [None if codec.name == "bf16" else codec.rotation for codec in (fmt.k, fmt.v)]
            decoder = Decoder(cfg, random_weights(cfg, "cpu", dtype, seed=1), *rotations)
        return Engine("tiny", cfg, decoder, ByteTokenizer(), plan, fmt, GenerationDefaults(), 0)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Engine]:
    """``tiny(kv="bf16", context=500, sink=64, window=64, cfg=TINY)``: a random model of two layers, float32."""

    def make(kv: str = "bf16", context: int | None = 500, cfg: ModelConfig = TINY, **plan_options: Any) -> Engine:
        return build_engine(None, cfg, kv, context, **plan_options)

    return make


@pytest.fixture(scope="session")
def scripted() -> Callable[..., tuple[Engine, ScriptedDecoder]]:
    """``scripted(kv="bf16", context=500, ...)``: an engine and the :class:`ScriptedDecoder` that it runs."""

    def make(kv: str = "bf16", context: int = 500, **plan_options: Any) -> tuple[Engine, ScriptedDecoder]:
        decoder = ScriptedDecoder(TINY)
        return build_engine(decoder, TINY, kv, context, **plan_options), decoder

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
