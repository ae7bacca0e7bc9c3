"""Tournament: everybody meets everybody in n - 1 rounds of disjoint pairs. Pure."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """The round-robin schedule of `count` players: in each round nobody plays twice.

    The circle method: one stays, the others move on by a place. `count - 1` rounds of
    `count / 2` pairs; with an odd count one more, in each of which somebody rests.
    """
    if count < 2:
        return []
    seats = [*range(count), *([-1] if count % 2 else [])]
    schedule = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        schedule.append([(min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0])
        seats.insert(1, seats.pop())
    return schedule
