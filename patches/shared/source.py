"""An inverted picture as the source beside a target: what must hold of it before the first step."""

from .beside import source_of
from .conditioning import refuse_hooks


def source_from(model, trajectory, conditioning=None):
    """The `Source` of a Trajectory, under its own prompt or another CONDITIONING; ValueError where it has none, or is
    of another model than this ModelPatcher."""
    conditioning = trajectory.conditioning if conditioning is None else conditioning
    if not conditioning:
        raise ValueError("there is no source prompt: the trajectory was saved without one; wire source.")
    refuse_hooks(conditioning)
    trajectory.check(model)
    return source_of(conditioning, trajectory)


def covers(source, run):
    """Raises ValueError unless the trajectory has one picture, or as many as the run, of its size, and begins at its
    noise or above."""
    trajectory = source.trajectory
    items = trajectory.latents.shape[1]
    trajectory.check(run.model, (items if items == 1 else run.size, *run.shape[1:]))
    highest, start = float(trajectory.sigmas[0]), float(run.sigmas[0])
    if start > highest * (1 + 1e-4):
        raise ValueError(
            f"the sampler starts at sigma {start:.4g}, and the source was inverted to {highest:.4g} only; invert it "
            "with the sampler's steps, scheduler and denoise."
        )
