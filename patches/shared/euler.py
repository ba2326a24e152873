"""For methods that are exact for the Euler step x' = x + (s' - s) (x - D) / s, which is DDIM's without noise."""


def only_euler(run):
    """Raises ValueError unless the run's sampler takes Euler steps down its sigmas."""
    import comfy.k_diffusion.sampling as k

    function = getattr(run.sampler, "sampler_function", None)
    churn = getattr(run.sampler, "extra_options", {}).get("s_churn", 0.0)
    if function is not k.sample_euler or churn > 0.0:
        name = getattr(function, "__name__", type(run.sampler).__name__).removeprefix("sample_")
        raise ValueError(
            f"the sampler {name}{' with s_churn' if churn > 0.0 else ''} does not take the step for which it is exact; "
            "use euler or ddim."
        )
    if not bool((run.sigmas[1:] < run.sigmas[:-1]).all()):
        raise ValueError("the sigmas must fall with every step; choose another scheduler or fewer steps.")


def next_sigma(call):
    """Where the sampler's step from this evaluation ends, a float."""
    sigmas = call.run.sigmas
    return float(sigmas[int((sigmas - call.level).abs().argmin()) + 1])
