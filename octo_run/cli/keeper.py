"""Saves the conversation of a chat, in the background, and loads others."""

import dataclasses
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from octo_run.cli import console, runtime, session_files
from octo_run.errors import OctoError, UsageError, quoted

if TYPE_CHECKING:
    from octo_run.cli.conversation import Conversation
    from octo_run.engine.background_save import BackgroundSave
    from octo_run.engine.saved_session import SavedSession

#: Options of a chat that are kept with its conversation.
KEPT_OPTIONS = ("kv", "conditioning", "ctx", "weights", "head")


class Keeper:
    """What is known of the files of one chat.

    Attributes:
        name: The conversation that is saved after each turn; None: none is.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._lock = ExitStack()
        #: By their names the files that this chat loaded or saved (``SavedSession.file_id``): only these are written
        #: over.
        self._own = dict[str, set[str]]()
        self._background: BackgroundSave | None = None
        self._behind = False  # whether the conversation has changed since it was saved

    def keep(self, name: str) -> None:
        """Save the conversation under ``name`` after each turn from now on.

        Raises:
            OctoError: Another program uses it.
        """
        if name != self.name:
            lock = ExitStack()
            lock.enter_context(session_files.in_use(name))
            self._let_go()
            self.name, self._lock = name, lock

    def _let_go(self) -> None:
        """Save the conversation no more; others may."""
        self._lock.close()
        self.name = None

    def save(self, chat: "Conversation", name: str) -> int:
        """Save the conversation now.

        Returns:
            Bytes of the file.

        Raises:
            UsageError: No name, or that of a conversation which this chat does not know, or not as it is.
            OctoError: It cannot be written.
        """
        path = session_files.session_path(name)
        with ExitStack() as lock:
            if name != self.name:
                self._refuse_unknown(name)
                lock.enter_context(session_files.in_use(name))
                self._refuse_unknown(name)  # until now somebody could write it
            self._begin(chat, name, whole=True)
            self.finish()
        return path.stat().st_size

    def _refuse_unknown(self, name: str) -> None:
        """Refuse to write over turns that this chat has not seen."""
        if not os.path.lexists(session_files.session_path(name)):
            return
        if name not in self._own:
            why = f"there is a session {quoted(name)} already"
        elif session_files.identity(name) not in self._own[name]:
            why = f"another program has changed the session {quoted(name)}"
        else:
            return
        raise UsageError(f"{why}: /load it, take another name, or `octo-run sessions rm {name}`.")

    def after_turn(self, chat: "Conversation") -> None:
        """Begin to save the conversation if it is one that is kept; what went wrong before is told."""
        self._tell_failure()
        self._behind = True
        self.catch_up(chat)

    def touched(self) -> None:
        """The conversation has changed without an answer."""
        self._behind = True

    def settings_changed(self) -> None:
        """How answers are drawn has changed: a conversation that is kept keeps that."""
        if self.name is not None:
            self._behind = True

    def catch_up(self, chat: "Conversation") -> None:
        """Begin to save what was not saved yet, if there is an engine."""
        if self.name is not None and self._behind and not chat.engine.closed:
            self._begin(chat, self.name)

    def release(self) -> None:
        """Wait until the engine's memory may change."""
        if self._background is not None:
            self._background.release()

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OctoError: It could not be written.
        """
        if self._background is not None:
            self._background.finish()
            if (failure := self._failure()) is not None:
                raise failure

    def _save_rest(self, chat: "Conversation") -> None:
        """Bring a conversation that is kept to the disk, in one file.

        Raises:
            OctoError: It cannot be written.
        """
        if self._background is not None:
            self._background.finish()
            self._failure()  # it is tried again
        if self.name is not None and (self._behind or self._in_parts(self.name)):
            self._begin(chat, self.name, whole=True)
        self.finish()

    def close(self, chat: "Conversation") -> None:
        """The chat ends: save what is left, in one file, and say it if that cannot be."""
        try:
            self._save_rest(chat)
        except OctoError as error:
            console.warn(f"octo-run: {error}")
        finally:
            self._lock.close()

    def load(self, chat: "Conversation", name: str, *, anew: bool, advice: str) -> None:
        """Go on with a saved conversation in place of the chat's, which is saved first if it is one that is kept.

        Args:
            anew: Read its text again instead of using its pages.
            advice: What to do where the pages are of no use.

        Raises:
            UsageError: There is no such conversation, or that of the chat would be lost.
            OctoError: It cannot be read, or its pages cannot be used, or the former one cannot be saved; then nothing
                has changed.
        """
        from octo_run.engine.saved_session import SessionMismatch

        session_files.find(name)
        if name == self.name:
            self.finish()  # its file is being written, maybe
        with ExitStack() as lock:
            if self.name not in (None, name):
                lock.enter_context(session_files.in_use(name))  # nobody shall change it from here on
            saved = session_files.read(name)
            if name != self.name:
                self._keep_former(chat)
            if self._background is not None:
                self._background.forget()
            try:
                if not anew:
                    saved.restore(chat.engine)
            except SessionMismatch as error:
                raise OctoError(f"{str(error).rstrip('.')}; {advice}.") from None
            if self.name not in (None, name):
                self._let_go()
                self.name, self._lock = name, lock.pop_all()
        self._own.setdefault(name, set()).add(saved.file_id)
        self._behind = False
        _take_over(chat, saved)

    def load_text(self, chat: "Conversation", name: str) -> bool:
        """Go on with the text of a conversation whose file is damaged. It is not saved there: the file stays as it is.

        Returns:
            Whether there is one.

        Raises:
            OctoError: As :meth:`load`.
        """
        text = session_files.read_text(name)
        if text is None:
            return False
        self._keep_former(chat)
        self._let_go()
        self._behind = True
        chat.session.clear()
        chat.session.system, chat.session.turns = text.system, [*text.turns]
        chat.documents = []
        chat.held = chat.count_tokens()
        return True

    def _keep_former(self, chat: "Conversation") -> None:
        """Before another conversation comes: bring the chat's own to the disk.

        Raises:
            UsageError: It has no name, and somebody is there who may give it one.
            OctoError: It cannot be written.
        """
        if self.name is not None:
            self._save_rest(chat)
        elif chat.person and self._behind and chat.session.mark().turns:
            raise UsageError("this conversation is not saved: /save NAME keeps it, or /clear forgets it; /load then.")

    def _in_parts(self, name: str) -> bool:
        return self._background is not None and session_files.session_path(name) in self._background.in_parts

    def _begin(self, chat: "Conversation", name: str, *, whole: bool = False) -> None:
        from octo_run.engine.background_save import BackgroundSave
        from octo_run.engine.saved_session import Snapshot

        loaded = runtime.resolved(dataclasses.replace(chat.load, kv=chat.engine.plan.kv))  # which needs no file
        options: dict[str, Any] = {option: getattr(loaded, option) for option in KEPT_OPTIONS}
        if self._background is None:
            self._background = BackgroundSave()
        self._background.finish()
        self._tell_failure()
        snapshot = Snapshot.take(chat.session, chat.params, options)
        self._own.setdefault(name, set()).add(snapshot.header["id"])
        self._background.begin(snapshot, session_files.session_path(name), whole=whole)
        self._behind = self._behind and self.name not in (None, name)  # a copy leaves it to be saved

    def _failure(self) -> OctoError | None:
        """Why the last file could not be written; what it was to have is still to be saved."""
        failure = None if self._background is None else self._background.failure()
        self._behind = self._behind or failure is not None
        return failure

    def _tell_failure(self) -> None:
        if (failure := self._failure()) is not None:
            console.warn(f"octo-run: the conversation is not saved: {failure}")


def _take_over(chat: "Conversation", saved: "SavedSession") -> None:
    """Let a chat go on with a saved conversation."""
    session = saved.session(chat.engine)
    session.drops = chat.session.drops
    chat.session, chat.params = session, saved.settings
    chat.changed = {
        field.name: getattr(saved.settings, field.name)
        for field in dataclasses.fields(saved.settings)
        if field.name != "stop_ids"
    }
    chat.documents = []
    chat.held = chat.count_tokens()
