"""Which adapters lie on the device, of one model: a slot each, the least recently used making room for the next.

Owns the count of the requests that run with each slot. Knows no tensors: what a slot holds is put there by the runner,
when it sees a request in a slot that held another adapter.
"""

from __future__ import annotations

from collections import OrderedDict


class AdapterSlots:
    """`num_slots` places. A slot that a request holds stays its adapter's until the last such request gives it back."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # by digest, the least recently used first
        self._adapter_in: dict[int, bytes] = {}
        self._num_users: dict[int, int] = {}

    @property
    def num_used(self) -> int:
        """Slots that requests hold."""
        return len(self._num_users)

    def take(self, digest: bytes) -> int | None:
        """A slot with this adapter, held for one request more; None where requests hold every slot for others."""
        slot = self._slot_of.get(digest)
        if slot is None:
            slot = self._place()
            if slot is None:
                return None
            self._slot_of[digest] = slot
            self._adapter_in[slot] = digest
        self._slot_of.move_to_end(digest)
        self._num_users[slot] = self._num_users.get(slot, 0) + 1
        return slot

    def give_back(self, slot: int) -> None:
        """One of the slot's requests holds it no longer. What it holds stays until its place is wanted."""
        self._num_users[slot] -= 1
        if not self._num_users[slot]:
            del self._num_users[slot]

    def _place(self) -> int | None:
        if self._free:
            return self._free.pop()
        for digest, slot in self._slot_of.items():
            if slot not in self._num_users:
                del self._slot_of[digest]
                return slot
        return None
