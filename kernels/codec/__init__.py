"""The KV codecs: formats that store key and value vectors in few bytes, as plain PyTorch functions.

`get("octopus3", head_dim=128)` gives a codec with `encode`, `decode` and `bytes_per_vector`; `parse_kv("octopus3")` the
pair that a KV cache uses. The classes are for building more formats: `RowCodec` has all but the code itself.
"""

from octo_run.kernels.codec.base import Codec, RowCodec, TripletCodec
from octo_run.kernels.codec.formats import KVFormat, get, names, parse_kv
from octo_run.kernels.codec.layer_formats import LayerFormats
from octo_run.kernels.codec.octopus import OctopusCodec, OctopusTables
from octo_run.kernels.codec.page_format import PageFormat
from octo_run.kernels.codec.plain import PlainCodec
from octo_run.kernels.codec.trellis import TrellisCodec

__all__ = [
    "Codec",
    "KVFormat",
    "LayerFormats",
    "OctopusCodec",
    "OctopusTables",
    "PageFormat",
    "PlainCodec",
    "RowCodec",
    "TrellisCodec",
    "TripletCodec",
    "get",
    "names",
    "parse_kv",
]
