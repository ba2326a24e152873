import comfy.samplers
import pytest
import torch
import toy
from comfy.patcher_extension import WrappersMP
from steer.patches.hspace import injectfusion
from steer.patches.hspace.injectfusion import MODES, norm, slerp
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory, fingerprint

PAPER = Schedule(0.0, 0.6)
ORIGIN = toy.text(5)


def path(model, batch=1, size=(16, 16), conditioning=ORIGIN, steps=4):
    sigmas = toy.sigmas(model, steps)
    clean = 0.3 * toy.noise(40, batch, *size)
    return Trajectory(
        sigmas, torch.stack([clean + s * toy.noise(50, batch, *size) for s in sigmas]), fingerprint(model), conditioning
    )


def steered(model, gamma=0.5, schedule=Schedule(), content=None, **options):
    return injectfusion.apply(model, content or path(model), gamma, schedule, **options)


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def test_slerp_is_the_arc():
    """Norm kept, the angle divided, for each item by itself."""
    h, content = toy.noise(1, 3), 5 * toy.noise(9, 3)
    size, angle = norm(h), lambda a, b: ((a * b).flatten(1).sum(1) / a.flatten(1).norm(dim=1)
                                         / b.flatten(1).norm(dim=1)).acos()
    for gamma in (0.0, 0.3, 0.7, 1.0):
        mixed = slerp(h, content, gamma)
        assert torch.allclose(norm(mixed), size, rtol=1e-5)
        if gamma:
            assert torch.allclose(angle(h, mixed), gamma * angle(h, content), atol=2e-3)
    assert torch.allclose(slerp(h, content, 0.0), h, atol=1e-6)
    assert torch.allclose(slerp(h, content, 1.0), content * size / norm(content), atol=1e-5)
    assert torch.allclose(slerp(h, content, 0.3)[1:2], slerp(h[1:2], content[1:2], 0.3))


@pytest.mark.parametrize("content", [1.0, 3.0, -2.0, 0.0], ids=["same", "parallel", "opposite", "zero"])
def test_slerp_of_what_has_no_arc_is_finite(content):
    h = toy.noise(1, 2)
    assert bool(slerp(h, content * h, 0.3).isfinite().all())
    if content > 0:
        assert torch.allclose(slerp(h, content * h, 0.3), h, atol=1e-5)
    assert bool(slerp(0 * h, h, 0.3).isfinite().all())


def oracle(model, content, gamma, mode, mask=None):
    """D of one evaluation, with the host's own patch: features of the content from a run of its own, for each cond."""
    kept, order = {}, []

    def keep(h, hsp, options):
        if options["block"] == ("output", 0):
            kept.update(zip(options["cond_or_uncond"], h.float().chunk(len(options["cond_or_uncond"])), strict=True))
        return h, hsp

    def put(h, hsp, options):
        if options["block"] == ("output", 0):
            parts = []
            for index, part in zip(options["cond_or_uncond"], h.chunk(len(options["cond_or_uncond"])), strict=True):
                c, m = kept[index], 1.0 if mask is None else mask
                x, y = m * part, m * c
                if mode == "replace":
                    mixed = y
                elif mode == "lerp":
                    mixed = (1 - gamma) * x + gamma * y
                elif mode == "add":
                    mixed = x + gamma * y
                else:
                    y = y / y.norm() * x.norm()
                    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
                    mixed = ((1 - gamma) * angle).sin() / angle.sin() * x + (gamma * angle).sin() / angle.sin() * y
                parts.append((1 - m) * part + mixed)
            h = torch.cat(parts)
            order.append(len(parts))
        return h, hsp

    first, second = model.clone(), model.clone()
    first.set_model_output_block_patch(keep)
    second.set_model_output_block_patch(put)
    sigmas = content.sigmas[[0, -1]]
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    toy.sample(first, positive=ORIGIN, sigmas=sigmas, start=content.latents[0] / sigmas[0], sampler=sampler)
    out = toy.sample(second, sigmas=sigmas, sampler=sampler)
    assert order
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_is_the_papers_mix_in_both_halves(mode, masked):
    model = toy.model()
    content = path(model)
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 16:64] = 1.0
    coarse = torch.zeros(1, 1, 8, 8)
    coarse[..., 2:6, 1:4] = 1.0
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    ours = steered(model, 0.4, content=content, mode=mode, mask=mask if masked else None)
    out = toy.sample(ours, sigmas=content.sigmas[[0, -1]], sampler=sampler)
    assert near(out, oracle(model, content, 0.4, mode, coarse if masked else None))


@pytest.mark.parametrize("options", [dict(gamma=0.0), dict(schedule=Schedule(0.5, 0.5))], ids=str)
def test_off_is_no_node(options):
    model = toy.model()
    off = steered(model, **options)
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    assert torch.equal(toy.sample(off), toy.sample(model))


def test_the_window_is_the_papers_and_costs_nothing_outside():
    """From pure noise down to t = 400 of 1000: two of four steps hold source rows."""
    model = toy.model()
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, schedule=PAPER))
    levels = toy.sigmas(model)[:-1]
    inside = int((levels > float(model.get_model_object("model_sampling").percent_to_sigma(0.6))).sum())
    assert 0 < inside < 4
    assert (count.calls, count.rows) == (4, 8 + 2 * inside)
    late = toy.sample(steered(model, schedule=Schedule(0.6, 1.0)))
    assert not near(out, toy.sample(model), 1e-3) and not near(late, out, 1e-3)


def test_a_whole_mask_is_none_and_outside_a_mask_less_changes():
    model = toy.model()
    plain, whole = toy.sample(steered(model)), toy.sample(steered(model, mask=torch.ones(1, 64, 64)))
    assert near(whole, plain)
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1.0
    change = (toy.sample(steered(model, mask=left)) - toy.sample(model)).abs().mean((0, 1, 2))
    assert change[:6].mean() > 1.5 * change[10:].mean()


def test_two_masks_of_one_content():
    """Two nodes with masks of their own are both at work."""
    model = toy.model()
    left, content = torch.zeros(1, 16, 16), path(model)
    left[..., :8] = 1.0
    both = steered(steered(model, content=content, mask=left), content=content, mask=1 - left)
    once = toy.sample(steered(model, content=content, mask=left))
    assert not near(toy.sample(both), once, 1e-3)


def test_batch_is_two_runs():
    model = toy.model()
    content = path(model, 2)
    both = toy.sample(steered(model, content=content), start=toy.noise(batch=2))
    for i in range(2):
        one = Trajectory(content.sigmas, content.latents[:, i : i + 1], content.model, ORIGIN)
        alone = toy.sample(steered(model, content=one), start=toy.noise(batch=2)[i : i + 1])
        assert near(both[i : i + 1], alone)
        shared = toy.sample(steered(model, content=one), start=toy.noise(batch=2))
        assert near(shared[i : i + 1], alone)  # one content beside all items


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_odd_sizes_are_finite(dtype):
    model = toy.model(dtype=dtype)
    out = toy.sample(steered(model, content=path(model, size=(14, 18))), start=toy.noise(height=14, width=18), steps=2)
    assert bool(out.isfinite().all())


def test_nothing_else_changes_not_even_after_an_error():
    model = toy.model()
    before = toy.sample(model)
    sibling = model.clone()
    ours = steered(model)
    first = toy.sample(ours)
    assert torch.equal(first, toy.sample(ours))

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, callback=stop)
    assert torch.equal(toy.sample(ours), first)
    assert torch.equal(toy.sample(model), before) and torch.equal(toy.sample(sibling), before)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_kinds_of_prediction(kind):
    model = toy.model(kind=kind)
    assert not near(toy.sample(steered(model)), toy.sample(model), 1e-3)


def test_bad_input_raises_before_sampling():
    model, other = toy.model(), toy.model(kind="v")
    content = path(model)
    for options, words in (
        (dict(gamma=1.5), "gamma 1.5 must be a finite number from 0 to 1"),
        (dict(gamma=float("nan")), "gamma nan"),
        (dict(layers="middle.7"), 'no layer "middle.7"; this model has'),
        (dict(mask=torch.zeros(1, 8, 8)), "the mask is empty"),
        (dict(content=path(other)), "another model: prediction .*V_PREDICTION"),
        (dict(content=path(model, conditioning=[])), "there is no source prompt: .* wire source"),
    ):
        with pytest.raises(ValueError, match=f"SteerInjectFusion: .*{words}"):
            steered(model, **options)
    for options, words in (
        (dict(content=path(model, size=(16, 24))), "of a size other than the latent's"),
        (dict(content=path(model, 3)), "of a batch other than the latent's"),
        (dict(mask=torch.ones(1, 16, 48)), "another aspect than the picture: 48x16"),
        (dict(mask=torch.full((1, 16, 16), float("inf"))), "values that are not finite"),
        (dict(mask=torch.ones(3, 16, 16)), "3 masks for a batch of 1"),
    ):
        with toy.count_forwards(model) as count:
            with pytest.raises(ValueError, match=f"SteerInjectFusion: .*{words}"):
                toy.sample(steered(model, **options))
        assert count.calls == 0
    low = Trajectory(content.sigmas[2:], content.latents[2:], content.model, ORIGIN)
    with pytest.raises(ValueError, match="SteerInjectFusion: the sampler starts at sigma .* invert it with"):
        toy.sample(steered(model, content=low))
    with pytest.raises(ValueError, match="SteerInjectFusion: works in the h-space of a UNet"):
        steered(toy.flux())
