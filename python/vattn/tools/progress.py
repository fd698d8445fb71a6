"""Progress on a terminal: rich's bar where it is installed, nothing anywhere else.

Promise: nothing is written unless standard error is a terminal, so logs and pipes stay clean.
Thread: the one that opened it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with how much is done so far.
Advance = Callable[[int], None]


def _ignore(_done: int) -> None:
    pass


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show a bar while the block runs; what it yields is called with the amount done (0 to ``total``)."""
    if not sys.stderr.isatty():
        yield _ignore
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _ignore
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int) -> None:
            bar.update(task, completed=done)

        yield advance
