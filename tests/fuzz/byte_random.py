"""Bytes in place of a random number generator: whoever chooses the bytes chooses the calls."""

import random


class ByteRandom(random.Random):
    """Its numbers are the bytes, in their order; where these end, pseudo-random ones that they seed."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        n = -(-k // 8)
        taken = self._data[self._at : self._at + n]
        self._at += n
        if len(taken) < n:
            return super().getrandbits(k)
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 65536
