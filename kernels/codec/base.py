"""What every KV codec offers, and what all triplet codecs share: rotation, norms, packed rows, bounded memory."""

from abc import ABC, abstractmethod

import torch

from octo_run.kernels.codec.packing import pack_codes, packed_bytes, unpack_codes
from octo_run.kernels.codec.rotation import rotation_matrix
from octo_run.kernels.page_size import PAGE_TOKENS

CHUNK = 2048  # vectors worked on at a time: the temporaries of a chunk fit the second-level cache of a CPU core
NORM_BYTES = 2
MAX_NORM = 65504.0  # the largest finite fp16 number


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in: float64 for float64, float32 for every other floating type."""
    if not dtype.is_floating_point:
        raise ValueError(f"a codec works on floating-point vectors, not on {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe_index(flat: int, shape: torch.Size | tuple[int, ...]) -> str:
    """The position of a flat index in an array of `shape`, as text: "[2, 0, 17]"."""
    position = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        position.append(place)
    return f"[{', '.join(map(str, reversed(position)))}]"


class Codec(ABC):
    """One storage format of key or value vectors of one head dimension. Instances are immutable and may be shared.

    Attributes:
        name: The format's name as in `--kv`.
        head_dim: Coordinates of a vector.
        seed: Of the rotation.
        bytes_per_vector: Stored bytes of a vector, everything included, always even.
        bits, num_triplets: Bits of a triplet's code and triplets of a vector (0 and 0 for a format without triplets).
    """

    name: str
    head_dim: int
    seed: int
    bytes_per_vector: int
    bits: int
    num_triplets: int

    def __init__(self, name: str, head_dim: int, seed: int, bytes_per_vector: int) -> None:
        self.name = name
        self.head_dim = head_dim
        self.seed = seed
        self.bytes_per_vector = bytes_per_vector
        self._rotations: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<{self.name}: head_dim {self.head_dim}, {self.bytes_per_vector} bytes a vector, seed {self.seed}>"

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: what a page holds of K, or of V."""
        return PAGE_TOKENS * self.bytes_per_vector

    @property
    @abstractmethod
    def rotation(self) -> torch.Tensor:
        """The orthonormal rotation R, float64 [head_dim, head_dim] on the CPU, not to be written into."""

    def _rotation_like(self, x: torch.Tensor) -> torch.Tensor:
        """R in x's working dtype on x's device, made once."""
        key = (working_dtype(x.dtype), x.device)
        if key not in self._rotations:
            self._rotations[key] = self.rotation.to(dtype=key[0], device=key[1])
        return self._rotations[key]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ R.T` for x [..., head_dim]; fp16 and bf16 are worked on in float32. Same shape and dtype."""
        matrix = self._rotation_like(x)
        return (x.to(matrix.dtype) @ matrix.T).to(x.dtype)

    def unrotate(self, y: torch.Tensor) -> torch.Tensor:
        """`y @ R` for y [..., head_dim], the inverse of `rotate`. Same shape and dtype."""
        matrix = self._rotation_like(y)
        return (y.to(matrix.dtype) @ matrix).to(y.dtype)

    @abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode floating x [..., head_dim], original basis, to uint8 [..., bytes_per_vector].

        Raises:
            ValueError: A NaN, an infinity or a vector too long to be stored; the message names the
                first one's position.
        """

    @abstractmethod
    def encode_rotated(self, y: torch.Tensor) -> torch.Tensor:
        """`encode` for vectors that are in the rotated basis already."""

    @abstractmethod
    def decode_rotated(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode uint8 [..., bytes_per_vector] to [..., head_dim] in the rotated basis.

        The order of the result in memory is not promised.

        Raises:
            ValueError: Another dtype or size of `packed`, or a `dtype` that is not a floating one.
        """

    def decode(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode uint8 [..., bytes_per_vector] to [..., head_dim] in the original basis; see `decode_rotated`."""
        return self.unrotate(self.decode_rotated(packed, working_dtype(dtype))).to(dtype)

    def _check_vectors(self, x: torch.Tensor) -> None:
        """Refuse an x that is not floating [..., head_dim]."""
        working_dtype(x.dtype)
        if x.ndim == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{self.name} takes vectors of {self.head_dim} coordinates, not a shape of {list(x.shape)}"
            )

    def _check_packed(self, packed: torch.Tensor) -> None:
        """Refuse packed rows that are not uint8 [..., bytes_per_vector]."""
        if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != self.bytes_per_vector:
            raise ValueError(
                f"{self.name} reads uint8 rows of {self.bytes_per_vector} bytes, "
                f"not {packed.dtype} of shape {list(packed.shape)}"
            )


class RowCodec(Codec):
    """A codec whose stored vector is a row of bit fields followed by a number gamma in fp16.

    Row of one vector: `num_triplets` codes and whatever else the format stores, as little-endian bit streams (see
    `packing`) of `bits` bits a triplet together, zero bits up to an even number of bytes, then gamma as little-endian
    fp16. A last triplet that the head dimension does not fill is padded. Decoding: gamma times the codewords; a gamma
    of 0 decodes to exact zeros. Vectors with a norm above 65504, the largest fp16 number, are refused with a
    ValueError that names the vector.

    A format implements `_encode_chunk` and `_decode_chunk`.
    """

    def __init__(self, name: str, head_dim: int, seed: int, bits: int) -> None:
        self.bits = bits
        self.num_triplets = -(-head_dim // 3)
        super().__init__(name, head_dim, seed, packed_bytes(self.num_triplets, bits) + NORM_BYTES)
        self._rotation = rotation_matrix(head_dim, seed)

    @property
    def rotation(self) -> torch.Tensor:
        return self._rotation

    @abstractmethod
    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        """Encode rotated rows [vectors, head_dim] into packed uint8 [vectors, bytes_per_vector]."""

    @abstractmethod
    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        """Write gamma [vectors] times the codewords of rows uint8 [vectors, bytes_per_vector] into `out`.

        out [num_triplets, 3, vectors], in the dtype to work in; gamma has it too.
        """

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._encode_rows(x, rotate=True)

    def encode_rotated(self, y: torch.Tensor) -> torch.Tensor:
        return self._encode_rows(y, rotate=False)

    def _encode_rows(self, x: torch.Tensor, rotate: bool) -> torch.Tensor:
        """`encode` (rotate) or `encode_rotated`, a chunk of vectors at a time."""
        self._check_vectors(x)
        rows = x.reshape(-1, self.head_dim)
        packed = torch.empty(len(rows), self.bytes_per_vector, dtype=torch.uint8, device=x.device)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK].to(working_dtype(x.dtype))
            self._check_norms(part, start, x.shape[:-1])
            if rotate:
                part = self.rotate(part)
            self._encode_chunk(part, packed[start : start + CHUNK])
        return packed.reshape(*x.shape[:-1], self.bytes_per_vector)

    def _check_norms(self, part: torch.Tensor, start: int, shape: torch.Size) -> None:
        """Refuse non-finite values and norms above fp16's range; `part` starts at flat vector `start` of `shape`."""
        norm = torch.linalg.vector_norm(part, dim=-1)
        good = norm <= MAX_NORM
        if bool(good.all()):
            return
        row = int((~good).nonzero()[0])
        broken = (~part[row].isfinite()).nonzero().flatten()
        if len(broken):
            place = describe_index((start + row) * self.head_dim + int(broken[0]), (*shape, self.head_dim))
            raise ValueError(f"{self.name} cannot encode {float(part[row, broken[0]])} (at position {place})")
        where = f" at position {describe_index(start + row, shape)}" if shape else ""
        raise ValueError(
            f"{self.name} cannot encode the vector{where}: its norm {float(norm[row]):.6g} is above {MAX_NORM:g}, "
            "the largest that fp16 holds"
        )

    def decode_rotated(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See `Codec.decode_rotated`; 2,048 vectors or more at a time are the fastest on a CPU.

        Returns:
            Stored coordinate-major, [head_dim, vectors] transposed, which matrix products take as it is.
        """
        self._check_packed(packed)
        work = working_dtype(dtype)
        rows = packed.reshape(-1, self.bytes_per_vector).contiguous()
        if rows.storage_offset() % 2:  # 16-bit words cannot start at an odd byte
            rows = rows.clone()
        out = torch.empty(self.num_triplets, 3, len(rows), dtype=work, device=packed.device)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            gamma = part[:, -NORM_BYTES:].contiguous().view(torch.float16)[:, 0].to(work)
            self._decode_chunk(part, gamma, out[:, :, start : start + CHUNK])
        vectors = out.view(3 * self.num_triplets, len(rows))[: self.head_dim].t()
        return vectors.view(*packed.shape[:-1], self.head_dim).to(dtype)


class TripletCodec(RowCodec):
    """A row codec that cuts the rotated unit vector into triplets and stores a code for each, then the norm in fp16.

    Norms: rounded to nearest. Below 2^-14 fp16 is subnormal: the norm keeps an absolute precision of 2^-25, and up to
    2^-25 it becomes 0. A last triplet is padded with zeros.

    A format implements `_encode_triplets` and `_decode_triplets`; both see the codes of whole vectors.
    """

    @abstractmethod
    def _encode_triplets(self, triplets: torch.Tensor) -> torch.Tensor:
        """Codes int32 [num_triplets, vectors] of the unit vectors' triplets [num_triplets, 3, vectors]."""

    @abstractmethod
    def _decode_triplets(self, codes: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        """Write gamma [vectors] times the codewords of `codes` [num_triplets, vectors] into `out`.

        out [num_triplets, 3, vectors], in the dtype to work in; gamma has it too.
        """

    def _encode_chunk(self, part: torch.Tensor, packed: torch.Tensor) -> None:
        norm = torch.linalg.vector_norm(part, dim=-1)
        units = part.new_zeros(3 * self.num_triplets, len(part))
        torch.div(part.t(), torch.where(norm > 0, norm, 1.0), out=units[: self.head_dim])
        codes = self._encode_triplets(units.view(self.num_triplets, 3, len(part)))
        packed[:, :-NORM_BYTES] = pack_codes(codes, self.bits)
        gamma = norm.to(torch.float32).to(torch.float16)
        packed[:, -NORM_BYTES:] = gamma[:, None].view(torch.uint8)

    def _decode_chunk(self, part: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor) -> None:
        self._decode_triplets(unpack_codes(part, self.num_triplets, self.bits), gamma, out)
