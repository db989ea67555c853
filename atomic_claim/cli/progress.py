"""Bars on the terminal while several things are done one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

T = TypeVar("T")


def with_progress(
    names: Sequence[str], total: int, run: Callable[[int, Callable[[int], None]], T]
) -> list[T]:
    """Run each task with a bar of its progress, and return their results."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    # Asked of the file itself: the environment can make Rich take anything for a terminal.
    with progress if sys.stderr.isatty() else nullcontext():
        tasks = [progress.add_task(name, total=total, start=False) for name in names]
        found = []
        for place, task in enumerate(tasks):
            progress.start_task(task)
            found.append(run(place, _shower(progress, task)))
            progress.update(task, completed=total)
            progress.stop_task(task)
    return found


def _shower(progress: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda reached: progress.update(task, completed=reached)
