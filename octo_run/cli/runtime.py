"""The one place where the command line meets the engine; tests replace these functions by a small stand-in."""

import dataclasses
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from octo_run import process
from octo_run.cli.console import human_bytes, notice, notice_lines, require_output, warn
from octo_run.cli.options import EngineOptions
from octo_run.cli.sampling_options import SamplingOptions, given
from octo_run.errors import OctoError, quoted, shown

if TYPE_CHECKING:
    from octo_run.engine import Engine, MemoryPlan, Reply, SamplingParams, Session
    from octo_run.engine.benchmark import Row, Test
    from octo_run.engine.profiling import Profile
    from octo_run.engine.random_model import NoTokenizer
    from octo_run.models.config import ModelConfig
    from octo_run.tokenizer import Tokenizer

PLAN_PARTS = {
    "weights": "weights",
    "arena": "KV arena",
    "full_precision": "sinks and windows",
    "recurrent": "recurrent states",
    "workspace": "workspace",
    "graphs": "graphs",
    "logits": "logits",
}


def go_offline() -> None:
    """Forbid the Hub's client every request of this process; call it before that client is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def import_torch() -> None:
    """Import PyTorch without the shapes of its operations, of which only its compiler asks: a third of the time.

    Whoever asks for them later gets them. What generators of random numbers need of them is there.
    """
    if "torch" in sys.modules:
        return
    name = "torch._meta_registrations"
    sys.modules[name] = ModuleType(name)
    try:
        with process.no_collection():
            import torch
    finally:
        del sys.modules[name]
    vars(torch).pop(name.rpartition(".")[2], None)
    try:
        torch.Generator()
    except RuntimeError:  # since PyTorch 2.13 what is imported with those shapes makes generators usable
        _make_generators_usable()


def _make_generators_usable() -> None:
    """Give `torch.Generator` its metaclass, as `torch._prims.rng_prims` does; importing that would take .3 s more."""
    import torch

    try:
        base = importlib.import_module("torch._opaque_base")
        vars(torch._C)["_set_generator_metaclass"](base.OpaqueBaseMeta)
        torch.Generator()
    except (ImportError, AttributeError, KeyError, RuntimeError, TypeError):
        importlib.import_module("torch._prims.rng_prims")


#: Weights beside which a CPU keeps the head in int8 unless something else is said: in float32 it would take as long to
#: read as all of the layers of a small model.
WITH_PACKED_HEAD = ("int8", "int4", "int4-128")
#: Models and devices whose plan this run has told in full, and what else it has told.
_planned: set[tuple[str, str]] = set()
_said: set[str] = set()


def _say_once(text: str) -> None:
    """A notice that a run gives once, however many engines it loads."""
    if text not in _said:
        notice(text)
    _said.add(text)


def resolved(options: EngineOptions, random_weights: str | None = None) -> EngineOptions:
    """The options with what the cache, weights and head are stored as where nothing was said about them.

    The cache is as `allocation.default_format` says. On a CPU with compiled kernels, which read them two to four times
    as fast, layers are int8, but not where they are quantised or a layer has experts; and the head is int8 where layers
    are int8 or int4, in their files or here.
    """
    from octo_run.engine.allocation import default_format

    known = functools.cache(lambda: bench_config(options.model, random_weights, offline=options.offline))
    kv, weights, head = options.kv, options.weights, options.head
    if kv is None:
        kv = default_format(known())
    packed = weights in WITH_PACKED_HEAD
    if head is None and weights is not None and weights not in WITH_PACKED_HEAD:
        head = "bf16"
    if (weights is None or head is None) and _compiled_cpu(options.device):
        if weights is None:
            cfg = known()
            weights = "int8" if cfg.quantisation is None and cfg.experts is None else "auto"
            packed = weights == "int8" or (cfg.quantisation is not None and cfg.quantisation.kinds <= {"int4", "int8"})
        if head is None and packed:
            head = "int8"
    return dataclasses.replace(options, kv=kv, weights=weights or "auto", head=head or "bf16")


def _compiled_cpu(device: str | None) -> bool:
    """Whether the device is a CPU that has compiled kernels."""
    from octo_run.engine.engine import choose_device
    from octo_run.kernels.cpu import library

    return choose_device(device).type == "cpu" and library() is not None


def load_engine(
    options: EngineOptions, check: "Callable[[Tokenizer, MemoryPlan], None] | None" = None, **cache: Any
) -> "Engine":
    """Load the model that ``options`` names, printing the device and the memory plan on standard error first.

    Args:
        check: Called before a weight is read; what it raises ends the loading.
        cache: Further arguments of ``Engine.load``.
    """
    require_output()
    if options.offline:
        go_offline()
    import_torch()
    with process.no_collection():
        from octo_run.engine import Engine
    from octo_run.kernels.codec.formats import PLAIN
    from octo_run.kernels.cpu import failure, on_compile

    on_compile(_say_once)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    asked, options = options, resolved(options, cache.get("random_weights"))

    def announce(plan: "MemoryPlan") -> None:
        if options.device is None and plan.device == "cpu":
            _say_once("no CUDA device found: running on the CPU")
        model = cache.get("random_weights") or options.model
        if (model, plan.device) in _planned:  # what differs from the plan above
            _say_once(f"{cache_and_context(plan)}: {human_bytes(plan.total)} in all")
        else:
            notice_lines(describe_plan(model, plan))
            _said.add(f"{cache_and_context(plan)}: {human_bytes(plan.total)} in all")
        if asked.kv is None and plan.kv == PLAIN:
            _say_once("the KV cache is in bf16, as there is no code for heads of this model's size")
        if asked.weights is None and options.weights == "int8":
            _say_once("weights in int8, as a CPU is slow to read them; --weights bf16 or fp32 does not quantise them")
        if options.weights == "bf16" and plan.weight_format.startswith("fp32"):
            where = "of a model with experts or recurrent layers" if plan.device == "cpu" else "on a GPU"
            _say_once(f"--weights bf16 changes nothing: weights {where} are in the dtype of the arithmetic, float32")
        if plan.device == "cpu" and (why := failure()) is not None:
            _say_once(f"slow: PyTorch does the work of compiled kernels, as {why}; {_without_kernels(asked)}")
        _planned.add((model, plan.device))

    said = time.monotonic()

    def tell(done: int, layers: int) -> None:
        nonlocal said
        if not done:
            notice(f"{options.kv}: measuring how precise the keys and values of {layers} layers must be")
        elif time.monotonic() > said + 15:
            notice(f"{options.kv}: {done} of {layers} layers measured")
        else:
            return
        said = time.monotonic()

    engine = Engine.load(
        options.model,
        kv=options.kv,
        device=options.device,
        max_context=options.ctx,
        dtype=options.dtype,
        on_plan=announce,
        before_weights=check,
        on_measure=tell,
        on_unkept=_say_once,
        conditioning=options.conditioning,
        weights=options.weights,
        head=options.head or "bf16",
        **cache,
    )
    if engine.config.wrapper:
        _say_once(f"{engine.config.wrapper}: its text part is loaded; images and sound would need the other parts")
    if engine.config.rope_switch is not None:
        factors, switch = engine.config.rope_factors(engine.max_context), f"{engine.config.rope_switch:,}"
        _say_once(f"RoPE: the {factors} factors, as the context decides (short up to {switch} tokens, long beyond)")
    if str(engine.kv) != engine.kv.name:
        notice(f"formats: {engine.kv}")
    return engine


@contextmanager
def context_by(advice: str) -> Iterator[None]:
    """Inside the block, a context that does not fit is explained by the options of a command that has no ``--ctx``.

    Args:
        advice: What to do; ``{fits}`` in it is the number of tokens that fit.
    """
    try:
        yield
    except OctoError as error:
        from octo_run.engine.plan import ContextTooLong

        if not isinstance(error, ContextTooLong):
            raise
        raise OctoError(f"{error.facts}: {advice.format(fits=error.fits)}.") from None


def _without_kernels(asked: EngineOptions) -> str:
    """What the missing kernels of a CPU mean for the weights."""
    if asked.weights in (None, "auto"):
        return "weights are not quantised"
    packed = asked.weights not in ("bf16", "fp32")
    return f"--weights bf16 is faster there than {asked.weights}" if packed else f"weights are {asked.weights} as asked"


def warm_up(engine: "Engine", params: "SamplingParams") -> None:
    """Let a GPU do now what the first answer would wait for. That kernels have to be compiled is said.

    On a CPU nothing is done: its kernels are there when the model is loaded.

    Raises:
        OctoError: Kernels cannot be compiled, or the GPU cannot run them.
    """
    if engine.device.type != "cuda":
        return
    from octo_run.engine.warm_up import warm_up

    try:
        warm_up(engine, params, lambda: notice("compiling the GPU's kernels, once for this machine and model"))
    except Exception as error:
        if isinstance(error, (OctoError, MemoryError)) or "out of memory" in str(error):  # these have their own advice
            raise
        why = shown(" ".join(f"{type(error).__name__}: {error}".split()).rstrip("."), 200)
        raise OctoError(
            f"{engine.device} cannot run the model ({why}): `octo-run doctor` looks at the machine, and --device cpu "
            "does without."
        ) from error


def open_session(engine: "Engine", system: str | None, **options: Any) -> "Session":
    """A new conversation with ``engine``; ``options`` are those of ``Session``."""
    from octo_run.engine import Session

    return Session(engine, system=system, **options)


def folder_of(model: str) -> str:
    """The folder of a model, which names its commit where it was pulled."""
    from octo_run.models.hub import resolve

    return str(resolve(model).resolve())


def model_defaults(engine: "Engine") -> dict[str, Any]:
    """What the model's own files say about how its answers are drawn: names and values of ``SamplingParams``."""
    from octo_run.engine import SamplingParams

    return SamplingParams.own(engine.defaults)


def model_names() -> list[str]:
    """The models on this machine."""
    from octo_run.models import hub

    return [entry.label for entry in hub.list_models() if entry.complete and entry.damage is None]


def format_names() -> list[str]:
    """The formats that ``--kv`` takes."""
    from octo_run.kernels import codec

    return [*codec.names(), "auto:56"]


def format_choices() -> str:
    """What ``--kv`` takes, in words."""
    from octo_run.engine.allocation import CHOICES

    return CHOICES


def open_reply(
    engine: "Engine", ids: list[int], options: SamplingOptions, on_prompt: Callable[[int, int], None], logprobs: int = 0
) -> "Reply":
    """Start to continue ``ids``; nothing of the answer is computed before the reply is iterated.

    Args:
        on_prompt: See ``Engine.generate``.
        logprobs: Alternatives of each token that are told.
    """
    from octo_run.engine import Reply

    params = sampling_params(engine, options, logprobs=logprobs)
    reply = Reply(engine.generate(ids, params, on_prompt))  # refuses what cannot be answered
    warm_up(engine, params)
    return reply


def copy_bandwidth(engine: "Engine") -> float:
    """Bytes per second that the engine's device copies."""
    from octo_run.engine import benchmark

    return benchmark.copy_bandwidth(engine.device)


def name_of(test: "Test") -> str:
    """A test as it is written."""
    from octo_run.engine import benchmark

    return benchmark.name_of(test)


def measure(engine: "Engine", test: "Test", **settings: Any) -> "Row":
    """One measurement of ``octo-run bench``; ``settings`` are those of ``benchmark.measure``."""
    from octo_run.engine import benchmark

    return benchmark.measure(engine, test, **settings)


def profile(engine: "Engine", test: tuple[str, int], *, depth: int, batch: int) -> "Profile":
    """Where the time of one measurement of ``octo-run bench`` goes."""
    from octo_run.engine import profiling

    return profiling.profile(engine, test, depth=depth, batch=batch)


def write_trace(path: Path, profiles: "list[Profile]", about: dict[str, str]) -> None:
    """Write profiles to a trace file; ``about`` is kept in it."""
    from octo_run.engine import profiling

    profiling.write_trace(path, profiles, about)


def device_name(engine: "Engine") -> str:
    """The device with the name of the chip, or the threads and instructions of a CPU: where a figure was taken."""
    import torch

    if engine.device.type == "cuda":
        return f"{engine.device} ({torch.cuda.get_device_name(engine.device)})"
    from octo_run.kernels.cpu import path_name

    count = torch.get_num_threads()
    return f"cpu ({count} thread{'s' * (count > 1)}, {path_name()})"


def threads() -> int:
    """CPU threads that PyTorch computes with."""
    import torch

    return torch.get_num_threads()


def model_config(model: str, *, offline: bool = False) -> "ModelConfig":
    """The configuration of a model, read before PyTorch is imported: most of a start for a name that is none.

    Raises:
        OctoError: There is no such model, or it is none that octo-run can load.
    """
    if offline:
        go_offline()
    from octo_run.models.cache import resolve
    from octo_run.models.config import load_config

    return load_config(resolve(model))


def bench_config(model: str, random_weights: str | None, *, offline: bool) -> "ModelConfig":
    """The configuration that ``bench`` measures, read before any weight is."""
    if random_weights is None:
        return model_config(model, offline=offline)
    from octo_run.engine.random_model import read_shape

    return read_shape(random_weights)


def sampling_params(engine: "Engine", options: SamplingOptions, **more: Any) -> "SamplingParams":
    """The model's sampling defaults, overridden by what the command line says.

    A stop text that no answer of this model can hold is told.

    Args:
        more: Further settings.
    """
    from octo_run.engine import SamplingParams

    params = SamplingParams.from_defaults(engine.defaults, **given(options), **more)
    warn_of_stops(engine.tokenizer, "--stop", params.stop)
    engine.check_params(params)
    return params


def warn_of_stops(tokenizer: "Tokenizer | NoTokenizer", name: str, stops: Iterable[str]) -> None:
    """Tell which stop texts no answer of the tokenizer's model can hold.

    Args:
        name: Of what gives them.
    """
    from octo_run.engine.stopping import impossible

    for text in stops:
        if impossible(tokenizer, text):
            warn(f"{name} {quoted(text)} never stops an answer: the tokens of this model cannot spell it")


def describe_plan(model: str, plan: "MemoryPlan") -> str:
    """Two lines that say what will be loaded where, and how much memory each part takes."""
    parts = plan.as_dict()
    sizes = [f"{label} {human_bytes(parts[key])}" for key, label in PLAN_PARTS.items() if parts[key]]
    return (
        f"{shown(model)} on {plan.device}, weights {plan.weight_format}, {cache_and_context(plan)}\n"
        f"memory: {' + '.join(sizes)} = {human_bytes(plan.total)}"
    )


def cache_and_context(plan: "MemoryPlan") -> str:
    """The part of a plan that differs between formats."""
    # What is usual goes without saying.
    kept = "" if plan.conditioning == "full" or not plan.coded else f" (conditioning {plan.conditioning})"
    return f"KV cache {plan.kv}{kept}: context {plan.context:,} tokens, {plan.bytes_per_token:,} bytes per packed token"


def forget_peak(engine: "Engine") -> None:
    """Count the allocator's peak from now on."""
    from octo_run.engine import benchmark

    benchmark.forget_peak(engine.device)
