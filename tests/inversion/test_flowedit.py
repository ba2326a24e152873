import comfy.model_sampling
import comfy.samplers
import pytest
import torch
import toy
import toy_dit
from comfy.k_diffusion.sampling import default_noise_sampler
from comfy.samplers import sampling_function
from steer.patches.guidance import cfgpp, pag
from steer.patches.inversion.flowedit import FlowEdit, guider
from steer.patches.shared.schedule import Schedule

SOURCE, FOUR = toy.text(5), FlowEdit(n_max=4)
STEPS = 6


def made(kind):
    return toy.flux() if kind == "flux" else toy.model(kind=kind)


def edit(model, sampler=FOUR, latent=None, source=SOURCE, positive=toy.POSITIVE, cfgs=(1.5, 5.5),
         mask=None, **options):
    """The edited latent."""
    latent = toy.noise(30) if latent is None else latent
    pair = guider(model, source, positive, toy.NEGATIVE, *cfgs, mask)
    given = dict(guider=pair, sampler=sampler, latent=latent, start=torch.zeros_like(latent), steps=STEPS)
    return toy.sample(model, **{**given, **options})


def paper(model, latent, n_max, n_min=0, n_avg=1, jump=False, cfgs=(1.5, 5.5)):
    """Algorithm 1 of FlowEdit, or of InfEdit, on velocities (flow) or noise (eps), for each item by itself."""
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guide, x_src = model.inner_model, model.latent_image
        noise = default_noise_sampler(x_src, seed=extra_args["seed"])

        def D(z, t, name):
            conds, cfg = (guide.conds["negative"], guide.conds[name]), cfgs[name == "positive"]
            each = [sampling_function(guide.inner_model, one[None], t[None], *conds, cfg, extra_args["model_options"])
                    for one in z]
            return torch.cat(each)

        def v(z, t, name):
            return (z - D(z, t, name)) / t

        z, T = x_src.clone(), len(sigmas) - 1
        for i in range(T - n_max, T):
            t, t_next = sigmas[i], sigmas[i + 1]
            if T - i > n_min:
                moves = []
                for _ in range(n_avg):
                    n = noise(t, t_next)
                    z_src = (1 - t) * x_src + t * n if flow else x_src + t * n
                    z_tar = z + z_src - x_src
                    if jump:
                        moves.append(x_src + D(z_tar, t, "positive") - D(z_src, t, "source") - z)
                    else:
                        moves.append((t_next - t) * (v(z_tar, t, "positive") - v(z_src, t, "source")))
                z = z + sum(moves) / n_avg
            else:
                if T - i == n_min:
                    n = noise(t, t_next)
                    z = z + ((1 - t) * x_src + t * n if flow else x_src + t * n) - x_src
                z = z + (t_next - t) * v(z, t, "positive")
        return z

    guide = comfy.samplers.CFGGuider(model)
    guide.inner_set_conds({"positive": toy.POSITIVE, "negative": toy.NEGATIVE, "source": SOURCE})
    zeros, sampler = torch.zeros_like(latent), comfy.samplers.KSAMPLER(sample)
    return toy.sample(model, guider=guide, sampler=sampler, latent=latent, start=zeros, steps=STEPS)


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.std()) < tolerance


@pytest.mark.parametrize("kind, case", [
    (kind, case) for kind in ("eps", "flux") for case in ("plain", "n_min", "n_avg", "DDCM", "batch")
] + [("v", "plain"), ("flow", "plain")])
def test_is_the_papers_algorithm(kind, case):
    model = made(kind)
    sampler = FlowEdit("DDCM" if case == "DDCM" else "FlowEdit", 4, 2 * (case == "n_min"), 1 + (case == "n_avg"))
    latent = toy.noise(30, 2 if case == "batch" else 1)
    expected = paper(model, latent, 4, sampler.n_min, sampler.n_avg, case == "DDCM")
    assert near(edit(model, sampler, latent), expected)


@pytest.mark.parametrize("kind", ["eps", "flow", "flux"])
@pytest.mark.parametrize("method", ["FlowEdit", "DDCM"])
@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_the_same_prompt_returns_the_picture(kind, method, cfg):
    latent = toy.noise(30)
    out = edit(made(kind), FlowEdit(method, STEPS), latent, positive=SOURCE, cfgs=(cfg, cfg))
    assert float((out - latent).abs().max()) <= 1e-5


def test_no_step_is_the_picture_and_asks_nothing():
    model, latent = toy.model(), toy.noise(30)
    with toy.count_forwards(model) as count:
        assert torch.equal(edit(model, FlowEdit(n_max=0), latent), latent)
    assert count.calls == 0


def test_more_than_all_steps_is_all_steps():
    model = toy.model()
    assert torch.equal(edit(model, FlowEdit(n_max=STEPS + 3)), edit(model, FlowEdit(n_max=STEPS)))


def test_two_forwards_of_a_pair_per_step():
    model = toy.model()
    with toy.count_forwards(model) as count:
        edit(model, FlowEdit(n_max=4, n_min=1, n_avg=2))
    assert (count.calls, count.rows) == (2 * 2 * 3 + 1, 2 * (2 * 2 * 3 + 1))


@pytest.mark.parametrize("size", [(16, 16), (17, 13)])
@pytest.mark.parametrize("n_min", [0, 2])
def test_outside_the_mask_the_picture_stays_bit_for_bit(size, n_min):
    model, latent = toy.model(), toy.noise(30, 2, *size)
    mask = torch.zeros(1, 8 * size[0], 8 * size[1])
    mask[:, : 8 * 6] = 1.0
    options = dict(latent=latent, sampler=FlowEdit(n_max=4, n_min=n_min))
    out = edit(model, mask=mask, **options)
    assert torch.equal(out[:, :, 7:], latent[:, :, 7:])
    assert not near(out[:, :, :5], latent[:, :, :5], 0.1)
    assert torch.equal(edit(model, denoise_mask=mask[:, None], **options), out)
    half = torch.ones_like(mask)
    half[..., : 8 * 6] = 0.0
    both = edit(model, mask=mask, denoise_mask=half[:, None], **options)
    assert torch.equal(both[..., :5], latent[..., :5]) and torch.equal(both[:, :, 7:], latent[:, :, 7:])


def test_masks_of_a_batch_are_one_each():
    latent, masks = toy.noise(30, 2), torch.stack((torch.ones(16, 16), torch.eye(16)))
    out = edit(toy.model(), latent=latent, mask=masks)
    assert torch.equal(out[1][:, masks[1] == 0], latent[1][:, masks[1] == 0])
    assert not torch.equal(out[0][:, masks[1] == 0], latent[0][:, masks[1] == 0])


def test_the_seed_decides():
    model = toy.model()
    first = edit(model, seed=1)
    assert torch.equal(edit(model, seed=1), first)
    assert not near(edit(model, seed=2), first, 1e-2)


def test_terms_act_on_the_target_and_leave_the_source_plain():
    """PAG moves the target alone, so even the same prompt no longer returns the picture."""
    model, latent = toy.model(), toy.noise(30)
    same = dict(latent=latent, positive=SOURCE, cfgs=(2.0, 2.0))
    steered = pag.apply(model, 3.0, "middle", Schedule())
    assert not near(edit(steered, **same), latent, 1e-2)
    assert torch.equal(edit(pag.apply(model, 0.0, "middle", Schedule()), **same), edit(model, **same))
    with pytest.raises(ValueError, match="SteerCFGPP: the sampler FlowEdit cannot take its step"):
        edit(cfgpp.apply(model, 0.6, Schedule()))


def test_models_are_as_before_also_after_an_error():
    model = toy.model()
    before = toy.sample(model)

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        edit(model, callback=stop)
    edit(model)
    assert torch.equal(toy.sample(model), before)


def test_previews_show_the_clean_estimate():
    seen, model = [], toy.model()
    out = edit(model, callback=lambda step, x0, x, total: seen.append((step, total, x0)))
    assert [each[:2] for each in seen] == [(i, STEPS) for i in range(2, STEPS)]
    assert near(model.model.process_latent_out(seen[-1][2]), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    assert edit(toy.model(dtype=dtype), FlowEdit(n_max=1), steps=1).isfinite().all()


@pytest.mark.parametrize("sampler, says", [
    (FlowEdit(n_max=4, n_min=4), "n_min 4 must be lower than n_max 4"),
    (FlowEdit(n_max=9, n_min=6), "n_min 6 must be lower than n_max 9 and the 6 steps"),
    (FlowEdit(n_avg=0), "n_avg 0 must be a finite number from 1"),
    ("euler", "its guider needs its sampler"),
])
def test_settings_that_make_no_sense(sampler, says):
    model = toy.model()
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerFlowEdit: {says}"):
        edit(model, sampler)
    assert count.calls == 0


@pytest.mark.parametrize("options, says", [
    (dict(latent=torch.zeros(1, 4, 16, 16)), "the latent is empty"),
    (dict(sigmas=torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.3, 0.1])), "the sigmas end at 0.1; they must end at 0"),
    (dict(sigmas=torch.tensor([8.0, 4.0, 4.0, 1.0, 0.5, 0.0])), "the sigmas must fall"),
    (dict(mask=torch.ones(1, 128, 64)), "the mask is of another aspect than the picture: 64x128"),
    (dict(mask=torch.zeros(1, 128, 128)), "the mask is empty"),
    (dict(mask=torch.ones(3, 128, 128)), "there are 3 masks for a batch of 1"),
    (dict(source=[]), "needs a source and a positive prompt"),
    (dict(cfgs=(float("nan"), 5.0)), "source_cfg nan must be a finite number"),
])
def test_bad_input_is_refused_before_sampling(options, says):
    model = toy.model()
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerFlowEdit: {says}"):
        edit(model, **options)
    assert count.calls == 0


def test_its_sampler_without_its_guider_is_refused():
    with pytest.raises(ValueError, match="SteerFlowEdit: its sampler needs its guider"):
        toy.sample(toy.model(), sampler=FlowEdit(n_max=4))


def test_a_video_with_a_mask():
    model, latent, mask = toy_dit.model("wan"), toy_dit.noise("wan", 2), torch.zeros(1, 64, 64)
    mask[:, :32] = 1.0
    pair = guider(model, toy_dit.text(3), toy_dit.text(1), toy_dit.text(2), 1.5, 5.5, mask)
    zeros, sampler = torch.zeros_like(latent), FlowEdit(n_max=2)
    out = toy_dit.sample("wan", model, zeros, guider=pair, sampler=sampler, steps=3, latent=latent)
    assert torch.equal(out[..., 4:, :], latent[..., 4:, :]) and not near(out[..., :4, :], latent[..., :4, :], 1e-2)
