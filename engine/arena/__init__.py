"""The KV arena: one preallocated store for all layers and sequences, packed pages plus full-precision sinks and
windows. What decides its bytes: `shape`; the tensors: `store`; new tokens on their way into it: `chunk`.

Where a token at position ``j`` of a sequence of ``n`` tokens with ``P`` packed pages lives:

- ``j < sink``: in its own full-precision sink slot (attention sinks ruin quantizers);
- ``sink <= j < sink + 64 P``: row ``(j - sink) % 64`` of packed page ``page_table[row, (j - sink) // 64]``;
- the rest, the *tail*: slot ``(j - sink) % ring`` of a full-precision ring of ``window + 64`` tokens.

``row`` is the sequence's (``engine.sequence``). A full ring's oldest 64 tokens are coded into a page before the next
token is written, so at least ``window`` of the last tokens are in full precision. (After a cut there may be fewer,
until new ones have come: what is coded stays coded.) Keys and queries are stored in the codec's rotated basis, values
too (see ``models.decoder``).

A page of the pool holds the pages of all layers and KV heads one after the other; layers may differ in format, hence in
bytes. Every one begins at a multiple of 128 bytes, as vectors have an even number of them.

An exception, Ctrl-C's included, may strike between any two statements here: what is being written lies beyond the end
of its sequence, which moves only when all of it is there.
"""

from octo_run.engine.arena.chunk import Chunk
from octo_run.engine.arena.shape import PAGE, ArenaShape
from octo_run.engine.arena.store import KVArena

__all__ = ["PAGE", "ArenaShape", "Chunk", "KVArena"]
