"""What is found out before a model is loaded: whether there is such a model, and whether options and files suit it."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from octo_run.cli import runtime
from octo_run.cli.options import EngineOptions
from octo_run.cli.sampling_options import SamplingOptions, given
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.models.config import ModelConfig


def answering(load: EngineOptions, sampling: SamplingOptions, template: tuple[str, str] | None) -> SamplingOptions:
    """Check, before a model is loaded, what shall answer and how.

    Args:
        template: The text of another chat template, and its file.

    Returns:
        The sampling options with what their files say.

    Raises:
        OctoError: There is no such model, llguidance is not installed, or the text is no template.
        UsageError: An option that cannot be, a file that cannot be read, or no grammar in it.
    """
    cfg = loadable(load)
    if template is not None:
        from octo_run.tokenizer.chat import ChatTemplate

        ChatTemplate(*template, {}, ()).check()
    return _drawn(sampling, cfg)


def weights(names: Iterable[str | None]) -> None:
    """Raise ``UsageError`` for a name that is no format of weights."""
    from octo_run.models.quantisation.schemes import scheme_of

    for name in names:
        scheme_of(name)


def several_weights(load: EngineOptions, cfg: "ModelConfig", random_weights: str | None) -> list[str | None]:
    """The formats of ``--weights A,B``, each once, checked before any of them is measured; None: nothing was said.

    Raises:
        OctoError: There is no such format, or the model cannot have it.
    """
    from octo_run.engine.engine import choose_device, choose_dtype
    from octo_run.models.hub import resolve
    from octo_run.models.quantisation.schemes import matrix_dtype, refuse_packed

    if load.weights is None:
        return [None]
    names = [*dict.fromkeys(name.strip() for name in load.weights.split(","))]
    weights(names)
    device = choose_device(load.device)
    for name in names:
        matrix_dtype(name, cfg, device, choose_dtype(load.dtype, cfg, device))
        if random_weights is None and cfg.quantisation is not None:
            refuse_packed(resolve(load.model), cfg, name)
    return [*names]


def several_formats(text: str | None, cfg: "ModelConfig") -> list[str]:
    """The formats of ``A,B,C``, each once, checked before any of them is measured; None: the usual one.

    Raises:
        UsageError: A model of this shape cannot use one of them.
    """
    from octo_run.engine.allocation import default_format, parse_formats

    text = default_format(cfg) if text is None else text
    kvs = [*dict.fromkeys(name.strip() for name in text.split(","))]
    for kv in kvs:
        parse_formats(kv, cfg)
    return kvs


def loadable(options: EngineOptions) -> "ModelConfig":
    """Check, before anything is read or closed for it, that there is such a model with such formats and device.

    Returns:
        The model's configuration.

    Raises:
        OctoError: There is not.
    """
    cfg = runtime.model_config(options.model, offline=options.offline)
    runtime.import_torch()
    from octo_run.engine.allocation import parse_formats
    from octo_run.engine.engine import choose_device, choose_dtype

    for name, value in (("--kv", options.kv or ""), ("--weights", options.weights or "")):
        if "," in value:
            raise UsageError(f"{name} {quoted(value)} are several formats: give one; bench and eval ppl take several.")
    if options.kv is not None:
        parse_formats(options.kv, cfg)
    weights([options.weights])
    choose_dtype(options.dtype, cfg, choose_device(options.device))
    return cfg


def _drawn(options: SamplingOptions, cfg: "ModelConfig") -> SamplingOptions:
    """The options with what the answer must be, read and checked.

    Raises:
        UsageError: A value that cannot be, a file that cannot be read, or no grammar in it.
        OctoError: llguidance is not installed.
    """
    if options == SamplingOptions():  # nothing is said
        return options
    runtime.import_torch()
    from octo_run.engine import SamplingParams

    wrong = next((token for token, _ in options.logit_bias if token >= cfg.vocab_size), None)
    if wrong is not None:
        raise UsageError(
            f"--logit-bias {wrong}=...: the model has the tokens 0 to {cfg.vocab_size - 1}, give one of them."
        )
    said = given(options)
    SamplingParams(**{name: value for name, value in said.items() if value is not None})
    return dataclasses.replace(options, read=said["grammar"])
