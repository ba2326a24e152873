"""Measurements: the losses written out, projections met at the end, tiles, and restored portraits of the lab."""

from functools import cache

import pytest
import torch
import toy
from measurement.by_hand import SMALL, made, once, scales
from steer.models.lab.load import load_unet, load_vae
from steer.patches.measurement import measurement
from steer.patches.measurement.operator import operator
from steer.patches.shared.decode import decoder
from steer.patches.shared.energy import push
from steer.patches.shared.gradient import gradients
from steer.patches.shared.schedule import Schedule

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)


@cache
def vae():
    with torch.inference_mode():  # as the host's loaders make it
        return load_vae()


@pytest.fixture(params=["unet", "flux"])
def model(request):
    return made(request.param)


def half(size=8):
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


def picture(seed=0, batch=1, size=64):
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").movedim(1, -1)


def steered(model, op="downsample", mode="soft", strength=1.0, schedule=ALWAYS, form="estimate", norm="unit", **more):
    if not ({"image", "latent"} & set(more)):
        more["latent"] = toy.noise(50, **SMALL)
    if isinstance(op, str):
        op = operator(op, factor=2, mask=half() if op == "mask" else None)
    how = push(strength, form, norm, every=more.pop("every", 1), recurrence=more.pop("recurrence", 1))
    return measurement.apply(model, op, how, schedule, mode, **more)


@pytest.mark.parametrize("sigma_y", [0.0, 0.5])
def test_the_soft_loss_is_the_papers(model, sigma_y):
    """-s^2/a of the slope of a Gaussian's log-density, or of DPS's root of it, in latents."""
    op, truth = operator("downsample", factor=2), toy.noise(50, **SMALL)
    D, (s, a) = once(model), scales(model)
    moved = D.clone().requires_grad_()
    off = (op(model.model.process_latent_out(moved)) - op(truth)).square().sum()
    loss = off / (2 * sigma_y**2) if sigma_y else off.sqrt()
    (g,) = torch.autograd.grad(loss, moved)
    ours = once(steered(model, norm="none", strength=1e-3, sigma_y=sigma_y, latent=truth))
    assert torch.allclose(ours, D - 1e-3 * s**2 / (a**2 + s**2) * g, atol=1e-5 * float(D.std()))


@pytest.mark.parametrize("op", ["mask", "downsample", "random projection"])
def test_a_hard_measurement_of_latents_is_met_at_the_end(model, op):
    op = operator(op, factor=2, mask=half() if op == "mask" else None)
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral"):
        truth = toy.noise(50, **SMALL)
        ours = steered(model, op, "hard", latent=truth)
        out = toy.sample(ours, sampler=sampler, start=toy.noise(**SMALL), steps=4)
        assert float((op(out) - op(truth)).abs().max()) <= 1e-4 * float(out.abs().max().clamp(min=1))


def test_hard_changes_only_what_was_measured(model):
    D, op = once(model), operator("downsample", factor=2)
    z, ours = (model.model.process_latent_out(x) for x in (D, once(steered(model, op, "hard"))))
    rest = [x - op.pinv(op(x), x) for x in (z, ours)]
    assert torch.allclose(*rest, atol=1e-4 * float(z.std()))


def test_of_pictures_each_step_comes_nearer():
    """Through the VAE, on the lab: by its encoder, or by the slope; a picture given is what its measuring gives."""
    model, text = load_unet(), [[torch.zeros(1, 77, 128), {}]]
    op, image = operator("downsample", factor=4), picture()
    y = op(image.movedim(-1, 1))

    def at(model):
        return once(model, cfg=1.0, positive=text, negative=text)

    def off(D):
        z = model.model.process_latent_out(D)
        with torch.inference_mode():
            return float((op(decoder(vae()).picture(z)) - y).square().mean().sqrt())

    given = dict(image=image, vae=vae())
    soft, hard, twice = steered(model, op, **given), steered(model, op, "hard", **given), {**given, "recurrence": 2}
    assert off(at(soft)) < off(at(model)) and off(at(hard)) < 0.5 * off(at(model))
    assert off(at(steered(model, op, "hard", **twice))) < off(at(hard))
    measured = steered(model, op, image=y.movedim(1, -1), vae=vae(), measure=False)
    assert torch.allclose(at(measured), at(soft), atol=1e-5)


def test_slopes_through_the_decoder_are_those_by_differences(model):
    ours = steered(model, norm="none", strength=1e-2, image=picture(), vae=vae())
    term, D, (s, a) = ours.model_options["steer"][-1], once(model), scales(model)
    slope = (D - once(ours)) / (1e-2 * s**2 / (a**2 + s**2))
    way = slope / slope.square().mean().sqrt()

    def loss(D):
        with torch.inference_mode():
            return float(term.judge(term.decoder(model.model.process_latent_out(D)).double()))

    h = 5e-3
    assert float((slope * way).sum()) == pytest.approx((loss(D + h * way) - loss(D - h * way)) / (2 * h), rel=0.05)


def test_tiles_are_the_whole_where_their_edges_are_not_seen():
    """A small VAE sees 16 cells around at most; losses and slopes of a large latent, tile by tile."""
    its, z = decoder(vae()), toy.noise(8, height=4, width=52)
    target = torch.rand(1, 3, 32, 416, generator=torch.Generator().manual_seed(3))

    def loss(pictures):
        return (pictures - target).square().sum((1, 2, 3))

    with gradients(its.patcher):
        whole, tiled = its.slope(z, loss), its.slope(z, loss, tile=18, margin=16)
    for a, b in zip(whole, tiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_through_a_vae_of_full_kind():
    """The host's AutoencoderKL, with attention and in-place SiLUs, as its loader makes it; a mask made by a node."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.sd import VAE

    size = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2, 2])
    params = dict(ddconfig=dict(size, num_res_blocks=1, attn_resolutions=[], dropout=0.0), embed_dim=4)
    with torch.inference_mode():
        network = AutoencoderKL(**params)
        toy.random_weights(network)
        full, z = VAE(sd=network.state_dict(), config={"params": params}), toy.noise(3, **SMALL)
        shown, mask = full.decode(z), torch.ones(1, 64, 64)
        mask[..., :24] = 0
    its, target = decoder(full), picture(2).movedim(-1, 1)
    assert torch.allclose(its.picture(z).movedim(1, -1), shown, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(its.encode(its.picture(z)), full.encode(shown), atol=1e-4)

    def loss(pictures):
        return (pictures - target).square().sum((1, 2, 3))

    slope = its.slope(z, loss)[1]
    way, h = slope / slope.norm(), 1e-3
    with torch.inference_mode():
        difference = (loss(its(z + h * way).double()) - loss(its(z - h * way).double())) / (2 * h)
        for mode in ("soft", "hard"):
            ours = steered(made("unet"), operator("mask", mask=mask), mode, image=picture(), vae=full, form="network")
            assert once(ours).isfinite().all()
    assert float((slope * way).sum()) == pytest.approx(float(difference), rel=0.01)


def test_off_is_no_node(model):
    plain = toy.sample(model, steps=2, start=toy.noise(**SMALL))
    for mode in ("soft", "hard"):
        for off in (dict(strength=0.0), dict(schedule=NEVER), dict(schedule=Schedule(0.0101, 0.0102))):
            ours = steered(model, "mask", mode, **off)
            assert torch.equal(toy.sample(ours, steps=2, start=toy.noise(**SMALL)), plain)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_batch_is_its_runs(model, mode):
    start, truth = toy.noise(batch=2, **SMALL), toy.noise(50, 2, **SMALL)
    out = toy.sample(steered(model, "mask", mode, 0.3, latent=truth), start=start, steps=2)
    for i in range(2):
        ours = steered(model, "mask", mode, 0.3, latent=truth[i : i + 1])
        alone = toy.sample(ours, start=start[i : i + 1], steps=2)
        assert torch.allclose(out[i : i + 1], alone, atol=2e-3 * float(alone.abs().max()))


def test_bad_input_raises_before_sampling(model):
    blur, image = operator("blur"), picture()
    behind = operator("downsample", factor=2, after=operator("mask", mask=half() * half().roll(-1, -1)))
    latent = toy.noise(50, **SMALL)
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(mode="firm"), "mode 'firm' is unknown; choose one of soft, hard"),
            (dict(image=image, latent=latent, vae=vae()), "wire either image or latent"),
            (dict(image=image), "wire the vae"),
            (dict(sigma_y=-1.0), "sigma_y -1.0 must be"),
            (dict(op=blur, mode="hard"), "blur has no inverse"),
            (dict(op=behind, mode="hard"), "no inverse that meets what was measured"),
            (dict(op=blur, mode="hard", measure=False), "blur has no inverse"),
            (dict(op=behind, mode="hard", measure=False, latent=latent[..., :4, :4]), "no inverse that meets"),
            (dict(latent=toy.noise(50, 3, **SMALL)), "there are 3 measurements for a batch of 1"),
            (dict(latent=toy.noise(50)), "has the shape .* make it in the size of the measurement"),
        ):
            with pytest.raises(ValueError, match=f"SteerMeasurement: .*{words}"):
                once(steered(model, **options))
    assert count.calls == 0


@pytest.mark.parametrize("name", ["x4", "blur", "left half"])
def test_on_the_lab_restored_portraits_are_nearer_by_3_db(name):
    """Two held-out portraits, under no prompt, in 6 steps; tests/bench/lab_measurement.py has more."""
    from bench.lab_measurement import lab, restored

    portraits = lab("unet", 2, 9000)
    plain, ours = (restored(portraits, 6, name, options) for options in (None, dict(strength=1.0, recurrence=2)))
    assert float((ours["PSNR"] - plain["PSNR"]).mean()) > 3.0
    assert float(ours["error"].max()) < 0.7 * float(plain["error"].max())
