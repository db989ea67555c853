"""Programs run for the tests alone: by a user without rights, gone when the tests are gone."""

import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

PREFIX: Final = "atomic_claim-tests-"
MEMORY: Final = Path("/dev/shm")  # noqa: S108 (folders in it get unpredictable names)
NEEDED: Final = 4 * 2**30


class ProgramError(Exception):
    """A program failed, ended early or was not ready in time."""


@dataclass(frozen=True)
class Account:
    """User account of a server: the tests' own, or an unprivileged one if the tests run as root."""

    entry: pwd.struct_passwd | None

    @classmethod
    def without_rights(cls, *preferred: str) -> Self:
        """Choose the first of the preferred users that exists, else the usual unprivileged one."""
        if os.geteuid() != 0:
            return cls(None)
        for name in preferred:
            with suppress(KeyError):
                return cls(pwd.getpwnam(name))
        return cls(pwd.getpwnam("nobody"))

    def options(self) -> dict[str, Any]:
        """Return the arguments that make `subprocess` start a program as this user."""
        if self.entry is None:
            return {}
        return {"user": self.entry.pw_uid, "group": self.entry.pw_gid, "extra_groups": []}

    def make_folder(self, path: Path) -> Path:
        """Make a folder that belongs to this user alone."""
        path.mkdir(mode=0o700)
        if self.entry is not None:
            os.chown(path, self.entry.pw_uid, self.entry.pw_gid)
        return path

    def can_run(self, program: Path) -> bool:
        """Tell whether this user reaches a program, every folder above it included."""
        return (
            subprocess.run(["test", "-x", program], **self.options(), check=False).returncode == 0
        )


def environment() -> dict[str, str]:
    """Nothing of the machine's settings for clients and servers."""
    return {"PATH": os.defpath, "LC_ALL": "C"}


def run(words: Sequence[str], account: Account, cwd: Path, stdin: str | None = None) -> None:
    """Run a program to its end.

    Raises:
        ProgramError: it failed; the message holds the end of what it said.
    """
    done = subprocess.run(
        words,
        **account.options(),
        cwd=cwd,
        env=environment(),
        check=False,
        input=stdin or "",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise ProgramError(_complaint(words, f"failed with {done.returncode}", done.stdout))


class Server:
    """A server process that does not outlive the tests, however they end.

    Args:
        words: the command.
        account: who runs it.
        folder: where it runs, and where its output goes.
        stop_signal: what ends it at once; its data are not needed any more by then.
    """

    def __init__(
        self, words: Sequence[str], *, account: Account, folder: Path, stop_signal: signal.Signals
    ) -> None:
        self._words = words
        self._account = account
        self._folder = folder
        self._log = folder / "server.log"
        self._stop_signal = stop_signal
        self.start()

    def start(self) -> None:
        """Start the server, again on the same data if it has been stopped."""
        # Linux ends the server when the thread that started it has ended: the tests' main thread.
        setpriv = shutil.which("setpriv")
        guard = [setpriv, "--pdeathsig", self._stop_signal.name, "--"] if setpriv else []
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *self._words],
                **self._account.options(),
                cwd=self._folder,
                env=environment(),
                # Ctrl-C at a terminal goes to the tests alone: they still need the server to end.
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], *, seconds: float = 120) -> None:
        """Ask until the server is ready.

        Raises:
            ProgramError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if self._process.poll() is not None:
                problem = f"ended with {self._process.returncode}"
            elif time.monotonic() > deadline:
                problem = f"was not ready after {seconds:.0f} s"
            else:
                time.sleep(0.02)
                continue
            output = self._log.read_text(encoding="utf-8", errors="replace")
            raise ProgramError(_complaint(self._words, problem, output))

    def stop(self) -> None:
        """End the server."""
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _complaint(words: Sequence[str], problem: str, output: str) -> str:
    return "\n".join([f"{' '.join(words)} {problem}", *output.splitlines()[-5:]])


class Workspace:
    """A folder for the servers of one run, removed with them at the end.

    Every account reaches it; what is inside belongs to whom it is made for. What a killed run left
    behind is removed by the next: its lock is free.
    """

    def __init__(self) -> None:
        _remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base_folder()))
        self.folder.chmod(0o755)
        self._lock = (self.folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self, words: Sequence[str], *, account: Account, folder: Path, stop_signal: signal.Signals
    ) -> Server:
        """Start a server that is stopped at the end of the run."""
        server = Server(words, account=account, folder=folder, stop_signal=stop_signal)
        self._servers.append(server)
        return server

    def reachable(self, tree: Path, program: str, account: Account) -> Path:
        """Return the folder `tree`, or a copy where the account cannot reach its `program`."""
        if account.can_run(tree / program):
            return tree
        copy = self.folder / f"copy-{tree.name}"
        if not copy.exists():
            shutil.copytree(tree, copy, symlinks=True, copy_function=_link_or_copy)
            subprocess.run(["chmod", "-R", "a+rX", copy], check=True)
        return copy

    def close(self) -> None:
        """Stop the servers and remove the folder."""
        while self._servers:
            self._servers.pop().stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _link_or_copy(source: str, target: str) -> None:
    # A file that not everybody may read is copied, so that the original stays as it is.
    if Path(source).stat().st_mode & 0o004:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _base_folder() -> Path:
    """Return the in-memory folder if it exists and has room, else the one for temporary files.

    ext4 takes a quarter of a second for PostgreSQL's 300 files of a new database where as many have
    just been deleted: it looks for inodes that have not been used for some seconds.
    """
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
        state = os.statvfs(MEMORY)
        if state.f_bavail * state.f_frsize > NEEDED and not state.f_flag & os.ST_NOEXEC:
            return MEMORY
    return Path(tempfile.gettempdir())


def _remove_leftovers() -> None:
    for folder in [*MEMORY.glob(f"{PREFIX}*"), *Path(tempfile.gettempdir()).glob(f"{PREFIX}*")]:
        with suppress(OSError), (folder / "lock").open() as lock:
            if folder.stat().st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port without a listener; the system never gives a well-known one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
