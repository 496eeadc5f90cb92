"""Which attention kernel runs when. `KERNELS` decides, and nothing else does: a call has exactly one entry.

A call is described by what the host knows without looking at a tensor's values (`Call`). The query heads of a KV head
(group) choose no kernel, nor does what an `AttentionSpec` has beside a scale: every kernel serves all of them. They
choose tiles (`TILES`), with head_dim, and the heads of a program of the table-decode kernel (`head_blocks`).
"""

from __future__ import annotations

import functools
from collections.abc import Container
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch

from octo_run.kernels.codec import PlainCodec, TrellisCodec
from octo_run.kernels.devices import is_nvidia
from octo_run.kernels.page_size import longest_unpaged

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.attention.inputs import AttentionInputs
    from octo_run.kernels.codec import KVFormat


class _Fact(Enum):
    """Members are hashed by identity: every launch looks them up in caches."""

    __hash__ = object.__hash__


class Kernel(_Fact):
    """What runs for a call, with the file of the kernel."""

    REFERENCE = "reference.py: PyTorch"
    TABLE_DECODE = "hopper/decode.py: table_decode_kernel, which also merges its parts"
    WIDE_DECODE = "hopper/wide_decode.py: wide_decode_kernel, then merge_places_kernel"
    PLAIN_DECODE = "general/plain_decode.py: plain_decode_kernel, then merge_kernel if there are several parts"
    GENERAL_DECODE = "general/decode.py: general_decode_kernel, then merge_kernel if there are several parts"
    PREFILL = "general/prefill.py: unpack_kernel and flash_kernel slab by slab, then flash_kernel over the rest"


class Device(_Fact):
    """What a device can run."""

    CPU = "a CPU"
    GPU = "a GPU; the interpreter"
    HOPPER = "an NVIDIA GPU with more than 200 KiB of shared memory a multiprocessor (sm_90, sm_100)"


class Stored(_Fact):
    """What the packed pages hold, K and V together."""

    PLAIN = "vectors of the queries' type, no key mean"
    TRELLIS = "trellis codes, K and V"
    HALF_TRELLIS = "trellis codes, K or V"
    OTHER = "octopus codes; vectors beside such codes, with a key mean or of another type than the queries"


class Element(_Fact):
    """The type of queries, sinks and tail."""

    HALF = "float16, bfloat16"
    SINGLE = "float32"
    OTHER = "float64"


class Queries(_Fact):
    """Query tokens of a sequence."""

    ONE = "a decode step"
    SEVERAL = "a chunk of a prompt, also of one token where a key mean's coefficients are not given"


class Pages(_Fact):
    """Whether any sequence of the batch can have a packed page."""

    NONE = "the pool is empty, or the bound on lengths leaves none"
    SOME = "there may be some"


class Width(_Fact):
    """Numbers of a head."""

    UP_TO_256 = "at most 256"
    ABOVE_256 = "more (512)"


class Call(NamedTuple):
    """What is known of a call on the host."""

    device: Device
    stored: Stored
    element: Element
    queries: Queries
    pages: Pages
    width: Width


class Entry(NamedTuple):
    """A row of `KERNELS`: for calls whose facts are each one of these, this kernel, for this reason."""

    kernel: Kernel
    device: Container[Device]
    stored: Container[Stored]
    element: Container[Element]
    queries: Container[Queries]
    pages: Container[Pages]
    width: Container[Width]
    why: str

    def applies(self, call: Call) -> bool:
        """Whether the row is the call's."""
        columns: tuple[Container[object], ...] = self[1:-1]
        return all(fact in column for fact, column in zip(call, columns, strict=True))


class _Any:
    """Contains everything."""

    def __contains__(self, _: object) -> bool:
        return True


ANY = _Any()
_CPU, _GPUS, _HOPPER, _LESSER = [Device.CPU], [Device.GPU, Device.HOPPER], [Device.HOPPER], [Device.GPU]
_PLAIN, _TRELLIS, _MIXED = [Stored.PLAIN], [Stored.TRELLIS], [Stored.HALF_TRELLIS, Stored.OTHER]
_CODED = [*_TRELLIS, *_MIXED]
_HALF, _SINGLE, _BOTH = [Element.HALF], [Element.SINGLE], [Element.HALF, Element.SINGLE]
_ONE, _SEVERAL = [Queries.ONE], [Queries.SEVERAL]
_NONE, _SOME = [Pages.NONE], [Pages.SOME]
_256, _MORE = [Width.UP_TO_256], [Width.ABOVE_256]

KERNELS: tuple[Entry, ...] = (
    #     kernel                 device    stored    element  queries   pages  width  why
    Entry(Kernel.REFERENCE,      _CPU,     ANY,      ANY,     ANY,      ANY,   ANY,
          "PyTorch, in every type and format; `attend` asks the compiled kernels (`kernels.cpu`) first"),
    Entry(Kernel.PREFILL,        _GPUS,    ANY,      _BOTH,   _SEVERAL, ANY,   ANY,
          "many queries read a page: it is decoded once, to memory, and then multiplied by warp groups"),
    Entry(Kernel.PLAIN_DECODE,   _GPUS,    _PLAIN,   _BOTH,   _ONE,     ANY,   ANY,
          "nothing is decoded: pages go by way of shared memory into the products of warp groups"),
    Entry(Kernel.PLAIN_DECODE,   _GPUS,    _CODED,   _BOTH,   _ONE,     _NONE, ANY,
          "all keys are in full precision: there are no codes to decode, and tables would be filled for nothing"),
    Entry(Kernel.TABLE_DECODE,   _HOPPER,  _TRELLIS, _HALF,   _ONE,     _SOME, _256,
          "a word of a table in shared memory is an int8 operand: a third of the general kernel's instructions"),
    Entry(Kernel.WIDE_DECODE,    _HOPPER,  _TRELLIS, _HALF,   _ONE,     _SOME, _MORE,
          "a page for each of eight warps would fill the shared memory: teams of four warps share pages and sums"),
    Entry(Kernel.GENERAL_DECODE, _HOPPER,  _TRELLIS, _SINGLE, _ONE,     _SOME, ANY,
          "the table kernels hold a query in 16 bits: too few for float32"),
    Entry(Kernel.GENERAL_DECODE, _LESSER,  _TRELLIS, _BOTH,   _ONE,     _SOME, ANY,
          "the tables' copies have no room in 164 KiB of shared memory, and other makers' GPUs run no PTX"),
    Entry(Kernel.GENERAL_DECODE, _GPUS,    _MIXED,   _BOTH,   _ONE,     _SOME, ANY,
          "it decodes K and V each in a format of its own, by arithmetic, and adds the key mean to the scores"),
)  # fmt: skip


@functools.cache
def choose(call: Call) -> Kernel:
    """The kernel for a call.

    Raises:
        ValueError: A type that a GPU's kernels do not take.
    """
    for entry in KERNELS:
        if entry.applies(call):
            return entry.kernel
    raise ValueError(f"the attention kernels take fp16, bf16 and fp32, not {call.element.value}")


ELEMENTS = {torch.float16: Element.HALF, torch.bfloat16: Element.HALF, torch.float32: Element.SINGLE}


def describe(q: Tensor, kv: AttentionInputs, fmt: KVFormat, max_length: int, device: Device) -> Call:
    """The facts of a call, arguments as those of `attend`, on a device of that kind. Needs no checked inputs."""
    coefficients_known = kv.mean is None or kv.mean.of_queries is not None
    return Call(
        device,
        stored(fmt, q.dtype, mean=kv.mean is not None),
        ELEMENTS.get(q.dtype, Element.OTHER),
        Queries.ONE if q.shape[1:2] == (1,) and coefficients_known else Queries.SEVERAL,
        Pages.SOME if kv.pages.numel() > 0 and max_length > longest_unpaged(kv.sink) else Pages.NONE,
        Width.UP_TO_256 if q.shape[-1] <= 256 else Width.ABOVE_256,
    )


@functools.cache
def stored(fmt: KVFormat, dtype: torch.dtype, *, mean: bool) -> Stored:
    """What pages of a format hold, for queries of a type, with a key mean or not."""
    trellis = [isinstance(codec, TrellisCodec) for codec in (fmt.k, fmt.v)]
    if any(trellis):
        return Stored.TRELLIS if all(trellis) else Stored.HALF_TRELLIS
    plain = all(isinstance(codec, PlainCodec) and codec.dtype == dtype for codec in (fmt.k, fmt.v))
    return Stored.PLAIN if plain and not mean else Stored.OTHER


def kind(device: torch.device) -> Device:
    """What a device can run."""
    return Device.CPU if device.type == "cpu" else kind_of_gpu(device)


@functools.cache
def kind_of_gpu(device: torch.device) -> Device:
    """What a device can run if it is taken for a GPU.

    Returns:
        `HOPPER` for a GPU with the shared memory for the table-decode kernel: sm_90 and sm_100 (228 KiB), not sm_80 to
        89 and sm_120 (at most 164). `GPU` for every other device, on which the Triton kernels run or are interpreted.
    """
    if is_nvidia(device) and torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor > 200 * 1024:
        return Device.HOPPER
    return Device.GPU


class Tiles(NamedTuple):
    """Tile sizes and launch options of the Triton kernels; see the constexprs of `general_decode_kernel`.

    Attributes:
        rows: Of queries (BM), in decode kernels at least the group made a power of two.
        keys: Of a page (BN).
        full_keys: In full precision (BF).
        flip: Keys on the side of a product that is a multiple of 16 (FLIP).
        warps, stages: Launch options.
        at_once: Programs that share a multiprocessor.
    """

    rows: int
    keys: int
    full_keys: int
    flip: bool
    warps: int
    stages: int
    at_once: int


class TilesEntry(NamedTuple):
    """A row of `TILES`."""

    kernel: Kernel
    stored: Container[Stored]
    element: Element
    head_dim: Container[int]
    tiles: Tiles
    why: str


_UP_TO_64, _UP_TO_128, _65_TO_128 = range(1, 65), range(1, 129), range(65, 129)
_129_TO_256, _ABOVE_256 = range(129, 257), range(257, 1 << 30)
_UP_TO_256 = range(1, 257)
_CODES, _REST = [Stored.TRELLIS, Stored.HALF_TRELLIS], [Stored.PLAIN, Stored.OTHER]
_G, _P, _F = Kernel.GENERAL_DECODE, Kernel.PLAIN_DECODE, Kernel.PREFILL

TILES: tuple[TilesEntry, ...] = (
    #          kernel, stored, element,    head_dim,    Tiles(rows, keys, full, flip, warps, stages, at once), why
    TilesEntry(_G, ANY,    Element.SINGLE, ANY,         Tiles(16,  16,  16,  False, 4,    1,     8),
               "the smallest products of float32 are 16 each way"),
    TilesEntry(_G, _CODES, Element.HALF,   _UP_TO_256,  Tiles(8,   16,  16,  True,  1,    1,     8),
               "one warp a program: what is decoded is decoded once (timed, H200)"),
    TilesEntry(_G, _REST,  Element.HALF,   _UP_TO_128,  Tiles(8,   32,  16,  True,  1,    1,     8),
               "the same, and twice the keys while they are small or quickly decoded (timed, H200)"),
    TilesEntry(_G, _REST,  Element.HALF,   _129_TO_256, Tiles(8,   16,  16,  True,  1,    1,     8),
               "one warp a program: what is decoded is decoded once (timed, H200)"),
    TilesEntry(_G, ANY,    Element.HALF,   _ABOVE_256,  Tiles(8,   16,  16,  True,  2,    1,     4),
               "the sums and the queries of one warp would not fit its registers; two were fastest (timed, H200)"),
    TilesEntry(_P, ANY,    Element.SINGLE, _UP_TO_256,  Tiles(16,  16,  16,  True,  4,    1,     2),
               "the smallest products of float32 are 16 each way"),
    TilesEntry(_P, ANY,    Element.SINGLE, _ABOVE_256,  Tiles(16,  16,  16,  True,  4,    1,     1),
               "the smallest products of float32 are 16 each way (not timed)"),
    TilesEntry(_P, ANY,    Element.HALF,   _UP_TO_64,   Tiles(16,  64,  64,  True,  4,    5,     4),
               "a warp group; programs by the registers, stages that fill the shared memory"),
    TilesEntry(_P, ANY,    Element.HALF,   _65_TO_128,  Tiles(16,  64,  64,  True,  4,    3,     3),
               "a warp group; programs by the registers, stages that fill the shared memory (timed at 128, H100)"),
    TilesEntry(_P, ANY,    Element.HALF,   _129_TO_256, Tiles(16,  64,  64,  True,  4,    3,     1),
               "a warp group; keys and values of three stages leave room for one program"),
    TilesEntry(_P, ANY,    Element.HALF,   _ABOVE_256,  Tiles(16,  32,  32,  True,  4,    3,     1),
               "keys and values of three stages fill the shared memory, half as many a stage (not timed)"),
    TilesEntry(_F, ANY,    Element.SINGLE, ANY,         Tiles(16,  16,  16,  False, 8,    1,     1),
               "the smallest products of float32 are 16 each way"),
    TilesEntry(_F, ANY,    Element.HALF,   _UP_TO_128,  Tiles(128, 64,  64,  False, 8,    3,     1),
               "the registers of a whole multiprocessor (sm_90); its shared memory has room for three stages"),
    TilesEntry(_F, ANY,    Element.HALF,   _129_TO_256, Tiles(128, 64,  64,  False, 8,    2,     1),
               "the registers of a whole multiprocessor (sm_90); its shared memory has room for two stages"),
    TilesEntry(_F, ANY,    Element.HALF,   _ABOVE_256,  Tiles(64,  32,  32,  False, 8,    2,     1),
               "half the queries, for their sums fill the registers; two stages of half the keys (not timed)"),
)  # fmt: skip


@functools.cache
def tiles(kernel: Kernel, stored: Stored, element: Element, head_dim: int) -> Tiles:
    """The tiles of a Triton kernel, the only row of `TILES` that applies."""
    (entry,) = [
        entry
        for entry in TILES
        if (entry.kernel, entry.element) == (kernel, element) and stored in entry.stored and head_dim in entry.head_dim
    ]
    return entry.tiles


def head_blocks(group: int, head_dim: int) -> tuple[int, int]:
    """How the table-decode kernel divides the query heads of a KV head.

    Returns:
        Blocks of four heads in a program, and programs.
    """
    blocks = 1 if group <= 4 or head_dim > 128 else 2  # registers allow no more
    return blocks, -(-group // (4 * blocks))
