import comfy.model_management as mm
import comfy.quant_ops
import pytest
import torch
import toy
from steer.patches.guidance import pag
from steer.patches.inversion import nulltext
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory, fingerprint

W = 4.0


def path(model, batch=1, steps=3, conditioning=toy.POSITIVE, size=8):
    """What the sampler passes at cfg 1, as an exact inversion finds it."""
    sigmas = torch.linspace(3.0, 0.0, steps + 1) if "CONST" not in fingerprint(model).prediction \
        else torch.linspace(0.8, 0.0, steps + 1)
    passed = []
    start = toy.noise(60, batch, size, size)
    toy.sample(model, 1.0, positive=conditioning, start=start, sigmas=sigmas,
               callback=lambda i, D, x, n: passed.append((x.clone(), D.clone())))
    x = [x for x, _ in passed] + [passed[-1][1]]
    return Trajectory(sigmas, torch.stack(x), fingerprint(model), conditioning)


def found(model, trajectory, negative=toy.NEGATIVE, w=W, iterations=4, lr=0.05, **options):
    return nulltext.optimise(model, trajectory, negative, w, iterations, lr, **options)


def test_it_is_the_papers_algorithm():
    """Written out on Gaussian data, D = m + std^2 / (std^2 + s^2) (x - m), where the text is only its mean."""
    model = toy.gaussian()
    trajectory = path(model)
    sigmas, z, n = trajectory.sigmas, trajectory.latents, 3

    def D(x, s, text):
        m = 4 * text.mean((1, 2)).tanh().view(-1, 1, 1, 1)
        return m + 0.25 / (0.25 + s**2) * (x - m)

    x, e, texts, losses = z[0], toy.NEGATIVE[0][0].clone(), [], []
    for i in range(n):
        s, s_next, positive = sigmas[i], sigmas[i + 1], toy.POSITIVE[0][0]

        def step(e, x=x, s=s, s_next=s_next, positive=positive):
            guided = D(x, s, e) + W * (D(x, s, positive) - D(x, s, e))
            return x + (s_next - s) * (x - guided) / s

        e = e.detach().clone().requires_grad_()
        adam = torch.optim.Adam([e], lr=0.05 * float(toy.NEGATIVE[0][0].std()) * (1 - i / (2 * n)))
        losses.append([])
        for _ in range(4):
            loss = (step(e) - z[i + 1]).square().mean() / z[i + 1].var()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[-1].append(loss.item())
            if loss < 1e-5 + 1e-3 * i / n:
                break
        x = step(e).detach()
        texts.append(e.detach())
    ours = found(model, trajectory)
    for mine, its in zip(ours.texts, texts, strict=True):
        assert torch.allclose(mine, its, atol=1e-4)
    for mine, its in zip(ours.losses, losses, strict=True):
        assert mine.flatten().tolist() == pytest.approx(its, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "flux"])
def test_the_loss_falls_in_every_step_and_the_sampler_follows_it(kind):
    """What euler draws under the CONDITIONING is where the search ended: each step has its own text."""
    model = toy.flux() if kind == "flux" else toy.model(kind=kind)
    trajectory, passed = path(model), []
    keep = lambda *step: passed.append(step)  # noqa: E731
    negative = nulltext.apply(model, trajectory, toy.NEGATIVE, W, 4, 0.05, callback=keep)
    again = found(model, trajectory)
    assert all(step[-1] < step[0] for step in again.losses)
    assert [torch.equal(part[0], text) for part, text in zip(negative, again.texts, strict=True)] == [True] * 3
    sigma = trajectory.sigmas[0]
    scale = float(model.get_model_object("model_sampling").noise_scaling(sigma, torch.ones(()), torch.zeros(())))
    start = trajectory.latents[0] / scale
    options = dict(cfg=W, start=start, sigmas=trajectory.sigmas)
    drawn = model.model.process_latent_in(toy.sample(model, negative=negative, **options))
    assert torch.allclose(drawn, passed[-1][2], atol=1e-3 * float(drawn.std()))
    plain = model.model.process_latent_in(toy.sample(model, **options))
    assert (drawn - trajectory.source).norm() < 0.97 * (plain - trajectory.source).norm()
    assert toy.sample(model, negative=negative, sampler="heun", **options).isfinite().all()


def test_items_of_a_batch_stop_by_themselves():
    model = toy.gaussian()
    both = path(model, 2)
    texts = found(model, both, iterations=8).texts
    assert torch.equal(texts[1], found(model, both, iterations=8).texts[1])
    for i in range(2):
        alone = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, both.conditioning)
        for together, single in zip(texts, found(model, alone, iterations=8).texts, strict=True):
            assert torch.allclose(together[i : i + 1], single, atol=2e-4)


def test_a_rate_of_0_leaves_the_negative():
    model = toy.gaussian()
    assert all(torch.equal(text, toy.NEGATIVE[0][0]) for text in found(model, path(model), lr=0.0).texts)


@pytest.mark.parametrize("dtype, cast", [
    (torch.float16, None), (torch.bfloat16, None), (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e5m2, torch.float32),
])
def test_half_precision_and_fp8_find_their_way(dtype, cast):
    """fp8 as the host loads it: weights are cast at each use. Found in inference mode, as the host runs nodes."""
    model = toy.model(dtype=dtype, cast=cast)
    assert {p.dtype for p in model.model.diffusion_model.parameters()} == {dtype}
    with torch.inference_mode():
        ours = found(model, path(model, steps=2), iterations=3)
    assert all(text.isfinite().all() and text.dtype == torch.float32 for text in ours.texts)
    assert all(step[-1] < step[0] for step in ours.losses)


def test_an_interrupt_leaves_nothing():
    model = toy.model()
    trajectory, before = path(model), toy.sample(model, steps=2)

    def interrupt(i, D, x, n):
        mm.interrupt_current_processing()

    try:
        with pytest.raises(mm.InterruptProcessingException):
            found(model, trajectory, callback=interrupt)
    finally:
        mm.interrupt_current_processing(False)
    assert torch.equal(toy.sample(model, steps=2), before) and not mm.in_training


WINDOWED = [[toy.NEGATIVE[0][0], {**toy.NEGATIVE[0][1], "start_percent": 0.2, "end_percent": 1.0}]]


@pytest.mark.parametrize("options, says", [
    (dict(w=1.0), "at cfg 1 the negative is not used"),
    (dict(w=float("nan")), "cfg nan must be a finite number"),
    (dict(iterations=0), "iterations 0 must be a finite number from 1"),
    (dict(lr=-0.1), "lr -0.1 must be a finite number from 0"),
    (dict(negative=[]), "the negative is empty; wire it"),
    (dict(negative=toy.NEGATIVE * 2), "the negative has several parts, an area or a timestep range"),
    (dict(negative=WINDOWED), "the negative has several parts, an area or a timestep range"),
    (dict(conditioning=[]), "the trajectory was saved without a prompt; wire source"),
    (dict(model=toy.model(kind="v")), "the trajectory is of another model"),
    (dict(model=pag.apply(toy.model(), 2.0, "middle", Schedule())), "searches along plain cfg, .* carries SteerPAG"),
])
def test_nonsense_is_refused_before_anything_runs(options, says):
    options = dict(options)
    model = toy.model()
    trajectory = path(model, steps=2)
    if "conditioning" in options:
        trajectory = Trajectory(trajectory.sigmas, trajectory.latents, trajectory.model, options.pop("conditioning"))
    model = options.pop("model", model)
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerNullText: {says}"):
        found(model, trajectory, **options)
    assert count.calls == 0


@pytest.mark.parametrize("kind", ["int8", "the host's scaled fp8"])
def test_quantised_weights_are_refused(kind):
    model = toy.model()
    trajectory, last = path(model, steps=2), model.model.diffusion_model.time_embed[0]
    weight = last.weight.data.to(torch.int8)
    if kind != "int8":
        weight = comfy.quant_ops.QuantizedTensor.from_float(last.weight.data, "TensorCoreFP8Layout")
    last.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="SteerNullText: needs gradients, and the weights of this model are quantised"):
        found(model, trajectory)
