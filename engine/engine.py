"""The engine: a loaded model, its KV arena, and the loop that turns token ids into token ids."""

import re
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import Decode, KVArena, Prefill
from octo_run.engine.plan import MemoryPlan, plan_memory
from octo_run.engine.sampling import Sampler, SamplingParams
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.codec import KVFormat, parse_kv
from octo_run.models.config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from octo_run.models.decoder import Decoder
from octo_run.models.hub import resolve
from octo_run.models.weights import load_weights
from octo_run.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Token:
    """A generated token. ``logprob`` is under the model's own distribution; the last one has a ``finish_reason``."""

    id: int
    logprob: float
    finish_reason: str | None


def choose_device(device: str | None) -> torch.device:
    """The device by name (``cpu``, ``cuda``, ``cuda:1``), or CUDA where there is one. Raises ``UsageError``."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", device)
    if match is None:
        raise UsageError(f"There is no device {device!r}; give --device cpu, cuda or cuda:N.")
    if device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise OctoError(f"The device {device} was asked for and PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    return torch.device(device)


def choose_dtype(dtype: str | torch.dtype | None, cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """The compute dtype: as asked, else the checkpoint's on CUDA and float32 on a CPU. Raises ``UsageError``."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else DTYPES.get(cfg.dtype, torch.bfloat16)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}; give --dtype bfloat16, float16 or float32.")
    return DTYPES[dtype]


class Engine:
    """A model ready to generate. Build it with :meth:`load`."""

    def __init__(self, name: str, cfg: ModelConfig, decoder: Decoder, tokenizer: Tokenizer, plan: MemoryPlan,
                 fmt: KVFormat, defaults: GenerationDefaults, seed: int) -> None:  # fmt: skip
        self.name, self.config, self.tokenizer, self.kv, self.defaults = name, cfg, tokenizer, fmt, defaults
        self.seed, self.plan = seed, plan
        self.device, self.dtype = torch.device(plan.device), plan.dtype
        self.max_context = plan.context
        self._decoder = decoder
        self.arena = KVArena(plan.shape, fmt, self.device)
        self._workspace: Tensor | None = None
        if self.device.type == "cuda":
            count = kernels.attention_workspace_bytes(
                plan.shape.sequences, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, self.device
            )
            self._workspace = torch.empty(count // 4, dtype=torch.float32, device=self.device)
        self._ids: list[int] = []  # the tokens whose keys and values sequence 0 holds
        self._holder: Generation | None = None  # whose tokens these are
        self.end_ids = frozenset((*defaults.eos_token_ids, *cfg.eos_token_ids, *tokenizer.eos_ids))

    @classmethod
    def load(
        cls,
        model: str | Path = "octo-demo",
        *,
        kv: str = "octopus3",
        device: str | None = None,
        max_context: int | None = None,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        sink: int = 64,
        window: int = 64,
        on_plan: Callable[[MemoryPlan], None] | None = None,
    ) -> "Engine":
        """Load ``model`` (a path, a name in the cache, or ``octo-demo``) with its KV cache in the format ``kv``.

        ``max_context`` is in tokens (None: what the model supports, as far as it fits); ``seed`` chooses the codec's
        rotation. ``on_plan`` is called with the memory plan before any weight is read. Raises ``UsageError`` for wrong
        arguments and ``OctoError`` for a model that cannot be loaded or does not fit.
        """
        path = resolve(str(model))
        cfg = load_config(path)
        where = choose_device(device)
        kind = choose_dtype(dtype, cfg, where)
        fmt = parse_kv(kv, cfg.head_dim, seed=seed, plain_dtype=kind)
        plan = plan_memory(cfg, fmt, device=where, dtype=kind, max_context=max_context, sink=sink, window=window)
        if on_plan is not None:
            on_plan(plan)
        tokenizer = load_tokenizer(path)
        defaults = load_generation_defaults(path)
        weights = load_weights(path, cfg, where, kind)
        with torch.inference_mode():
            decoder = Decoder(cfg, weights, _rotation(fmt.k.rotation), _rotation(fmt.v.rotation))
            return cls(str(model), cfg, decoder, tokenizer, plan, fmt, defaults, seed)

    def memory_plan(self) -> dict[str, int]:
        """Planned bytes by purpose, bytes per packed token, and the context in tokens."""
        return self.plan.as_dict()

    def memory_now(self) -> dict[str, int]:
        """Bytes as the allocator sees them on CUDA (``allocated``, ``peak``, ``reserved``); the process's on a CPU."""
        if self.device.type == "cuda":
            return {
                "allocated": torch.cuda.memory_allocated(self.device),
                "peak": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.memory_reserved(self.device),
            }
        unit = 1 if sys.platform == "darwin" else 1024
        return {"process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

    @torch.inference_mode()
    def logits(self, ids: list[int], step: int | None = None) -> Tensor:
        """Teacher-forced float32 logits ``[n, vocab]`` by the real cache path, ``step`` tokens a time (None: a chunk).

        Raises ``UsageError`` for ids that are no prompt (see ``generate``) and for a step longer than a chunk.
        """
        self._check_prompt(ids)
        chunk = self.plan.shape.chunk
        if step is not None and not 1 <= step <= chunk:
            raise UsageError(f"step is {step}; give 1 to {chunk} tokens.")
        self._holder = None
        self._reuse([])
        size = step or chunk
        parts = [self._decoder.logits(self._forward(ids[i : i + size])) for i in range(0, len(ids), size)]
        return torch.cat(parts)

    def generate(self, ids: list[int], params: SamplingParams | None = None) -> "Generation":
        """Continue ``ids``: an iterator of :class:`Token` with the figures of the run as attributes.

        Raises ``UsageError`` for no ids, more than the context holds, or ids outside the vocabulary.
        """
        self._check_prompt(ids)
        return Generation(self, list(ids), params or SamplingParams())

    def _check_prompt(self, ids: list[int]) -> None:
        if not ids:
            raise UsageError("The prompt is empty; give at least one token.")
        if len(ids) > self.max_context:
            raise UsageError(
                f"The prompt has {len(ids):,} tokens and the context holds {self.max_context:,}: "
                "shorten it or raise --ctx."
            )
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"The token id {wrong} is not in the vocabulary of {self.config.vocab_size:,}.")

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache back to the longest prefix of ``ids[:-1]`` that it holds; returns its length."""
        common = 0
        for have, want in zip(self._ids, ids[:-1], strict=False):
            if have != want:
                break
            common += 1
        kept = self.arena.truncate(0, common)
        del self._ids[kept:]
        return kept

    @torch.inference_mode()
    def _next_logits(self, ids: list[int]) -> Tensor:
        """Feed ``ids`` in chunks; returns the last token's float32 logits ``[vocab]``."""
        chunk = self.plan.shape.chunk
        hidden = None
        for i in range(0, len(ids), chunk):
            hidden = self._forward(ids[i : i + chunk])[-1:]
        assert hidden is not None
        return self._decoder.logits(hidden)[0]

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Tensor:
        """Hidden states ``[n, hidden]`` of the next ``ids`` of sequence 0, whose keys and values enter the cache."""
        start = self.arena.length[0]
        step: Prefill | Decode | None = None
        scale = self.config.head_dim**-0.5
        try:
            step = self.arena.decode(1) if len(ids) == 1 else self.arena.prefill(0, len(ids))
            attend, workspace = step.attend, self._workspace
            hidden = self._decoder.hidden(
                torch.tensor([ids], device=self.device),
                torch.arange(start, start + len(ids), device=self.device)[None],
                lambda layer, q, k, v: attend(layer, q, k, v, scale, workspace),
            )
            step.commit()
            self._ids += ids
        except BaseException:
            if step is None:
                self.arena.truncate(0, start)
            else:
                step.abort()
            del self._ids[self.arena.length[0] :]
            raise
        return hidden[0]


def _rotation(matrix: Tensor) -> Tensor | None:
    """None for the identity, so that plain formats pay nothing."""
    return None if torch.equal(matrix, torch.eye(matrix.shape[0], dtype=matrix.dtype)) else matrix


class Generation:
    """A running continuation: an iterator of tokens. Leaving it early loses nothing: the cache holds what was fed.

    Another one may run in between; whichever goes on first brings its own tokens back into the cache.
    """

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams) -> None:
        self.prompt_tokens, self.reused_tokens = len(ids), 0
        self.prefill_seconds, self.decode_seconds = 0.0, 0.0
        self.generated_tokens = 0
        self.finish_reason: str | None = None
        self._tokens = self._run(engine, ids, params)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the generation; further iteration yields nothing."""
        self._tokens.close()

    def _run(self, engine: Engine, ids: list[int], params: SamplingParams) -> Generator[Token, None, None]:
        ends = engine.end_ids | set(params.stop_ids)
        begun = time.perf_counter()
        sampler = Sampler(params, ids, engine.config.vocab_size, engine.device)
        engine._holder = self
        self.reused_tokens = engine._reuse(ids)
        token, logprob = sampler(engine._next_logits(ids[self.reused_tokens :]))
        self.prefill_seconds = time.perf_counter() - begun
        while True:
            self.generated_tokens += 1
            if token in ends:
                self.finish_reason = "stop"
            elif params.max_tokens is not None and self.generated_tokens >= params.max_tokens:
                self.finish_reason = "length"
            elif len(ids) == engine.max_context:
                self.finish_reason = "context"
            ids.append(token)
            yield Token(token, logprob, self.finish_reason)
            if self.finish_reason is not None:
                return
            begun = time.perf_counter()
            fresh = len(ids) - 1
            if engine._holder is not self:
                engine._holder = self
                fresh = engine._reuse(ids)
            token, logprob = sampler(engine._next_logits(ids[fresh:]))
            self.decode_seconds += time.perf_counter() - begun
