"""ControlNets in a forward whose rows are not all there all the time."""

import torch


class Shared:
    """A ControlNet of the host that is asked for the rows that are computed from the start, and no others."""

    def __init__(self, control, starters):
        self._control, self._starters = control, starters

    def __getattr__(self, name):
        return getattr(self._control, name)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        chosen = self._starters(transformer_options, x_noisy)
        if chosen is None:
            return self._control.get_control(x_noisy, t, cond, batched_number, transformer_options)
        size = x_noisy.shape[0] // batched_number
        index = torch.tensor([c * size + row for c in chosen for row in range(size)], device=x_noisy.device)

        def take(value):
            whole = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == x_noisy.shape[0]
            return value.index_select(0, index) if whole else value

        options = dict(transformer_options)
        for name in ("cond_or_uncond", "uuids"):
            options[name] = [options[name][c] for c in chosen]
        cond = {name: take(value) for name, value in cond.items()}
        cond["transformer_options"] = options
        return self._control.get_control(take(x_noisy), take(t), cond, len(chosen), options)


class Residuals(list):
    """What a ControlNet adds, with the rows that the hidden states have where the host takes an entry."""

    def __init__(self, values, rows, skips):
        super().__init__(values)
        self._rows, self._skips = rows, skips

    def pop(self, *at):
        # a UNet's output side adds to the skip connection of the input block of the same number
        stage = self._rows.pushed.get(len(self) - 1) if self._skips else None
        return self._rows.conform(super().pop(*at), stage)

    def __getitem__(self, at):
        value = super().__getitem__(at)
        return self._rows.conform(value) if isinstance(at, int) else value


def whole(control, rows):
    """`control` with all rows of the batch."""
    if control is None:
        return None
    everyone = tuple(range(len(rows.units)))
    return {
        name: [rows.conform(v, everyone) for v in values] if isinstance(values, list) else values
        for name, values in control.items()
    }


def residuals(control, rows):
    """`control` (name -> list of tensors or None), following `rows`."""
    if control is None:
        return None
    return {
        name: Residuals(values, rows, name == "output") if isinstance(values, list) else values
        for name, values in control.items()
    }
