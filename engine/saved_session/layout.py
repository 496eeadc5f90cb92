"""What a session file holds, and by which names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from octo_run.engine.arena import KVArena
    from octo_run.engine.engine import Engine
    from octo_run.models.decoder import AttentionWeights

FORMAT = "octo-run session"
#: Of the header: a change of what it says makes a new one.
VERSION = 2
#: Bytes of pages that are read, or written, at once.
PIECE_BYTES = 32 << 20
#: The states of recurrent layers: what convolutions remember, and the memories.
STATES = ("conv", "memory")


def tail_of(path: Path) -> Path:
    """Where the tail of a session file lies."""
    return path.with_name(f".{path.name}.tail")


def key_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """The maps and means of all layers whose keys are conditioned, those of one kind together, by their names in a
    file; none that follow from the rotation alone."""
    every, found = attention_layers(engine), dict[str, list[Tensor]]()
    for kind, numbers in enumerate(engine.plan.shape.kinds.values()):
        layers = [every[number] for number in numbers]
        maps = [layer.maps for layer in layers if layer.maps is not None]
        if engine.plan.conditioning == "full" and maps:
            found[f"key_maps{kind}"] = maps
        means = [layer.key_mean for layer in layers if layer.key_mean is not None]
        if means:
            found[f"key_means{kind}"] = means
    return found


def page_stores(arena: KVArena) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """What holds pages, by its name in a file: ``[pages, bytes]``, and the layers of which these are, in order."""
    windowed = {layer for group in arena.windows for layer in group.shape.layers}
    found = {"pages": (arena.pages, tuple(layer for layer in range(arena.shape.layers) if layer not in windowed))}
    return found | {f"window{n}": (group.pages, group.shape.layers) for n, group in enumerate(arena.windows)}


def attention_layers(engine: Engine) -> list[AttentionWeights]:
    """The layers with a KV cache, in order."""
    decoder = engine.forward.decoder
    return [decoder.layers[index].attention for index in decoder.cfg.attention_layers]
