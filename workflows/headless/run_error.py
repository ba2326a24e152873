"""What can go wrong while a prompt runs."""


class RunError(RuntimeError):
    """A node failed, or the host refused the prompt (`before_start`). The message names node and input."""

    def __init__(self, message, before_start=False):
        super().__init__(message)
        self.before_start = before_start


class Unreachable(RuntimeError):
    """The server does not answer."""
