from functools import cache

import comfy.samplers
import pytest
import torch
import toy
from steer.patches.hspace import pullback
from steer.patches.shared.hspace import block, probe
from steer.patches.shared.trajectory import Trajectory, fingerprint


def path(model, batch=1, size=(16, 16)):
    sigmas = toy.sigmas(model)
    clean = 0.3 * toy.noise(40, batch, *size)
    latents = torch.stack([clean + s * toy.noise(50, batch, *size) for s in sigmas])
    return Trajectory(sigmas, latents, fingerprint(model), toy.POSITIVE)


def features(model, x, sigma):
    with torch.inference_mode():
        ((h, _),) = probe(model, toy.POSITIVE, [(x, sigma)], block(model, "middle"))
    return h


@cache
def found(kind="eps", count=24):
    model = toy.model(kind=kind)
    trajectory = path(model)
    x, sigma = trajectory.latents[1], trajectory.sigmas[1]
    with torch.inference_mode():
        return model, x, sigma, pullback.local_basis(model, toy.POSITIVE, x, sigma, count)


def edit(model, trajectory, strength=0.3, component=1, percent=0.4, **options):
    options = {"iterations": 2, "count": 8, **options}
    with torch.inference_mode():
        return pullback.edit(model, toy.POSITIVE, trajectory, percent, component, strength, **options)


def go_on(model, latent, sigmas):
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    return toy.sample(model, 1.0, sampler, start=torch.zeros_like(latent), latent=latent, sigmas=sigmas)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 6, 9)])
def test_cosines_are_orthonormal_and_smoothest_first(shape):
    fields = pullback.cosines(shape, 30).flatten(1)
    assert torch.allclose(fields @ fields.T, torch.eye(30), atol=1e-5)
    assert all(len(set(field.tolist())) <= 2 for field in fields[: shape[0]])  # constant in one channel
    whole = pullback.cosines((2, 4, 4), 1000).flatten(1)
    assert whole.shape == (32, 32) and torch.allclose(whole @ whole.T, torch.eye(32), atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_basis_is_a_singular_value_decomposition_of_the_jacobian(kind):
    """V^T V = I, U^T U = I, s falls, and J v = s u, with J by a difference of another size, evaluated by itself."""
    model, x, sigma, basis = found(kind)
    v, u = basis.v.flatten(1), basis.u.flatten(1)
    assert torch.allclose(v @ v.T, torch.eye(len(v)), atol=1e-4)
    assert torch.allclose(u @ u.T, torch.eye(len(u)), atol=1e-3)
    assert bool((basis.s[1:] <= basis.s[:-1]).all()) and basis.s[-1] > 0
    unit = (1 + sigma**2).sqrt() if kind == "eps" else ((1 - sigma) ** 2 + sigma**2).sqrt()
    step = 0.05
    for i in range(4):
        both = x + torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * step * unit * basis.v[i]
        h = features(model, both, sigma)
        Jv = (h[0] - h[1]) / (2 * step)
        assert float((Jv - basis.s[i] * basis.u[i]).norm() / basis.s[i]) < 1e-2


def test_the_power_method_finds_the_first_directions_of_all(monkeypatch):
    """The oracle measures J along every direction there is, 256 of them; the method asks for 4 and has gradients, in
    the host's inference mode."""
    model = toy.model()
    trajectory = path(model, size=(8, 8))
    x, sigma, before = trajectory.latents[1], trajectory.sigmas[1], toy.sample(model)
    with torch.inference_mode():
        whole = pullback.local_basis(model, toy.POSITIVE, x, sigma, 256)
        power = pullback.exact_basis(model, toy.POSITIVE, x, sigma, 4)
        monkeypatch.setattr(pullback, "ROUNDS", 2)
        moved = edit(model, trajectory, iterations=1, method="power method")[0]
    assert torch.allclose(power.s[:2], whole.s[:2], rtol=1e-2)
    v = power.v.flatten(1)
    assert torch.allclose(v @ v.T, torch.eye(4), atol=1e-4)
    inside = (v[:1] @ whole.v[:4].flatten(1).T).norm()  # singular values that lie close mix their vectors
    assert float(inside) > 0.95
    assert bool(moved.isfinite().all()) and not torch.equal(moved, edit(model, trajectory, iterations=1)[0])
    assert torch.equal(toy.sample(model), before)


def test_the_first_direction_moves_the_features_more_than_random_ones():
    """A random network has no direction of its own; on the trained one it is several times more, see test_lab.py."""
    model, x, sigma, basis = found()
    random = toy.noise(9, 4)
    random = random / random.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    h = features(model, torch.cat((x, x + 0.3 * sigma * basis.v[:1], x + 0.3 * sigma * random)), sigma)
    moved = (h[1:] - h[:1]).flatten(1).norm(dim=1)
    assert moved[0] > 1.1 * moved[1:].max()


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_walk_is_the_papers(kind):
    """In the paper's variables: x_t of unit variance on eps models, eps(x_t + step v) - eps(x_t) at each step."""
    model = toy.model(kind=kind)
    trajectory = path(model)
    x, sigma = trajectory.latents[2], trajectory.sigmas[2]
    v = pullback.cosines((4, 16, 16), 1)
    with torch.inference_mode():
        out = pullback.walk(model, toy.POSITIVE, x, sigma, v, 0.25, 2)
        s = float(sigma)
        a, unit = (1.0, (1 + s**2) ** 0.5) if kind == "eps" else (1 - s, ((1 - s) ** 2 + s**2) ** 0.5)
        x_t, step = x / unit, 0.25 * 32 / 2

        def eps(z):
            ((_, D),) = probe(model, toy.POSITIVE, [(z * unit, sigma)], block(model, "middle"))
            return (z * unit - a * D) / s

        for _ in range(2):
            x_t = x_t + eps(x_t + step * v) - eps(x_t)
    assert torch.allclose(out, x_t * unit, rtol=1e-3, atol=1e-4 * float(out.abs().max()))


def test_strength_0_returns_the_trajectory_and_goes_on_from_it():
    model = toy.model()
    trajectory = path(model)
    with toy.count_forwards(model) as count:
        latent, sigmas = edit(model, trajectory, 0.0)
    assert count.calls == 0 and torch.equal(sigmas, trajectory.sigmas[-len(sigmas):]) and 2 <= len(sigmas) < 5
    assert torch.allclose(model.model.process_latent_in(latent), trajectory.latents[-len(sigmas)], atol=1e-5)
    moved, same = edit(model, trajectory)
    assert torch.equal(sigmas, same) and not torch.allclose(moved, latent, atol=1e-2)
    assert not torch.allclose(go_on(model, moved, sigmas), go_on(model, latent, sigmas), atol=1e-2)


def test_batch_is_two_runs_and_nothing_else_changes():
    model = toy.model()
    before, both = toy.sample(model), path(model, 2)
    out, _ = edit(model, both)
    second = Trajectory(both.sigmas, both.latents[:, 1:], both.model, toy.POSITIVE)
    assert torch.allclose(edit(model, second)[0], out[1:], rtol=1e-3, atol=1e-3)
    assert torch.equal(edit(model, both)[0], out)
    assert torch.equal(toy.sample(model), before)


def test_odd_sizes_and_half_precision_are_finite():
    model = toy.model(dtype=torch.bfloat16)
    assert bool(edit(model, path(model, size=(10, 14)))[0].isfinite().all())


def test_bad_input():
    model = toy.model()
    for options, words in (
        (dict(component=9), "component 9 must lie between 1 and the number of directions, 8"),
        (dict(percent=1.5), "percent 1.5 must be a finite number from 0 to 1"),
        (dict(strength=float("nan")), "strength nan"),
        (dict(iterations=0), "iterations 0"),
        (dict(layer="single"), 'no layer "single"'),
    ):
        with pytest.raises(ValueError, match=f"SteerPullback: {words}"):
            edit(model, path(model), **options)
    with pytest.raises(ValueError, match="SteerPullback: the trajectory is of another model"):
        edit(model, path(toy.model(kind="v")))
    flow = toy.model(kind="flow")
    with pytest.raises(ValueError, match="SteerPullback: at percent 0.0 there is noise alone"):
        edit(flow, path(flow), percent=0.0)
    with pytest.raises(ValueError, match="SteerPullback: works in the h-space of a UNet"):
        edit(toy.flux(), path(toy.flux()))
