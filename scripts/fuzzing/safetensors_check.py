"""The reader of weight files, held against the safetensors library."""

from pathlib import Path

import safetensors
import torch

from fuzzing.kinds import Trial, Wrong
from octo_run.errors import OctoError
from octo_run.models.config import load_config
from octo_run.models.safetensors_file import FLOAT_DTYPES, TensorFile, read_header
from octo_run.models.weights import load_weights

#: What octo-run says where it refuses a file that the library takes -> why.
STRICTER: dict[str, str] = {
    "a name occurs twice": "which of two entries of one name holds depends on the parser; the library takes the last",
    "dimensions, more than": "a limit: no model has tensors of so many dimensions",
    "tensors, and octo-run reads": "a limit: no model has so many tensors, and reading them would take long",
}
#: What the library says where it refuses a file that octo-run takes -> why.
MILDER: dict[str, str] = {}


def check(folder: Path, trial: Trial) -> None:
    """Read the header and all tensors of floats, or the weights of a model where a configuration stands beside them."""
    if not (folder / "config.json").exists():
        for entry in read_header(folder / "model.safetensors").values():
            if entry.dtype in FLOAT_DTYPES:
                with TensorFile(entry.file) as data:
                    data.read(entry, torch.device("cpu"), torch.float32)
        return
    load_weights(folder, load_config(folder), "cpu", torch.float32)


def compare(folder: Path, trial: Trial) -> None:
    """Check that the library accepts and refuses the same files, and finds the same tensors in them.

    Raises:
        Wrong: It does not, and the difference is not listed.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 28:
            continue  # the library reads whatever there is
        ours, refusal = None, ""
        try:
            ours = {name: (entry.dtype, list(entry.shape)) for name, entry in read_header(path).items()}
        except OctoError as error:
            refusal = str(error)
        theirs, library = None, ""
        try:
            found = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
            theirs = {name: (entry["dtype"], list(entry["shape"])) for name, entry in found}
        except BaseException as error:  # its panics are no Exception
            library = f"{type(error).__name__} {error}"
        if ours is None and theirs is not None:
            _explain(trial, "refused, the library accepts", refusal, STRICTER)
        elif ours is not None and theirs is None:
            _explain(trial, "accepted, the library refuses", library, MILDER)
        elif ours is not None and theirs is not None and ours != theirs:
            raise Wrong("other tensors than the library", f"{ours} / {theirs}"[:300])


def _explain(trial: Trial, what: str, said: str, listed: dict[str, str]) -> None:
    for part, reason in listed.items():
        if part in said:
            trial.notes.append(f"{what} ({part}): {reason}")
            return
    raise Wrong(what, said)
