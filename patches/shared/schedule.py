"""When a method acts, and how strongly: a window in percent of the sampling range and an optional curve."""

from bisect import bisect_left
from dataclasses import dataclass

GRID = 1000  # resolution of the percent axis when a sigma is mapped back onto it


@dataclass(frozen=True)
class Schedule:
    """Half-open window [start_percent, end_percent) with an optional curve of weights over the whole range.

    Percent is the host's: 0 is pure noise, 1 the finished picture, mapped to sigma by the model's own
    `percent_to_sigma`, so the same numbers mean the same on eps, v and flow models.

    curve: weights at evenly spaced percents 0..1, or None for 1 everywhere.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0
    curve: tuple[float, ...] | None = None

    def __post_init__(self):
        if not 0.0 <= self.start_percent <= 1.0 or not 0.0 <= self.end_percent <= 1.0:
            raise ValueError(
                f"start_percent and end_percent lie between 0 and 1, got {self.start_percent} and {self.end_percent}."
            )

    @property
    def closed(self):
        """True when no step can ever fall into the window."""
        return self.start_percent >= self.end_percent or (self.curve is not None and not any(self.curve))

    @property
    def always(self):
        """True when the weight is 1 at every step."""
        return self.start_percent == 0.0 and self.end_percent == 1.0 and self.curve is None

    def overlaps(self, other):
        """True when both windows hold some percent in common."""
        return max(self.start_percent, other.start_percent) < min(self.end_percent, other.end_percent)

    def resolve(self, model_sampling):
        """The schedule on a model's own sigmas; called when a run starts, since later nodes may change them."""
        return Window(self, model_sampling)


class Window:
    """A `Schedule` resolved on a live `model_sampling`."""

    def __init__(self, schedule, model_sampling):
        self.schedule = schedule
        self.first = model_sampling.percent_to_sigma(schedule.start_percent)
        self.last = model_sampling.percent_to_sigma(schedule.end_percent)
        if schedule.curve is not None:
            # sigma falls with percent; negated it rises, as bisect wants
            self.grid = [-float(model_sampling.percent_to_sigma(i / GRID)) for i in range(GRID + 1)]

    def weight(self, sigma):
        """Weight at `sigma` (float); 0.0 outside the window. The start belongs to the window, the end does not."""
        schedule = self.schedule
        if schedule.always:
            return 1.0
        if schedule.closed or sigma > self.first or (sigma <= self.last and schedule.end_percent < 1.0):
            return 0.0
        if schedule.curve is None:
            return 1.0
        position = min(bisect_left(self.grid, -sigma), GRID) / GRID * (len(schedule.curve) - 1)
        i = min(int(position), len(schedule.curve) - 2)
        return schedule.curve[i] + (schedule.curve[i + 1] - schedule.curve[i]) * (position - i)
