import comfy.model_base
import comfy.samplers
import pytest
import torch
import toy
from comfy.k_diffusion.sampling import default_noise_sampler
from steer.models.lab.portrait import FACTORS
from steer.patches.inversion import editfriendly
from steer.patches.shared.steering import SHARE

SOURCE = toy.text(5)
STEPS = 6


def made(kind):
    return toy.flux() if kind == "flux" else toy.model(kind=kind)


def found(model, latent=None, cfg=3.5, eta=1.0, seed=3, positive=SOURCE, sigmas=None, **options):
    latent = toy.noise(30) if latent is None else latent
    sigmas = toy.sigmas(model, STEPS) if sigmas is None else sigmas
    with torch.inference_mode():
        return editfriendly.invert(model, positive, toy.NEGATIVE, latent, sigmas, seed, cfg, eta, **options)


def redraw(model, sampler, latent=None, cfg=3.5, positive=SOURCE, **options):
    latent = toy.noise(30) if latent is None else latent
    given = dict(sampler=sampler, latent=latent, start=torch.zeros_like(latent), sigmas=sampler.trajectory.sigmas)
    return toy.sample(model, cfg, positive=positive, **{**given, **options})


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.std()) < tolerance


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "flux"])
@pytest.mark.parametrize("cfg, eta", [(1.0, 1.0), (3.5, 1.0), (9.0, 0.4), (3.5, 0.0)])
def test_the_same_prompt_and_cfg_return_the_picture(kind, cfg, eta):
    model, latent = made(kind), toy.noise(30)
    out = redraw(model, found(model, latent, cfg, eta), latent, cfg)
    assert float((out - latent).abs().max()) < 1e-5


def test_the_last_steps_alone_return_it_too():
    model = toy.model()
    sampler = found(model)
    out = redraw(model, sampler, sigmas=sampler.trajectory.sigmas[2:])
    assert float((out - toy.noise(30)).abs().max()) < 1e-5


def test_is_the_papers_construction():
    """Equation 3 and algorithm 1 in the paper's variables, xt = sqrt(abar) x0 + sqrt(1 - abar) n: the next latent of
    the edit is mu_t(xt) + sigma_t z_t, with z_t from the picture's own latents."""
    model, latent = toy.model(), toy.noise(30)
    sampler = found(model, latent, cfg=3.5)
    expected = []

    def sample(predict, x, sigmas, extra_args=None, callback=None, disable=None):
        guide, x0 = predict.inner_model, predict.latent_image
        draw = default_noise_sampler(x0, seed=3)
        abar = 1 / (1 + sigmas**2)
        levels = [abar[i].sqrt() * x0 + (1 - abar[i]).sqrt() * draw(0, 0) for i in range(len(sigmas) - 1)] + [x0]

        def mu(xt, i, conds, cfg):
            x = xt / abar[i].sqrt()
            conds = guide.conds["negative"], guide.conds[conds]
            P = comfy.samplers.sampling_function(
                guide.inner_model, x, sigmas[i][None], *conds, cfg, extra_args["model_options"]
            )
            eps = (xt - abar[i].sqrt() * P) / (1 - abar[i]).sqrt()
            var = (1 - abar[i + 1]) / (1 - abar[i]) * (1 - abar[i] / abar[i + 1])
            return abar[i + 1].sqrt() * P + (1 - abar[i + 1] - var).clamp(min=0).sqrt() * eps, var.sqrt()

        x = levels[0]
        for i in range(len(sigmas) - 1):
            mean, sd = mu(levels[i], i, "source", 3.5)
            z = (levels[i + 1] - mean) / sd if sd > 0 else None
            mean_edit, sd = mu(x, i, "positive", 7.0)
            x = mean_edit + (sd * z if z is not None else levels[i + 1] - mean)
        expected.append(model.model.process_latent_out(x))
        return x

    guide = comfy.samplers.CFGGuider(model)
    guide.inner_set_conds({"positive": toy.POSITIVE, "negative": toy.NEGATIVE, "source": SOURCE})
    kept = dict(start=torch.zeros_like(latent), latent=latent, sigmas=sampler.trajectory.sigmas)
    toy.sample(model, guider=guide, sampler=comfy.samplers.KSAMPLER(sample), **kept)
    assert near(redraw(model, sampler, latent, 7.0, toy.POSITIVE), expected[0])


def test_levels_have_independent_noise():
    """So an edit cannot slide along one noise: neighbours correlate as the picture alone makes them."""
    model, latent = toy.model(), toy.noise(30, 1, 48, 48)
    sampler = found(model, latent, sigmas=torch.tensor([14.0, 10.0, 6.0, 0.0]))
    clean = sampler.trajectory.source
    noise = [(x - clean) / s for x, s in zip(sampler.trajectory.latents, (14.0, 10.0, 6.0), strict=False)]
    assert all(abs(float(n.std()) - 1) < 0.03 for n in noise)
    assert all(abs(float((a * b).mean())) < 0.03 for a, b in zip(noise, noise[1:], strict=False))


def test_an_evaluation_per_step_and_the_noise_given_does_not_matter():
    model = toy.model()
    with toy.count_forwards(model) as count:
        sampler = found(model)
        assert (count.calls, count.rows) == (STEPS, 2 * STEPS)
        out = redraw(model, sampler, positive=toy.POSITIVE)
    assert (count.calls, count.rows) == (2 * STEPS, 4 * STEPS)
    assert torch.equal(out, redraw(model, sampler, positive=toy.POSITIVE, start=toy.noise(8), seed=8))


def test_the_seed_decides():
    model = toy.model()
    a, b, other = found(model), found(model), found(model, seed=4)
    assert torch.equal(a.maps, b.maps) and not near(other.maps, a.maps, 0.1)
    edits = [redraw(model, each, positive=toy.POSITIVE) for each in (a, other)]
    assert not near(*edits, 1e-2)


def test_a_batch_is_its_items():
    """Each item is edited from its own maps."""
    model, latent = toy.model(), toy.noise(30, 2, 17, 14)
    model.model_options[SHARE] = False
    both = found(model, latent)
    out = redraw(model, both, latent, 6.0, toy.POSITIVE)
    for i in range(2):
        trajectory, maps = both.trajectory, both.maps[:, i : i + 1]
        path = type(trajectory)(trajectory.sigmas, trajectory.latents[:, i : i + 1], trajectory.model, SOURCE)
        one = editfriendly.EditFriendly(path, maps, 1.0)
        assert near(out[i : i + 1], redraw(model, one, latent[i : i + 1], 6.0, toy.POSITIVE))


def test_outside_a_mask_the_picture_stays():
    model, latent = toy.model(), toy.noise(30)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    out = redraw(model, found(model, latent), latent, 9.0, toy.POSITIVE, denoise_mask=mask)
    assert near(out[..., 8:], latent[..., 8:], 1e-5) and not near(out[..., :8], latent[..., :8], 0.1)


def test_models_are_as_before_also_after_an_error():
    model = toy.model()
    before = toy.sample(model)

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        found(model, callback=stop)
    sampler = found(model)
    with pytest.raises(InterruptedError):
        redraw(model, sampler, callback=stop)
    assert torch.equal(toy.sample(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_returns_the_picture(dtype):
    model = toy.model(toy.FLUX, "flow", dtype, base=comfy.model_base.Flux)
    out = redraw(model, found(model, sigmas=torch.tensor([1.0, 0.5, 0.0])))
    assert float((out - toy.noise(30)).abs().max()) < 1e-5


@pytest.mark.parametrize("options, says", [
    (dict(eta=1.5), "eta 1.5 must be a finite number from 0 to 1"),
    (dict(cfg=float("inf")), "cfg inf must be a finite number"),
    (dict(latent=torch.zeros(1, 4, 16, 16)), "the latent is empty"),
    (dict(sigmas=torch.tensor([9.0, 2.0, 0.5])), "the sigmas end at 0.5"),
    (dict(sigmas=torch.tensor([9.0, 9.0, 0.0])), "the sigmas must fall"),
    (dict(positive=[]), "needs a positive prompt"),
])
def test_bad_input_is_refused_before_sampling(options, says):
    model = toy.model()
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerEditFriendly: {says}"):
        found(model, **options)
    assert count.calls == 0


@pytest.mark.parametrize("options, says", [
    (dict(latent=toy.noise(30, 1, 24, 16)), "the trajectory is of a size other than"),
    (dict(latent=toy.noise(30, 2)), "the trajectory is of a batch other than"),
    (dict(sigmas=torch.linspace(8.0, 0.0, 5)), "the trajectory has another schedule"),
])
def test_maps_of_another_run_are_refused(options, says):
    model = toy.model()
    sampler = found(model)
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerEditFriendly: {says}"):
        redraw(model, sampler, **options)
    assert count.calls == 0
    with pytest.raises(ValueError, match="SteerEditFriendly: the trajectory is of another model"):
        redraw(toy.model(kind="v"), sampler)


def test_as_a_user_wires_it(run_prompt):
    """Through the executor: the prompt and cfg of the source return the latent, whatever noise the sampler is given."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    result = run_prompt({
        "1": node("SteerLabModel", model="unet"),
        "2": node("SteerLabPortrait", seed=5, **dict.fromkeys(FACTORS, "from seed")),
        "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "4": node("CLIPTextEncode", clip=["1", 1], text=["2", 1]),
        "5": node("CLIPTextEncode", clip=["1", 1], text=""),
        "6": node("RandomNoise", noise_seed=3),
        "7": node("SteerEditFriendly", model=["1", 0], positive=["4", 0], negative=["5", 0], latent=["3", 0],
                  noise=["6", 0], cfg=3.5, steps=8, scheduler="normal", skip=0.3, eta=1.0),
        "8": node("CFGGuider", model=["1", 0], positive=["4", 0], negative=["5", 0], cfg=3.5),
        "9": node("SamplerCustomAdvanced", noise=["6", 0], guider=["8", 0], sampler=["7", 0], sigmas=["7", 1],
                  latent_image=["3", 0]),
        "10": node("VAEDecode", samples=["9", 0], vae=["1", 2]),
        "11": node("PreviewImage", images=["10", 0]),
    })
    latent = result["3"][0]["samples"]
    assert float((result["9"][0]["samples"] - latent).abs().max()) < 1e-5
    assert len(result["7"][1]) == 8 - 2 + 1
