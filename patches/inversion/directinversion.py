"""Direct inversion (Ju et al. 2023, arXiv 2310.01506): the source is put back on its trajectory at every step."""

import logging
from dataclasses import dataclass

from ..shared.combine import spare
from ..shared.euler import next_sigma, only_euler
from ..shared.source import source_from
from ..shared.steering import Source, Term, blame, in_order, number, overrides, steer

GUIDANCE = ("instead", "reshape", "scale", "add", "transform", "step")  # places that leave plain CFG
FOREIGN = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")  # of other nodes

@dataclass(frozen=True)
class DirectInversion(Term):
    """D + o (D_z - D_src): what the sampler's step would lose of the source, given to the target.

    The source z runs beside the target under its own prompt, the run's negative and cfg: D_src. The Euler step from z
    to the next latent z' of its trajectory is the one towards D_z = z - s (z' - z) / (s' - s); D_z - D_src is the
    paper's offset z' - z'_src (algorithm 1) as a D. With o = 0 the target has none of it (the paper's choice), with
    o = 1 the same prompt returns the source, at any cfg, also one that changes over time.

    D_src is plain CFG. Where other steering guides the target otherwise (CFG++, APG, PAG, a rescale), o = 1 leaves what
    that adds, and the source does not return; the run says so.
    """

    source: Source = None
    o: float = 1.0
    node = "SteerDirectInversion"
    exclusive = True

    def check(self):
        number("offset", self.o, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.o == 0.0

    def prepare(self, run):
        only_euler(run)
        self.source.trajectory.check(run.model, run.shape, run.sigmas)
        options = run.guider.model_options
        others = [
            term.node
            for term in in_order(options)
            if type(term) is not type(self) and term.schedule.overlaps(self.schedule)
            and any(overrides(term, place) for place in GUIDANCE)
        ]
        if others := [*others, *(name for name in FOREIGN if options.get(name))]:
            logging.warning(
                f"{self.node}: the edit is also guided by {', '.join(others)}, the source by plain cfg alone, so at "
                "offset 1 its own prompt does not return it; take that off, or give it another window, where it must."
            )

    def branches(self, model):
        return (self.source,)

    def step(self, denoised, call, weight):
        trajectory, D_src = self.source.trajectory, call.predictions[self.source]
        if self.source.negative in call.predictions:
            D_neg = spare(call.run.spared, D_src, call.predictions[self.source.negative])
            D_src = D_neg + (D_src - D_neg) * call.run.guider.cfg
        s = call.level
        s_next = next_sigma(call)
        z, z_next = (trajectory.at(sigma).to(D_src) for sigma in (s, s_next))
        D_z = z - (z_next - z) * (s / (s_next - s))
        return denoised + (D_z - D_src) * (self.o * weight)


def apply(model, trajectory, o, schedule, source=None):
    with blame(DirectInversion):
        branch = source_from(model, trajectory, source)
    return steer(model, DirectInversion(schedule, branch, o))
