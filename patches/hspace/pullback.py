"""The local latent basis of a diffusion model (Park et al. 2023, arXiv 2307.12868): the directions of x_t that move the
h-space most, found by pulling its metric back through the network, and a walk along them."""

from dataclasses import dataclass
from functools import partial

import torch

from ..shared.euler import signal
from ..shared.gradient import differentiable, gradients, own
from ..shared.hspace import Read, block, probe
from ..shared.steering import RUN, blame, number, steer

ROWS = 16  # rows of one forward
DELTA = 0.002  # of |x|: half the step of a finite difference
ROUNDS, ENOUGH = 20, 1e-3  # of the power method at most; change of the singular values at which it ends
METHODS = ("finite differences", "power method")


class Pullback:
    node = "SteerPullback"


def cosines(shape, count):
    """The `count` smoothest orthonormal fields of `shape` [C, H, W]: cosines of a channel, [count, C, H, W]."""
    C, H, W = shape
    count = min(count, C * H * W)

    def wave(n, k):
        i = torch.arange(n, dtype=torch.float64)
        w = torch.cos(torch.pi * (i + 0.5) * k / n)
        return w / w.norm()

    order = sorted(((u / H) ** 2 + (v / W) ** 2, u, v, c) for u in range(H) for v in range(W) for c in range(C))
    fields = torch.zeros(count, C, H, W)
    for field, (_, u, v, c) in zip(fields, order, strict=False):
        field[c] = torch.outer(wave(H, u), wave(W, v))
    return fields


@dataclass(frozen=True)
class Basis:
    """J v_i = s_i u_i for the Jacobian J of h at x, s falling.

    v: [K, C, ...] orthonormal, in x of unit variance.  s: [K].  u: [K, C', H', W'], orthonormal.
    """

    v: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor


def local_basis(model, conditioning, x, sigma, count=64, layer="middle"):
    """The `Basis` at x [1, C, H, W] (as a sampler sees it), restricted to the `count` smoothest directions.

    J is taken along each of them by a central difference, 2 `count` rows of network; of J B = U S W^T, v = B W.
    """
    where, unit = block(model, layer), scale(model, sigma)
    fields = cosines(x.shape[1:], count).to(x)
    delta = DELTA * x[0].numel() ** 0.5
    moves = torch.cat([sign * delta * unit * fields for sign in (1, -1)])
    size = min(ROWS, len(moves))
    moves = torch.cat((moves, moves[: -len(moves) % size]))  # whole batches
    found = probe(model, conditioning, [(x + part, sigma) for part in moves.split(size)], where)
    h = torch.cat([h for h, _ in found]).double()
    return decomposed((h[: len(fields)] - h[len(fields) : 2 * len(fields)]) / (2 * delta), fields)


def decomposed(JB, B):
    """The `Basis` within the span of orthonormal fields B [K, C, H, W], of J B [K, C', H', W']. The largest element of
    each v is positive."""
    U, s, Wt = torch.linalg.svd(JB.double().flatten(1).T, full_matrices=False)
    v = torch.tensordot(Wt, B.double(), 1)
    sign = v.flatten(1).gather(1, v.flatten(1).abs().argmax(1, keepdim=True)).sign().view(-1, 1, 1, 1)
    u = U.T.reshape(-1, *JB.shape[1:]) * sign
    return Basis((v * sign).float(), s.float(), u.float())


@dataclass
class Power:
    """A sampler of the host that takes no step: it iterates V <- J^T J V, orthonormal, with gradients for J^T and
    central differences for J."""

    x: torch.Tensor
    V: torch.Tensor
    unit: float
    term: Read
    basis: Basis = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        run = extra_args["model_options"]["transformer_options"][RUN]
        sigma, delta = float(sigmas[0]), DELTA * self.x.numel() ** 0.5

        def features(z):
            model_wrap(z * self.unit, z.new_full((z.shape[0],), sigma), **extra_args)
            return run.state.pop(self.term)

        def along(V):
            with torch.no_grad():
                up, down = (torch.cat([features(z + d * v) for v in V.split(ROWS)]) for d in (delta, -delta))
                return (up - down) / (2 * delta)

        with gradients(model_wrap.model_patcher):
            model_wrap.conds["positive"] = own(model_wrap.conds["positive"])
            z, V, before = own(self.x).to(noise.device) / self.unit, own(self.V).to(noise.device), None
            for _ in range(ROUNDS):
                JV = along(V)
                leaf = z.clone().requires_grad_()
                h = features(leaf)
                JtJV = torch.stack([torch.autograd.grad(h, leaf, u[None], retain_graph=True)[0][0] for u in JV])
                # some devices have no float64
                vectors, squares, _ = torch.linalg.svd(JtJV.cpu().double().flatten(1).T, full_matrices=False)
                V, s = vectors.T.reshape(V.shape).to(V), squares.sqrt()
                if before is not None and float((s / before - 1).abs().max()) < ENOUGH:
                    break
                before = s
            self.basis = decomposed(along(V).cpu(), V.cpu())
        return noise


def exact_basis(model, conditioning, x, sigma, count=8, layer="middle"):
    """The `Basis` at x [1, C, H, W] of the first `count` directions among all, by the paper's power method: `count`
    backward passes in each of up to ROUNDS rounds, and the activations of a forward in memory."""
    from comfy.samplers import CFGGuider

    model = differentiable(model)
    read = Read(layer=block(model, layer))
    power = Power(x, cosines(x.shape[1:], count), scale(model, sigma), read)
    guider = CFGGuider(steer(model, read))
    guider.set_conds(conditioning, [])
    zero = torch.zeros_like(x)
    guider.sample(zero, zero.clone(), power, torch.tensor([float(sigma), 0.0]), seed=0, disable_pbar=True)
    return power.basis


def scale(model, sigma):
    """|x| of one element where x0 has unit variance: what the paper's x_t, of unit variance, is divided by here."""
    a = signal(model.get_model_object("model_sampling"), float(sigma))
    return (a**2 + float(sigma) ** 2) ** 0.5


@dataclass
class Walk:
    """A sampler of the host that stays at one noise level and walks along v (the paper's x-space guidance):
    x <- x + eps(x + step v) - eps(x), with x of unit variance."""

    x: torch.Tensor
    v: torch.Tensor
    step: float
    unit: float
    a: float

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        x, move = self.x.to(noise), (self.step * self.unit * self.v).to(noise)
        sigma, n = sigmas[0], x.shape[0]
        for i in range(len(sigmas) - 1):
            both = torch.cat((x + move, x))
            D = model_wrap(both, sigma * both.new_ones(2 * n), **extra_args)
            eps = (both - self.a * D) / sigma
            x = x + self.unit * (eps[:n] - eps[n:])
            if callback is not None:
                callback(i, D[n:], x, len(sigmas) - 1)
        self.x = x
        return x


def walk(model, conditioning, x, sigma, v, strength, iterations, callback=None):
    """x after `iterations` steps along v, whose lengths add up to `strength` |x|."""
    from comfy.samplers import CFGGuider

    step = strength * x[0].numel() ** 0.5 / iterations
    a = signal(model.get_model_object("model_sampling"), float(sigma))
    sampler = Walk(x, v, step, scale(model, sigma), a)
    guider = CFGGuider(model)
    guider.set_conds(conditioning, [])
    zero, levels = torch.zeros_like(x), torch.full((iterations + 1,), float(sigma))
    guider.sample(zero, zero.clone(), sampler, levels, callback=callback, seed=0, disable_pbar=True)
    return sampler.x.cpu()


def edit(model, conditioning, trajectory, percent, component, strength, iterations, count, layer="middle",
         method=METHODS[0], callback=None):
    """Each picture of a Trajectory, moved along its own v number `component` (from 1) at the noise level of `percent`:
    the latent from which a sampler without noise goes on, and the sigmas it goes on with."""
    with blame(Pullback):
        number("percent", percent, 0.0, 1.0)
        number("strength", strength, -10.0, 10.0)
        number("iterations", iterations, 1, 1000)
        number("directions", count, 1, 4096)
        if not 1 <= component <= count:
            raise ValueError(f"component {component} must lie between 1 and the number of directions, {count}.")
        trajectory.check(model)
        block(model, layer)
        if method != METHODS[0]:
            differentiable(model)
    sampling = model.get_model_object("model_sampling")
    level = float(sampling.percent_to_sigma(percent))
    i = int((trajectory.sigmas[:-1] - level).abs().argmin())
    sigma, x = trajectory.sigmas[i], trajectory.latents[i]
    if float(signal(sampling, float(sigma))) <= 0:
        raise ValueError(f"{Pullback.node}: at percent {percent} there is noise alone; take a higher one.")
    if strength:
        if method == METHODS[0]:
            find = partial(local_basis, count=count)
        else:  # one that is not followed is none of the last, which converge last
            find = partial(exact_basis, count=min(count, component + 4))
        v = [find(model, conditioning, one[None], sigma, layer=layer).v[component - 1] for one in x]
        x = walk(model, conditioning, x, sigma, torch.stack(v), strength, iterations, callback)
    return model.model.process_latent_out(sampling.inverse_noise_scaling(sigma, x)), trajectory.sigmas[i:]
