"""The lab's DiT obeys prompts, and is an ordinary Flux of the host."""

import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from steer.models.lab import evaluate
from steer.models.lab.load import TOKENS, dit_model, load_clip, load_model, load_unet
from steer.models.lab.portrait import FACTORS

PROMPTS = ["a flat portrait of a happy person, light skin, blue hair", "a comic portrait, a crown, white background"]


@pytest.fixture(scope="module")
def models():
    return load_model("dit")


def sample(models, prompts=PROMPTS, seed=0, steps=4, **options):
    return evaluate.sample(models, prompts, seed, steps=steps, **{**evaluate.FLOW, **options})


def latent(model, clip, prompt=PROMPTS[0], noise=None, **options):
    """A latent sampled from one prompt at CFG 4."""
    positive, negative = (evaluate.conditioning(clip, [text]) for text in (prompt, ""))
    return toy.sample(model, 4.0, positive=positive, negative=negative, start=noise, **options)


def test_it_is_the_hosts_flux(models):
    network = models[0].model.diffusion_model
    assert type(network) is comfy.ldm.flux.model.Flux
    assert len(network.double_blocks) and len(network.single_blocks)
    assert type(models[0].model) is comfy.model_base.Flux


def test_prompts_are_obeyed(models, reader):
    """24 prompts, one noise; the figures of 64 x 4 are in the card."""
    rates, _ = evaluate.prompt_hits(reader, models, 24, 1, first=100, **evaluate.FLOW)
    assert sum(rates.values()) / len(FACTORS) >= 0.96
    assert min(rates.values()) >= 0.85


def test_the_weaker_sibling_is_weaker_and_guidance_helps_it(models, reader):
    prompts = [evaluate.caption(p) for p in evaluate.data.held_out(16, 6000)[0]]
    weak = (load_unet("dit-weak"), *models[1:])

    def fit(which, cfg):
        made = sample(which, prompts, 1, steps=20, cfg=cfg)
        return sum(float(reader.score(made[i : i + 1], text)) for i, text in enumerate(prompts)) / len(prompts)

    plain, guided, strong = fit(weak, 1.0), fit(weak, 4.0), fit(models, 1.0)
    assert plain + 0.1 < guided < strong - 0.5


def test_too_much_guidance_in_few_steps_harms(models, reader):
    """What CFG-Zero*, CFG++ and their kin repair on a flow; with enough steps prompts are met at any scale."""
    prompts = [evaluate.caption(p) for p in evaluate.data.held_out(12, 6000)[0]]

    def fit(cfg):
        made = sample(models, prompts, 1, cfg=cfg)
        return sum(float(reader.score(made[i : i + 1], text)) for i, text in enumerate(prompts)) / len(prompts)

    assert fit(2.0) > fit(7.0) + 0.05


def test_the_context_is_heeded(models, reader):
    """Where it contradicts the pooled vector it wins; where it is empty the pooled vector sets the backdrop."""
    shares = evaluate.heeds(reader, models, 16, **evaluate.FLOW)
    context, pooled, _ = zip(*shares.values(), strict=True)
    assert sum(context) / len(FACTORS) > sum(pooled) / len(FACTORS) + 0.7
    assert min(shares[name][2] for name in ("pattern", "background")) > 0.5


def test_times_are_those_of_a_straight_flow(models):
    sampling = models[0].get_model_object("model_sampling")
    assert float(sampling.sigma_max) == 1.0
    assert sampling.percent_to_sigma(0.25) == pytest.approx(0.75)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
    assert torch.allclose(sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), atol=1e-3)


def test_latents_have_unit_spread(models):
    pictures = torch.from_numpy(evaluate.data.held_out(16, 8000)[1]).float() / 255
    z = models[0].model.latent_format.process_in(models[2].encode(pictures).detach())
    assert z.std() == pytest.approx(1.0, abs=0.1)


def test_a_prompt_has_the_tokens_it_was_trained_with(models):
    """And the numbers the UNet's encoder gives them."""
    for text in (*PROMPTS, ""):
        context, pooled = models[1].encode_from_tokens(models[1].tokenize(text), return_pooled=True)
        usual, same = load_clip().encode_from_tokens(load_clip().tokenize(text), return_pooled=True)
        assert context.shape[1] == TOKENS
        assert torch.allclose(context, usual[:, :TOKENS], atol=1e-4)
        assert torch.allclose(pooled, same, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "heun", "ddim", "uni_pc", "lcm", "euler_cfg_pp"])
@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta"])
def test_samplers(models, sampler, scheduler):
    made = sample(models, sampler=sampler, scheduler=scheduler)
    assert torch.isfinite(made).all() and made.std() > 0.05


def test_the_same_seed_gives_the_same_picture(models):
    assert torch.equal(sample(models), sample(models))


def test_a_batch_equals_single_runs(models):
    both = sample(models, seed=5)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    for i, text in enumerate(PROMPTS):
        one = evaluate.sample_noise(models, [text], noise[i : i + 1], steps=4, **evaluate.FLOW)
        assert torch.allclose(one[0], both[i], atol=2e-3)


def test_inversion_returns(models):
    """A flow at CFG 1 walked up towards noise and down again comes back: what inversion builds on."""
    model, clip, vae = models
    portraits, pictures = evaluate.data.held_out(1, 4000)
    source = vae.encode(torch.from_numpy(pictures).float() / 255).detach()
    condition = evaluate.conditioning(clip, [evaluate.caption(portraits[0])])
    down = toy.sigmas(model, 20, "simple")[1:-1]  # the host divides by sigma and by 1 - sigma
    run = dict(positive=condition, negative=condition, start=torch.zeros_like(source))
    up = toy.sample(model, 1.0, latent=source, sigmas=down.flip(0), **run)
    assert (up * (1 - down[0]) - source).std() > source.std()  # it went somewhere
    back = toy.sample(model, 1.0, latent=up, sigmas=down, **run)
    assert (back - source).square().mean() < 0.01 * source.var()


def patched(name, model):
    if name == "lora":
        key = "diffusion_model.single_blocks.1.linear2.weight"
        weight = model.model.state_dict()[key]
        draw = torch.Generator().manual_seed(0)
        up, down = (torch.randn(n, generator=draw) * 0.3 for n in ((len(weight), 2), (2, weight.shape[1])))
        lora = {"lora_unet_test.lora_up.weight": up, "lora_unet_test.lora_down.weight": down}
        model = model.clone()
        assert model.add_patches(comfy.lora.load_lora(lora, {"lora_unet_test": key}), 1.0) == [key]
        return model
    apply = {
        "cfg-zero": lambda: CFGZeroStar.execute(model),
        "nag": lambda: NAGuidance.execute(model, 5.0, 0.5, 1.5),
        "slg": lambda: SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="1", single_layers="2"),
    }[name]
    return apply().result[0]


@pytest.mark.parametrize("name", ["lora", "cfg-zero", "nag", "slg"])
def test_what_others_do_to_a_model_acts_on_it(models, name):
    plain = sample(models)
    changed = sample((patched(name, models[0]), *models[1:]))
    assert torch.isfinite(changed).all()
    assert (changed - plain).abs().mean() > 1e-3
    assert torch.equal(sample(models), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(models, dtype):
    """The same weights in half precision give nearly the same latent."""
    base = dit_model_of(models[0], dtype)
    half, full = (latent(m, models[1]) for m in (base, models[0]))
    assert torch.isfinite(half).all()
    assert torch.corrcoef(torch.stack([half.flatten(), full.flatten()]))[0, 1] > 0.97


def dit_model_of(patcher, dtype):
    """The lab's DiT anew, computing in `dtype`."""
    space = patcher.model.latent_format
    stats = dict(mean=space.mean.flatten().tolist(), std=space.std.flatten().tolist(),
                 rgb_factors=space.latent_rgb_factors, rgb_bias=space.latent_rgb_factors_bias)  # fmt: skip
    base = dit_model(stats, dtype)
    base.diffusion_model.load_state_dict(patcher.model.diffusion_model.state_dict())
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def test_the_patchers_can_be_made_again(models):
    for patcher in (models[0], models[1].patcher):
        make, arguments = patcher.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        for (name, a), b in zip(patcher.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_no_part_was_left_untrained(models):
    weights = models[0].model.diffusion_model.state_dict()
    assert [name for name, w in weights.items() if not w.any()] == []
