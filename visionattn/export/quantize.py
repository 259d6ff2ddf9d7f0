"""placeholder"""


class Quantizer:
    kept: list[str] = []

    def bound(self, info): ...
