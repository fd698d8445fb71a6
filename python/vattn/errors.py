"""The errors of vattn.

Bad input is a ``TypeError``, ``ValueError``, ``IndexError`` or ``OverflowError``; everything else is one of these.
Each names the parameter or the call, the value and the way out, and leaves the state as it was. Thread: any.
"""

from __future__ import annotations


class Error(Exception):
    """Base of everything vattn raises for reasons other than bad input."""


class OutOfMemoryError(Error, MemoryError):
    """Memory, or another resource that memory needs, is not there; nothing was taken.

    Attributes:
        needed_bytes: what the call had to create.
        available_bytes: what it could have had.
        limit_bytes: the bound that said no.
        held_by_others_bytes: what the call could have besides, once every slot that it does not grow, and every other
            member of the pool, gave its memory up; 0 where something else than the budget's memory is missing.

    Waiting can help exactly where ``needed_bytes`` is not 0 and at most ``available_bytes + held_by_others_bytes``,
    which ``waiting_can_help`` says: a server then waits for a request to end, or preempts one. Else the call asks for
    more than the budget holds: ask for less, or raise ``memory_limit``.
    """

    needed_bytes: int = 0
    available_bytes: int = 0
    limit_bytes: int = 0
    held_by_others_bytes: int = 0

    @property
    def waiting_can_help(self) -> bool:
        return 0 < self.needed_bytes <= self.available_bytes + self.held_by_others_bytes


class NoFreeSlotError(Error):
    """Every slot of the cache is in use."""


class DriverError(Error):
    """A driver call failed.

    Attributes:
        call: its name, such as ``cuMemMap`` or ``fallocate``.
        code: the numeric code: a CUresult, or errno on a host.
        name: the code's name, such as ``CUDA_ERROR_INVALID_VALUE`` or ``ENOMEM``.
    """

    call: str = ""
    code: int = 0
    name: str = ""


class ClosedError(Error):
    """The object was closed, or belongs to the process that forked this one."""


class InUseError(Error):
    """The object is still used by others, named in the message."""
