"""A few axes of the guide: against the formulas written out, the limit in Plug-and-Play, and the layout on the lab."""

import comfy.samplers
import pytest
import torch
import toy
from attention.by_hand import attention, drawn, near, network, one_step, path, text
from comfy.patcher_extension import WrappersMP
from steer.patches.attention import freecontrol, masactrl, plugandplay
from steer.patches.guidance import apg, pag
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)
ALL = {"unet": "input, middle, output"}
METHODS = freecontrol.METHODS


def steered(model, trajectory, strength=1.0, components=5, layers="auto", method="subspace", schedule=ALWAYS, **more):
    return freecontrol.apply(model, trajectory, strength, components, layers, method, schedule, **more)


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


def projector(*features, count):
    """V V^T [b, C, C] and the mean of the leading principal axes of several [b, n, C] together."""
    both = torch.cat(features, 1)
    mean = both.mean(1, keepdim=True)
    V = torch.linalg.eigh((both - mean).mT @ (both - mean))[1][..., -count:]
    return V @ V.mT, mean, V


def test_axes_hold_nearly_all_that_as_many_can_hold():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 300, 48, generator=generator) * torch.linspace(3, 0.2, 48)
    x = x - x.mean(1, keepdim=True)
    for count in (1, 4, 16):
        V = freecontrol.axes(x, count)
        assert torch.allclose(V.mT @ V, torch.eye(count).expand(2, -1, -1), atol=1e-5)
        best = torch.linalg.eigvalsh(x.mT @ x)[:, -count:].sum(1)
        assert ((x @ V).square().sum((1, 2)) / best > 0.9).all()


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "lumina", "wan"])
def test_coordinates_in_the_axes_are_the_guides(name, strength, monkeypatch):
    """q + s V V^T (q_s - q), and the same of k, in both halves of cfg; the values are the picture's own."""
    monkeypatch.setattr(freecontrol, "ROUNDS", 300)  # to the end
    model = network(name)
    trajectory = path(name, model)

    def injected(target, source, image, heads):
        changed = []
        for t, s in zip(target[:2], source[:2], strict=True):
            s, own = s[:, image], t[:, image]
            P, *_ = projector(s.expand(len(t), -1, -1), own, count=3)
            other = t.clone()
            other[:, image] = own + strength * (s - own) @ P
            changed.append(other)
        return attention(*changed, target[2], heads)

    out = toy.sample(steered(model, trajectory, strength, 3), **one_step(name, trajectory))
    assert near(out, drawn(name, model, trajectory, injected), 2e-4)
    assert not near(out, toy.sample(model, **one_step(name, trajectory)), 2e-3)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3", "wan"])
def test_with_all_axes_it_is_plug_and_play(name):
    model = network(name)
    trajectory, layers = path(name, model), ALL.get(name, "auto")
    both = plugandplay.apply(model, trajectory, layers, ALWAYS, "auto", ALWAYS)
    out = toy.sample(steered(model, trajectory, 1.0, 9999, layers), **one_step(name, trajectory))
    assert torch.equal(out, toy.sample(both, **one_step(name, trajectory)))
    few = toy.sample(steered(model, trajectory, 1.0, 2, layers), **one_step(name, trajectory))
    assert not near(few, out, 1e-2)


def test_features_of_the_resblock_too(monkeypatch):
    monkeypatch.setattr(freecontrol, "ROUNDS", 300)
    term = freecontrol.Subspace(strength=0.5, components=3)
    h, source = toy.noise(1, 2, 6, 5, 16), toy.noise(9, 2, 6, 5, 16)
    mine, its = (t.flatten(2).mT for t in (h, source))
    P, *_ = projector(its, mine, count=3)
    expected = (mine + 0.25 * (its - mine) @ P).mT.reshape(h.shape)
    assert near(term.put(h, source, None, 0.5), expected, 1e-3)


def keys(name, model, x, sigma, conditioning, layers):
    """Keys of the image in the self or joint attentions `layers` (by number) at x, [b, n, C] each."""
    kept, number = [], 0

    def hook(function, q, k, v, heads, *args, **kwargs):
        nonlocal number
        rows = (k.transpose(1, 2) if kwargs.get("skip_reshape") else k).flatten(2)
        if q.shape == k.shape:
            if number in layers:
                kept.append(rows[:, -64:] if name == "flux" else rows)
            number += 1
        return function(q, k, v, heads, *args, **kwargs)

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = hook
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    toy.sample(hooked, 1.0, sampler, positive=conditioning, start=x / sigma, sigmas=torch.stack((sigma, sigma * 0)))
    return [k.double() for k in kept]


def energy(now, guide, at, count):
    """Equation 4 of one picture's keys [1, n, C], with axes and ranges as they are where the keys are `at`."""
    _, mean, V = projector(guide, at, count=count)
    turned = ((guide - guide.mean(1, keepdim=True)) @ V).pow(3).sum(1, keepdim=True).sign()
    s, s_g, here = ((k - mean) @ (V * turned) for k in (now, guide, at))

    def scaled(s, by):
        return (s - by.amin(1, keepdim=True)) / (by.amax(1, keepdim=True) - by.amin(1, keepdim=True))

    s, s_g = scaled(s, here), scaled(s_g, s_g)
    m = s_g > freecontrol.THRESHOLD
    g = (s - s_g)[m].square().mean()
    highest = s_g.masked_fill(m, 0).amax(1, keepdim=True)
    return float(g + freecontrol.PENALTY * ((s - highest).relu() * ~m).square().mean())


@pytest.mark.parametrize("name, layers, numbers", [("unet", "output.3", (6,)), ("flux", "double.1, single.0", (1, 2))])
def test_the_gradient_leads_down_the_energy(name, layers, numbers, monkeypatch):
    """Its slope along random directions is that of the energy written out, by central differences."""
    monkeypatch.setattr(freecontrol, "ROUNDS", 300)
    model, count = network(name), 4
    trajectory = path(name, model)
    given = one_step(name, trajectory)
    x, sigma = trajectory.latents[0] * 0.5 + 0.5 * sigma_noise(trajectory), trajectory.sigmas[0]
    given["start"] = x / sigma
    with torch.inference_mode():
        ours = steered(model, trajectory, 1.0, count, layers, "gradient")
    push = model.model.process_latent_in(toy.sample(ours, **given) - toy.sample(model, **given))
    guide = keys(name, model, trajectory.latents[0], sigma, trajectory.conditioning, numbers)
    here = keys(name, model, x, sigma, given["positive"], numbers)

    def at(x):
        now = keys(name, model, x, sigma, given["positive"], numbers)
        return sum(energy(*each, count) for each in zip(now, guide, here, strict=True))

    root = (at(x) / len(numbers)) ** 0.5
    assert near(push.square().mean().sqrt(), freecontrol.LENGTH * root * sigma, 1e-2)
    unit = push / push.norm()
    slopes = []
    for seed in range(4):  # along it, and across it to a random side
        aside = toy.noise(60 + seed)
        way = unit + aside / aside.norm() * (seed > 0)
        step = 0.02 * x.norm() * way
        slopes.append((at(x + step) - at(x - step)) / (2 * 0.02 * float(x.norm())) / float((way * unit).sum()))
    assert max(slopes) < 0
    assert max(slopes) - min(slopes) < 0.1 * abs(slopes[0])


def sigma_noise(trajectory):
    return trajectory.sigmas[0] * toy.noise(77)


def test_appearance_is_a_weighted_mean_of_features():
    """Equation 5, and its place in the energy: the sibling itself has none of it."""
    k, guide, sibling = (toy.noise(n, 1, 7, 5, 12).flatten(2).mT for n in (1, 2, 3))
    s = torch.rand(1, 35, 2, generator=torch.Generator().manual_seed(0))
    w = torch.where(s > freecontrol.ACTIVE, s, 0)
    expected = torch.stack([(w[0, :, i, None] * k[0]).sum(0) / w[0, :, i].sum() for i in range(2)])
    assert near(freecontrol.looks(k, s)[0], expected, 1e-4)
    without = freecontrol.energy(k, guide, count=4)
    assert torch.allclose(freecontrol.energy(k, guide, k, 4), without)
    assert (freecontrol.energy(k, guide, sibling, 4) > without).all()


def test_appearance_changes_the_push(name):
    model = network(name)
    options = dict(method="gradient", schedule=Schedule(0.0, 0.6))
    plain = toy.sample(steered(model, path(name, model), **options))
    guide = path(name, model)
    sibling = Trajectory(guide.sigmas, guide.latents.flip(-1), guide.model, text(name, 1))
    out = toy.sample(steered(model, guide, appearance=sibling, **options))
    assert out.isfinite().all() and not torch.equal(out, plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_is_the_guide_stays(name, method):
    model = network(name)
    trajectory = path(name, model)
    options = one_step(name, trajectory, positive=5)
    out = toy.sample(steered(model, trajectory, method=method), **options)
    assert near(out, toy.sample(model, **options), 1e-4 if method == "subspace" else 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_off_is_no_node(name, method):
    model = network(name)
    for off in (dict(strength=0.0), dict(schedule=NEVER)):
        ours = steered(model, path(name, model), method=method, **off)
        assert not ours.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
        with toy.count_forwards(model) as count:
            assert torch.equal(toy.sample(ours), toy.sample(model))
        assert (count.calls, count.rows) == (8, 16)


def test_what_each_method_costs(name):
    """A row of the guide beside each row; the gradient takes one row more, in a forward of its own."""
    model, rows = network(name), []
    for method in METHODS:
        with toy.count_forwards(model) as count:
            toy.sample(steered(model, path(name, model), method=method, schedule=Schedule(0.0, 0.6)))
        rows.append((count.calls, count.rows))
    (calls, least), (more, most) = rows
    active = more - calls
    assert calls == 4 and 1 <= active <= 3 and most - least == active and least == 8 + 2 * active


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_runs(name, method):
    model = network(name)
    both, start = path(name, model, 2), toy.noise(batch=2)
    out = toy.sample(steered(model, both, method=method), start=start)
    for i in range(2):
        one = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, both.conditioning)
        alone = toy.sample(steered(model, one, method=method), start=start[i : i + 1])
        assert near(out[i : i + 1], alone, 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_with_guidance_and_other_edits(name, method):
    model = network(name)
    trajectory = path(name, model)
    first, second = ("output.1", "output.3") if name == "unet" else ("double.1", "single.1")
    base = steered(model, trajectory, layers=first, method=method)
    alone = toy.sample(base)
    together = masactrl.apply(base, trajectory, 1.0, second, ALWAYS)
    together = apg.apply(pag.apply(together, 2.0, second, ALWAYS), 0.0, 15.0, -0.5, ALWAYS)
    out = toy.sample(together)
    assert out.isfinite().all() and not near(out, alone, 1e-3)
    same = plugandplay.apply(base, trajectory, first, ALWAYS, "auto", NEVER)
    if method == "subspace":
        with pytest.raises(ValueError, match="both replace the keys and queries of the attention in"):
            toy.sample(same)
    else:
        assert toy.sample(same).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_changes_not_even_after_an_error(name, method):
    with torch.inference_mode():
        model = network(name)  # as the host's loaders make it
    before, ours = toy.sample(model), steered(model, path(name, model), method=method)
    first = toy.sample(ours)

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, callback=stop)
    assert torch.equal(toy.sample(ours), first) and torch.equal(toy.sample(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_near(method):
    models = toy.model(dtype=torch.float16), toy.model()
    assert near(*(toy.sample(steered(m, path("unet", m), method=method), steps=2) for m in models), 0.03)


def test_bad_input_raises_before_sampling(name):
    model = network(name)
    trajectory = path(name, model)
    (tokens, more), = text(name, 1)
    low = Trajectory(trajectory.sigmas[2:], trajectory.latents[2:], trajectory.model, text(name, 5))
    controlled = [[tokens, {**more, "control": toy.controlnet(torch.zeros(1, 3, 128, 128))}]]
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(strength=1.5), "strength 1.5 must be a finite number from 0 to 1"),
            (dict(strength=-1.0, method="gradient"), "strength -1.0 must be a finite number from 0"),
            (dict(components=0), "components 0 must be a finite number from 1"),
            (dict(layers="double.77"), 'no layer "double.77"; this model has'),
            (dict(appearance=trajectory), 'appearance is kept by the method "gradient" alone'),
            (dict(trajectory=path(name, model, 3)), "of a batch other than the latent's"),
            (dict(method="gradient", appearance=path(name, model, 3)), "of a batch other than the latent's"),
            (dict(trajectory=low), "the sampler starts at sigma .* invert it with"),
            (dict(trajectory=path(name, model, conditioning=[])), "there is no source prompt"),
            (dict(trajectory=path("unet", toy.model(kind="v"))), "another model"),
        ):
            with pytest.raises(ValueError, match=f"SteerFreeControl: .*{words}"):
                toy.sample(steered(model, **{"trajectory": trajectory, **options}))
        with pytest.raises(ValueError, match="SteerFreeControl: .*ControlNet"):
            toy.sample(steered(model, trajectory, method="gradient"), positive=controlled)
    assert count.calls == 0


@pytest.mark.parametrize("which, method", [("unet", "subspace"), ("unet", "gradient"), ("dit", "subspace")])
def test_on_the_lab_the_layout_is_the_guides_and_colours_the_prompts(which, method):
    """Eight portraits from noise of their own, under a prompt with three other colours that says nothing of shapes. On
    three sets layout rose by 0.35 to 0.55; the new colours were always there."""
    from bench.lab_editing import trajectory
    from bench.lab_layout import freecontrol as method_of
    from bench.lab_layout import layout, row

    lab, steps = layout(which, 8, 9000, "recoloured"), 8
    found = trajectory(lab, steps)
    plain, ours = (row(lab, steps, method_of, o, found, seed=3) for o in (None, {"method": method}))
    assert float(ours["layout"].mean()) > float(plain["layout"].mean()) + 0.2
    assert float(ours["new"].mean()) >= 0.7
