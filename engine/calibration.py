"""What is measured on a model once, on a short text, and kept beside the cache of models.

Two things are: how its keys are conditioned, and how much each layer and side suffers from a code.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octo_run import folders
from octo_run.engine import sensitivity
from octo_run.engine.random_model import NoTokenizer
from octo_run.errors import OctoError
from octo_run.kernels.codec import KVFormat
from octo_run.kernels.codec.page_format import version_of
from octo_run.models import conditioning
from octo_run.models.cache import name_of, statistics_folder
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.files import weight_files
from octo_run.models.foreign import parsing, read_bytes
from octo_run.tokenizer import Tokenizer
from octo_run.unfinished import unfinished

#: Tokens of the text that are used at most; and of these for sensitivities, which take far longer.
TOKENS, FEWER = 1536, 768
#: Files that are kept, those used last: one may have some 20 MB.
MOST = 16
#: Counts changes of the text or of what is made of it.
_VERSION = 6
#: Bytes of a file beside the numbers, for each array; there are some 300.
_ENTRY_BYTES = 1024


@dataclass(frozen=True)
class Calibration:
    """Measurements on one model.

    Attributes:
        tokenizer: The model's; one of random weights sees random tokens.
        path: The model's folder; None for random weights: nothing is kept of them.
        on_unkept: Called with a sentence if something took long and cannot be kept.
    """

    decoder: Decoder
    tokenizer: Tokenizer | NoTokenizer
    path: Path | None
    on_unkept: Callable[[str], object] | None = None

    def conditioning(self, kind: str) -> Conditioning | None:
        """What is to be done to the keys, whose decoder must store them as they are.

        Args:
            kind: One of ``config.CONDITIONINGS``.
        """
        if kind == "off":
            return None
        layers = [*enumerate(self.decoder.cfg.cached_heads)]

        def measured() -> dict[str, Tensor]:
            found = conditioning.measure(self.decoder, self.ids)
            assert found.shapes is not None
            means = {f"means{layer}": part for layer, part in enumerate(found.means)}
            return means | {f"shapes{layer}": part for layer, part in enumerate(found.shapes)}

        sizes: dict[str, tuple[int, ...]] = {f"means{layer}": tuple(heads) for layer, heads in layers}
        sizes |= {f"shapes{layer}": (*heads, heads.size) for layer, heads in layers}
        found = self._known(("conditioning",), sizes, measured)
        means, shapes = (tuple(found[f"{name}{layer}"] for layer, _ in layers) for name in ("means", "shapes"))
        return Conditioning(means, shapes).of_kind(kind)

    def sensitivities(
        self,
        kind: str,
        fmt: KVFormat,
        on_progress: Callable[[int, int], None] | None = None,
        plain: tuple[int, ...] = (),
    ) -> Tensor | None:
        """``sensitivity.measure`` of a decoder whose keys are conditioned; None if no token of the text would be coded.

        Args:
            kind: The conditioning.
            fmt: The code.
            plain: Of the layers that have keys and values those without a code, by their numbers: 0.
        """
        ids = self.ids[:FEWER]
        if len(ids) <= sensitivity.FIRST:
            return None
        what = ("sensitivities", kind, fmt.name, fmt.k.seed, version_of(fmt), *plain)
        layers = self.decoder.cfg.attention_layers
        shape = {"divergences": (self.decoder.cfg.num_layers, 2)}
        without = frozenset(layers[number] for number in plain)

        def measured() -> dict[str, Tensor]:
            return {"divergences": sensitivity.measure(self.decoder, fmt, ids, on_progress, without)}

        return self._known(what, shape, measured)["divergences"][[*layers]]

    @cached_property
    def ids(self) -> list[int]:
        """The tokens of the text."""
        return calibration_ids(self.decoder.cfg, self.tokenizer)

    def _known(
        self, what: tuple[object, ...], shapes: Mapping[str, tuple[int, ...]], measure: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Read from where it was kept, else measured and kept."""
        if self.path is None:
            return measure()
        file = statistics_folder() / f"{name_of(self.path)}-{self._fingerprint(self.path, what)[:40]}.npz"
        found = _read(file, shapes)
        if found is None:
            found = folders.made_and_kept(
                measure, partial(_keep, file), self.on_unkept, folder=file.parent, again="measures the model again",
                model=self.path,
            )  # fmt: skip
        return found

    def _fingerprint(self, path: Path, what: tuple[object, ...]) -> str:
        """Of all that decides the numbers: the weights (by name, size and time of their files) and what they are stored
        as, the configuration, the dtype of the arithmetic, the kind of device, RoPE's factors where the context chooses
        them, and the tokens."""
        files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path)]
        decoder = self.decoder
        model = decoder.cfg, decoder.weight_format, decoder.dtype, decoder.device.type, decoder.rope_factors
        known = (_VERSION, what, files, model, self.ids)
        return hashlib.sha256(repr(known).encode()).hexdigest()


def calibration_ids(cfg: ModelConfig, tokenizer: Tokenizer | NoTokenizer) -> list[int]:
    """The tokens that statistics of a model are measured on; random ones where there is no tokenizer."""
    count = min(TOKENS, cfg.max_position_embeddings)
    if isinstance(tokenizer, NoTokenizer):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(cfg.vocab_size, (count,), generator=generator).tolist()
    return tokenizer.prompt(conditioning.calibration_text())[:count]


def _read(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """What ``_keep`` wrote, None if there is none or it is damaged."""
    most = sum(4 * math.prod(shape) + _ENTRY_BYTES for shape in shapes.values())
    try:
        data = io.BytesIO(read_bytes(file, most))
        with parsing(file, "NumPy archive"), np.load(data, allow_pickle=False) as stored:
            found = {name: torch.from_numpy(stored[name]) for name in shapes}
    except OctoError:
        return None
    for name, shape in shapes.items():
        part = found[name]
        if part.dtype != torch.float32 or part.shape != shape or not bool(part.isfinite().all()):
            return None
    with suppress(OSError):
        os.utime(file)  # used last
    return found


def _keep(file: Path, found: dict[str, Tensor]) -> OSError | None:
    """Write it; what keeps it from being written is returned, and the next load measures anew."""
    arrays: dict[str, Any] = {name: part.numpy() for name, part in found.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(file) as part:
            with part.open("wb") as out:
                np.savez(out, **arrays)
            part.replace(file)
    except OSError as error:
        return error
    with suppress(OSError):
        kept = sorted(file.parent.glob("*.npz"), key=lambda one: -one.stat().st_mtime)
        for old in kept[MOST:]:
            old.unlink(missing_ok=True)
    return None
