"""FlowEdit (Kulikov et al. 2024, arXiv 2412.08629) and the denoising diffusion consistent model of InfEdit (DDCM; Xu et
al. 2023, arXiv 2312.04965): edits without inversion, of which one takes Euler steps and the other jumps."""

from dataclasses import dataclass
from functools import partial

import torch

from ..shared.beside import Live
from ..shared.euler import signal
from ..shared.mask import fit
from ..shared.picture import check_latent, check_sigmas
from ..shared.steering import RUN, blame, number

METHODS = ("FlowEdit", "DDCM")
ASK = "sampler_calc_cond_batch_function"  # by which other nodes ask the network in the host's place


@dataclass(frozen=True)
class FlowEdit:
    """A sampler of the host that takes the picture x0 to the edited one, z, without noise of its own.

    At each noise level s the same fresh noise n is put on both, z_src = a x0 + s n and z_tar = z + z_src - x0, and the
    picture is drawn towards
        T = x0 + D(z_tar | positive) - D(z_src | source),
    FlowEdit by the Euler step z' = z + (s' - s) (z - T) / s, which is the paper's (s' - s) (v_tar - v_src) as D; DDCM
    by z' = T. For eps models (a = 1) and flow models (a = 1 - s) alike.

    n_max, n_min, in steps from the end: those before the last n_max are left out (as in the official code, more than
    there are is all of them), the last n_min are plain sampling.
    n_avg: draws of n over which T is averaged at each step.
    """

    method: str = "FlowEdit"
    n_max: int = 16
    n_min: int = 0
    n_avg: int = 1
    node = "SteerFlowEdit"

    def check(self, sigmas):
        steps = len(sigmas) - 1
        number("n_max", self.n_max, 0)
        number("n_min", self.n_min, 0)
        number("n_avg", self.n_avg, 1)
        if self.n_min >= max(min(self.n_max, steps), 1):
            raise ValueError(
                f"n_min {self.n_min} must be lower than n_max {self.n_max} and the {steps} steps of the sigmas: the "
                "steps between n_max and n_min are the edit."
            )

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.k_diffusion.sampling import default_noise_sampler
        from comfy.utils import model_trange as trange

        if not hasattr(model_wrap, "predict_source"):
            raise ValueError(f"{self.node}: its sampler needs its guider; wire both to SamplerCustomAdvanced.")
        x0, total, sampling = latent_image, len(sigmas) - 1, model_wrap.inner_model.model_sampling
        draw, ones = default_noise_sampler(x0, seed=extra_args.get("seed")), x0.new_ones(x0.shape[0])

        def keep(D):
            return D if denoise_mask is None else x0 + denoise_mask * (D - x0)

        run = extra_args["model_options"]["transformer_options"].get(RUN)
        z = x0
        for i in trange(max(total - self.n_max, 0), total, disable=disable_pbar):
            s, s_next = sigmas[i], sigmas[i + 1]
            a, edits = signal(sampling, s), i < total - self.n_min
            if edits:
                T = torch.zeros_like(x0)
                for _ in range(self.n_avg):
                    z_src = a * x0 + s * draw(s, s_next)
                    if run is not None:
                        run.beside = Live(z_src)
                    # the target first: Steer's terms act on it
                    D_tar = model_wrap(z_src + (z - x0), s * ones, **extra_args)
                    T += (D_tar - model_wrap.predict_source(z_src, s * ones, **extra_args)) / self.n_avg
                T = keep(x0 + T)
            else:
                if i == total - self.n_min:
                    z = z + (a * x0 + s * draw(s, s_next) - x0)
                T = keep(model_wrap(z, s * ones, **extra_args))
            z = T if edits and self.method == "DDCM" else z + (s_next - s) / s * (z - T)
            if callback is not None:
                callback(i, T, z, total)
        return z


def known(said, args):
    """The host's calc_cond_batch of [source, negative or None], for whose D there is what the network `said` of the
    source beside the edit."""
    from comfy.samplers import calc_cond_batch

    conds, x = args["conds"], args["input"]
    asked = [role for role, cond in zip(("positive", "negative"), conds, strict=True) if cond is not None]
    if not said.keys() >= set(asked):
        return calc_cond_batch(args["model"], conds, x, args["sigma"], args["model_options"])
    return [said[role] if role in asked else torch.zeros_like(x) for role in ("positive", "negative")]


def guider(model, source, positive, negative, source_cfg, target_cfg, mask=None):
    """The GUIDER of the edit: CFG towards `positive`, which Steer's terms may change, and plain CFG towards `source`.

    mask: [B, H, W], what may change; times the latent's own. Outside it the result is the latent, bit for bit.
    """
    import comfy.samplers

    class Pair(comfy.samplers.CFGGuider):
        def predict_source(self, x, timestep, model_options, seed=None):
            conds = self.conds["negative"], self.conds["source"]
            run = model_options["transformer_options"].get(RUN)
            if run is not None and run.beside.said:
                model_options = {ASK: partial(known, run.beside.said), **model_options}
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, *conds, self.source_cfg, model_options=model_options, seed=seed
            )

        def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
            if not isinstance(sampler, FlowEdit):
                raise ValueError(f"{FlowEdit.node}: its guider needs its sampler; wire both to SamplerCustomAdvanced.")
            both = None
            with blame(FlowEdit):
                check_latent(latent_image)
                check_sigmas(sigmas)
                sampler.check(sigmas)
                for each in (self.mask, denoise_mask):
                    if each is not None:
                        fitted = fit(each.cpu(), latent_image.shape)
                        both = fitted if both is None else both * fitted
                if both is not None and not torch.count_nonzero(both):
                    raise ValueError("the mask is empty, nothing could change; white is what may change.")
            if sampler.n_max == 0:
                return latent_image.clone()
            out = super().sample(noise, latent_image, sampler, sigmas, both, *args, **kwargs)
            return out if both is None else latent_image.to(out).where((both == 0).to(out.device), out)

    with blame(FlowEdit):
        if not source or not positive:
            raise ValueError("needs a source and a positive prompt: what the picture shows, and what it shall show.")
        for name, cfg in (("source_cfg", source_cfg), ("target_cfg", target_cfg)):
            number(name, cfg)
        signal(model.get_model_object("model_sampling"), 0.5)
    pair = Pair(model)
    pair.inner_set_conds({"positive": positive, "negative": negative, "source": source})
    pair.set_cfg(target_cfg)
    pair.source_cfg, pair.mask = source_cfg, mask
    return pair
