"""The engine: a loaded model, its KV arena, and the loop that turns token ids into token ids."""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine import system_memory
from octo_run.engine.arena import Decode, KVArena, Prefill
from octo_run.engine.forward import Forward
from octo_run.engine.generation import Generation, OnPrompt, PromptWatch
from octo_run.engine.key_means import KeyMeans
from octo_run.engine.plan import MemoryPlan, free_memory, plan_memory
from octo_run.engine.random_model import NoTokenizer, read_shape
from octo_run.engine.sampling import BatchSampler, SamplingParams
from octo_run.engine.step import DecodeStep
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.codec import KVFormat, parse_kv
from octo_run.models import weights as weight_files
from octo_run.models.config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from octo_run.models.decoder import Decoder
from octo_run.models.hub import resolve
from octo_run.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Sequences that decode together at most.
MAX_SEQUENCES = 64
#: Rows of logits that are computed at once when all are wanted.
LOGIT_ROWS = 256
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        means = KeyMeans(plan.shape, fmt.k.rotation, decoder.inv_freq) if plan.shape.mean_heads else None
        self.arena = KVArena(plan.shape, fmt, self.device, means)
        #: Whether prompts and steps run on kept buffers, and tokens ahead of what the host has read: always on CUDA.
        self.ahead = self.device.type == "cuda"
        self._workspace: Tensor | None = None
        if self.device.type == "cuda":
            count = kernels.attention_workspace_bytes(
                plan.shape.sequences, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, self.device, plan.shape.chunk,
                plan.shape.context,
            )  # fmt: skip
            self._workspace = torch.zeros(count // 4, dtype=torch.float32, device=self.device)
            self.step  # noqa: B018 (its memory is taken now)
        self._ids: list[int] = []  # the tokens whose keys and values sequence 0 holds
        self._holder: object = None  # whose tokens these are: a generation's, or those of logits in blocks
        self.end_ids = frozenset((*defaults.eos_token_ids, *cfg.eos_token_ids, *tokenizer.eos_ids))

    @classmethod
    def load(
        cls,
        model: str | Path = "octo-demo",
        *,
        kv: str = "oct3",
        device: str | None = None,
        max_context: int | None = None,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        sink: int = 64,
        window: int = 64,
        key_mean: bool | None = None,
        sequences: int = 1,
        random_weights: ModelConfig | str | Path | None = None,
        on_plan: Callable[[MemoryPlan], None] | None = None,
    ) -> "Engine":
        """Load ``model`` (a path, a name in the cache, or ``octo-demo``) with its KV cache in the format ``kv``.

        ``max_context`` is in tokens (None: what the model supports, as far as it fits); ``seed`` chooses the codec's
        rotation. ``key_mean``: keep the mean of a head's keys out of their code, which makes decode attention up to one
        and a half times as long (None: where the model's keys have a bias). ``sequences`` is the largest number of them
        that ``step`` decodes together, each with ``max_context`` tokens. ``random_weights`` (a configuration, the path
        of one, or a name in `shapes.SHAPES`) makes up the weights of a shape, to measure it; ``model`` is then a name
        for it. ``on_plan`` is called with the memory plan before any weight is read. Raises ``UsageError`` for wrong
        arguments and ``OctoError`` for a model that cannot be loaded or does not fit.
        """
        if not 1 <= sequences <= MAX_SEQUENCES:
            raise UsageError(f"The number of sequences is {sequences}; give 1 to {MAX_SEQUENCES}.")
        path: Path | None = None
        if random_weights is None:
            path = resolve(str(model))
            cfg = weight_files.stored_config(path, load_config(path))
        else:
            cfg = read_shape(random_weights)
        where = choose_device(device)
        kind = choose_dtype(dtype, cfg, where)
        fmt = parse_kv(kv, cfg.head_dim, seed=seed, plain_dtype=kind)
        tokenizer: Tokenizer | NoTokenizer = NoTokenizer(cfg.vocab_size) if path is None else load_tokenizer(path)
        defaults = GenerationDefaults() if path is None else load_generation_defaults(path)
        plan = plan_memory(
            cfg, fmt, device=where, dtype=kind, max_context=max_context, sink=sink, window=window, sequences=sequences,
            key_mean=key_mean,
        )  # fmt: skip
        if on_plan is not None:
            on_plan(plan)
        with torch.inference_mode():
            if path is None:
                weights = weight_files.random_weights(cfg, where, kind)
            else:
                weights = weight_files.load_weights(path, cfg, where, kind)
            decoder = Decoder(cfg, weights, _rotation(fmt.k.rotation), _rotation(fmt.v.rotation))
            if where.type == "cuda":
                torch.cuda.empty_cache()  # what fusing the weights left behind, before the arena asks for the rest
            return cls(str(model), cfg, decoder, cast("Tokenizer", tokenizer), plan, fmt, defaults, seed)

    @cached_property
    def forward(self) -> Forward:
        """The layers on buffers that are kept: for whole chunks if ``ahead``, else for decode steps alone."""
        sequences = self.plan.shape.sequences
        rows = max(self.plan.shape.chunk, sequences) if self.ahead else sequences
        return Forward(self._decoder, self.arena, rows, self._workspace)

    @cached_property
    def step(self) -> DecodeStep:
        """Decode steps of the engine's sequences, whose first tokens :meth:`prefill` or :meth:`fill` put there."""
        return DecodeStep(self.forward, BatchSampler(self.plan.shape.sequences, self.config.vocab_size, self.device))

    def memory_plan(self) -> dict[str, int]:
        """Planned bytes by purpose, bytes per packed token, and the context in tokens."""
        return self.plan.as_dict()

    def memory_now(self) -> dict[str, int]:
        """Bytes as the allocator sees them on CUDA: ``allocated``, ``peak``, ``reserved``, and the ``rounding`` in what
        is allocated (blocks that are larger than what was asked of them), which the plan leaves to the driver's share.

        On a CPU ``process_peak``, the most that the process held since its start or ``benchmark.forget_peak``,
        ``before_loading``, what it held before (PyTorch's own share), and ``engine_peak``, the difference, which is to
        be compared with the plan.
        """
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            allocated = stats["allocated_bytes.all.current"]
            return {
                "allocated": allocated,
                "peak": stats["allocated_bytes.all.peak"],
                "reserved": stats["reserved_bytes.all.current"],
                "rounding": allocated - stats["requested_bytes.all.current"],
            }
        peak, before = system_memory.resident_peak(), self.plan.before
        return {"engine_peak": max(0, peak - before), "before_loading": before, "process_peak": peak}

    @torch.inference_mode()
    def logits(self, ids: list[int], step: int | None = None) -> Tensor:
        """Teacher-forced float32 logits ``[n, vocab]`` by the real cache path, ``step`` tokens a time (None: a chunk).

        They take 4 n vocab bytes beside the memory plan; :meth:`logit_rows` gives them in blocks. Raises ``UsageError``
        for ids that are no prompt (see ``generate``) and for a step longer than a chunk, and ``OctoError`` for more
        than the device has free.
        """
        blocks = self.logit_rows(ids, step)
        row = 4 * self.config.vocab_size
        needed, free = (len(ids) + min(LOGIT_ROWS, len(ids))) * row, free_memory(self.device)
        if needed > free:
            raise OctoError(
                f"The logits of {len(ids):,} tokens take {needed / 2**30:.2f} GiB and {self.device} has "
                f"{free / 2**30:.2f} GiB free: give fewer tokens, or take blocks of them from Engine.logit_rows."
            )
        out = torch.empty(len(ids), self.config.vocab_size, device=self.device)
        done = 0
        for rows in blocks:
            out[done : done + len(rows)] = rows
            done += len(rows)
        return out

    def logit_rows(self, ids: list[int], step: int | None = None) -> Iterator[Tensor]:
        """The rows of :meth:`logits` in order, in blocks ``[r, vocab]`` of 1 to ``LOGIT_ROWS`` rows.

        Only the block at hand is held. Raises ``UsageError`` as :meth:`logits` does, and where the engine does
        something else before the last block is taken.
        """
        self._check_prompt(ids)
        chunk = self.plan.shape.chunk
        if step is not None and not 1 <= step <= chunk:
            raise UsageError(f"step is {step}; give 1 to {chunk} tokens.")
        return self._logit_rows(list(ids), step or chunk)

    @torch.inference_mode()
    def _logit_rows(self, ids: list[int], size: int) -> Iterator[Tensor]:
        self._holder = mark = object()
        self._reuse([])
        for start in range(0, len(ids), size):
            hidden = self._forward(ids[start : start + size])
            for rows in torch.split(hidden, LOGIT_ROWS):
                yield self._logits(rows)
                if self._holder is not mark:
                    raise UsageError("The engine did something else between two blocks of logits: take them all first.")

    @torch.inference_mode()
    def fill(self, seq: int, length: int, seed: int = 0) -> None:
        """Make sequence ``seq`` hold ``length`` tokens of Gaussian keys and values, to measure at a depth.

        Raises ``UsageError`` for a sequence that there is not, and for more tokens than the context holds.
        """
        self._check_sequence(seq)
        self._settle()
        self.arena.fill(seq, length, seed)
        if seq == 0:
            self._holder, self._ids = None, [-1] * length  # no prompt has them

    @torch.inference_mode()
    def prefill(self, ids: list[int], seq: int = 0) -> Tensor:
        """Append ``ids`` to sequence ``seq``; the last token's float32 logits ``[vocab]``.

        Raises ``UsageError`` for a sequence that there is not, and for ids that are no prompt or do not fit.
        """
        self._check_sequence(seq)
        self._check_prompt(ids)
        self._settle()
        self._holder = None
        if self.arena.length[seq] + len(ids) > self.max_context:
            raise UsageError(
                f"Sequence {seq} holds {self.arena.length[seq]:,} tokens: {len(ids):,} more do not fit into the "
                f"context of {self.max_context:,}."
            )
        return self._next_logits(ids, seq)

    def generate(
        self, ids: list[int], params: SamplingParams | None = None, on_prompt: OnPrompt | None = None
    ) -> "Generation":
        """Continue ``ids``: an iterator of :class:`Token` with the figures of the run as attributes.

        ``on_prompt`` is called with the tokens read so far and the tokens to read (those not reused): first with 0,
        then whenever the device is through with a chunk, last when the first token is drawn; and so again if another
        generation ran in between. What it raises ends the generation; the cache keeps what was fed. Raises
        ``UsageError`` for no ids, more than the context holds, ids outside the vocabulary, or stop strings where there
        is no tokenizer.
        """
        self._check_prompt(ids)
        return Generation(self, list(ids), params or SamplingParams(), on_prompt)

    def _check_sequence(self, seq: int) -> None:
        if not 0 <= seq < self.plan.shape.sequences:
            raise UsageError(f"There is no sequence {seq}: the engine was loaded for {self.plan.shape.sequences}.")

    def _settle(self) -> None:
        """Take back the steps that run ahead of what was read."""
        if "step" in vars(self):
            self.step.cancel()
        del self._ids[self.arena.length[0] :]

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
        self._settle()
        common = 0
        for have, want in zip(self._ids, ids[:-1], strict=False):
            if have != want:
                break
            common += 1
        kept = self.arena.truncate(0, common)
        del self._ids[kept:]
        return kept

    def _next_logits(self, ids: list[int], seq: int = 0, on_prompt: OnPrompt | None = None) -> Tensor:
        """Feed ``ids`` in chunks; returns the last token's float32 logits ``[vocab]``."""
        with torch.inference_mode():
            return self._logits(self._next_hidden(ids, seq, on_prompt))[0]

    @torch.inference_mode()
    def _next_hidden(self, ids: list[int], seq: int = 0, on_prompt: OnPrompt | None = None) -> Tensor:
        """Feed ``ids`` in chunks; returns the last token's state ``[1, hidden]``, as :meth:`_forward` gives it.

        ``on_prompt``: see :class:`PromptWatch`; that the last chunk is read is for the caller to tell.
        """
        chunk = self.plan.shape.chunk
        watch = None if on_prompt is None else PromptWatch(on_prompt, len(ids), self.device)
        hidden = None
        for i in range(0, len(ids), chunk):
            hidden = self._forward(ids[i : i + chunk], seq)[-1:]
            if watch is not None:
                watch.fed(min(i + chunk, len(ids)))
        assert hidden is not None
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[n, vocab]`` of what :meth:`_forward` gave."""
        if self.ahead:
            return self.forward.logits(hidden).to(torch.float32)
        return self._decoder.logits(hidden)

    @torch.inference_mode()
    def _forward(self, ids: list[int], seq: int = 0) -> Tensor:
        """States ``[n, hidden]`` of the next ``ids`` of a sequence, whose keys and values enter the cache."""
        start = self.arena.length[seq]
        step: Prefill | Decode | None = None
        try:
            step = self.arena.decode(1) if len(ids) == 1 and seq == 0 else self.arena.prefill(seq, len(ids))
            hidden = self._hidden(ids, step) if self.ahead else self._hidden_eager(ids, start, step)
            step.commit()
            if seq == 0:
                self._ids += ids
        except BaseException:
            if step is None:
                self.arena.truncate(seq, start)
            else:
                step.abort()
            del self._ids[self.arena.length[0] :]
            raise
        return hidden

    def _hidden(self, ids: list[int], step: Prefill | Decode) -> Tensor:
        on_device = self.forward.upload(ids)
        if isinstance(step, Decode):
            return self.forward.step(on_device, step.max_length)
        return self.forward.chunk(on_device, step)

    def _hidden_eager(self, ids: list[int], start: int, step: Prefill | Decode) -> Tensor:
        attend, scale = step.attend, self.config.head_dim**-0.5
        return self._decoder.hidden(
            torch.tensor([ids]),
            torch.arange(start, start + len(ids))[None],
            lambda layer, q, k, v: attend(layer, q, k, v, scale, None),
        )[0]


def _rotation(matrix: Tensor) -> Tensor | None:
    """None for the identity, so that plain formats pay nothing."""
    return None if torch.equal(matrix, torch.eye(matrix.shape[0], dtype=matrix.dtype)) else matrix
