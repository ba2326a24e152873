"""Null-text inversion (Mokady et al. 2022, arXiv 2211.09794): a negative of its own for every step, found by gradients,
under which guidance keeps to the path of an inverted picture."""

from dataclasses import dataclass, field

import torch

from ..shared.conditioning import refuse_hooks
from ..shared.gradient import differentiable, gradients, own, predict
from ..shared.steering import STACK, number

NODE = "SteerNullText"
LOSS, LATER = 1e-5, 1e-3  # an item is done with step i of N below LOSS + LATER i / N


@dataclass
class Optimisation:
    """A sampler of the host that walks down a trajectory at cfg w, as euler does. Before each step Adam moves the text
    e of the negative, until the step ends where the trajectory does; the next step begins with that e.

    losses: [N] of [iterations][B], mean squared distance to the trajectory, in variances of its latent.
    """

    latents: torch.Tensor  # [N + 1, B, C, ...]
    w: float
    iterations: int
    lr: float  # at the first step, in standard deviations of e
    texts: list = field(default_factory=list)  # [N] of [B, tokens, width], float32, on the CPU
    losses: list = field(default_factory=list)

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.utils import model_trange as trange

        model, options, n = guider.inner_model, extra_args["model_options"], len(sigmas) - 1
        with gradients(guider.model_patcher):
            positive, negative = own(guider.conds["positive"]), own(guider.conds["negative"])
            path = own(self.latents).to(noise.device)
            text = text_of(negative)
            x, e = path[0], text.cond.float().repeat(len(path[0]) // len(text.cond), 1, 1)
            lr = self.lr * float(e.std())
            for i in trange(n, disable=disable_pbar):
                s, s_next = float(sigmas[i]), float(sigmas[i + 1])
                with torch.no_grad():
                    D_positive = predict(model, positive, x, s, options)

                def step(e, x=x, D_positive=D_positive, s=s, s_next=s_next):
                    text.cond = e.to(text.cond)
                    D = predict(model, negative, x, s, options)
                    D = D + self.w * (D_positive - D)
                    return x + (s_next - s) / s * (x - D), D

                share = i / n
                e = self._optimised(e, step, path[i + 1], lr * (1 - share / 2), LOSS + LATER * share)
                with torch.no_grad():
                    x, D = step(e)
                self.texts.append(e.cpu())
                if callback is not None:
                    callback(i, D, x, n)
        return x

    def _optimised(self, e, step, pivot, lr, enough):
        """e after the iterations of one step. An item whose loss is small enough keeps its e from then on."""
        from comfy.model_management import throw_exception_if_processing_interrupted

        e = e.clone().requires_grad_()
        adam, dims = torch.optim.Adam([e], lr=lr), tuple(range(1, pivot.ndim))
        going, losses = e.new_ones(len(e), dtype=torch.bool), []
        for _ in range(self.iterations):
            throw_exception_if_processing_interrupted()
            loss = (step(e)[0] - pivot).square().mean(dims) / pivot.var(dims)
            slope, = torch.autograd.grad(loss.sum() * pivot[0].numel(), e)  # of a mean, half precision would lose it
            e.grad = slope / pivot[0].numel()
            before, losses = e.detach().clone(), [*losses, loss.detach()]
            adam.step()
            with torch.no_grad():
                e[~going] = before[~going]
            going = going & (loss.detach() >= enough)
            if not going.any():
                break
        self.losses.append(torch.stack(losses).cpu())
        return e.detach()


def text_of(conds):
    """The COND object of the text in prepared conds; ValueError where there is not one."""
    (cond, *more), parted = conds, ("area", "timestep_start", "timestep_end")
    if more or any(key in cond for key in parted):
        raise ValueError(f"{NODE}: the negative has several parts, an area or a timestep range; wire one plain prompt.")
    text, given = cond["model_conds"].get("c_crossattn"), cond.get("cross_attn")
    if None in (text, given) or text.cond.shape != given.shape or not torch.equal(text.cond, given.to(text.cond)):
        raise ValueError(
            f"{NODE}: this model does not take its text as the text encoder gives it, so that one found here cannot be "
            "handed to a sampler; use SteerNegativePromptInversion."
        )
    return text


def optimise(model, trajectory, negative, cfg, iterations=10, lr=0.1, source=None, callback=None):
    """The finished `Optimisation` of a trajectory of this ModelPatcher."""
    from comfy.samplers import CFGGuider

    number(f"{NODE}: cfg", cfg, 0.0)
    number(f"{NODE}: iterations", iterations, 1, 1000)
    number(f"{NODE}: lr", lr, 0.0)
    if cfg == 1.0:
        raise ValueError(f"{NODE}: at cfg 1 the negative is not used; set the cfg with which the sampler will run.")
    carried = ", ".join(term.node for term in model.model_options.get(STACK, ()))
    if carried:
        raise ValueError(f"{NODE}: searches along plain cfg, the model carries {carried}; wire it from before that.")
    positive = trajectory.conditioning if source is None else source
    if not positive or not negative:
        missing = "negative is empty; wire it" if positive else "trajectory was saved without a prompt; wire source"
        raise ValueError(f"{NODE}: the {missing}.")
    try:
        refuse_hooks([*positive, *negative])
        model = differentiable(model)
        trajectory.check(model)
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from None
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    found = Optimisation(trajectory.latents, cfg, iterations, lr)
    latent = model.model.process_latent_out(trajectory.source)
    guider.sample(torch.zeros_like(latent), latent, found, trajectory.sigmas, callback=callback, seed=0)
    return found


def apply(model, trajectory, negative, cfg, iterations=10, lr=0.1, source=None, callback=None):
    """A CONDITIONING for the sampler's negative: at each step of the trajectory another text, in force from halfway
    to the step before to halfway to the step after."""
    found = optimise(model, trajectory, negative, cfg, iterations, lr, source, callback)
    sigmas, options = trajectory.sigmas, negative[0][1]
    middles = ((sigmas[1:] + sigmas[:-1]) / 2).tolist()
    parts = []
    for i, text in enumerate(found.texts):
        first = {"timestep_start": middles[i - 1]} if i else {}
        last = {"timestep_end": middles[i]} if i + 1 < len(found.texts) else {}
        parts.append([text, {**options, **first, **last}])
    return parts
