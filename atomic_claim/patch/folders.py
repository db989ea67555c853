"""Legacy functions that take files from a folder, replaced by a claim of files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from atomic_claim.errors import PatchError
from atomic_claim.files import ClaimedFile, claim_files

from .calls import Call, Reference
from .options import ClaimOptions
from .patches import Patch
from .replacing import Replacing
from .targets import Target

PROCESSING = "processing"


class FileClaiming(Replacing):
    """The claim of files that stands in place of one function."""

    def __init__(self, patch: Patch, target: Target, options: ClaimOptions) -> None:
        super().__init__(patch, target, {**options, "returns": options.get("returns") or _paths})
        directory, processing = options.get("directory"), options.get("processing")
        self.directory = self.options.reading("directory", directory, _is_path)
        self.processing = self.options.reading("processing", processing, _is_path)
        self.claim_files = partial(
            claim_files,
            pattern=options.get("pattern", "*"),
            key=options.get("key"),
            layout=options.get("layout", "plain"),
        )
        for name, given in (("directory", directory), ("processing", processing)):
            is_read = callable(given) or isinstance(given, Reference)
            if not (given is None or is_read or _is_path(given)):
                raise PatchError(
                    f"{name}={given!r} of {target.name}: expected a path, the name of a parameter "
                    "or a callable"
                )

    @asynccontextmanager
    async def claimed(self, call: Call, limit: int) -> AsyncIterator[tuple[list[ClaimedFile], Any]]:
        """Claim files, beside the event loop if there is one, and yield them."""
        claim = partial(self._claim, call, limit)
        yield (await asyncio.to_thread(claim) if self.is_coroutine else claim()), None

    def _claim(self, call: Call, limit: int) -> list[ClaimedFile]:
        if limit == 0:
            return []
        waiting = Path(self.directory.read(call))
        processing = self.processing.read(call)
        claimed = self.claim_files(
            limit,
            waiting=waiting,
            processing=waiting.parent / PROCESSING if processing is None else processing,
            worker=self.worker.read(call),
        )
        self.patch.count(claimed=len(claimed))
        return claimed


def _is_path(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike))


def _paths(found: Any) -> Any:
    return [file.path for file in found] if isinstance(found, list) else found.path
