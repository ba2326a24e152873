"""The Euler step x' = x + (s' - s) (x - D) / s, which is DDIM's without noise: for methods that are exact for it, and
for those that take it themselves, in x = a D + s n."""


def only_euler(run, own=None, remedy="does not take the step for which it is exact; use euler or ddim."):
    """Raises ValueError unless the run's sampler takes Euler steps, or is the function `own`, down its sigmas."""
    import comfy.k_diffusion.sampling as k

    function = getattr(run.sampler, "sampler_function", None)
    churn = getattr(run.sampler, "extra_options", {}).get("s_churn", 0.0)
    if function is not own and (function is not k.sample_euler or churn > 0.0):
        name = getattr(function, "__name__", type(run.sampler).__name__).removeprefix("sample_")
        raise ValueError(f"the sampler {name}{' with s_churn' if churn > 0.0 else ''} {remedy}")
    if not bool((run.sigmas[1:] < run.sigmas[:-1]).all()):
        raise ValueError("the sigmas must fall with every step; choose another scheduler or fewer steps.")


def next_sigma(call):
    """Where the sampler's step from this evaluation ends, a float."""
    sigmas = call.run.sigmas
    return float(sigmas[int((sigmas - call.level).abs().argmin()) + 1])


def signal(model_sampling, sigma):
    """a(sigma) of x = a x0 + sigma n: 1 for eps, v and EDM models in the host's scaling, 1 - sigma for flow."""
    import comfy.model_sampling as ms

    if isinstance(model_sampling, ms.CONST) and not isinstance(model_sampling, ms.IMG_TO_IMG_FLOW):
        return 1 - sigma
    if isinstance(model_sampling, (ms.EPS, ms.COSMOS_RFLOW)) and not isinstance(model_sampling, ms.IMG_TO_IMG):
        return 1.0
    kind = ", ".join(base.__name__ for base in type(model_sampling).__bases__)
    raise ValueError(f"its step is derived for eps, v, EDM and flow models, not for this one ({kind}).")


def ancestral(s, s_next, a_next, model_sampling, eta):
    """How much of the old noise a step to `s_next` keeps and how much is fresh, as the host's ancestral samplers."""
    from comfy.k_diffusion.sampling import get_ancestral_step

    if isinstance(a_next, float):
        return get_ancestral_step(s, s_next, eta=eta)
    down = s_next * (1 + (s_next / s - 1) * eta)
    kept = down * a_next / signal(model_sampling, down)
    return kept, (s_next**2 - kept**2) ** 0.5
