"""What the kernels keep on a device for a format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from octo_run.kernels.codec import Codec, KVFormat
    from octo_run.kernels.codec.page_layout import Side


def prepare(fmt: KVFormat, device: torch.device) -> None:
    """Make the tables that the CUDA kernels of a format would make when they first need them.

    They take less than a megabyte and are kept for the process, so that nothing is allocated after an engine was
    loaded.
    """
    from octo_run.kernels.attention.constants import codec_constants, no_table
    from octo_run.kernels.codec import TrellisCodec
    from octo_run.kernels.encode import trellis_launch

    sides: tuple[tuple[Side, Codec], ...] = (("k", fmt.k), ("v", fmt.v))
    no_table(device)
    for side, codec in sides:
        codec_constants(codec, side, device)
        if isinstance(codec, TrellisCodec):
            trellis_launch.prepare(codec, side, device)
