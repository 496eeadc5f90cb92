"""Another engine for a chat: another model, or another format of the KV cache. Where it cannot be had, the former one
comes back."""

import dataclasses
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from octo_run import process
from octo_run.cli import checks, runtime

if TYPE_CHECKING:
    from octo_run.cli.conversation import Conversation
    from octo_run.cli.options import EngineOptions
    from octo_run.engine import Engine, SamplingParams


class _CtrlC:
    """What Ctrl-C does meanwhile: it interrupts, or while that would lose something it is only noted."""

    def __init__(self) -> None:
        self.noted, self._raises = False, False

    def handle(self, frame: FrameType | None) -> None:
        self.noted = True
        if not self._raises:
            return
        if process.importing(frame):  # a module that is half imported would fail ever after
            process.interrupt_soon()
            return
        raise KeyboardInterrupt

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Inside the block it interrupts; so does one that was noted before."""
        self._raises = True
        try:
            if self.noted:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False


def load_anew(chat: "Conversation", **changes: Any) -> None:
    """Load another engine for the conversation; where that fails or is interrupted, the former one again.

    Args:
        changes: Options of the engine.

    Raises:
        OctoError: There is no such engine, or it cannot be loaded; the chat has its former one then. Where that cannot
            be loaded again either, the chat has none, which is said; its conversation is there still.
        KeyboardInterrupt: Ctrl-C was pressed; likewise.
    """
    wanted, before, former = dataclasses.replace(chat.load, **changes), chat.load, chat.engine.plan.kv
    checks.loadable(wanted)
    chat.keeper.catch_up(chat)  # without an engine nothing can be saved
    chat.keeper.release()
    failure: BaseException | None = None
    ctrl_c = _CtrlC()
    with process.interrupt_handler(ctrl_c.handle):
        chat.engine.close()  # two do not fit at once
        try:
            with ctrl_c.interrupts():
                engine, params = _loaded(chat, wanted, warm=True)
        except (Exception, KeyboardInterrupt) as error:
            failure, wanted = error, before
        if failure is not None:
            _forget_frames(failure)
            chat.tell(f"back to {before.model} with the KV cache {former}")
            try:
                engine, params = _loaded(chat, before, warm=False)
            except Exception as error:
                chat.tell(
                    f"{before.model} could not be loaded again: the conversation is kept, and /model NAME or "
                    "/kv FORMAT loads what it goes on with"
                )
                raise error from failure
        _give(chat, engine, wanted, params)
    if failure is not None:
        raise failure
    follows = "; the conversation is read with the next question" if chat.session.turns else ""
    chat.notice(f"{wanted.model} with the KV cache {engine.plan.kv}{follows}")


def _give(chat: "Conversation", engine: "Engine", load: "EngineOptions", params: "SamplingParams") -> None:
    """Let the chat go on with an engine."""
    former, same = chat.session, chat.load.model == load.model
    if same:  # its token ids mean the same
        former.engine = engine
    else:
        chat.session = runtime.open_session(engine, former.system, variables=former.variables, drops=former.drops)
        chat.session.turns = former.turns
    chat.engine, chat.load, chat.params = engine, load, params


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the failed calls held: half an engine, which would leave the former one no room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _loaded(chat: "Conversation", wanted: "EngineOptions", *, warm: bool) -> "tuple[Engine, SamplingParams]":
    """An engine that is ready to answer in this chat, and how it does.

    Args:
        warm: Whether it is warmed up: not one that has been used before.
    """
    engine = runtime.load_engine(wanted, check=lambda tokenizer, _plan: chat.options.prepare(tokenizer, wanted.model))
    try:
        params = _params(chat, engine)
        if warm:
            runtime.warm_up(engine, params)
    except BaseException:
        engine.close()
        raise
    return engine, params


def _params(chat: "Conversation", engine: "Engine") -> "SamplingParams":
    """How an engine answers in this chat."""
    params = dataclasses.replace(runtime.sampling_params(engine, chat.sampling), **chat.changed)
    runtime.warn_of_stops(engine.tokenizer, "stop", chat.changed.get("stop", ()))
    engine.check_params(params)  # a bias is on tokens of the former model
    return params
