"""Packing of examples into rows of equal length."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Assign examples to rows of `row` tokens by best-fit decreasing; return the numbers of the examples of each row.

    Each example, from the longest to the shortest, goes to the fullest row with enough room, otherwise to a new row.
    Ties go to the earlier example and the newer row, so that the result depends on the lengths alone. At most 11/9 of
    the fewest possible rows, plus one, are used.

    Raises ValueError for an example that is longer than a row, or empty.
    """
    if wrong := [length for length in lengths if not 0 < length <= row]:
        raise ValueError(f"examples of {wrong[0]} tokens: expected 1 to {row}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted: the room of rows, each once
    with_room: dict[int, list[int]] = {}  # room -> numbers of the rows
    for example in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(rooms, lengths[example])
        if at == len(rooms):
            room, number = row, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[number].append(example)
        if left := room - lengths[example]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(number)
    return rows
