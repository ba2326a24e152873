"""The asymmetric reverse process (Asyrp, Kwon et al. 2022, arXiv 2210.10960), with the latent calibration and the
quality boost of InjectFusion (Jeong et al. 2023, arXiv 2303.15403)."""

from ..shared.euler import ancestral, signal
from ..shared.steering import PLAIN, RUN, number

NODE = "SteerAsymmetricSampler"


def calibrated(D_mod, D):
    """P': the edited D with the contrast of the plain one: its mean kept, its deviation that of D, over each item."""
    dims = tuple(range(1, D.ndim))
    mean = D_mod.mean(dims, keepdim=True)
    deviation = D_mod.std(dims, keepdim=True).clamp(min=1e-12)
    return mean + (D_mod - mean) * (D.std(dims, keepdim=True) / deviation)


def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, calibration=False, omega=0.3, boost=0.8):
    """Steps in which the edit of the network changes the clean estimate alone, and not the noise that is kept.

    With x = a x0 + s n, D the plain prediction, D_mod the edited one, n = (x - a D) / s:
        x_next = a' D_mod + s' n.
    Calibration instead moves x to where the plain network would say about the same, and steps plainly from there:
        dx = a (P' - D) - a omega (D_mod - D),    x_next = a' D(x + dx) + s' n(x + dx).
    From the share `boost` of the sampling range on, each step renews its noise (eta = 1). Where nothing edits the
    network, D_mod is D, and the step is Euler's.
    """
    import logging

    import torch
    from comfy.k_diffusion.sampling import default_noise_sampler
    from tqdm.auto import trange

    options = extra_args["model_options"]
    run = options["transformer_options"].get(RUN)
    if run is None or not any(term.edits for term, _, _ in run.terms):
        logging.warning(
            f"{NODE}: the model carries no node that edits the network (SteerInjectFusion, SteerAsyrp), or one that is "
            "off, so it samples as euler does."
        )
    sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    last = float(sampling.percent_to_sigma(boost)) if boost < 1.0 else -1.0
    noise = default_noise_sampler(x, seed=extra_args.get("seed"))
    plain = {**options, "transformer_options": {**options["transformer_options"], PLAIN: True}}
    levels = sigmas.tolist()
    ones = x.new_ones(x.shape[0])

    def predict(z, s, model_options=options):
        return model(z, s * ones, **{**extra_args, "model_options": model_options})

    with torch.no_grad():
        for i in trange(len(sigmas) - 1, disable=disable):
            s, t = sigmas[i], sigmas[i + 1]
            a, b = signal(sampling, s), signal(sampling, t)
            edited = run is not None and run.edits_at(levels[i])
            D_mod = predict(x, s)
            D = predict(x, s, plain) if edited else D_mod
            if edited and calibration:
                x = x + a * (calibrated(D_mod, D) - D) - a * omega * (D_mod - D)
                D_mod = D = predict(x, s, plain)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": s, "sigma_hat": s, "denoised": D_mod})
            if levels[i] <= last and levels[i + 1] > 0:
                kept, fresh = ancestral(s, t, b, sampling, 1.0)
                x = b * D_mod + kept * ((x - a * D) / s) + fresh * noise(s, t)
            elif D_mod is D:
                x = x + (x - D) / s * (t - s)
            else:
                x = b * D_mod + t * ((x - a * D) / s)
    return x


def sampler(calibration, omega, boost):
    """A SAMPLER of the host."""
    from comfy.samplers import KSAMPLER

    try:
        number("omega", omega, 0.0, 1.0)
        number("boost_percent", boost, 0.0, 1.0)
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from None
    return KSAMPLER(sample, {"calibration": calibration, "omega": omega, "boost": boost})
