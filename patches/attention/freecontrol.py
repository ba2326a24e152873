"""FreeControl (Mo et al. 2023, arXiv 2312.07536): the structure of a guide picture, in a few principal axes of what
self-attention asks and is asked by."""

from dataclasses import dataclass, replace

import torch

from ..shared.architectures import residual_layers, self_attention_layers, unet
from ..shared.attention import Attention
from ..shared.gradient import differentiable, gradients, own
from ..shared.layers import listing
from ..shared.run import Call
from ..shared.source import covers, source_from
from ..shared.steering import CALL, Source, Term, blame, number, steer, with_roles
from .plugandplay import DIT, decoder, on_unet

METHODS = ("subspace", "gradient")
ROUNDS, SPARE = 3, 8  # of the orthogonal iteration; columns that it has more than asked for
READ = "FreeControl, read"  # role of the forward that is differentiated
THRESHOLD, PENALTY = 0.3, 10.0  # of the structure's mask; of what stands out where the guide has nothing
APPEARANCE, ACTIVE, AXES = 0.05, 0.5, 2  # share of the second energy, its threshold and its number of axes
LENGTH = 0.5  # of the gradient's step at strength 1 and energy 1, where the predicted noise has length 1


def axes(x, count):
    """The `count` leading principal axes of centred features x [b, n, C], the first of most variance, as orthonormal
    columns [b, C, count]: a few rounds of orthogonal iteration, with columns to spare."""
    width = min(count + SPARE, x.shape[2])
    V = torch.randn(x.shape[2], width, generator=torch.Generator().manual_seed(0)).to(x).expand(len(x), -1, -1)
    for _ in range(ROUNDS):
        V = torch.linalg.qr(x.mT @ (x @ V))[0]
    s = x @ V
    return V @ torch.linalg.eigh(s.mT @ s)[1].flip(-1)[..., :count]


def basis(a, b, count):
    """The axes of two pictures' features [b, n, C] together, and their mean [b, 1, C]; all float32."""
    both = torch.cat((a, b), 1).float()
    mean = both.mean(1, keepdim=True)
    return axes(both - mean, count), mean


def moved(mine, guide, count, share):
    """Features [b, n, C] with a `share` of the guide's coordinates in the leading axes: f + share (f_s - f) V V^T."""
    if count >= min(2 * mine.shape[1], mine.shape[2]):
        return guide.to(mine) if share == 1.0 else torch.lerp(mine, guide.to(mine), share)
    V, _ = basis(guide, mine, count)
    return mine + (share * (guide.float() - mine.float()) @ V @ V.mT).to(mine)


def of_image(call, name):
    return getattr(call, name)[:, slice(*call.image)]


@dataclass(frozen=True)
class FreeControl(Term):
    """What both methods have in common."""

    source: Source = None
    strength: float = 1.0
    components: int = 64
    layers: str = "auto"
    node = "SteerFreeControl"
    edits = True

    def check(self):
        number("components", self.components, 1)
        number("strength", self.strength)

    @property
    def off(self):
        return super().off or self.strength == 0.0

    def prepare(self, run):
        for source in self.branches(run.model):
            covers(source, run)

    def branches(self, model):
        return (self.source,)

    def found(self, model):
        auto = {unet.name: listing(decoder(model))} if on_unet(model) else DIT
        return self_attention_layers(model, self.layers, auto)


@dataclass(frozen=True)
class Subspace(FreeControl):
    """q, k of the image, and what the decoder's second ResBlock that attends adds on a UNet, with the guide's
    coordinates in the leading axes and their own in all others. With as many axes as there are it is Plug-and-Play."""

    def check(self):
        super().check()
        number("strength", self.strength, 0.0, 1.0)

    def attention(self, model):
        return (Attention("self", self.found(model), self.edit, ("queries", "keys"), (self.source,)),)

    def edit(self, target, beside, attend, call, weight, role):
        (guide,) = beside
        changed = {}
        for name in "qk":
            mine, its = of_image(target, name), of_image(guide, name)
            changed[name] = getattr(target, name).clone()
            changed[name][:, slice(*target.image)] = moved(mine, its, self.components, self.strength * weight)
        return attend(replace(target, **changed))

    def features(self, model):
        if not on_unet(model):
            return ()
        return [(place, self.put) for place in residual_layers(model, listing(decoder(model)[:1]))]

    def put(self, h, source, call, weight):
        mine, its = (t.flatten(2).mT for t in (h, source))
        return moved(mine, its, self.components, self.strength * weight).mT.reshape(h.shape)


@dataclass(frozen=True)
class Energy(FreeControl):
    """D - s l sqrt(g) sigma n: n of length 1 along the gradient by x of the energy g = g_s + 0.05 g_a (equation 7).

    The guide's keys are those beside the target; the target's are read in a forward of their own, which is
    differentiated. sibling: the picture whose appearance is kept, or None.
    """

    sibling: Source | None = None
    again = True

    def prepare(self, run):
        super().prepare(run)
        if any("control" in cond for cond in run.guider.original_conds["positive"]):
            raise ValueError('the method "gradient" does not lead through a ControlNet; choose "subspace".')

    def branches(self, model):
        return (self.source,) if self.sibling is None else (self.source, self.sibling)

    def attention(self, model):
        layers = self.found(model)
        return (
            Attention("self", layers, self.keep, beside=self.branches(model), negative=False),
            Attention("self", layers, self.read),
        )

    def keep(self, target, beside, attend, call, weight, role):
        """The keys of the pictures beside, in the forward of this step."""
        if role == "positive":
            call.seen.setdefault(self, {})[target.layer, target.depth] = [of_image(other, "k") for other in beside]
        return attend(target)

    def read(self, target, beside, attend, call, weight, role):
        if role == READ:
            call.seen.setdefault(self, {})[target.layer, target.depth] = of_image(target, "k")
        return attend(target)

    def add(self, call, extra, weight):
        from comfy.samplers import calc_cond_batch

        kept, run = call.seen[self], call.run
        with gradients(run.model):
            x, sigma, conds = own(call.x).requires_grad_(), own(call.sigma), own(call.conds["positive"])
            inner = Call(run, x, sigma, call.sigmas, [(self, weight, ())])  # the network as it is by itself
            options = with_roles(call.options, (READ,))
            options["transformer_options"][CALL] = inner
            calc_cond_batch(run.guider.inner_model, [conds], x, sigma, options)
            keys = inner.seen[self]
            g = sum(energy(keys[at], *map(own, beside), count=self.components) for at, beside in kept.items())
            (slope,) = torch.autograd.grad(g.sum(), x)
        length = slope.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
        step = (g.detach() / len(kept)).sqrt() * call.sigma * (-LENGTH * self.strength * weight) / length
        return slope * step.view(-1, *[1] * (slope.ndim - 1))


def energy(k, guide, sibling=None, count=64):
    """g_s of keys [b, n, C] towards those of the guide (equation 4), and a share of g_a towards those of the sibling
    (equation 6): [b].

    Coordinates count as 0..1 over each picture, axis by axis. An axis points to where the guide stands out.
    """
    V, mean = basis(guide, k.detach(), min(count, k.shape[2]))
    its = (guide.float() - mean) @ V
    V = V * (its - its.mean(1, keepdim=True)).pow(3).sum(1, keepdim=True).sign()
    s, s_g = (scaled((f.float() - mean) @ V) for f in (k, guide))
    m = (s_g > THRESHOLD).float()
    highest = (s_g * (1 - m)).amax(1, keepdim=True)
    g = (m * (s - s_g).square()).sum((1, 2)) / m.sum((1, 2))
    g = g + PENALTY * ((1 - m) * (s - highest)).relu().square().mean((1, 2))
    if sibling is not None:
        its = scaled((sibling.float() - mean) @ V[..., :AXES])
        g = g + APPEARANCE * (looks(k, s[..., :AXES]) - looks(sibling, its)).square().mean((1, 2))
    return g


def scaled(s):
    """Coordinates [b, n, K] in 0..1 over the places."""
    low, high = (each.detach() for each in (s.amin(1, keepdim=True), s.amax(1, keepdim=True)))
    return (s - low) / (high - low + 1e-7)


def looks(f, s):
    """Means of features f [b, n, C], weighted by where each coordinate is active (equation 5): [b, K, C]."""
    w = s * (s > ACTIVE)
    return w.mT @ f.float() / (w.sum(1)[..., None] + 1e-5)


def apply(model, trajectory, strength, components, layers, method, schedule, source=None, appearance=None):
    """A clone of `model` whose pictures have the structure of the trajectory's. appearance: the Trajectory of a picture
    whose appearance the method "gradient" keeps."""
    with blame(FreeControl):
        if appearance is not None and method == METHODS[0]:
            raise ValueError(f'appearance is kept by the method "{METHODS[1]}" alone; choose that one, or wire none.')
        guide = source_from(model, trajectory, source)
        if method == METHODS[0]:
            term = Subspace(schedule, guide, strength, components, layers)
        else:
            sibling = None if appearance is None else source_from(model, appearance)
            model, term = differentiable(model), Energy(schedule, guide, strength, components, layers, sibling)
    return steer(model, term)
