"""The memory plan: what an engine will hold on its device, computed before anything is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from octo_run.engine import system_memory
from octo_run.engine.allocation import AutoFormats, parse_formats
from octo_run.engine.arena import PAGE, ArenaShape
from octo_run.engine.forward import buffer_bytes
from octo_run.engine.parts import Parts, held_bytes
from octo_run.engine.recurrent_state import RecurrentShape
from octo_run.engine.window_pages import WindowShape
from octo_run.engine.working_bytes import library_workspace, loading_bytes, temporary_bytes
from octo_run.errors import OctoError, UsageError, quoted
from octo_run.kernels.codec import LayerFormats
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import CONDITIONINGS, ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.delta_net import DeltaNetSpec
from octo_run.models.linear import Quantise
from octo_run.models.specs import layer_specs
from octo_run.models.weights import RandomWeights

#: Tokens that go through the layers together in prefill; on CUDA fewer where their buffers would take too much memory.
CHUNK = {"cuda": 4096, "cpu": 512}
#: Bytes left to the driver on CUDA: kernels, graphs, the rounding of allocations.
DRIVER_BYTES = 640 * 2**20
#: Share of the free memory that ``--ctx auto`` may take (the rest is for other programs).
AUTO_SHARE = {"cuda": 0.92, "cpu": 0.5}

#: Snapshots of recurrent states take at most the so-manieth part of the free memory, beside two for each sequence, and
#: those of layers with windows at most as much.
SNAPSHOT_SHARE = 32

_NO_LIMIT = 2**62  # tokens

#: The parts of a plan, which add up to its total.
PARTS = ("weights", "arena", "full_precision", "recurrent", "workspace", "graphs", "logits")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose on one device, and the context that they hold.

    They are those of the engine's own tensors, made on the ``meta`` device to be counted. ``free``, ``before`` and
    ``loading`` are not in the sum.

    Attributes:
        coded: Whether keys of any layer have a code.
        weight_format: What the weights are stored as (``Decoder.weight_format``).
        free: What is left to an engine.
        before: What the process held in memory when the plan was made if the device is a CPU (PyTorch, tokenizer).
        loading: The bytes held at most while weights are fused, before anything else is there.
        longest: Tokens of the longest context that the model has.
        arena: Packed pages, their table, and what is done to keys (`models.conditioning`).
        full_precision: Sinks, windows and the staging buffer.
        recurrent: States of recurrent layers and their snapshots.
        workspace: Partial results of attention, the matrix-product library's workspace and the activations of a chunk
            or a step.
        graphs: What recorded steps take of their own.
        logits: The logits of a step and what the sampler keeps for each sequence.
    """

    kv: str
    coded: bool
    conditioning: str
    weight_format: str
    device: str
    dtype: torch.dtype
    shape: ArenaShape
    free: int
    before: int
    loading: int
    longest: int
    weights: int
    arena: int
    full_precision: int
    recurrent: int
    workspace: int
    graphs: int
    logits: int
    measure: Callable[[ArenaShape], dict[str, int]] = field(repr=False, compare=False)

    @property
    def context(self) -> int:
        """Tokens that one sequence can hold."""
        return self.shape.context

    @property
    def shorten(self) -> str:
        """What to do about a text that the context does not hold."""
        if self.context >= self.longest:
            return "shorten it, this model's context cannot be longer"
        return f"shorten it, or load the model with a longer context (max_context or --ctx, {self.longest} at most)"

    def check_length(self, tokens: int) -> None:
        """Check that the context holds a prompt of so many tokens.

        Raises:
            UsageError: It does not.
        """
        if tokens > self.context:
            raise UsageError(
                f"The prompt has {tokens:,} tokens and the context holds {self.context:,}: {self.shorten}."
            )

    @property
    def total(self) -> int:
        """All bytes of the plan."""
        return sum(int(getattr(self, part)) for part in PARTS)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more packed token takes: codes and norms of K and V, of all KV heads and all layers that have
        no window."""
        return self.shape.token_bytes

    @property
    def windows(self) -> list[dict[str, int]]:
        """Of each group of layers with a window: ``layers``, ``window`` in tokens, ``bytes_per_token``, and the
        ``bytes`` of the pages that all sequences together hold of it, however long they are."""
        s = self.shape
        return [
            {
                "layers": len(one.layers),
                "window": one.window,
                "bytes_per_token": one.token_bytes,
                "bytes": PAGE * one.token_bytes * one.pages(s.sequences, s.max_pages, s.chunk),
            }
            for one in s.windows
        ]

    def bytes_read(self, tokens: float) -> float:
        """Bytes of pages that a step of one sequence of so many tokens reads, if all of them were packed."""
        seen = (min(tokens, one["window"]) * one["bytes_per_token"] for one in self.windows)
        return tokens * self.bytes_per_token + sum(seen)

    @property
    def all_in_bytes_per_token(self) -> float:
        """All bytes of the cache, recurrent states and snapshots included, divided by the context."""
        return (self.arena + self.full_precision + self.recurrent) / (self.shape.sequences * self.context)

    def of(self, shape: ArenaShape) -> "MemoryPlan":
        """The plan for another shape of the arena."""
        changes: dict[str, Any] = self.measure(shape)
        return replace(self, shape=shape, **changes)

    def tokens_that_fit(self, budget: int | None = None) -> int:
        """The longest context of one sequence whose plan stays within ``budget`` bytes (default: the free memory)."""
        alone = replace(self, shape=replace(self.shape, sequences=1))
        pages = alone.pages_that_fit(self.free if budget is None else budget, _NO_LIMIT)
        return 0 if pages is None else self.shape.with_pages(pages, _NO_LIMIT).context

    def pages_that_fit(self, budget: int, limit: int) -> int | None:
        """The largest number of pages whose plan stays within ``budget`` bytes.

        Args:
            limit: Tokens of the context up to which one sequence may have all of the pages.

        Returns:
            The number, None if there is no room even without pages.
        """

        def total(pages: int) -> int:
            return self.of(self.shape.with_pages(pages, limit)).total

        least, many = total(0), 1024
        if least > budget or self.loading > budget:
            return None
        # Bytes grow evenly with pages, but for work space at the beginning: a guess, then the edge beside it.
        pages = max(0, (budget - least) * many // max(1, total(many) - least))
        step = 1
        while total(pages) > budget:
            pages, step = max(0, pages - step), 2 * step
        above, step = pages + 1, 1
        while total(above) <= budget:
            pages, above, step = above, above + step, 2 * step
        while above - pages > 1:
            middle = (pages + above) // 2
            pages, above = (middle, above) if total(middle) <= budget else (pages, middle)
        return pages

    def as_dict(self) -> dict[str, int]:
        """Bytes by purpose, ``bytes_per_token`` and ``context`` in tokens."""
        names = (*PARTS, "total", "bytes_per_token", "context")
        return {name: int(getattr(self, name)) for name in names}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now; for a CPU see :func:`system_memory.available`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an engine that is gone has left with the allocator is free, too
        return int(torch.cuda.mem_get_info(device)[0])
    system_memory.give_back()  # likewise
    return system_memory.available()


def _chunk(cfg: ModelConfig, dtype: torch.dtype, device: torch.device, free: int) -> int:
    """Tokens of a chunk: on CUDA halved, down to 512, until their buffers take at most a sixteenth of what is free."""
    rows = CHUNK[device.type]
    while device.type == "cuda" and rows > 512 and buffer_bytes(cfg, rows, dtype) > free // 16:
        rows //= 2
    return rows


def recurrent_shape(cfg: ModelConfig) -> RecurrentShape | None:
    """The states of recurrent layers, without snapshots; None: there are no such layers."""
    mixers = [spec.mixer for spec in layer_specs(cfg) if isinstance(spec.mixer, DeltaNetSpec)]
    return RecurrentShape(mixers[0].shape, len(mixers), 0) if mixers else None


def window_shapes(cfg: ModelConfig, fmt: LayerFormats, sequences: int = 1, free: int = 0) -> tuple[WindowShape, ...]:
    """The groups of layers that have a window, with as many snapshots as a part of the free memory holds. There are no
    groups of layers whose formats are chosen later: what one takes is known only then, and its layers share the pages
    of those without a window."""
    groups = dict[int, list[int]]()
    for number, index in enumerate(cfg.attention_layers):
        window = layer_specs(cfg)[index].attention.window
        known = not isinstance(fmt, AutoFormats) or number in fmt.plain
        if window is not None and known:
            groups.setdefault(window, []).append(number)
    sizes = _token_bytes(cfg, fmt)
    shapes = [
        WindowShape(tuple(layers), window, sum(sizes[layer] for layer in layers)) for window, layers in groups.items()
    ]
    each = sum(PAGE * one.seen * one.token_bytes for one in shapes)
    snapshots = min(8 + 8 * sequences, free // SNAPSHOT_SHARE // max(1, each))
    return tuple(replace(one, snapshots=snapshots) for one in shapes)


def _token_bytes(cfg: ModelConfig, fmt: LayerFormats) -> list[int]:
    """Bytes of a packed token in each layer that has keys and values of its own."""
    return [heads.number * fmt.layer_bytes(layer) for layer, heads in enumerate(cfg.cached_heads)]


def token_bytes(cfg: ModelConfig, fmt: LayerFormats) -> int:
    """Bytes of a packed token in all layers without a window."""
    return sum(_token_bytes(cfg, fmt)) - sum(one.token_bytes for one in window_shapes(cfg, fmt))


def _lent(cfg: ModelConfig) -> frozenset[int]:
    """Of the layers that have keys and values those whose later layers see, too."""
    number = {layer: place for place, layer in enumerate(cfg.attention_layers)}
    return frozenset(number[source] for layer, source in enumerate(cfg.kv_sources) if layer != source)


def _with_snapshots(cfg: ModelConfig, dtype: torch.dtype, sequences: int, free: int) -> RecurrentShape | None:
    shape = recurrent_shape(cfg)
    if shape is None:
        return None
    affordable = free // SNAPSHOT_SHARE // shape.state_bytes(dtype.itemsize)
    return replace(shape, snapshots=max(2 * sequences, min(8 + 8 * sequences, affordable)))


def _block(count: int) -> int:
    """Bytes of the block that PyTorch's allocator gives for a large request: it leaves no rest of 1 MiB or less."""
    whole = -(-count // 2**21) * 2**21
    return whole if count >= 10 * 2**20 and whole - count <= 2**20 else count


def _measure(decoder: Decoder, fmt: LayerFormats, device: torch.device, shape: ArenaShape) -> dict[str, int]:
    """Bytes by purpose of what an engine of this shape makes, beside its weights."""
    parts = Parts.build(decoder, shape, fmt, device, meta=True)

    def held(*holders: object, but: tuple[object, ...] = ()) -> int:
        sizes = held_bytes(*holders, but=but)
        return sum(map(_block, sizes)) if device.type == "cuda" else sum(sizes)

    arena, full = parts.arena, parts.arena.full_precision
    return {
        "arena": held(arena, but=(full, arena.states, decoder)) + held(decoder.key_tensors),
        "full_precision": held(full),
        "recurrent": held(arena.states),
        "workspace": held(parts.forward, but=(arena, decoder)) + temporary_bytes(decoder, shape, fmt, device),
        "graphs": library_workspace(device),
        "logits": held(parts.step, but=(parts.forward,)),
    }


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of a decoder's weights; it may be on ``meta``."""
    parts = decoder.embedding, decoder.head, decoder.final_norm, decoder.layers, decoder.per_layer
    return sum(held_bytes(*parts, but=(decoder.key_tensors,)))


def conditioning_kind(fmt: LayerFormats, asked: str | None) -> str:
    """What is done to keys (`models.config.CONDITIONINGS`): as asked, else all of it; nothing to keys without a code.

    It is the same for all kinds of layers: of what makes keys of families hard, biases need the mean, large channels
    the matrices, and neither harms where there is nothing to mend (docs/results/kv-families.md).

    Raises:
        UsageError: Another word.
    """
    kind = "full" if asked is None else asked.strip().lower()
    if kind not in CONDITIONINGS:
        raise UsageError(f"There is no conditioning {quoted(asked)}; give --conditioning off, mean or full.")
    return kind if fmt.coded else "off"


class ContextTooLong(OctoError):
    """A context that the free memory does not hold.

    Attributes:
        facts: What it needs, as the beginning of a sentence.
        fits: Tokens of the longest one that it holds.
    """

    def __init__(self, facts: str, fits: int) -> None:
        super().__init__(f"{facts}: choose a context of {fits} tokens or less.")
        self.facts, self.fits = facts, fits


def plan_memory(
    cfg: ModelConfig,
    kv: str | LayerFormats,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_context: int | None = None,
    sink: int = 64,
    window: int = 64,
    sequences: int = 1,
    seed: int = 0,
    conditioning: str | None = None,
    cache_bytes: int | None = None,
    quantise: Quantise | None = None,
    pack_embedding: Quantise | None = None,
    matrices: torch.dtype | None = None,
    free: int | None = None,
) -> MemoryPlan:
    """The plan for a model.

    Args:
        max_context: In tokens (None: what the model's file says, as far as the free memory holds it).
        sequences: See ``Engine.load``.
        conditioning: See ``Engine.load``.
        cache_bytes: See ``Engine.load``.
        quantise, pack_embedding: See ``Decoder``.
        matrices: See ``StoredWeights``.
        free: Bytes that the device has free (None: those that it has now).

    Raises:
        UsageError: A context that the model does not support or ``cache_bytes`` cannot hold.
        OctoError: A context that does not fit.
    """
    fmt = kv if isinstance(kv, LayerFormats) else parse_formats(kv, cfg, seed, dtype)
    if max_context is not None and max_context > cfg.context_limit:
        raise UsageError(
            f"A context of {max_context:,} tokens is beyond the model's: choose one of {cfg.context_limit} tokens or "
            "less."
        )
    # What RoPE's scaling gives beyond the file's context is taken only if it is asked for.
    limit = cfg.max_position_embeddings if max_context is None else cfg.context_limit
    kind = conditioning_kind(fmt, conditioning)
    context, free = limit if max_context is None else max_context, free_memory(device) if free is None else free
    shape = ArenaShape(
        heads=cfg.cached_heads,
        token_bytes=token_bytes(cfg, fmt),
        dtype=dtype,
        context=context,
        sink=sink,
        window=window,
        chunk=min(_chunk(cfg, dtype, device, free), context),
        sequences=sequences,
        mean_heads=cfg.num_heads if kind != "off" else 0,
        on_gpu=device.type == "cuda",
        recurrent=_with_snapshots(cfg, dtype, sequences, free),
        windows=window_shapes(cfg, fmt, sequences, free),
        lent=_lent(cfg),
    )
    if cache_bytes is not None:
        shape = _shape_of_bytes(shape, cache_bytes, limit if max_context is None else None)
    with torch.inference_mode():
        decoder = Decoder(
            cfg, RandomWeights(cfg, "meta", dtype, matrices=matrices), None, fmt.rotations("v"), quantise, None,
            pack_embedding,
        )  # fmt: skip
        decoder.store_keys(fmt.rotations("k"), Conditioning.empty(cfg, kind, "meta"))
        weights = weight_bytes(decoder)

    def measure(shape: ArenaShape) -> dict[str, int]:
        with torch.inference_mode():
            return _measure(decoder, fmt, device, shape)

    plan = MemoryPlan(
        kv=fmt.name,
        coded=fmt.coded,
        conditioning=kind,
        weight_format=decoder.weight_format,
        device=str(device),
        dtype=dtype,
        shape=shape,
        free=max(0, free - DRIVER_BYTES) if device.type == "cuda" else free,
        before=0 if device.type == "cuda" else system_memory.resident(),
        loading=loading_bytes(decoder, weights, fmt, device, quantise is not None),
        longest=cfg.context_limit,
        weights=weights,
        measure=measure,
        **measure(shape),
    )
    return _fitted(plan, limit, unasked=max_context is None and cache_bytes is None)


def _fitted(plan: MemoryPlan, limit: int, *, unasked: bool) -> MemoryPlan:
    """The plan if it fits; if its context was chosen, not asked for, else one whose context does, at most ``limit``.

    Raises:
        OctoError: There is none.
    """
    shape, where = plan.shape, torch.device(plan.device)
    budget = int(plan.free * AUTO_SHARE[where.type]) if unasked else plan.free
    if max(plan.total, plan.loading) <= budget:
        return plan
    pages = plan.pages_that_fit(budget, limit)
    if not unasked:
        fits = 0 if pages is None else shape.with_pages(pages // shape.sequences, limit).context
        facts = (
            f"A context of {shape.context:,} tokens with --kv {plan.kv} needs {plan.total / 2**30:.2f} GiB and "
            f"{plan.device} has {plan.free / 2**30:.2f} GiB free"
        )
        if fits:
            raise ContextTooLong(facts, fits)
        raise OctoError(f"{facts}: choose a smaller model{' or --device cpu' if where.type == 'cuda' else ''}.")
    fitting = shape if pages is None else shape.with_pages(pages, limit)
    if pages is None or fitting.context < min(256, limit):
        raise OctoError(
            f"The model's weights need {plan.weights / 2**30:.2f} GiB; of the {plan.free / 2**30:.2f} GiB free on "
            f"{plan.device}, {budget / 2**30:.2f} GiB are taken unasked: choose a context (max_context or --ctx), or a "
            "smaller model."
        )
    return plan.of(fitting)


def _shape_of_bytes(shape: ArenaShape, count: int, limit: int | None) -> ArenaShape:
    """The shape with ``count`` bytes of pages, and with ``limit`` a context of as many tokens as they hold, at most
    that. Raises ``UsageError`` if there is not one page, or if they hold no sequence of the shape's context."""
    page = max(1, PAGE * shape.token_bytes)  # where all layers have windows, pages take nothing
    pages = count // page
    if pages < 1:
        raise UsageError(f"cache_bytes is {count:,} and one page takes {page:,}: give more.")
    if limit is not None:
        return shape.with_pages(pages, limit)
    if pages < shape.max_pages:
        raise UsageError(
            f"cache_bytes hold {pages:,} pages and a context of {shape.context:,} tokens has {shape.max_pages:,}: give "
            f"{shape.max_pages * page:,} bytes, or a smaller max_context."
        )
    return replace(shape, pool_pages=pages)
