"""The program in processes that begin where `import octo_run.engine` has ended: PyTorch is imported once, then forked.

`Programs` starts a server, this file run as a script, which has imported the engine and nothing that reads the
environment. For each program it forks a keeper, which forks the program, tells its pid and waits for its end. The
program gets its arguments, environment and streams as an interpreter that starts does; what happens earlier (streams
that are closed, signals while modules are imported, an interpreter without UTF-8) is for tests that start one. At the
end it does what an interpreter does, but for taking PyTorch apart, which would be most of the time of a short program.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

_MOST = 1 << 17  # bytes of a request


class Program:
    """A running program; what it has is as with ``subprocess.Popen``."""

    def __init__(self, pid: int, ended: IO[bytes]) -> None:
        self.pid, self.returncode, self._ended = pid, None, ended
        self.returncode: int | None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("octo-run", timeout or 0)
            status = self._ended.readline()
            assert status, "the keeper of the program ended"
            self.returncode = os.waitstatus_to_exitcode(int(status))
            self._ended.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Programs:
    """Starts programs; ``close`` ends the server, not what runs."""

    def __init__(self) -> None:
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST)
        argv = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()

    def start(
        self, argv: list[str], env: Mapping[str, str], streams: tuple[Any, Any, Any], *, code: str | None = None,
        terminal: bool = False,
    ) -> Program:  # fmt: skip
        """Start ``octo-run ARGV``, or Python code in its place.

        Args:
            streams: Files or descriptors for its three streams.
            terminal: Whether standard input is a terminal that is to control it.
        """
        ours, theirs = os.pipe()
        what = {"argv": argv, "env": dict(env), "cwd": str(Path.cwd()), "code": code, "terminal": terminal}
        request = json.dumps(what).encode()
        assert len(request) < _MOST
        with os.fdopen(theirs, "wb"):
            files = [each if isinstance(each, int) else each.fileno() for each in streams]
            socket.send_fds(self._server, [request], [*files, theirs])
        ended = os.fdopen(ours, "rb", buffering=0)
        pid = ended.readline()
        assert pid, "the server of programs ended"
        return Program(int(pid), ended)

    def run(
        self, argv: list[str], env: Mapping[str, str], text: str | None = "", timeout: float = 200
    ) -> "subprocess.CompletedProcess[str]":
        """Let ``octo-run ARGV`` run to its end.

        Args:
            text: What standard input has (None: it is ``/dev/null``).
        """
        with contextlib.ExitStack() as stack:
            given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            nothing = stack.enter_context(Path(os.devnull).open("rb"))
            given.write((text or "").encode())
            given.seek(0)
            program = self.start(argv, env, (nothing if text is None else given, out, err))
            try:
                program.wait(timeout)
            finally:
                program.kill()
            said = []
            for each in (out, err):
                each.seek(0)
                said.append(each.read().decode().replace("\r\n", "\n"))
        return subprocess.CompletedProcess(argv, program.wait(), *said)

    def close(self) -> None:
        self._server.close()
        self._process.wait()


def as_a_shell_starts_it(terminal: int | None) -> None:
    """In a new process: the terminal is its own, and no signal is ignored, as ``nohup pytest`` would have it."""
    import fcntl
    import termios

    if terminal is not None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Make this process what an interpreter is that has just started."""
    as_a_shell_starts_it(files[0] if request["terminal"] else None)
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.closerange(3, max(files) + 1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    modes = (("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace"))
    for number, (name, mode, errors) in enumerate(modes):
        lines = mode == "w" and (number == 2 or os.isatty(number))
        stream = open(number, mode, 1 if lines else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _serve(server: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns in the programs alone, with what they are to do."""
    import gc

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(server, _MOST, 4)
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for file in files:
            os.close(file)
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = files
    pid = os.fork()
    if pid:
        for file in streams:
            os.close(file)
        os.write(told, b"%d\n" % pid)
        os.write(told, b"%d\n" % os.waitpid(pid, 0)[1])
        os._exit(0)
    os.close(told)
    request: dict[str, Any] = json.loads(message)
    _become(request, streams)
    return request


def _do(request: dict[str, Any]) -> None:
    if request["code"] is None:
        from octo_run.__main__ import main

        sys.argv = ["octo-run", *request["argv"]]
        sys.exit(main())
    sys.argv = ["-c", *request["argv"]]
    exec(request["code"], {"__name__": "__main__"})


if __name__ == "__main__":
    from octo_run import process
    from octo_run.cli.runtime import import_torch

    import_torch()  # as the program does it
    import octo_run.engine  # noqa: F401

    assert "huggingface_hub" not in sys.modules  # it reads the environment
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    code = 0
    try:
        _do(asked)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # the interpreter prints it
        code = ended.code or 0
    sys.exit(process.finish(code))
