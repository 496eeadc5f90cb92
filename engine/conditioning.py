"""The conditioning of a model's keys, measured once and kept beside the cache of models."""

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from octo_run.engine.random_model import NoTokenizer
from octo_run.models import conditioning
from octo_run.models.cache import statistics_folder
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.files import weight_files
from octo_run.tokenizer import Tokenizer

#: Tokens of the text that are used at most.
TOKENS = 768
#: Counts changes of the text or of what is made of it.
_VERSION = 1


def conditioning_of(
    decoder: Decoder, tokenizer: Tokenizer | NoTokenizer, kind: str, path: Path | None
) -> Conditioning | None:
    """What is to be done to the keys of a model: read where it was measured before, else measured and kept.

    Args:
        decoder: One that stores keys as they are.
        kind: One of ``config.CONDITIONINGS``.
        path: The model's folder, None for random weights: those see random tokens, and nothing is kept.
    """
    if kind == "off":
        return None
    ids = calibration_ids(decoder.cfg, tokenizer)
    if path is None:
        return conditioning.measure(decoder, ids).of_kind(kind)
    kept = statistics_folder() / f"{_fingerprint(path, decoder, ids)}.npz"
    found = _read(kept, decoder.cfg)
    if found is None:
        found = conditioning.measure(decoder, ids)
        _keep(kept, found)
    return found.of_kind(kind)


def calibration_ids(cfg: ModelConfig, tokenizer: Tokenizer | NoTokenizer) -> list[int]:
    """The tokens that statistics of a model are measured on; random ones where there is no tokenizer."""
    count = min(TOKENS, cfg.max_position_embeddings)
    if isinstance(tokenizer, NoTokenizer):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(cfg.vocab_size, (count,), generator=generator).tolist()
    return tokenizer.prompt(conditioning.calibration_text())[:count]


def _fingerprint(path: Path, decoder: Decoder, ids: list[int]) -> str:
    """Of all that decides the numbers: the weights (by name, size and time of their files), the configuration, the
    dtype, the kind of device, and the tokens."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path)]
    weights = decoder.embedding
    known = (_VERSION, files, decoder.cfg, str(weights.dtype), weights.device.type, ids)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _read(file: Path, cfg: ModelConfig) -> Conditioning | None:
    """What ``_keep`` wrote, None if there is none or it is damaged."""
    size = (cfg.num_layers, cfg.num_kv_heads, cfg.head_dim)
    try:
        with np.load(file, allow_pickle=False) as stored:
            parts = [torch.from_numpy(stored[name].astype(np.float32)) for name in ("means", "shapes")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    means, shapes = parts
    sized = means.shape == size and shapes.shape == (*size, cfg.head_dim)
    return Conditioning(means, shapes) if sized and all(bool(x.isfinite().all()) for x in parts) else None


def _keep(file: Path, found: Conditioning) -> None:
    """Write it. Where that cannot be, the next load measures anew."""
    assert found.shapes is not None
    partial = file.with_name(f".{os.urandom(8).hex()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as out:
                np.savez(out, means=found.means.numpy(), shapes=found.shapes.numpy())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
