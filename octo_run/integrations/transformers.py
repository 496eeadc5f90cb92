"""Coded KV memory for models of the transformers library.

    from octo_run.integrations.transformers import OctoCache

    model.set_attn_implementation("octo")
    model.generate(**inputs, cache=OctoCache(model.config, kv="oct3"))

Importing this module makes the attention "octo" known to transformers (see ``octo_attention``). The cache works with
any attention: without "octo", keys and values are decoded for every call.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import DynamicCache, PreTrainedConfig
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

    from octo_run.integrations import octo_attention
except ImportError as error:
    raise ImportError(
        "octo_run.integrations.transformers needs transformers 5.24 or newer: pip install 'octo-run[transformers]'."
    ) from error

from octo_run.engine.allocation import SHORT_WINDOW
from octo_run.engine.arena import ArenaShape
from octo_run.errors import OctoError, UsageError, expect, quoted
from octo_run.integrations.batch_pages import BatchPages, Scratch, View
from octo_run.integrations.stored_states import StoredStates
from octo_run.kernels.codec import parse_kv
from octo_run.kernels.codec.formats import PLAIN
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.models.config import KVHeads

__all__ = ["OctoCache", "OctoLayer"]

octo_attention.register()

#: Kinds of layers whose keys and values are stored here.
_STORED = ("full_attention", "sliding_attention", "chunked_attention")
#: Kinds of layers that have none; transformers' own objects keep what they have.
_WITHOUT = ("conv", "linear_attention", "dummy")
_TWO_CACHES = (
    "A model with an encoder has two caches: give it EncoderDecoderCache(OctoCache(model.config), "
    "OctoCache(model.config))."
)
_NO_OFFLOADING = "OctoCache does not offload pages: use it without offloading."


class OctoLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values in pages.

    Args:
        kv: The formats, as ``--kv`` has them.
        sinks: Tokens at the beginning that stay in full precision.
        window: At least so many of the newest tokens are in full precision.
        scratch: Shared by the layers of a cache.
        sliding_window: A query sees so many of the newest tokens, itself included; pages before them are let go of.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, kv: str, sinks: int, window: int, scratch: Scratch, sliding_window: int | None = None) -> None:
        self.kv, self.window, self.scratch, self.sliding_window = kv, window, scratch, sliding_window
        self.sinks = sinks if sliding_window is None else 0  # they would slide out of sight
        self.is_sliding = sliding_window is not None
        self.is_initialized = False
        self._store: BatchPages | None = None
        #: The view that the latest ``keys`` are of, for the ``values``: held by them, not by the layer.
        self._latest: weakref.ref[View] | None = None

    @property
    def keys(self) -> Tensor | None:
        """All keys as they are stored, ``[B, kv_heads, length, d]``."""
        return self._states(0)

    @property
    def values(self) -> Tensor | None:
        """All values as they are stored, ``[B, kv_heads, length, d]``."""
        return self._states(1)

    def _states(self, side: int) -> Tensor | None:
        store = self._store
        if store is None:
            return None
        seen = store.length if self.sliding_window is None else min(store.length, self.sliding_window - 1)
        view = None if self._latest is None else self._latest()
        if view is None or view.store is not store or view.version != store.version:
            view = store.view()
            self._latest = weakref.ref(view)
        return StoredStates(view, side, store.length - seen)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for batches of such keys and values.

        Raises:
            UsageError: Heads that the format cannot store.
            OctoError: Another device than a CPU or a CUDA GPU, or keys and values of different sizes.
        """
        batch, kv_heads, _, head_dim = key_states.shape
        device, dtype = key_states.device, key_states.dtype
        if device.type not in ("cpu", "cuda"):
            raise OctoError(
                f"OctoCache runs on CPUs and CUDA GPUs, not on {device.type}: move the model to one of them."
            )
        if key_states.shape[:2] != value_states.shape[:2] or head_dim != value_states.shape[3]:
            raise OctoError(
                f"OctoCache stores keys and values of one shape, and this model has {list(key_states.shape)} and "
                f"{list(value_states.shape)}: use another cache, for example DynamicCache."
            )
        if head_dim not in HEAD_DIMS and any(name != "bf16" for name in self.kv.split(":")):
            dims = ", ".join(map(str, HEAD_DIMS[:-1]))
            raise UsageError(
                f"OctoCache cannot store heads of {head_dim} numbers in {self.kv}, only of {dims} or {HEAD_DIMS[-1]}: "
                "give kv='bf16', which stores any in full precision."
            )
        fmt = parse_kv(self.kv, head_dim, plain_dtype=dtype)
        self._store = BatchPages(fmt, batch, kv_heads, dtype, device, self.sinks, self.window, self.scratch)
        self.dtype, self.device = dtype, device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[B, kv_heads, T, d]``.

        Returns:
            All that the new tokens see, the new ones as they came: tensors that are decoded where their numbers are
            needed (see ``StoredStates``).

        Raises:
            OctoError: Keys or values of another batch than before, gradients, or numbers that are not finite.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise OctoError("OctoCache keeps no gradients: call the model within torch.no_grad().")
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        store = self._store
        assert store is not None
        batch, kv_heads, _, head_dim = store.shape
        count: int = key_states.shape[2]
        wanted = (batch, kv_heads, count, head_dim)
        for states in (key_states, value_states):
            if tuple(states.shape) != wanted or states.dtype != self.dtype or states.device != self.device:
                raise OctoError(
                    f"The cache holds {list(wanted)} in {self.dtype} on {self.device}, and {list(states.shape)} in "
                    f"{states.dtype} on {states.device} came: give every batch a cache of its own."
                )
        if not count:
            return key_states, value_states
        past: int = store.length
        if self.sliding_window is not None:
            store.drop_before(store.length - (self.sliding_window - 1))
            past = min(store.length, self.sliding_window - 1)
        view = store.append(key_states, value_states)
        first = view.length - past - count
        return StoredStates(view, 0, first), StoredStates(view, 1, first)

    def get_seq_length(self) -> int:
        """Tokens that came, those that were let go of included."""
        return 0 if self._store is None else self._store.dropped + self._store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that so many new ones will see, themselves included, and the position of the first."""
        length = self.get_seq_length()
        past = length if self.sliding_window is None else min(length, self.sliding_window - 1)
        return past + query_length, length - past

    def get_max_length(self) -> int:
        """The sliding window, or -1: any length."""
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: Their number, negative or 0.

        Raises:
            OctoError: Tokens that come into sight again were let go of.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of the tokens to remove.")
        store = self._store
        if not tokens_to_remove or store is None:
            return
        length = max(0, store.length + tokens_to_remove)
        if store.dropped and self.sliding_window is not None and length < self.sliding_window - 1:
            raise OctoError(
                f"{-tokens_to_remove:,} tokens cannot be removed from a layer with a sliding window of "
                f"{self.sliding_window:,}: what was before it is gone; begin with an empty cache."
            )
        store.cut(length)

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self._store, self._latest, self.is_initialized = None, None, False

    def select(self, rows: list[int]) -> None:
        """Make number r of the batch what number ``rows[r]`` is now."""
        if self._store is not None:
            self._store.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make number r of the batch what number ``beam_idx[r]`` is now. Pages are shared, not copied."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text of the batch. Pages are shared, not copied."""
        if self._store is not None:
            self.select([row for row in range(self._store.shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts of the batch."""
        if self._store is not None:
            self.select(torch.arange(self._store.shape[0])[indices.cpu()].tolist())

    def offload(self) -> None:
        """Not done: pages stay on their device."""
        raise OctoError(_NO_OFFLOADING)

    prefetch = offload

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, spare room included."""
        return 0 if self._store is None else self._store.arena.nbytes

    def __repr__(self) -> str:
        return f"OctoLayer({self.kv}, {self.get_seq_length():,} tokens, {self.nbytes:,} bytes)"


class OctoCache(DynamicCache):  # type: ignore[misc]
    """A cache of keys and values in codes, for ``past_key_values``.

    The first ``sinks`` tokens and at least the last ``window`` are in full precision; the rest are in pages of 64
    tokens. What a call brings is seen by this call as it came, and coded for later ones. Texts of a batch have the same
    length, padding included. It grows as needed. Layers with a sliding window of 256 tokens or fewer have no codes,
    which would save little there: they store what they are given as it is.

    Args:
        config: The model's.
        kv: The format of keys and values, or those of keys and of values, ``"K:V"``: oct2, oct3, oct4, octopus2,
            octopus3, octopus4, or bf16, which stores the model's dtype as it is.
        sinks: 0 or more; none in layers with a sliding window.
        window: A multiple of 64.

    Raises:
        UsageError: A format, sinks or window that there is not.
        OctoError: The model has layers of a kind that is not known here, or none with keys and values.
    """

    def __init__(self, config: PreTrainedConfig, kv: str = "oct3", *, sinks: int = 64, window: int = 64) -> None:
        expect("The model's configuration", config, PreTrainedConfig)
        expect("The KV format", kv, str)
        expect("The number of sink tokens", sinks, int)
        expect("The window", window, int)
        kv = kv.strip().lower()
        if "auto" in kv.split(":"):
            raise UsageError(
                f"The KV format is {quoted(kv)}, and OctoCache does not measure which layers need the better codes: "
                "give one format, oct3 say, or K:V."
            )
        parse_kv(kv, 128)
        ArenaShape((KVHeads(1, 128),), 1, torch.float32, 1, sinks, window)  # refuses what no arena takes
        self.kv, self.sinks, self.window, self.scratch = kv, sinks, window, Scratch()
        self._has_encoder, self._given = bool(getattr(config, "is_encoder_decoder", False)), False
        self._updated: int | None = None
        decoder = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(decoder)
        Cache.__init__(self, layers=[self._layer(kind, given) for kind, given in zip(kinds, options, strict=True)])
        if not any(isinstance(layer, OctoLayer) for layer in self.layers):
            raise OctoError("The model has no layer whose keys and values OctoCache could store: use DynamicCache.")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store new keys and values of a layer: see ``OctoLayer.update``.

        Raises:
            UsageError: A layer's self-attention and its cross-attention both come here.
        """
        if self._has_encoder and layer_idx == self._updated and len(self) > 1:
            raise UsageError(_TWO_CACHES)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._updated = layer_idx
        return states

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self._updated = None
        super().reset()

    def offload(self, *_: Any, **__: Any) -> None:
        """Not done: pages stay on their device."""
        raise OctoError(_NO_OFFLOADING)

    prefetch = offload

    @property
    def _is_user_defined(self) -> bool:
        """Whether it was given to ``generate``, which says so here.

        Raises:
            UsageError: It is set for a model that needs two caches. Some would use others then, in full precision.
        """
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        if given and self._has_encoder:
            raise UsageError(_TWO_CACHES)
        self._given = given

    def _layer(self, kind: str, options: dict[str, Any]) -> Any:
        if kind in _STORED:
            seen = options.get("sliding_window")
            kv = self.kv if seen is None or seen > SHORT_WINDOW else PLAIN
            return OctoLayer(kv, self.sinks, self.window, self.scratch, seen)
        if kind in _WITHOUT:
            return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
        raise OctoError(
            f"OctoCache does not know layers of the kind {quoted(kind)}, only {', '.join(_STORED + _WITHOUT)}: use "
            "another cache, for example DynamicCache."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make number r of the batch what number ``beam_idx[r]`` is now. Pages are shared, not copied."""
        rows = beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, OctoLayer):
                layer.select(rows)
            else:
                layer.reorder_cache(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the cache holds on its devices: pages, full precision, tables, attention's workspace."""
        return self.scratch.nbytes + sum(_nbytes(layer) for layer in self.layers)

    def __repr__(self) -> str:
        coded = [layer for layer in self.layers if isinstance(layer, OctoLayer)]
        longest = max(layer.get_seq_length() for layer in coded)
        count = f"{len(coded)} layers" if len(coded) == len(self) else f"{len(coded)} of {len(self)} layers"
        return f"OctoCache({self.kv}, {count}, {longest:,} tokens, {self.nbytes:,} bytes)"


def _nbytes(layer: Any) -> int:
    """Bytes of a layer, ours or transformers' own."""
    if isinstance(layer, OctoLayer):
        return layer.nbytes
    parts = [part for held in vars(layer).values() for part in (held.values() if isinstance(held, dict) else [held])]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
