"""In which order rows are copied onto each other, so that each is read before it is overwritten.

What it is: a beam search says for each row which row it becomes. A row that stays is not copied, and of the others
none needs a second place, but one of each ring of rows that change places.

Thread: any; a pure function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

#: The one place beside the rows, for a ring.
SPARE = -1


def row_moves(sources: Sequence[int]) -> list[tuple[int, int]]:
    """Copies (to, from), in order, after which row i holds what row `sources[i]` held; `SPARE` is no row."""
    pending = {place: source for place, source in enumerate(sources) if place != source}
    readers = Counter(pending.values())
    free = [place for place in pending if not readers[place]]  # nobody wants what they hold
    moves = []
    while pending:
        if not free:
            place = next(iter(pending))  # only rings are left
            moves.append((SPARE, place))
            reader = next(to for to, source in pending.items() if source == place)
            pending[reader] = SPARE
            free.append(place)
        place = free.pop()
        source = pending.pop(place)
        moves.append((place, source))
        readers[source] -= 1
        if source in pending and not readers[source]:
            free.append(source)
    return moves
