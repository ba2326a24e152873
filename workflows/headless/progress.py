"""One line per node that reports steps: a moving bar on a terminal, a single line when it is done elsewhere."""

import sys
import time


class Progress:
    def __init__(self, stream=sys.stderr):
        self.stream = stream
        self.label = None
        self.started = 0.0

    def __call__(self, label, value, total):
        now = time.monotonic()
        if label != self.label or value < self.value:
            self.finish()
            self.label, self.started = label, now
        self.value, self.total, self.now = value, total, now
        if self.stream.isatty():
            filled = int(24 * value / total) if total else 0
            self.stream.write(f"\r{self.line()} [{'#' * filled}{'.' * (24 - filled)}]")
            self.stream.flush()

    def line(self):
        return f"{self.label}: {self.value:g}/{self.total:g}, {self.now - self.started:.1f} s"

    def finish(self):
        if self.label is not None:
            self.stream.write("\n" if self.stream.isatty() else self.line() + "\n")
            self.stream.flush()
        self.label = None
