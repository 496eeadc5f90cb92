"""The engine: a loaded model, its KV arena, and the loop that turns token ids into token ids."""

import gc
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from octo_run.engine import system_memory
from octo_run.engine.allocation import AutoFormats, default_format, parse_formats
from octo_run.engine.arena import Chunk
from octo_run.engine.batching import Completion, complete
from octo_run.engine.calibration import Calibration
from octo_run.engine.generation import Generation, OnPrompt, PromptWatch
from octo_run.engine.grammar import Guide
from octo_run.engine.parts import Parts
from octo_run.engine.plan import MemoryPlan, free_memory, plan_memory
from octo_run.engine.random_model import NoTokenizer, read_shape
from octo_run.engine.reply import Reply
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.sampling_rules import breaking_tokens
from octo_run.engine.sequence import Sequence
from octo_run.engine.shared_beginning import shared_beginning
from octo_run.errors import OctoError, UsageError, expect, quoted, shown
from octo_run.kernels.codec import LayerFormats
from octo_run.models import weights as weight_files
from octo_run.models.config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from octo_run.models.decoder import Decoder
from octo_run.models.hub import resolve
from octo_run.models.kept_weights import KeptWeights
from octo_run.models.quantisation.importance import random_ids
from octo_run.models.quantisation.schemes import Scheme, head_scheme, matrix_dtype, refuse_packed, scheme_of
from octo_run.models.tensors import stored_config
from octo_run.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Sequences that decode together at most.
MAX_SEQUENCES = 64
#: Rows of logits that are computed at once when all are wanted.
LOGIT_ROWS = 256
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device by name, or CUDA where there is one.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``, say; None or ``auto`` to have it chosen.

    Raises:
        UsageError: A name that is none of these.
        OctoError: A CUDA device that PyTorch does not see.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = str(device).strip().lower()
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", device)
    if match is None:
        raise UsageError(f"There is no device {quoted(device)}; give --device cpu, cuda, cuda:N or auto.")
    if device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        instead = "give --device cpu" if count == 0 else f"give --device cuda:N with N = 0 to {count - 1}, or cpu"
        raise OctoError(f"The device {device} was asked for and PyTorch sees {count} CUDA devices: {instead}.")
    return torch.device(device)


def choose_dtype(dtype: str | torch.dtype | None, cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """The compute dtype: as asked, else the checkpoint's on CUDA and float32 on a CPU.

    Raises:
        UsageError: A dtype that is not supported.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    name = dtype.strip().lower() if isinstance(dtype, str) else dtype
    if name is None or name == "auto":
        return torch.float32 if device.type == "cpu" else DTYPES.get(cfg.dtype, torch.bfloat16)
    if not isinstance(name, str) or name not in DTYPES:
        raise UsageError(f"There is no dtype {quoted(dtype)}; the dtypes are {', '.join(DTYPES)}, auto.")
    return DTYPES[name]


#: What an engine holds on its device.
_HELD = ("_decoder", "arena", "forward", "step")


class Engine:
    """A model ready to generate. Build it with :meth:`load`; ``close`` it, or use it in a ``with`` block."""

    def __init__(self, name: str, cfg: ModelConfig, decoder: Decoder, tokenizer: Tokenizer, plan: MemoryPlan,
                 fmt: LayerFormats, defaults: GenerationDefaults, seed: int) -> None:  # fmt: skip
        self.name, self.config, self.tokenizer, self.kv, self.defaults = name, cfg, tokenizer, fmt, defaults
        self.seed, self.plan = seed, plan
        self.device, self.dtype = torch.device(plan.device), plan.dtype
        self.max_context = plan.context
        self._decoder = decoder
        parts = Parts.build(decoder, plan.shape, fmt, self.device)
        self.arena, self.forward = parts.arena, parts.forward
        #: Decode steps of the engine's sequences.
        self.step = parts.step
        #: Steps of one sequence in flight: on CUDA the next one is launched before the host has read this one's token.
        self.depth = 2 if self.device.type == "cuda" else 1
        ends = frozenset((*defaults.eos_token_ids, *cfg.eos_token_ids, *tokenizer.eos_ids))
        self.end_ids = ends = ends if isinstance(tokenizer, NoTokenizer) else tokenizer.thinking.ends(ends)
        if isinstance(tokenizer, Tokenizer):
            self.step.guide = lambda grammar, prompt, answer: Guide(grammar, tokenizer, ends, prompt, answer)
            self.step.breaking = lambda: breaking_tokens(tokenizer)

    def close(self) -> None:
        """Give back the memory of weights and cache; closing it again does nothing.

        Whatever is done with the engine afterwards raises ``UsageError``.
        """
        for name in _HELD:
            vars(self).pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def closed(self) -> bool:
        """Whether its memory was given back."""
        return "_decoder" not in vars(self)

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (
            f"<Engine {shown(self.name)}: {self.kv.name} cache, {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}, context {self.max_context:,}{state}>"
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _HELD:
                raise UsageError("The engine was closed: load it again.")
            raise AttributeError(f"an Engine has no attribute {name!r}")

    @classmethod
    def load(
        cls,
        model: str | Path = "octo-demo",
        *,
        kv: str | None = None,
        device: str | torch.device | None = None,
        max_context: int | None = None,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        sink: int = 64,
        window: int = 64,
        conditioning: str | None = None,
        weights: str | Scheme | None = None,
        head: str = "bf16",
        sequences: int = 1,
        cache_bytes: int | None = None,
        random_weights: ModelConfig | str | Path | None = None,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        before_weights: Callable[[Tokenizer, MemoryPlan], None] | None = None,
        on_measure: Callable[[int, int], None] | None = None,
        on_unkept: Callable[[str], object] | None = None,
    ) -> "Engine":
        """Load a model with its KV cache.

        Args:
            model: A path, a name in the cache, or ``octo-demo``; with ``random_weights`` a name for the shape.
            kv: The format of the cache: NAME, K:V, or auto:N, which chooses among ``oct2``, ``oct3`` and ``oct4`` for
                the keys and the values of each layer, N bytes of 128 numbers on average. Layers with a short window
                have ``bf16`` in any case (``allocation.SHORT_WINDOW``). None: ``oct3``, or ``bf16`` where heads have
                sizes for which there are no codes.
            max_context: In tokens (None: what the model's file says, as far as it fits).
            seed: Chooses the codec's rotation.
            conditioning: What is done to keys so that their code errs less (`models.conditioning`): ``off``, ``mean``
                or ``full`` (None: ``full``); nothing is done to keys without a code.
            weights: What the layers' matrices are stored as, whatever the arithmetic is in: ``auto`` (also None: as the
                files have them, in the dtype of the arithmetic; the command line's own choice on a CPU is int8, which
                changes results, so that a program has to ask for it), ``bf16`` (not quantised; in the dtype of the
                arithmetic, but on a CPU in bfloat16, the embedding and the head, too), ``fp32`` (not quantised), or
                ``fp8``, ``int8``, ``int4``, ``int4-128`` (`models.quantisation.schemes`), made layer by layer.
            head: What the embedding and the output head are stored as: ``bf16`` (not quantised) or ``int8``.
            sequences: The largest number of them that decode together; one may hold ``max_context`` tokens.
            cache_bytes: Bytes of the packed pages that the sequences share (None: as many as all of them need at
                ``max_context``; where that is None too, as many as fit).
            random_weights: A configuration, the path of one, or a name in `shapes.SHAPES`: the weights of this shape
                are made up, to measure it.
            on_plan: Called with the memory plan before any weight is read.
            before_weights: Called then with the tokenizer, too, if there is one: to check a prompt, say. What it raises
                ends the loading.
            on_measure: Called with layers and their number while ``auto:N`` measures how precise each must be.
            on_unkept: Called with a sentence if what a load measured or packed cannot be kept for the next one.

        Raises:
            UsageError: Wrong arguments.
            OctoError: A model that cannot be loaded or does not fit.
        """
        expect("model", model, str, Path)
        expect("kv", kv, str, none=True)
        expect("device", device, str, torch.device, none=True)
        for name, number in (("seed", seed), ("sink", sink), ("window", window), ("sequences", sequences)):
            expect(name, number, int)
        for name, limit in (("max_context", max_context), ("cache_bytes", cache_bytes)):
            expect(name, limit, int, none=True)
        expect("conditioning", conditioning, str, none=True)
        expect("weights", weights, str, Scheme, none=True)
        expect("head", head, str)
        scheme, of_head = scheme_of(weights), head_scheme(head)
        if not 1 <= sequences <= MAX_SEQUENCES:
            raise UsageError(f"The number of sequences is {sequences}; give 1 to {MAX_SEQUENCES}.")
        path: Path | None = None
        if random_weights is None:
            path = resolve(str(model))
            cfg = load_config(path)
            refuse_packed(path, cfg, weights)
        else:
            cfg, scheme = read_shape(random_weights), None if scheme is None else scheme.plain
        where = choose_device(device)
        kind = choose_dtype(dtype, cfg, where)
        fmt = parse_formats(default_format(cfg) if kv is None else kv, cfg, seed, kind)
        matrices = matrix_dtype(weights, cfg, where, kind)
        tokenizer: Tokenizer | NoTokenizer = NoTokenizer(cfg.vocab_size) if path is None else load_tokenizer(path)
        defaults = GenerationDefaults() if path is None else load_generation_defaults(path)
        system_memory.give_back()  # what reading a large vocabulary took

        def planned(cfg: ModelConfig) -> MemoryPlan:
            return plan_memory(
                cfg, fmt, device=where, dtype=kind, max_context=max_context, sink=sink, window=window,
                sequences=sequences, cache_bytes=cache_bytes, conditioning=conditioning,
                quantise=scheme, pack_embedding=of_head, matrices=matrices,
            )  # fmt: skip

        if packed := path is not None and cfg.quantisation is not None:  # which layers are, their tensors say
            cfg = stored_config(path, cfg)
        plan = planned(cfg)  # wrong arguments are refused before any weight is looked at
        if path is not None and not packed and (stored := stored_config(path, cfg)) != cfg:
            cfg, plan = stored, planned(stored)
        if on_plan is not None:
            on_plan(plan)
        if before_weights is not None and isinstance(tokenizer, Tokenizer):
            before_weights(tokenizer, plan)
        with torch.inference_mode():
            source: weight_files.Weights
            if path is None:
                source = weight_files.RandomWeights(cfg, where, kind, matrices=matrices)
            else:
                source = weight_files.StoredWeights(path, cfg, where, kind, matrices)
            turned = fmt.rotations("v")

            def made(source: weight_files.Weights) -> Decoder:
                ids = random_ids(cfg) if scheme is not None and scheme.weighted else None
                with system_memory.returning():
                    return Decoder(cfg, source, None, turned, scheme, ids, of_head, plan.context)

            if path is None or where.type != "cpu" or scheme is None or cfg.recurrent:
                decoder = made(source)
            else:
                turns = {len(one): one.numpy().tobytes() for one in turned if one is not None}
                unturned = [number for number, one in enumerate(turned) if one is None]
                factors = cfg.rope_factors(plan.context)  # all that the context decides of a decoder's tensors
                kept = KeptWeights(path, (cfg, kind, matrices, scheme, of_head, turns, factors, *unturned), on_unkept)
                shapes = weight_files.RandomWeights(cfg, "meta", kind, matrices=matrices)
                decoder = kept.decoder(made, shapes, source)
            calibration = Calibration(decoder, tokenizer, path, on_unkept)
            decoder.store_keys(fmt.rotations("k"), calibration.conditioning(plan.conditioning))
            if isinstance(fmt, AutoFormats):
                found = calibration.sensitivities(plan.conditioning, fmt.measured_with, on_measure, tuple(fmt.plain))
                fmt = fmt.chosen(found)
            if where.type == "cuda":
                torch.cuda.empty_cache()  # what fusing the weights left behind, before the arena asks for the rest
            else:
                system_memory.give_back()  # likewise, and what measuring keys took
            return cls(str(model), cfg, decoder, cast("Tokenizer", tokenizer), plan, fmt, defaults, seed)

    def memory_plan(self) -> dict[str, int]:
        """Planned bytes by purpose, bytes per packed token, and the context in tokens."""
        return self.plan.as_dict()

    def memory_now(self) -> dict[str, int]:
        """Bytes that are held now, by kind.

        Returns:
            On CUDA, as the allocator sees them: ``allocated``, ``peak``, ``reserved``, and the ``rounding`` in what is
            allocated (blocks that are larger than what was asked of them), which the plan leaves to the driver's share.
            On a CPU ``process_peak``, the most that the process held since its start or ``benchmark.forget_peak``,
            ``before_loading``, what it held before (PyTorch's own share), and ``engine_peak``, the difference, which is
            to be compared with the plan.
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
    def logits(self, prompt: str | Iterable[int], step: int | None = None) -> Tensor:
        """Teacher-forced logits by the real cache path.

        They take 4 n vocab bytes beside the memory plan; :meth:`logit_rows` gives them in blocks.

        Args:
            prompt: A text or its token ids.
            step: Tokens that are fed at a time (None: a chunk).

        Returns:
            Float32 ``[n, vocab]``.

        Raises:
            UsageError: Ids that are no prompt (see ``generate``), or a step longer than a chunk.
            OctoError: More bytes than the device has free.
        """
        ids = self.prompt_ids(prompt)
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

    def logit_rows(self, prompt: str | Iterable[int], step: int | None = None) -> Iterator[Tensor]:
        """The rows of :meth:`logits` in order, in blocks.

        Only the block at hand is held. They take a sequence of the engine until the last block is taken.

        Returns:
            An iterator of blocks ``[r, vocab]`` of 1 to ``LOGIT_ROWS`` rows.

        Raises:
            UsageError: As :meth:`logits` does.
        """
        ids = self.prompt_ids(prompt)
        self.check_prompt(ids)
        chunk = self.plan.shape.chunk
        if step is not None and not 1 <= step <= chunk:
            raise UsageError(f"step is {step}; give 1 to {chunk} tokens.")
        return self._logit_rows(ids, step or chunk)

    @torch.inference_mode()
    def _logit_rows(self, ids: list[int], size: int) -> Iterator[Tensor]:
        sequence = self.arena.open()
        try:
            for start in range(0, len(ids), size):
                hidden = self._forward(sequence, ids[start : start + size])
                for rows in torch.split(hidden, LOGIT_ROWS):
                    yield self._logits(rows)
        finally:
            sequence.discard()

    def sequence(self) -> Sequence:
        """A new sequence to be worked with by hand (:meth:`prefill`, :meth:`fill`, ``step``); it ends with ``close``.

        Raises:
            OctoError: All sequences that the engine was loaded for are in use.
        """
        return self.arena.open()

    @torch.inference_mode()
    def fill(self, sequence: Sequence, length: int, seed: int = 0) -> None:
        """Make the sequence hold ``length`` tokens of Gaussian keys and values, to measure at a depth.

        Raises:
            UsageError: More tokens than the context holds.
        """
        self.arena.fill(sequence, length, seed)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, prompt: str | Iterable[int]) -> Tensor:
        """Append a text or token ids to the sequence.

        Returns:
            The last token's float32 logits ``[vocab]``.

        Raises:
            UsageError: Ids that are no prompt or do not fit.
        """
        ids = self.prompt_ids(prompt)
        self.check_prompt(ids)
        known = sequence.ids
        held = len(known)
        if held + len(ids) > self.max_context:
            raise UsageError(
                f"The sequence holds {held:,} tokens: {len(ids):,} more do not fit into the context of "
                f"{self.max_context:,}."
            )
        return self._logits(self.feed(sequence, (known + ids)[sequence.cancel() :]))[0]

    def generate(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
        shared: int = 0,
        answered: int = 0,
    ) -> "Generation":
        """Continue a prompt.

        Args:
            prompt: A text or its token ids.
            on_prompt: Called with the tokens read so far and the tokens to read (those not reused): first with 0, then
                whenever the device is through with a chunk, last when the first token is drawn; and so again if another
                generation took its place in between. What it raises ends the generation; the cache keeps what was fed.
            shared: How many of the prompt's first tokens others will begin with, too (a document, say): recurrent
                layers and those with windows keep a snapshot there, so that these need not be read again.
            answered: How many of the prompt's last tokens are the beginning of the answer: a grammar, penalties of the
                answer's tokens and the noise of a seed go on behind them.

        Returns:
            An iterator of :class:`Token` with the figures of the run as attributes.

        Raises:
            UsageError: No ids, more than the context holds, ids outside the vocabulary, stop strings where there is no
                tokenizer, what is neither text nor ids, fewer than 0 ``shared`` tokens, or more tokens of an answer
                than the prompt has.
        """
        ids = self.prompt_ids(prompt)
        self.check_prompt(ids)
        expect("params", params, SamplingParams, none=True)
        expect("shared", shared, int)
        if shared < 0:
            raise UsageError(f"shared is {shared}; give 0 or more tokens.")
        expect("answered", answered, int)
        if not 0 <= answered <= len(ids):
            raise UsageError(f"answered is {answered} and the prompt has {len(ids):,} tokens: give 0 to {len(ids)}.")
        if params is not None:
            self.check_params(params)
        return Generation(self, ids, params or SamplingParams(), on_prompt, shared, answered)

    def chat(
        self,
        messages: Sequence_[Mapping[str, Any]],
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
    ) -> Reply:
        """Answer a conversation.

        The cache is used for what it holds of the conversation. (:class:`Session` keeps the turns itself, and drops the
        oldest ones when the context is full.)

        Args:
            messages: Dicts with ``role`` and ``content``, as the model's chat template wants them.
            params: None for the model's own defaults.

        Returns:
            An iterator of pieces of text.

        Raises:
            UsageError: What is no conversation or too long.
            OctoError: The template refuses it, or there is none.
        """
        self.check_chat()
        expect("messages", messages, list, tuple)
        for number, message in enumerate(messages):
            expect(f"messages[{number}]", message, dict)
        ids = self.tokenizer.chat([dict(message) for message in messages])
        shared = shared_beginning(ids, messages, self.tokenizer.chat) if self.arena.takes_snapshots else 0
        return Reply(self.generate(ids, params or SamplingParams.from_defaults(self.defaults), on_prompt, shared))

    def generate_batch(
        self, prompts: Iterable[str | Iterable[int]], params: SamplingParams | Sequence_[SamplingParams] | None = None
    ) -> Iterator[Completion]:
        """Continue many prompts together.

        As many run at a time as the engine has sequences; the next one begins as soon as one has ended. What prompts
        have in common is read once, as far as the cache holds it.

        Args:
            params: For all, or one for each.

        Returns:
            An iterator of finished :class:`Completion`, whichever is done first.

        Raises:
            UsageError: As :meth:`generate` does, naming the prompt.
            OctoError: Sequences that are worked with by hand, or another batch, leave it none, or no page.
        """
        if isinstance(prompts, (str, bytes, dict)) or not isinstance(prompts, Iterable):
            raise UsageError(f"prompts is {quoted(prompts)}; give a list of prompts, each a text or token ids.")
        return complete(self, prompts, params)

    def prompt_ids(self, prompt: object) -> list[int]:
        """Token ids of a prompt: of a text as the model wants a text to begin, else the ids as plain integers.

        Raises:
            UsageError: What is neither.
        """
        if isinstance(prompt, str):
            return self.tokenizer.prompt(prompt)
        given = prompt
        if isinstance(prompt, Tensor) or hasattr(prompt, "tolist"):  # NumPy's arrays have it, too
            prompt = prompt.tolist()
        if isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes, dict)):
            ids = list(prompt)
            try:
                if not any(isinstance(i, bool) for i in ids):
                    return [operator.index(i) for i in ids]
            except TypeError:  # no whole number is among them
                pass
        kind = type(given).__name__ + (f" and shape {[*given.shape]}" if hasattr(given, "shape") else "")
        raise UsageError(f"A prompt is a text or one list of token ids (whole numbers); this is of type {kind}.")

    def check_chat(self) -> None:
        """Check that the model can chat.

        Raises:
            OctoError: A model without a chat template.
        """
        if not self.tokenizer.has_chat_template:
            raise OctoError(f"The model {self.name} has no chat template; continue text with `octo-run generate`.")

    def check_prompt(self, ids: list[int]) -> None:
        """Check that ids are a prompt.

        Raises:
            UsageError: Ids that are none.
        """
        if not ids:
            raise UsageError("The prompt is empty; give at least one token.")
        self.plan.check_length(len(ids))
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"The token id {wrong} is not in the vocabulary of {self.config.vocab_size:,}.")

    def check_params(self, params: SamplingParams) -> None:
        """Check that rules of sampling suit the model.

        Raises:
            UsageError: A bias of tokens that there are not, or a grammar where there is no tokenizer.
        """
        most = min(self.config.vocab_size, self.tokenizer.vocab_size)  # a model may have rows without tokens
        wrong = next((token for token, _ in params.logit_bias if token >= most), None)
        if wrong is not None:
            raise UsageError(
                f"logit_bias names the token {wrong} and the vocabulary has {most:,}: give ids below that."
            )
        if params.grammar is not None and self.step.guide is None:
            raise UsageError("A model with random weights has no tokenizer, so no grammar can be followed.")

    @torch.inference_mode()
    def feed(self, sequence: Sequence, ids: list[int], on_prompt: OnPrompt | None = None) -> Tensor:
        """Append ``ids`` to the sequence in chunks.

        Args:
            on_prompt: See :class:`PromptWatch`; that the last chunk is read is for the caller to tell.

        Returns:
            The last token's normed state ``[1, hidden]``.
        """
        chunk = self.plan.shape.chunk
        watch = None if on_prompt is None else PromptWatch(on_prompt, len(ids), self.device)
        hidden = None
        for i in range(0, len(ids), chunk):
            hidden = self._forward(sequence, ids[i : i + chunk])[-1:]
            if watch is not None:
                watch.fed(min(i + chunk, len(ids)))
        assert hidden is not None
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[n, vocab]`` of normed states ``[n, hidden]``."""
        return self.forward.logits(hidden).to(torch.float32)

    def _forward(self, sequence: Sequence, ids: list[int]) -> Tensor:
        """Normed states ``[n, hidden]`` of the next ``ids`` of a sequence, at most a chunk, which enter the cache."""
        return self.read_chunks([self.arena.prefill(sequence, ids)])

    @torch.inference_mode()
    def read_chunks(self, chunks: list[Chunk]) -> Tensor:
        """Read chunks of several sequences, which enter the cache.

        Args:
            chunks: In all no more tokens than one chunk may have.

        Returns:
            Their normed states ``[n, hidden]``.
        """
        hidden = self.forward.chunks(chunks)
        for chunk in chunks:
            chunk.commit()
        return hidden
