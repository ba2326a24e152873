"""What a run cost: forwards of the network, rows of the batch, and rows in units of a full-size one."""

from collections import Counter
from math import prod


class Stats:
    def __init__(self, shape):
        self.size = prod(shape[1:])  # elements of one full-size latent
        self.evaluations = 0
        self.forwards = 0
        self.rows = Counter()  # role -> rows of the batch
        self.work = Counter()  # role -> rows as shares of a full-size row: an area of half the picture counts 0.5

    def count(self, roles, x):
        """One forward of `x` [len(roles) * B, ...] whose equal chunks have these roles."""
        self.forwards += 1
        rows = x.shape[0] // len(roles)
        for role in roles:
            self.rows[str(role)] += rows
            self.work[str(role)] += x.numel() / len(roles) / self.size

    def line(self):
        shares = ", ".join(f"{role} {self.rows[role]} rows = {self.work[role]:.4g}" for role in sorted(self.rows))
        return (
            f"Steer: {self.evaluations} evaluations, {self.forwards} forwards, {self.rows.total()} rows, "
            f"work of {self.work.total():.4g} single-image forwards ({shares})"
        )
