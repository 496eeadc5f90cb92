"""`bf16`: uncompressed vectors behind the codecs' interface, the yardstick of every comparison."""

import torch

from octo_run.kernels.codec.base import Codec, describe_index


class PlainCodec(Codec):
    """Stores the elements of a vector in `dtype`, in the original basis (the rotation is the identity)."""

    def __init__(self, head_dim: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        """`dtype` is the floating type of the stored elements, `seed` has no effect."""
        self.dtype = dtype
        self.bits = 0
        self.num_triplets = 0
        super().__init__("bf16", head_dim, seed, head_dim * dtype.itemsize)

    @property
    def rotation(self) -> torch.Tensor:
        return torch.eye(self.head_dim, dtype=torch.float64)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def unrotate(self, y: torch.Tensor) -> torch.Tensor:
        """y itself."""
        return y

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See `Codec.encode`.

        Raises:
            ValueError: As there; a value that overflows the stored dtype is refused like an infinity.
        """
        self._check_vectors(x)
        stored = x.to(self.dtype).contiguous()
        if not bool(stored.isfinite().all()):
            first = int((~stored.isfinite()).flatten().nonzero()[0])
            value, place = float(x.reshape(-1)[first]), describe_index(first, x.shape)
            raise ValueError(f"{self.name} cannot encode {value:g} as {self.dtype} (at position {place})")
        return stored.view(torch.uint8)

    def encode_rotated(self, y: torch.Tensor) -> torch.Tensor:
        return self.encode(y)

    def decode_rotated(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See `Codec.decode_rotated`; may share its memory with `packed` when `dtype` is the stored one."""
        self._check_packed(packed)
        if not dtype.is_floating_point:
            raise ValueError(f"{self.name} decodes to a floating-point dtype, not to {dtype}")
        rows = packed.contiguous()
        if rows.storage_offset() % self.dtype.itemsize:
            rows = rows.clone()
        return rows.view(self.dtype).to(dtype)

    def decode(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.decode_rotated(packed, dtype)
