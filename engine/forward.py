"""The one way forward, on every device: chunks of a prompt and decode steps through the layers, on kept buffers.

``Decoder.hidden`` computes the same in plain PyTorch, for tests to compare with; the rounding points are the same.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import Chunk, KVArena
from octo_run.engine.sequence import Sequence
from octo_run.kernels import step as ops
from octo_run.kernels.cpu.memory import collapse_later
from octo_run.kernels.cpu.replay import Replays
from octo_run.models import per_layer
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Angles, AttentionWeights, Decoder, Layer, Mixer
from octo_run.models.specs import LayerSpec, Shapes, layer_specs

if TYPE_CHECKING:
    from octo_run.engine.step import StepState

#: ``mix(layer, qkv [R, (heads + 2 kv_heads) d]) -> [R, heads * d]``: from a layer's projections to its attention
Mix = Callable[[int, Tensor], Tensor]
#: ``other(layer, normed [R, hidden], out [R, hidden], buffers)``: what a layer has in place of attention
Other = Callable[[Mixer, Tensor, Tensor, dict[str, Tensor]], None]

_ALIGNED = 128  # elements: every buffer begins on a multiple


def _shapes(cfg: ModelConfig, rows: int) -> tuple[Shapes, list[Shapes]]:
    """Buffers that live through a layer, and those of parts of layers, of which one works at a time (these share
    memory): attention, other mixers, MLPs."""
    specs = layer_specs(cfg)
    lasting: Shapes = dict.fromkeys(("residual", "normed", "delta"), (rows, cfg.hidden_size))
    kinds = dict.fromkeys((spec.rope, spec.head_dim) for spec in specs)
    for number, (_, head_dim) in enumerate(kinds):
        lasting |= {f"{name}{number}": (rows, head_dim // 2) for name in ("cos", "sin")}
    parts = [shapes for spec in specs for shapes in (_mixer_shapes(spec, rows), spec.mlp.shapes(rows))]
    if cfg.per_layer_input:
        lasting |= {
            "per_layer": (len(specs), rows, 2 * cfg.per_layer_input), "per_layer_inner": (rows, cfg.per_layer_input)
        }  # fmt: skip
        parts.append(per_layer.buffers(cfg, rows))
    return lasting, [*{repr(shapes): shapes for shapes in parts}.values()]


def _mixer_shapes(spec: LayerSpec, rows: int) -> Shapes:
    if spec.mixer is not None:
        return spec.mixer.shapes(rows)
    q, kv = (spec.heads, spec.head_dim), (spec.kv_heads, 1, spec.head_dim)
    shapes: Shapes = {"qkv": (rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim), "q": (rows, 1, *q)}
    if spec.gated:
        shapes["gate"] = (rows, spec.heads * spec.head_dim)
    return shapes | {"mixed": (rows, 1, *q), "kv": (2, rows, *kv)}


def _size(shapes: Shapes) -> int:
    return sum(-(-prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes.values())


def buffer_bytes(cfg: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes that a :class:`Forward` of ``rows`` tokens holds."""
    lasting, parts = _shapes(cfg, rows)
    scaled = 4 * len({spec.rope for spec in layer_specs(cfg) if spec.rope is not None and spec.rope.query_scaling})
    return (_size(lasting) + max(map(_size, parts))) * dtype.itemsize + rows * (4 + 4 + 8 + scaled)


class Forward:
    """Runs up to ``rows`` tokens through the layers of ``decoder`` over the sequences of ``arena``."""

    def __init__(self, decoder: Decoder, arena: KVArena, rows: int, workspace: Tensor | None) -> None:
        self.decoder, self.arena, self.workspace = decoder, arena, workspace
        cfg, device = decoder.cfg, arena.pages.device
        lasting, parts = _shapes(cfg, rows)
        kept = _size(lasting)
        flat = torch.empty(kept + max(map(_size, parts)), dtype=arena.shape.dtype, device=device)
        self._buffers = _carve(flat, lasting)
        made = {repr(shapes): _carve(flat[kept:], shapes) for shapes in parts}
        self._of_inputs = made[repr(per_layer.buffers(cfg, rows))] if cfg.per_layer_input else {}
        #: The buffers of each layer's mixer and MLP; layers of one kind have the same.
        self._of_mlp = [made[repr(spec.mlp.shapes(rows))] for spec in decoder.specs]
        self._of_mixer = [made[repr(_mixer_shapes(spec, rows))] for spec in decoder.specs]
        self._positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self._no_slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        #: What queries are multiplied by, for each rotary embedding that says so.
        self._queries = {
            number: torch.zeros(rows, device=device)
            for number, (kind, _) in enumerate(decoder.ropes)
            if kind is not None and kind.query_scaling is not None
        }
        self._coefficients = torch.zeros(arena.shape.coefficients_shape(rows), device=device)
        #: Steps on a CPU, recorded. Where there is a second one, more will follow.
        self._replays = Replays(functools.partial(collapse_later, decoder))

    def _upload(self, ids: list[int]) -> Tensor:
        """``ids`` on the device, int64, without waiting for the device."""
        into = self._ids[: len(ids)]
        self.arena.upload(ids, into)
        return into

    def _coefficients_of(self, index: int, count: int) -> Tensor | None:
        """Where those of so many queries of a layer are written to, ``[count, 1, heads, d]``; None where nothing needs
        them."""
        layer = self.decoder.layers[index]
        if layer.attention.key_mean is None or not 0 < count <= len(self._coefficients):
            return None
        shape = count, 1, self._coefficients.shape[2], layer.spec.head_dim
        return self._coefficients.view(-1)[: prod(shape)].view(shape)

    def chunks(self, chunks: list[Chunk]) -> Tensor:
        """Run chunks of several sequences through the layers.

        Products and norms take all of them at once, attention each by itself.

        Returns:
            Normed hidden states ``[C, hidden]`` of the chunks, one after the other.
        """
        ids = self._upload([token for chunk in chunks for token in chunk.ids])
        count = len(ids)
        parts, first = list[tuple[Chunk, slice]](), 0
        for chunk in chunks:
            last = first + chunk.count
            torch.arange(chunk.start, chunk.end, dtype=torch.int32, out=self._positions[first:last])
            parts.append((chunk, slice(first, last)))
            first = last
        transforms = self._transforms(self._positions[:count])

        def mix(index: int, qkv: Tensor) -> Tensor:
            slots, buffers = self._no_slots[:count], self._of_mixer[index]
            q, mixed, kv = buffers["q"][:count], buffers["mixed"][:count], buffers["kv"][:, :count]
            layer, number = self.decoder.specs[index], self.decoder.places[index]
            coefficients = self._coefficients_of(index, count)
            ops.qkv_rope_append(qkv, transforms[index], slots, kv[0], kv[1], q, coefficients=coefficients)
            for chunk, rows in parts:
                queries, out = (x[rows].transpose(0, 1) for x in (q, mixed))
                found = None if coefficients is None else coefficients[rows].transpose(0, 1)
                if layer.kv_source is None:
                    new = kv[:, rows, :, 0]
                    chunk.attend(number, queries, new, layer.attention, self.workspace, out=out, coefficients=found)
                else:
                    chunk.attend_again(number, queries, layer.attention, self.workspace, out=out, coefficients=found)
            return mixed

        self._per_layer_inputs(ids)
        return self._layers(ids, mix, lambda mixer, *buffers: mixer.chunks(*buffers, chunks))

    def read_again(self, sequence: Sequence, ids: list[int]) -> None:
        """Append to a sequence what it lacks of ``ids``, which begin with its own: what a cut had to take along."""
        while (held := len(sequence)) < len(ids):
            chunk = self.arena.prefill(sequence, ids[held : held + self.arena.shape.chunk])
            self.chunks([chunk])
            chunk.commit()

    def step(self, ids: Tensor, state: "StepState", max_length: int) -> Tensor:
        """Run one token in each of B sequences through the layers.

        Nothing here depends on a value of the host but the bound ``max_length``.

        Args:
            ids: Integers ``[B]``.

        Returns:
            Normed hidden states ``[B, hidden]``.
        """
        arena, batch = self.arena, len(ids)
        transforms = self._transforms(state.positions)

        def mix(index: int, qkv: Tensor) -> Tensor:
            buffers, layer = self._of_mixer[index], self.decoder.specs[index]
            q, mixed, number = buffers["q"][:batch], buffers["mixed"][:batch], self.decoder.places[index]
            coefficients = self._coefficients_of(index, batch)
            if layer.kv_source is None:
                full_k, full_v = arena.full(number)
                ops.qkv_rope_append(qkv, transforms[index], state.places, full_k, full_v, q, state.rows, coefficients)
            else:  # keys and values that it has not are written to where nobody reads them
                (k, v), slots = buffers["kv"][:, :batch], self._no_slots[:batch]
                ops.qkv_rope_append(qkv, transforms[index], slots, k, v, q, coefficients=coefficients)
            inputs, spec = arena.inputs(number, state, coefficients), layer.attention
            return kernels.attend(
                q, inputs, arena.formats[number], spec=spec, max_length=max_length, out=mixed, workspace=self.workspace
            )

        def other(mixer: Mixer, normed: Tensor, out: Tensor, buffers: dict[str, Tensor]) -> None:
            assert arena.states is not None
            mixer.step(normed, out, buffers, state, arena.states)

        if not ids.is_cpu:
            self._per_layer_inputs(ids)
            return self._layers(ids, mix, other)
        into = self._ids[:batch]  # what is recorded reads and writes kept buffers alone
        into.copy_(ids)
        self._per_layer_inputs(into)
        return self._replays.run((batch, state.whole.data_ptr()), lambda: self._layers(into, mix, other))

    def logits(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits ``[R, vocab]`` of normed hidden states ``[R, hidden]`` in the compute dtype."""
        if out is None:
            out = normed.new_empty(len(normed), self.decoder.cfg.vocab_size)
        self.decoder.head.apply(normed, out)
        self.decoder.finish(out)
        return out

    def _transforms(self, positions: Tensor) -> dict[int, ops.HeadTransform]:
        """For every layer with attention what is done to its heads before it at ``positions`` int32 ``[R]``."""
        decoder, count = self.decoder, len(positions)
        angles, eps = list[Angles](), decoder.cfg.rms_norm_eps
        for number in range(len(decoder.ropes)):
            cos, sin = (self._buffers[f"{name}{number}"][:count] for name in ("cos", "sin"))
            scaled = self._queries[number][:count] if number in self._queries else None
            queries = decoder.write_angles(number, positions, cos, sin)
            if queries is not None and scaled is not None:
                scaled.copy_(queries)
            angles.append(Angles(cos, sin, scaled))
        made = dict[int, ops.HeadTransform]()
        for index, layer in enumerate(decoder.layers):
            if not layer.has_attention:
                continue
            (cos, sin, scaled), part = angles[decoder.rope_of[index]], layer.attention
            norms = (None, None) if layer.spec.qk_norm == "all" else (part.q_norm, part.k_norm)
            own = layer.spec.kv_source is None
            made[index] = ops.HeadTransform(
                cos, sin, *norms, eps, part.maps, part.v_rotation if own else None, part.key_mean, scaled,
                layer.spec.v_norm and own,
            )  # fmt: skip
        return made

    def _per_layer_inputs(self, ids: Tensor) -> None:
        """Make what each layer is given of tokens int64 ``[R]``, where there is such."""
        embedding, count = self.decoder.per_layer, len(ids)
        if embedding is None:
            return
        embedded = self._buffers["residual"][:count]
        ops.embed(ids, self.decoder.embedding, embedded, self.decoder.embedding_scale)
        buffers = {name: x[:count] for name, x in self._of_inputs.items()}
        embedding.write(ids, embedded, self._buffers["per_layer"][:, :count], buffers)

    def _layers(self, ids: Tensor, mix: Mix, other: Other) -> Tensor:
        decoder, eps, rows = self.decoder, self.decoder.cfg.rms_norm_eps, len(ids)
        residual, normed, delta = (self._buffers[name][:rows] for name in ("residual", "normed", "delta"))
        ops.embed(ids, decoder.embedding, residual, decoder.embedding_scale)

        def add(spec: LayerSpec, post: Tensor | None, norm: Tensor | None, scale: float = 1.0) -> Tensor:
            """Add what a part of a layer gave to the residual; the input of the next part, for which ``norm`` is."""
            ops.add_rms_norm(delta, residual, norm, eps, normed, post, spec.residual_multiplier, spec.layer_norm, scale)
            return residual if norm is None else normed

        following = [layer.norms.before_attention for layer in decoder.layers[1:]] + [decoder.final_norm]
        given, first = residual, decoder.layers[0]
        if first.norms.before_attention is not None:
            given = normed
            ops.add_rms_norm(residual, None, first.norms.before_attention, eps, normed, centred=first.spec.layer_norm)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, following, strict=True)):
            if isinstance(layer.mixer, AttentionWeights):
                self._attention(index, layer, given, delta, mix)
            else:
                other(layer.mixer, given, delta, {name: x[:rows] for name, x in self._of_mixer[index].items()})
            if layer.spec.parallel:  # the MLP sees what attention saw
                add(layer.spec, layer.norms.after_attention, None)
            else:
                given = add(layer.spec, layer.norms.after_attention, layer.norms.before_mlp)
            layer.mlp.apply(given, delta, {name: x[:rows] for name, x in self._of_mlp[index].items()})
            if layer.per_layer is None:
                given = add(layer.spec, layer.norms.after_mlp, next_norm, layer.scale)
                continue
            add(layer.spec, layer.norms.after_mlp, None)
            own, inner = self._buffers["per_layer"][index, :rows], self._buffers["per_layer_inner"][:rows]
            layer.per_layer.apply(residual, own, delta, inner)
            given = add(layer.spec, layer.per_layer.norm, next_norm, layer.scale)
        return given

    def _attention(self, index: int, layer: Layer, given: Tensor, out: Tensor, mix: Mix) -> None:
        """A layer's attention of ``given [R, hidden]``, written to ``out [R, hidden]``."""
        part, spec, rows = layer.attention, layer.spec, len(given)
        buffers = self._of_mixer[index]
        qkv = buffers["qkv"][:rows]
        part.qkv.apply(given, qkv if spec.kv_source is None else qkv[:, : spec.edges[0]])
        if spec.qk_norm == "all" and part.q_norm is not None and part.k_norm is not None:
            (of_q, of_k, _), eps = spec.edges, self.decoder.cfg.rms_norm_eps
            ops.norm_heads(qkv[:, :of_q], part.q_norm, eps)
            ops.norm_heads(qkv[:, of_q:of_k], part.k_norm, eps)
        mixed = mix(index, qkv)
        if part.v_rotation is not None:
            mixed, rotated = buffers["q"][:rows], mixed  # the queries are not needed any more
            ops.rotate_back(rotated.flatten(1), part.v_rotation, mixed.view(rows, -1))
        if part.gate is not None:
            part.gate.apply(given, buffers["gate"][:rows])
            ops.gate(mixed.view(rows, -1), buffers["gate"][:rows])
        part.out.apply(mixed.flatten(1), out)


def _carve(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Views of consecutive parts of ``flat``."""
    parts, first = {}, 0
    for name, shape in shapes.items():
        parts[name] = flat[first : first + prod(shape)].view(shape)
        first += -(-prod(shape) // _ALIGNED) * _ALIGNED
    return parts
