"""Bars on the terminal while several things are done one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

T = TypeVar("T")


def with_progress(
    names: Sequence[str], total: int, run: Callable[[int, Callable[[int], None]], T]
) -> list[T]:
    """Run each task with a bar of its progress, and return their results."""
    # Asked of the file itself: the environment can make Rich take anything for a terminal.
    shown, console = sys.stderr.isatty(), Console(stderr=True)
    found = []
    with Progress(console=console, transient=True, disable=not shown) as progress:
        tasks = [progress.add_task(name, total=total, start=False) for name in names]
        for place, task in enumerate(tasks):

            def told(reached: int, task: TaskID = task) -> None:
                progress.update(task, completed=reached)

            progress.start_task(task)
            found.append(run(place, told))
            progress.update(task, completed=total)
            progress.stop_task(task)
    return found
