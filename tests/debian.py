"""Debian packages unpacked into a folder, without installing them and without being root.

apt runs with lists, cache and status of its own, so the machine's packages neither change nor
count: every library a program needs, the C library included, ends up in the folder beside it. The
archive is the one that the machine's apt already uses, with another suite where one is asked for.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUITE_ALIASES = frozenset({"stable", "oldstable", "testing", "unstable", "sid"})

APT_CONFIGURATION = """\
// The machine's hooks, pins and foreign architectures are not meant for this folder.
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::SourceList "{folder}/{source}";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
"""


class PackageError(Exception):
    """A Debian package is not available on this machine."""


@dataclass(frozen=True)
class Source:
    """An apt source: the name of its file, whose ending tells its format, and its text."""

    file_name: str
    text: str


def sources(files: Iterable[Path], *, codename: str, suite: str | None = None) -> Iterator[Source]:
    """Yield each Debian archive named in apt's source files, reduced to one suite.

    Args:
        files: deb822 `.sources` and one-line `.list` files; others are passed over.
        codename: the machine's release; archives of other releases, of security updates and of
            other vendors are passed over.
        suite: what to take instead of the machine's own release.
    """
    releases = SUITE_ALIASES | {codename}
    for file in files:
        if file.suffix == ".sources":
            for stanza in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
                if text := _reduced_stanza(stanza, releases, suite):
                    yield Source("debian.sources", text)
        elif file.suffix == ".list":
            for line in file.read_text(encoding="utf-8").splitlines():
                if text := _reduced_line(line, releases, suite):
                    yield Source("debian.list", text)


def _reduced_stanza(stanza: str, releases: frozenset[str], suite: str | None) -> str | None:
    lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
    # A line that starts with a blank continues the field before it, such as a key in Signed-By.
    fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", "\n".join(lines), re.MULTILINE))
    fields = {name.lower(): value for name, value in fields.items()}
    own = [name for name in fields.get("suites", "").split() if name in releases]
    if (
        fields.get("enabled", "yes").strip().lower() in {"no", "false", "0"}
        or "deb" not in fields.get("types", "").split()
        or "main" not in fields.get("components", "").split()
        or not own
    ):
        return None
    fields |= {"types": "deb", "suites": suite or own[0]}
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def _reduced_line(line: str, releases: frozenset[str], suite: str | None) -> str | None:
    parts = re.match(r"\s*deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
    if parts is None or parts[3] not in releases or "main" not in parts[4].split():
        return None
    return f"deb {parts[1] or ''}{parts[2]} {suite or parts[3]} {parts[4].strip()}\n"


def cache_folder() -> Path:
    """Where unpacked packages are kept for the next run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "atomic_claim"


def cached(package: str, *, suite: str | None = None) -> Path | None:
    """Return the folder that holds a package and all it needs, if an earlier run has fetched it."""
    folder = _destination(package, suite)
    return folder if folder.is_dir() else None


def unpacked(package: str, *, suite: str | None = None) -> Path:
    """Return the folder that holds a package and all it needs, fetched if this is the first time.

    Raises:
        PackageError: the machine is no Debian, or its archive does not answer or lacks the package.
    """
    destination = _destination(package, suite)
    if destination.is_dir():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.with_suffix(".lock").open("w") as lock:
        # Of several runs at once, one fetches and the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return destination if destination.is_dir() else _fetched(package, suite, destination)


def command(folder: Path, program: str) -> list[str]:
    """Return the words that run a program of an unpacked folder with the folder's own libraries."""
    libraries = [
        library
        for pattern in ("usr/lib/*-linux-gnu*", "lib/*-linux-gnu*")
        for library in folder.glob(pattern)
    ]
    loaders = [loader for library in libraries for loader in library.glob("ld-linux*.so.*")]
    path = ":".join(map(str, libraries))
    return [str(loaders[0]), "--library-path", path, str(folder / program)]


def _destination(package: str, suite: str | None) -> Path:
    release = suite or platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
    return cache_folder() / f"{package}-{release}-{platform.machine()}"


def _fetched(package: str, suite: str | None, destination: Path) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise PackageError(f"the package {package} can be fetched by apt only, and there is none")
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    candidates = list(
        sources(filter(Path.is_file, files), codename=codename, suite=suite),
    )
    if not candidates:
        raise PackageError(f"apt knows no Debian archive to fetch the package {package} from")
    failures = []
    for source in candidates:
        try:
            return _fetch(package, source, destination)
        except PackageError as error:
            failures.append(str(error))
    raise PackageError("\n".join(failures))


def _fetch(package: str, source: Source, destination: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix="atomic_claim-apt-") as name:
        work = Path(name)
        configuration = _apt_configuration(work, source)
        apt = ["apt-get", "-q", "-c", str(configuration)]
        _run([*apt, "update"])
        _run([*apt, "install", "--yes", "--download-only", package])
        # A run that ends early must not leave a folder that is only half there for the next one:
        # it gets its name at the end.
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix="unpacking-") as unpacking:
            folder = Path(unpacking) / "folder"
            folder.mkdir()
            for archive in sorted((work / "cache/archives").glob("*.deb")):
                _run(["dpkg", "--extract", str(archive), str(folder)])
            folder.rename(destination)
    return destination


def _apt_configuration(work: Path, source: Source) -> Path:
    # apt fetches as a user of its own, which must be able to enter.
    work.chmod(0o755)
    for part in ("state/lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    (work / source.file_name).write_text(source.text, encoding="utf-8")
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    configuration = work / "apt.conf"
    configuration.write_text(
        APT_CONFIGURATION.format(architecture=architecture, folder=work, source=source.file_name),
        encoding="utf-8",
    )
    return configuration


def _run(words: list[str]) -> str:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            words,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"{' '.join(words)}: no end after {error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise PackageError(f"{' '.join(words)}: {error.stderr.strip()}") from error
    return done.stdout
