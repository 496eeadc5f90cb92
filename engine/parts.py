"""What an engine is made of besides its weights, built in one place: for the device, or on ``meta`` to count bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import ArenaShape, KVArena
from octo_run.engine.forward import Forward
from octo_run.engine.key_means import KeyMeans
from octo_run.engine.sampling import BatchSampler
from octo_run.engine.step import Stepper
from octo_run.kernels.codec import Codec, LayerFormats
from octo_run.models.decoder import Decoder


@dataclass(frozen=True)
class Parts:
    """The arena, the layers' buffers, and the steps. What they hold on the device is allocated when they are made."""

    arena: KVArena
    forward: Forward
    step: Stepper

    @classmethod
    def build(
        cls, decoder: Decoder, shape: ArenaShape, fmt: LayerFormats, device: torch.device, *, meta: bool = False
    ) -> "Parts":
        """Make the parts for ``device``.

        Args:
            meta: Make them only as shapes, as ``decoder`` then is.
        """
        place, cfg = torch.device("meta") if meta else device, decoder.cfg
        means = _key_means(decoder, shape) if shape.mean_heads else None
        arena, workspace = KVArena(shape, fmt, place, means), None
        count = max(
            kernels.attention_workspace_bytes(
                shape.sequences, cfg.num_heads, *heads, device, shape.chunk, shape.context
            )
            for heads in shape.kinds
        )
        if count:
            workspace = torch.zeros(count // 4, dtype=torch.float32, device=place)
        forward = Forward(decoder, arena, max(shape.chunk, shape.sequences), workspace)
        return cls(arena, forward, Stepper(forward, BatchSampler(shape.sequences, cfg.vocab_size, place)))


def _key_means(decoder: Decoder, shape: ArenaShape) -> KeyMeans:
    """Those of a decoder that was given means (``Decoder.store_keys``)."""
    means, maps, frequencies = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    for number, index in enumerate(decoder.cfg.attention_layers):
        part = decoder.layers[index].attention
        if part.key_mean is not None:
            assert part.maps is not None
            means[number], maps[number], frequencies[number] = part.key_mean, part.maps[1], decoder.inv_freq(index)
    return KeyMeans(shape, means, maps, frequencies)


def tensors(*holders: object) -> Iterator[Tensor]:
    """All tensors that objects hold in attributes, lists and dictionaries, and in such of ours among them.

    Tables of codecs are not theirs: the process keeps them.
    """
    seen: set[int] = set()
    waiting = list(holders)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif isinstance(thing, Codec):
            continue
        elif type(thing).__module__.startswith("octo_run.") and hasattr(thing, "__dict__"):
            waiting += vars(thing).values()


def held_bytes(*holders: object, but: tuple[object, ...] = ()) -> list[int]:
    """Bytes of every storage that objects hold on their device, each once; not those that ``but`` hold."""
    storages: dict[int, int] = {}
    for group, keep in ((holders, True), (but, False)):
        for tensor in tensors(*group):
            storage = tensor.untyped_storage()
            if keep:
                storages[storage._cdata] = storage.nbytes()
            else:
                storages.pop(storage._cdata, None)
    return list(storages.values())
