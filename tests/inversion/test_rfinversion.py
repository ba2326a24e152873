import comfy.model_base
import comfy.samplers
import pytest
import torch
import toy
from steer.patches.inversion import invert, rfinversion
from steer.patches.shared.schedule import Schedule

SOURCE, ALWAYS = toy.text(5), Schedule()
STEPS = 6


BOTH = pytest.mark.parametrize("model", ["flux", "flow"], indirect=True)


@pytest.fixture(scope="module")
def model(request):
    return toy.flux() if getattr(request, "param", "flux") == "flux" else toy.model(kind="flow")


def inverted(model, gamma=0.5, latent=None, noise=None, positive=SOURCE, sigmas=None, **options):
    latent = toy.noise(30) if latent is None else latent
    noise = toy.noise(60, len(latent), *latent.shape[2:]) if noise is None else noise
    sigmas = toy.sigmas(model, STEPS) if sigmas is None else sigmas
    with torch.inference_mode():
        return rfinversion.invert(model, positive, latent, sigmas, noise, gamma, **options)


def redraw(model, trajectory, latent=None, start=None, **options):
    latent = toy.noise(30) if latent is None else latent
    if start is None:
        start = invert.InvertedNoise(trajectory, model).generate_noise({"samples": latent})
    return toy.sample(model, start=start, latent=latent, **{"sigmas": trajectory.sigmas, **options})


def paper(model, y0, y1, gamma):
    """Algorithm 1 of the paper, in its time t = s and its velocities."""
    path = []

    def sample(predict, x, sigmas, extra_args=None, callback=None, disable=None):
        Y = predict.latent_image
        path.append(Y)
        up = sigmas.flip(0)
        for t, t_next in zip(up[:-1], up[1:], strict=True):
            where = t if t > 0 else t_next
            u = (Y - predict(Y, where * Y.new_ones(len(Y)), **extra_args)) / where
            u_cond = (y1 - Y) / (1 - t)
            Y = Y + (u + gamma * (u_cond - u)) * (t_next - t)
            path.append(Y)
        return x

    toy.sample(model, 1.0, comfy.samplers.KSAMPLER(sample), STEPS, SOURCE, start=torch.zeros_like(y0), latent=y0)
    return torch.stack(path[::-1])


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.std()) < tolerance


@BOTH
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_up_is_the_papers_algorithm(model, gamma):
    latent, noise = toy.noise(30), toy.noise(60)
    found = inverted(model, gamma, latent, noise)
    assert near(found.latents, paper(model, latent, noise, gamma)) and found.latents.isfinite().all()
    if gamma == 0.0:
        with torch.inference_mode():
            plain = invert.invert(model, SOURCE, latent, toy.sigmas(model, STEPS), "ddim / euler")
        assert near(found.latents, plain.latents, 1e-5)
    if gamma == 1.0:
        clean, s = model.model.process_latent_in(latent), found.sigmas.view(-1, 1, 1, 1, 1)
        assert near(found.latents, (1 - s) * clean + s * noise, 1e-5)


@BOTH
@pytest.mark.parametrize("eta", [0.3, 0.9])
def test_down_is_the_papers_field(model, eta):
    """v + eta ((X - y0) / s - v) in the first half of the range, v in the second."""
    found = inverted(model)
    y0 = found.source

    def sample(predict, x, sigmas, extra_args=None, callback=None, disable=None):
        half = model.get_model_object("model_sampling").percent_to_sigma(0.5)
        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = (x - predict(x, s * x.new_ones(len(x)), **extra_args)) / s
            if s > half:
                v = v + eta * ((x - y0) / s - v)
            x = x + (s_next - s) * v
        return x

    steered = rfinversion.apply(model, found, eta, Schedule(0.0, 0.5))
    assert near(redraw(steered, found), redraw(model, found, sampler=comfy.samplers.KSAMPLER(sample)))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_eta_one_returns_the_picture_from_any_noise(model, sampler, cfg):
    found = inverted(model)
    steered = rfinversion.apply(model, found, 1.0, ALWAYS)
    out = redraw(steered, found, start=toy.noise(99), cfg=cfg, sampler=sampler)
    assert float((out - toy.noise(30)).abs().max()) <= 2e-5


@pytest.mark.parametrize("eta, window", [(0.0, ALWAYS), (0.9, Schedule(0.5, 0.5)), (0.9, Schedule(curve=(0.0, 0.0)))])
def test_off_is_off(model, eta, window):
    found = inverted(model)
    steered = rfinversion.apply(model, found, eta, window)
    with toy.count_forwards(model) as count:
        out = redraw(steered, found)
    assert count.calls == STEPS
    assert torch.equal(out, redraw(model, found))


def test_no_forward_is_added(model):
    found = inverted(model)
    with toy.count_forwards(model) as count:
        redraw(rfinversion.apply(model, found, 0.9, ALWAYS), found)
    assert (count.calls, count.rows) == (STEPS, 2 * STEPS)


def test_a_batch_is_its_items(model):
    latent = toy.noise(30, 2, 17, 14)
    both = inverted(model, latent=latent)
    out = redraw(rfinversion.apply(model, both, 0.6, ALWAYS), both, latent)
    for i in range(2):
        one = inverted(model, latent=latent[i : i + 1], noise=toy.noise(60, 2, 17, 14)[i : i + 1])
        assert near(both.latents[:, i : i + 1], one.latents)
        assert near(out[i : i + 1], redraw(rfinversion.apply(model, one, 0.6, ALWAYS), one, latent[i : i + 1]))


def test_the_noise_is_where_gamma_leads(model):
    """With the fields mixed half and half, starts of two seeds differ; without, they do not."""
    a, b = (inverted(model, 0.5, noise=toy.noise(seed)) for seed in (1, 2))
    assert not near(a.latents[0], b.latents[0], 0.1)
    assert torch.equal(a.latents[0], inverted(model, 0.5, noise=toy.noise(1)).latents[0])
    assert torch.equal(*(inverted(model, 0.0, noise=toy.noise(seed)).latents for seed in (1, 2)))


def test_models_are_as_before_also_after_an_error(model):
    before = toy.sample(model)

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        inverted(model, callback=stop)
    found = inverted(model)
    steered = rfinversion.apply(model, found, 0.9, ALWAYS)
    redraw(steered, found)
    assert torch.equal(toy.sample(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = toy.model(toy.FLUX, "flow", dtype, base=comfy.model_base.Flux)
    found = inverted(model, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert redraw(rfinversion.apply(model, found, 0.5, ALWAYS), found).isfinite().all()


@pytest.mark.parametrize("options, says", [
    (dict(gamma=1.5), "gamma 1.5 must be a finite number from 0 to 1"),
    (dict(latent=torch.zeros(1, 4, 16, 16)), "the latent is empty"),
    (dict(noise=torch.zeros(1, 4, 16, 16)), "the noise is empty"),
    (dict(sigmas=torch.tensor([1.0, 0.5, 0.1])), "the sigmas end at 0.1"),
    (dict(sigmas=torch.tensor([0.0])), "there are 0 steps"),
    (dict(positive=[]), "needs a positive conditioning"),
])
def test_bad_input_is_refused_before_sampling(model, options, says):
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerRFInversion: {says}"):
        inverted(model, **options)
    assert count.calls == 0


def test_it_is_for_flow_models(model):
    eps = toy.model()
    with pytest.raises(ValueError, match="SteerRFInversion: is for flow models .* this model is .*EPS. Use"):
        inverted(eps)
    with pytest.raises(ValueError, match="SteerRFController: is for flow models"):
        rfinversion.apply(eps, inverted(model), 0.9, ALWAYS)


def test_a_foreign_trajectory_is_refused(model):
    found = inverted(model)
    other = toy.model(kind="flow")
    with pytest.raises(ValueError, match="SteerRFController: the trajectory is of another model: network"):
        rfinversion.apply(other, found, 0.9, ALWAYS)
    with pytest.raises(ValueError, match="SteerRFController: eta 2.0 must be"):
        rfinversion.apply(model, found, 2.0, ALWAYS)
    steered = rfinversion.apply(model, found, 0.9, ALWAYS)
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match="SteerRFController: the trajectory is of a size other than"):
            toy.sample(steered, start=toy.noise(height=24))
        with pytest.raises(ValueError, match="SteerRFController: the model carries it twice"):
            redraw(rfinversion.apply(steered, found, 0.5, ALWAYS), found)
    assert count.calls == 0
