"""CFG++ (Chung et al. 2024, arXiv 2406.08070): manifold-constrained classifier-free guidance."""

from dataclasses import dataclass

from ..shared.euler import ancestral, only_euler, signal
from ..shared.steering import RUN, Term, number, steer

SOLVERS = ("euler", "euler_ancestral", "dpmpp_2m")


@dataclass(frozen=True)
class CFGPP(Term):
    """D_l = D_u + lambda (D_c - D_u), lambda in [0, 1], and the noise of the unguided D_u in the next step.

    The paper's step (algorithm 2) from sigma s to s', with x = a D + s n and a = 1 (eps) or 1 - s (flow), is
        x' = a' D_l + s' (x - a D_u) / s.
    An Euler step x' = r x + (1 - r) D, r = s' / s, makes exactly this x' of
        D* = (a' D_l - r a D_u) / (1 - r),
    which at the last step (s' = 0) is D_l. `sample` takes the step itself, with other solvers too.
    """

    lam: float = 0.6
    node = "SteerCFGPP"
    needs_negative = True
    exclusive = True

    def check(self):
        number("strength", self.lam)

    @property
    def off(self):
        return super().off or self.lam == 0.0

    def prepare(self, run):
        signal(run.sampling, 0.0)
        offered = f"SteerCFGPPSampler ({', '.join(SOLVERS)}) with SamplerCustom or SamplerCustomAdvanced"
        only_euler(run, sample, f"cannot take its step; use euler or ddim, or {offered}.")

    def scale(self, w, difference, call, weight):
        return self.lam

    def step(self, denoised, call, weight):
        D_l, D_u = denoised, call.predictions["negative"]
        if call.run.sampler.sampler_function is sample:
            call.run.renoise = D_u
            return D_l
        s = call.sigma[0]
        s_next = call.sigmas.take((call.sigmas - s).abs().argmin() + 1)
        r = s_next / s
        sampling = call.run.sampling
        return (signal(sampling, s_next) * D_l - r * signal(sampling, s) * D_u) / (1 - r)


def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, solver="euler", eta=1.0, s_noise=1.0):
    """CFG++ with the noise of D_u in the place of the solver's own; plain solver outside SteerCFGPP's window.

    euler            x' = a' D_l + s' n_u,  n_u = (x - a D_u) / s
    euler_ancestral  x' = a' D_l + k n_u + v z, with k^2 + v^2 = s'^2 as the host splits them by eta
    dpmpp_2m         the same Euler form on D extrapolated to second order in log(a / s), D_l and D_u alike
    """
    import torch
    from comfy.k_diffusion.sampling import default_noise_sampler
    from tqdm.auto import trange

    run = extra_args["model_options"]["transformer_options"].get(RUN)
    if run is None or not any(isinstance(term, CFGPP) for term, _, _ in run.terms):
        raise ValueError(
            "SteerCFGPPSampler: the model carries no SteerCFGPP, or one that is off (strength 0, empty window); "
            "put SteerCFGPP between the model and the guider."
        )
    a = [signal(run.sampling, s) for s in sigmas]
    noise = default_noise_sampler(x, seed=extra_args.get("seed"))
    before = None
    with torch.no_grad():
        for i in trange(len(sigmas) - 1, disable=disable):
            s, s_next = sigmas[i], sigmas[i + 1]
            D_l = model(x, s * x.new_ones([x.shape[0]]), **extra_args)
            D_u = D_l if run.renoise is None else run.renoise
            if callback is not None:
                callback({"x": x, "i": i, "sigma": s, "sigma_hat": s, "denoised": D_l})
            if i == len(sigmas) - 2 and s_next == 0:
                return D_l
            now = D_l, D_u
            if solver == "dpmpp_2m" and before is not None:
                c = extrapolation(sigmas[i - 1 : i + 2], a[i - 1 : i + 2])
                D_l, D_u = (D + c * (D - old) for D, old in zip(now, before, strict=True))
            before = now
            n_u = (x - a[i] * D_u) / s
            kept, fresh = (s_next, 0.0)
            if solver == "euler_ancestral":
                kept, fresh = ancestral(s, s_next, a[i + 1], run.sampling, eta)
            x = a[i + 1] * D_l + kept * n_u
            if solver == "euler_ancestral":
                x = x + noise(s, s_next) * (s_noise * fresh)
    return x


def extrapolation(sigmas, a):
    """h / (2 h_last) of DPM-Solver++(2M), in half log-SNR l = log(a / s); 0 where the SNR before was 0 (flow at 1)."""
    import torch

    l_last, l_now, l_next = (torch.as_tensor(a_).log() - s.log() for a_, s in zip(a, sigmas, strict=True))
    return (l_next - l_now) / (2 * (l_now - l_last))


def apply(model, lam, schedule):
    return steer(model, CFGPP(schedule, lam))


def sampler(solver, eta, s_noise):
    """A SAMPLER of the host."""
    from comfy.samplers import KSAMPLER

    return KSAMPLER(sample, {"solver": solver, "eta": eta, "s_noise": s_noise})
