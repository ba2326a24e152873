"""Direct inversion: the source returns at any cfg, and what it is refused for."""

import comfy.samplers
import pytest
import torch
import toy
from bench.lab_guidance import lab
from comfy_extras.nodes_model_advanced import RescaleCFG
from steer.models.lab.captions import caption
from steer.models.lab.portrait import Portrait, draw
from steer.patches.guidance import adaptiveguidance, apg, betacfg, cfgpp, feedbackcfg, guidanceschedule, pag, rescale
from steer.patches.inversion import directinversion, invert
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory, fingerprint

ALWAYS = Schedule()
ORIGIN = toy.text(5)
ROUNDING = 2e-2  # of a random network at sigma 14.6 and cfg 10; a trained one is below 1e-4


def path(model, batch=1, conditioning=ORIGIN, steps=4, size=8):
    """Any path will do: the offset is what the sampler would lose of it."""
    sigmas = toy.sigmas(model, steps)
    clean = 0.3 * toy.noise(40, batch, size, size)
    latents = torch.stack([clean + s * toy.noise(50, batch, size, size) for s in sigmas])
    return Trajectory(sigmas, latents, fingerprint(model), conditioning)


def drawn(model, trajectory, positive=ORIGIN, cfg=5.0, **options):
    """What euler draws from the first latent of the trajectory, in the model's latent space."""
    latent = model.model.process_latent_out(trajectory.source)
    start = invert.InvertedNoise(trajectory, model).generate_noise({"samples": latent})
    options = {"sigmas": trajectory.sigmas, "start": start, "latent": latent, **options}
    return model.model.process_latent_in(toy.sample(model, cfg, positive=positive, **options))


def direct(model, trajectory, o=1.0, schedule=ALWAYS, source=None):
    return directinversion.apply(model, trajectory, o, schedule, source)


def off(latent, trajectory):
    """How far it is from the source."""
    return float((latent - trajectory.source).abs().max())


@pytest.fixture(scope="module", params=["unet", "flux", "v"])
def model(request):
    return {"unet": toy.model, "flux": toy.flux, "v": lambda: toy.model(kind="v")}[request.param]()


@pytest.mark.parametrize("cfg", [1.0, 3.0, 10.0])
def test_the_source_returns_at_any_cfg(model, cfg):
    trajectory = path(model)
    assert off(drawn(direct(model, trajectory), trajectory, cfg=cfg), trajectory) < ROUNDING
    assert off(drawn(model, trajectory, cfg=cfg), trajectory) > 0.5


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_the_source_returns_on_the_lab(which):
    """From the plainest inversion, which drifts: 1e-4 at cfg 1 to 10 against 0.4 and more without."""
    (model, clip, vae), _ = lab(which)
    portrait = Portrait.from_seed(3)
    with torch.inference_mode():
        latent = vae.encode(torch.from_numpy(draw(portrait).copy())[None].float() / 255)
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in (caption(portrait), "")]
    sigmas = toy.sigmas(model, 6, "normal" if which == "unet" else "simple")
    with torch.inference_mode():
        trajectory = invert.invert(model, prompts[0], latent, sigmas, "ddim / euler")
    for cfg in (1.0, 5.0, 10.0):
        steered, plain = (
            drawn(m, trajectory, *prompts[:1], cfg, negative=prompts[1]) for m in (direct(model, trajectory), model)
        )
        assert off(steered, trajectory) < 5e-4  # of rounding, which differs from processor to processor
        assert off(plain, trajectory) > 0.1


def test_it_is_algorithm_1(model):
    """The Euler step of the target plus o times z' minus the Euler step of the source."""
    trajectory, cfg, o = path(model), 4.0, 0.6

    def paper(m, x, sigmas, extra_args=None, callback=None, disable=None):
        inner = m.inner_model.inner_model

        def guided(x, sigma, positive):
            conds = [positive, m.inner_model.conds["negative"]]
            options = extra_args["model_options"]
            D, D_neg = comfy.samplers.calc_cond_batch(inner, conds, x, sigma * x.new_ones(len(x)), options)
            return D_neg + cfg * (D - D_neg)

        def step(x, s, s_next, positive):
            return x + (s_next - s) * (x - guided(x, s, positive)) / s

        for i, (s, s_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            z, z_next = trajectory.latents[i], trajectory.latents[i + 1]
            offset = z_next - step(z, s, s_next, m.inner_model.conds["source"])
            x = step(x, s, s_next, m.inner_model.conds["positive"]) + o * offset
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": toy.POSITIVE, "negative": toy.NEGATIVE, "source": ORIGIN})
    expected = drawn(model, trajectory, guider=guider, sampler=comfy.samplers.KSAMPLER(paper))
    ours = drawn(direct(model, trajectory, o), trajectory, toy.POSITIVE, cfg)
    assert torch.allclose(ours, expected, atol=2e-4 * float(expected.std()))


def test_it_costs_the_rows_of_the_source_in_the_same_forwards_and_off_nothing(model):
    trajectory = path(model)
    plain = drawn(model, trajectory)
    with toy.count_forwards(model) as count:
        for idle in (dict(o=0.0), dict(schedule=Schedule(0.5, 0.5))):
            assert torch.equal(drawn(direct(model, trajectory, **idle), trajectory), plain)
    assert (count.calls, count.rows) == (8, 16)
    with toy.count_forwards(model) as count:
        drawn(direct(model, trajectory), trajectory)
    assert (count.calls, count.rows) == (4, 16)
    with toy.count_forwards(model) as count:
        half = drawn(direct(model, trajectory, schedule=Schedule(0.0, 0.5)), trajectory)
    assert count.calls == 4 and 8 < count.rows < 16 and not torch.equal(half, plain)


def test_a_batch_is_as_many_runs_and_two_runs_are_equal():
    model = toy.model()
    both = path(model, 2)
    together = drawn(direct(model, both), both, toy.POSITIVE)
    assert torch.equal(together, drawn(direct(model, both), both, toy.POSITIVE))
    for i in range(2):
        alone = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, ORIGIN)
        out = drawn(direct(model, alone), alone, toy.POSITIVE)
        assert torch.allclose(together[i : i + 1], out, atol=2e-4 * float(out.std()))


def test_other_models_are_as_they_were_also_after_an_error():
    model = toy.model()
    trajectory = path(model)
    sibling = pag.apply(model, 2.0, "middle", ALWAYS)
    before = [drawn(m, trajectory) for m in (model, sibling)]
    steered = direct(sibling, trajectory)

    def fail(i, D, x, n):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        drawn(steered, trajectory, callback=fail)
    assert [torch.equal(drawn(m, trajectory), b) for m, b in zip((model, sibling), before, strict=True)] == [True] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_returns_within_its_rounding(dtype):
    model = toy.model(dtype=dtype)
    trajectory = path(model)
    assert off(drawn(direct(model, trajectory), trajectory), trajectory) < 0.1 * trajectory.source.std()


GUIDED = {
    "SteerCFGPP": lambda m, window: cfgpp.apply(m, 0.6, window),
    "SteerBetaCFG": lambda m, window: betacfg.apply(m, 2.0, 2.0, 0.0, False, window),
    "SteerFeedbackCFG": lambda m, window: feedbackcfg.apply(m, 1.0, 12.0, 3, 1.0, window),
    "SteerAPG": lambda m, window: apg.apply(m, 0.0, 1.0, -0.5, window),
    "SteerPAG": lambda m, window: pag.apply(m, 2.0, "middle", window),
    "SteerRescale": lambda m, window: rescale.apply(m, 0.7, window),
    "sampler_cfg_function": lambda m, window: RescaleCFG().patch(m, 0.7)[0],
}


@pytest.mark.parametrize("name", GUIDED)
def test_where_the_target_has_other_guidance_it_says_that_the_source_does_not_return(name, caplog):
    model = toy.model()
    trajectory = path(model)
    before, after = direct(GUIDED[name](model, ALWAYS), trajectory), GUIDED[name](direct(model, trajectory), ALWAYS)
    for steered in (before, after):
        caplog.clear()
        out = drawn(steered, trajectory)
        assert out.isfinite().all() and off(out, trajectory) > 5 * ROUNDING
        assert caplog.text.count(f"SteerDirectInversion: the edit is also guided by {name}, the source by plain") == 1


def test_what_sets_the_cfg_alone_keeps_the_promise_and_says_nothing(caplog):
    model = toy.model()
    trajectory = path(model)
    scheduled = guidanceschedule.apply(direct(model, trajectory), 1.0, 8.0, "custom", Schedule(0.0, 0.6))
    assert off(drawn(scheduled, trajectory), trajectory) < ROUNDING
    early = direct(model, trajectory, schedule=Schedule(0.0, 0.5))
    drawn(pag.apply(early, 2.0, "middle", Schedule(0.5, 1.0)), trajectory)
    assert "SteerDirectInversion" not in caplog.text


def test_an_item_that_is_spared_its_negative_returns_too(monkeypatch):
    """Adaptive Guidance ends it for the item whose prompt is nearer to the negative, and not for the other."""
    model, negative = toy.model(), toy.NEGATIVE[0][0]
    both = torch.cat((torch.lerp(negative, ORIGIN[0][0], 0.5), ORIGIN[0][0]))
    trajectory = path(model, 2, [[both, {"pooled_output": ORIGIN[0][1]["pooled_output"].repeat(2, 1)}]])
    seen, spare = [], directinversion.spare
    monkeypatch.setattr(directinversion, "spare", lambda spared, *D: (seen.append(spared), spare(spared, *D))[1])
    adaptive = adaptiveguidance.apply(direct(model, trajectory), 0.99, ALWAYS)
    assert off(drawn(adaptive, trajectory, trajectory.conditioning), trajectory) < ROUNDING
    assert seen == [None, *[[True, False]] * 3]


@pytest.mark.parametrize("case, says", [
    ("heun", "the sampler heun does not take the step for which it is exact; use euler or ddim"),
    ("schedule", "the trajectory has another schedule: 4 steps from sigma 14.61 to 0, the sampler's is 3 steps"),
    ("size", "the trajectory is of a size other than the latent's"),
    ("batch", "the trajectory is of a batch other than the latent's"),
    ("offset", "offset 1.5 must be a finite number from 0 to 1"),
    ("model", "the trajectory is of another model: prediction"),
    ("prompt", "there is no source prompt: the trajectory was saved without one; wire source"),
    ("twice", "the model carries it twice at the same time"),
])
def test_what_cannot_be_exact_is_refused_before_sampling(case, says):
    model = toy.model()
    trajectory = path(model)
    other = toy.model(kind="v") if case == "model" else model
    bare = Trajectory(trajectory.sigmas, trajectory.latents, trajectory.model, [])
    options = {
        "heun": dict(sampler="heun"),
        "schedule": dict(sigmas=toy.sigmas(model, 3)),
        "size": dict(start=toy.noise(height=8, width=16), latent=toy.noise(height=8, width=16)),
        "batch": dict(start=toy.noise(batch=2, height=8, width=8), latent=toy.noise(batch=2, height=8, width=8)),
    }.get(case, {})
    with toy.count_forwards(other) as count, pytest.raises(ValueError, match=f"SteerDirectInversion: {says}"):
        steered = direct(other, bare if case == "prompt" else trajectory, 1.5 if case == "offset" else 1.0)
        drawn(direct(steered, trajectory) if case == "twice" else steered, trajectory, **options)
    assert count.calls == 0


def test_a_part_of_the_trajectory_is_enough():
    """Its last steps, from a latent that is there."""
    model = toy.model()
    trajectory = path(model, steps=6)
    tail = Trajectory(trajectory.sigmas[2:], trajectory.latents[2:], trajectory.model, ORIGIN)
    assert off(drawn(direct(model, trajectory), tail), trajectory) < ROUNDING


def test_another_source_prompt_is_the_source():
    model = toy.model()
    trajectory = path(model)
    out = drawn(direct(model, trajectory, source=toy.POSITIVE), trajectory, toy.POSITIVE)
    assert off(out, trajectory) < ROUNDING
    assert off(drawn(direct(model, trajectory), trajectory, toy.POSITIVE), trajectory) > 0.1


def test_hooks_of_the_source_prompt_are_refused():
    import comfy.hooks

    model = toy.model()
    hooked = [[ORIGIN[0][0], {**ORIGIN[0][1], "hooks": comfy.hooks.HookGroup()}]]
    with pytest.raises(ValueError, match="SteerDirectInversion: its conditioning carries hooks"):
        direct(model, path(model), source=hooked)


