"""What a run cost: forwards of the network, rows of the batch, and rows in units of a full-size one."""

from collections import Counter
from math import prod


class Stats:
    def __init__(self, shape):
        self.size = prod(shape[1:])  # elements of one full-size latent
        self.evaluations = 0
        self.forwards = 0
        self.saved = 0  # negatives that guidance did without
        self.rows = Counter()  # role -> rows of the batch
        self.work = Counter()  # role -> rows as shares of a full-size row: an area of half the picture counts 0.5

    def count(self, units, x, rows=None):
        """One forward of `x` [len(units) * B, ...].

        rows: the `Rows` of a forward in which some units joined late or left blocks out; they count for what they ran.
        """
        self.forwards += 1
        size = x.shape[0] // len(units)
        shares = [work / rows.whole for work in rows.work] if rows and rows.whole else [1] * len(units)
        for unit, share in zip(units, shares, strict=True):
            self.rows[str(unit.role)] += size
            self.work[str(unit.role)] += share * x.numel() / len(units) / self.size

    def line(self):
        shares = ", ".join(f"{role} {self.rows[role]} rows = {self.work[role]:.4g}" for role in sorted(self.rows))
        return (
            f"Steer: {self.evaluations} evaluations, {self.forwards} forwards, {self.rows.total()} rows, "
            f"work of {self.work.total():.4g} single-image forwards ({shares})"
            + (f", {self.saved} negatives spared" if self.saved else "")
        )
