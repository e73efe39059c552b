"""What the free slots of the engine hold: a context that begins like an earlier one continues it."""

from collections.abc import Sequence


class SlotCache:
    """The free slots with their contents. Reusing a prefix is exact: `Engine.extend` continues it."""

    def __init__(self, n_slots: int) -> None:
        self._free: dict[int, list[int]] = {slot: [] for slot in range(n_slots)}  # least recently used first

    def __len__(self) -> int:
        """The number of free slots."""
        return len(self._free)

    def take(self, context: Sequence[int]) -> tuple[int, int]:
        """Take the free slot with the longest common prefix; return it and the length of the prefix.

        Among equals, take the one that has been free for longest.
        """
        prefixes = {slot: common_prefix(ids, context) for slot, ids in self._free.items()}
        slot = max(prefixes, key=lambda candidate: prefixes[candidate])  # the first of equals
        del self._free[slot]
        return slot, prefixes[slot]

    def give_back(self, slot: int, ids: list[int]) -> None:
        """Return a slot, which holds these ids."""
        assert slot not in self._free, "the slot is free already"
        self._free[slot] = ids


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
