"""Writing a model with quantised weights, as ``octo-run quantize`` does."""

from collections.abc import Callable
from pathlib import Path

import torch

from octo_run.engine.engine import DTYPES, choose_device, choose_dtype
from octo_run.errors import OctoError, UsageError, expect
from octo_run.models.config import load_config
from octo_run.models.hub import resolve
from octo_run.models.quantisation.schemes import scheme_of
from octo_run.models.quantisation.writer import check_shapes, check_target, quantised_items, write_folder
from octo_run.models.tensors import stored_config
from octo_run.models.weights import StoredWeights


def quantise(
    model: str | Path,
    out: Path,
    weights: str = "int4",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a model to a new folder with its layers' matrices quantised.

    It holds the quantised model and one dense layer at a time.

    Args:
        model: See ``Engine.load``.
        out: Must not be there.
        weights: ``fp8``, ``int8``, ``int4`` or ``int4-128``.
        device, dtype: See ``Engine.load``, which makes the same codes (int8 and fp8: for a cache whose values are not
            rotated; int4: but for experts, see ``Scheme.in_files``).
        progress: Told the bytes written and to be written.

    Returns:
        The bytes of the folder.

    Raises:
        UsageError: Wrong arguments.
        OctoError: A model that cannot be loaded, is quantised already or does not fit the format; a folder that cannot
            be written.
    """
    expect("model", model, str, Path)
    scheme = scheme_of(weights)
    if scheme is None:
        raise UsageError("There is nothing to quantise: give --weights fp8, int8, int4 or int4-128.")
    out = Path(out)
    check_target(out)
    path = resolve(str(model))
    cfg = load_config(path)
    if cfg.quantisation is not None:  # as it says: the files decide
        cfg = stored_config(path, cfg)
    if cfg.quantisation is not None:
        raise OctoError(
            f"The weights in {path} are quantised already ({cfg.quantisation.method}): take the model's unquantised "
            "files."
        )
    where = choose_device(device)
    check_shapes(cfg, scheme)
    source = StoredWeights(path, cfg, where, choose_dtype(dtype, cfg, where))
    items = quantised_items(source.cfg, source, scheme, DTYPES.get(cfg.dtype, torch.bfloat16))
    return write_folder(path, out, source.cfg, items, scheme, progress)
