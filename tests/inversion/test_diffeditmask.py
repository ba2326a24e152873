import host
import pytest
import torch
import toy
from bench.lab_masks import found as iou
from steer.patches.guidance import cfgpp, pag
from steer.patches.inversion import diffeditmask
from steer.patches.inversion.diffeditmask import mask
from steer.patches.shared.schedule import Schedule

SOURCE, TARGET = toy.text(1), toy.text(5)


def picture(batch=1, height=16, width=16):
    return toy.noise(40, batch, height, width) * 0.8


def found(model, latent, source=SOURCE, target=TARGET, **options):
    with torch.inference_mode():
        return mask(model, source, target, latent, **options)


def predicted(model, x, sigma, positive):
    """D at x, as the sampler sees it."""
    import comfy.samplers

    kept = []

    class Ask:
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
            kept.append(model_wrap(x, sigma * x.new_ones(len(x)), **extra_args))
            return latent_image

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, [])
    with torch.inference_mode():
        guider.sample(torch.zeros_like(x), torch.ones_like(x), Ask(), torch.tensor([sigma, 0.0]), seed=0)
    return kept[0]


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_it_is_the_papers_recipe(kind):
    """Written out: noise at half the range, both eps, |.| averaged, cut at 3 means, to 0..1, threshold."""
    model, latent, seed = toy.model(kind=kind), picture(), 11
    sampling = model.get_model_object("model_sampling")
    sigma = float(sampling.percent_to_sigma(0.5))
    from comfy.k_diffusion.sampling import default_noise_sampler

    draw, differences = default_noise_sampler(latent, seed=seed), []
    z = model.model.process_latent_in(latent)
    for _ in range(4):
        n = draw(sigma, 0.0)
        x = z * (1 - sigma) + n * sigma if kind == "flow" else z + n * sigma
        eps = [(x - predicted(model, x, sigma, text)) / sigma for text in (SOURCE, TARGET)]
        differences.append((eps[1] - eps[0]).abs().mean(1))
    m = torch.stack(differences).mean(0)
    m = m.clamp(max=3 * float(m.mean()))
    m = m / m.max()
    ours, soft = found(model, latent, maps=4, seed=seed)
    assert ours.shape == soft.shape == (1, 128, 128)
    torch.testing.assert_close(soft[:, ::8, ::8], m, rtol=1e-3, atol=1e-4)
    clear = (m - 0.5).abs() > 1e-3
    assert torch.equal(ours[:, ::8, ::8][clear], (m > 0.5).float()[clear]) and 0 < ours.mean() < 1


def test_a_batch_is_its_items():
    """Also of prompts of another length; every item gets the noises it would get alone."""
    model, latent, longer = toy.model(), picture(2), toy.text(6, tokens=154)
    both = found(model, latent, target=longer, maps=3)[1]
    for i in range(2):
        alone = found(model, latent[i : i + 1], target=longer, maps=3)[1]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_the_seed_decides_and_the_cost_is_known():
    model, latent = toy.model(), picture()
    with toy.count_forwards(model) as count:
        first = found(model, latent, maps=3, seed=1)[1]
    assert count.rows == 6
    assert torch.equal(found(model, latent, maps=3, seed=1)[1], first)
    assert not torch.equal(found(model, latent, maps=3, seed=2)[1], first)


def test_guidance_on_the_model_is_not_asked():
    """CFG++ would refuse this sampler, and PAG add a row; prompts differ by the same whatever guides."""
    model, latent = toy.model(), picture()
    plain = found(model, latent, maps=2)[1]
    steered = cfgpp.apply(pag.apply(model, 3.0, "auto", Schedule()), 0.6, Schedule())
    before = toy.sample(steered)
    with toy.count_forwards(model) as count:
        assert torch.equal(found(steered, latent, maps=2)[1], plain)
    assert count.rows == 4
    assert torch.equal(toy.sample(steered), before)


def test_inputs_do_what_they_say():
    model, latent = toy.model(), picture()
    ours, soft = found(model, latent, maps=2)
    low, high = (found(model, latent, maps=2, threshold=t)[0] for t in (0.3, 0.7))
    assert (high <= ours).all() and (ours <= low).all() and high.sum() < low.sum()
    grown = found(model, latent, maps=2, cells=1)[0]
    assert (grown >= ours).all() and grown.sum() > ours.sum()
    blurred = found(model, latent, maps=2, soft=2.0)[1]
    assert blurred.diff(dim=-1).abs().max() < soft.diff(dim=-1).abs().max()


def test_half_precision_odd_sizes_full_strength_and_previews():
    latent, seen = picture(1, 18, 14), []
    for dtype in (torch.float16, torch.bfloat16):
        ours, soft = found(toy.model(dtype=dtype), latent, maps=2, strength=1.0,
                           callback=lambda i, D, x, total: seen.append((i, total, tuple(D.shape))))
        assert soft.isfinite().all() and ours.shape == (1, 144, 112)
    assert seen == [(i, 2, (1, 4, 18, 14)) for i in (0, 1)] * 2


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(target=SOURCE), "both prompts want the same picture"),
        (dict(target=[]), "the target prompt is missing"),
        (dict(source=[]), "the source prompt is missing"),
        (dict(latent=torch.zeros(1, 4, 16, 16)), "the latent is empty"),
        (dict(latent=torch.ones(1, 4, 16)), "this one has 3 dimensions"),
        (dict(strength=0.0), "strength 0"),
        (dict(strength=1.5), "strength 1.5 must be"),
        (dict(threshold=2.0), "threshold 2.0 must be"),
        (dict(maps=0), "maps 0 must be"),
        (dict(soft=-1.0), "blur -1.0 must be"),
    ],
)
def test_bad_input_is_refused(options, words):
    model = toy.model()
    with pytest.raises(ValueError, match=f"SteerDiffEditMask: .*{words}"):
        found(model, **{"latent": picture(), "maps": 1, **options})


def test_through_the_executor(run_prompt):
    factors = ("style", "expression", "position", "skin", "hair_style", "glasses", "shirt", "pattern", "background")
    portrait = dict(seed=3, hat="no hat", hair_color="black", **dict.fromkeys(factors, "from seed"))
    prompt = {
        "1": {"class_type": "SteerLabModel", "inputs": {"model": "dit"}},
        "2": {"class_type": "SteerLabPortrait", "inputs": portrait},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "black hair"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "red hair"}},
        "6": {"class_type": "SteerDiffEditMask", "inputs": {
            "model": ["1", 0], "source": ["4", 0], "target": ["5", 0], "latent": ["3", 0], "seed": 1, "maps": 4,
            "strength": 0.5, "threshold": 0.5, "blur": 0.0, "grow": 0}},
    }
    result = run_prompt(prompt)
    ours, soft = result["6"]
    assert ours.shape == soft.shape == result["2"][3].shape
    assert set(ours.unique().tolist()) == {0.0, 1.0}
    prompt["6"]["inputs"]["target"] = ["4", 0]
    with pytest.raises(host.PromptError, match="SteerDiffEditMask: both prompts want the same picture"):
        run_prompt(prompt)


def test_large_regions_stay_whole():
    """Three means lie above the largest difference where most of the picture differs: the map still reaches 1."""
    most = torch.full((1, 8, 8), 2.0)
    most[:, :2] = 0
    assert torch.equal(diffeditmask.normalised(most), most / 2)
    outlier = torch.zeros(1, 8, 8)
    outlier[0, 0, :4], outlier[0, 4, 4] = 1.0, 100.0
    assert diffeditmask.normalised(outlier).max() == 1.0 and diffeditmask.normalised(outlier)[0, 0, 0] < 0.5


@pytest.mark.parametrize("which", ["unet", "dit"])
@pytest.mark.parametrize("edit, least", [("background colour", 0.6), ("hat on", 0.45)])
def test_on_the_lab_it_finds_what_the_prompt_changes(which, edit, least):
    """tests/bench/lab_masks.md: IoU with the drawn truth, of every single portrait."""
    ours, best = iou(which, edit, 3, 7000)
    assert ours.min() > least and (ours <= best).all()
