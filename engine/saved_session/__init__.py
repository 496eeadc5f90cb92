"""Conversations in files: their text and settings, and what the KV cache holds of them, page by page.

A session file is a safetensors file. Its ``__metadata__`` has ``format`` (``octo-run session``) and ``session``, a JSON
object: version, model, settings, the conversation, and what decides whether the pages can be used. Its tensors:

- ``ids`` int32 ``[n]``: the tokens that the cache holds;
- ``pages`` uint8 ``[P, bytes]``: the packed pages as the arena has them, a row has all layers without a window and KV
  heads of a page; ``window0``, ``window1`` and so on those of layers with a window: the last ones, which the next token
  sees, and some before them;
- ``full0`` ``[2, layers, kv_heads, sink + ring, d]``: the sinks and the ring, K and V; ``full1`` and so on of layers
  whose heads differ from these in number or size;
- ``conv`` and ``memory``: the states of recurrent layers behind the last token, where there are such layers;
- ``earlier`` int32 ``[s]``: positions where turns begin and end, in order; ``earlier_conv`` and ``earlier_memory``
  ``[s, ...]`` the states there; ``earlier_window0`` uint8 and ``earlier_window0_numbers`` int32, and so on, the pages
  that a cut to these positions needs beside those of ``window0``, and their numbers. An older file has none of them:
  what is cut is then read again;
- ``key_maps0`` ``[layers, 2, kv_heads, d, d]`` and ``key_means0`` float32 ``[layers, kv_heads, d]``: what queries and
  keys are multiplied by and what is kept out of the code, of the layers whose keys have one; ``key_maps1`` as
  ``full1``. They are measured, so each machine has its own; an engine takes those of the file.

Pages go from one layout to the other where they were written on another kind of device. Nothing but the codec
compresses them. A file is written beside its name, brought to the disk, and then given its name: whoever is interrupted
leaves the older one.

A conversation that is saved after each turn has a second file for some turns, its *tail* (``.NAME.tail``): all that a
session file has, but of the pages only those that the first file lacks. Its header names the first file by its ``id``,
which each file has anew, and says how many of its pages count. A tail of another first file counts for nothing.

Names and shapes: `layout`, of earlier positions `earlier`; writing: `snapshot`; reading: `reading`; what can be read of
damaged files: `salvage`.
"""

from octo_run.engine.saved_session.layout import tail_of
from octo_run.engine.saved_session.reading import SavedSession, SessionMismatch
from octo_run.engine.saved_session.salvage import SavedText
from octo_run.engine.saved_session.snapshot import Base, Snapshot

__all__ = ["Base", "SavedSession", "SavedText", "SessionMismatch", "Snapshot", "tail_of"]
