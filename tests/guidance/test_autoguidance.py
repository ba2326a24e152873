import comfy.hooks
import comfy.latent_formats
import comfy.model_management as mm
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import autoguidance, pag
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def weak():
    return toy.model(seed=5)


def steered(model, weak, scale=1.1, schedule=ALWAYS):
    return autoguidance.apply(model, weak, scale, schedule)


def lora(model, strength=1.0):
    model = model.clone()
    delta = torch.randn(128, 128, generator=torch.Generator().manual_seed(9)) * 0.2
    assert model.add_patches({KEY: (delta,)}, strength) == [KEY]
    return model


def weakened(model):
    """Another pack's patch: self-attention of the middle block replaced by its values."""
    model = model.clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    return model


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


def D(model, x, sigma, positive=toy.POSITIVE):
    """One prediction by the host alone, cfg 1: a sampler that asks once and returns what it is told."""
    seen = {}

    class Ask(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent, mask=None, disable_pbar=False):
            seen["D"] = wrap(x.clone(), sigma * x.new_ones(len(x)), **extra_args)
            return seen["D"]

    toy.sample(model, cfg=1.0, sampler=Ask(), positive=positive, start=x)
    return seen["D"]


def test_is_the_formula_on_predictions_of_two_host_runs(model, weak):
    """D + s (D - D_weak), each from a run of its own: D_weak + w (D - D_weak) with w = 1 + s."""
    x, sigma, w = toy.noise(batch=2) * 3.0, 3.0, 2.1
    good, bad = D(model, x, sigma), D(weak, x, sigma)
    assert near(D(steered(model, weak, w - 1), x, sigma), bad + w * (good - bad))


@pytest.mark.parametrize("how", ["another checkpoint", "LoRA", "patch of another node"])
def test_a_whole_run_equals_two_models_side_by_side(model, weak, how):
    bad = weak if how == "another checkpoint" else lora(model) if how == "LoRA" else weakened(model)
    sigmas = toy.sigmas(model, 4)
    x = toy.noise() * (1 + sigmas[0] ** 2) ** 0.5  # as the host scales the starting noise of an eps model
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        good, other = D(model, x, float(s)), D(bad, x, float(s))
        x = x + (x - (good + 1.1 * (good - other))) / s * (s_next - s)
    ours = steered(model, bad)
    out = toy.sample(ours, cfg=1.0)
    assert near(model.model.process_latent_in(out), x, 1e-3)
    plain = toy.sample(model, cfg=1.0)
    assert not near(out, plain, 1e-2)
    assert torch.equal(toy.sample(model, cfg=1.0), plain)  # the LoRA of the weak one is not left behind
    assert torch.equal(toy.sample(ours, cfg=1.0), out)


def test_one_forward_of_each_model_and_none_outside_the_window(model, weak):
    with toy.count_forwards(model) as strong, toy.count_forwards(weak) as other:
        toy.sample(steered(model, weak))
    assert (strong.calls, strong.rows, other.calls, other.rows) == (4, 8, 4, 4)
    sampling = model.get_model_object("model_sampling")
    inside = sum(float(s) > float(sampling.percent_to_sigma(0.4)) for s in toy.sigmas(model, 8)[:-1])
    with toy.count_forwards(weak) as other:
        toy.sample(steered(model, weak, schedule=Schedule(0.0, 0.4)), steps=8)
    assert (other.calls, other.rows) == (inside, inside) and 0 < inside < 8


def test_a_self_weakened_model_needs_no_second_network(model):
    bad = weakened(model)
    ours = steered(model, bad)
    assert ours.get_additional_models() == []
    with toy.count_forwards(model) as count:
        toy.sample(ours)
    assert (count.calls, count.rows) == (8, 12)


def test_the_weak_ones_patches_do_not_reach_the_model_and_the_other_way_round(model, weak):
    """Peers run the weak model under the main model's options."""
    seen = {"weak": 0, "main": 0}

    def counting(patcher, name):
        def attn2(n, context, value, extra):
            seen[name] += 1
            return n, context, value

        patcher = patcher.clone()
        patcher.set_model_attn2_patch(attn2)
        return patcher

    toy.sample(steered(counting(model, "main"), counting(weak, "weak")), steps=2)
    assert seen["weak"] == seen["main"] > 0


@pytest.mark.parametrize("how", ["area", "controlnet", "lora hook"])
def test_conditionings_with_extras(model, weak, how, monkeypatch):
    positive = toy.POSITIVE
    if how == "area":
        positive = toy.text(1) + toy.text(3, area=(8, 8, 4, 2), strength=0.8)
    elif how == "controlnet":
        control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
        positive = toy.text(1, control=control, control_apply_to_uncond=False)
    else:
        hooks = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
        hooks.hooks[0].weights = {KEY: (torch.ones(128, 128) * 0.05,)}
        positive = comfy.hooks.set_hooks_for_conditioning(toy.POSITIVE, hooks)
    x, sigma = toy.noise() * 3.0, 3.0
    good, bad = (D(m, x, sigma, positive) for m in (model, weak))
    assert near(D(steered(model, weak), x, sigma, positive), good + 1.1 * (good - bad), 1e-4)


def test_without_a_negative(model, weak):
    ours = steered(model, weak)
    guider = Guider_Basic(ours)
    guider.set_conds(toy.POSITIVE)
    assert torch.equal(toy.sample(model, guider=guider), toy.sample(ours, cfg=1.0))


def test_image_to_image_and_inpainting(model, weak):
    latent, mask = toy.noise(5), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    out = toy.sample(steered(model, weak), latent=latent, denoise_mask=mask)
    assert torch.allclose(out[..., :8], latent[..., :8], atol=1e-5)


def test_both_are_loaded_by_the_host(model, weak):
    mm.unload_all_models()
    toy.sample(steered(model, weak), steps=1)
    loaded = [m.model.model for m in mm.current_loaded_models if m.model is not None]
    assert model.model in loaded and weak.model in loaded


def test_an_error_in_mid_run_lets_go_of_both(model, weak):
    ours = steered(model, weak)
    expected = toy.sample(ours)

    def stop(step, x0, x, total):
        if step == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        toy.sample(ours, callback=stop)
    assert weak.model.current_patcher is None and model.model.current_patcher is None
    assert torch.equal(toy.sample(ours), expected)


def test_an_error_before_the_run_is_the_one_that_is_seen(model):
    def fail(patcher):
        raise RuntimeError("not ready")

    first, second = toy.model(seed=5), toy.model(seed=6)
    for patcher in (first, second):
        patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, fail)
    with pytest.raises(RuntimeError, match="not ready"):
        toy.sample(steered(steered(model, first), second))
    assert toy.sample(model).isfinite().all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -0.5])
def test_bad_scale_raises_in_the_node(model, weak, scale):
    with pytest.raises(ValueError, match=f"SteerAutoGuidance: scale {scale}"):
        steered(model, weak, scale)


def test_the_same_object_raises_in_the_node(model):
    for same in (model, model.clone(), pag.apply(model, 3.0, "auto", Schedule(0.5, 0.5))):
        with pytest.raises(ValueError, match="SteerAutoGuidance: AutoGuidance with the same object.*weaken it"):
            steered(model, same)
    with pytest.raises(ValueError, match="AutoGuidance with the same object"):
        steered(pag.apply(model, 3.0, "auto", ALWAYS), model)


def test_models_that_do_not_fit_raise_in_the_node(model):
    with pytest.raises(ValueError, match=r"SteerAutoGuidance: weak_model has another architecture: Flux \(Flux\)"):
        steered(model, toy.flux())
    other = toy.model(seed=5)
    other.model.latent_format = comfy.latent_formats.SDXL()
    with pytest.raises(ValueError, match="weak_model has another latent format: SDXL, the model has SD15"):
        steered(model, other)
    with pytest.raises(ValueError, match="one of model and weak_model predicts a flow"):
        steered(model, toy.model(kind="flow"))
    with pytest.raises(ValueError, match=r"weak_model carries steering of its own \(SteerPAG\)"):
        steered(model, pag.apply(toy.model(seed=5), 3.0, "auto", ALWAYS))


def test_a_lora_put_on_afterwards_raises_before_sampling(model):
    ours = lora(steered(model, weakened(model)))
    with pytest.raises(ValueError, match="SteerAutoGuidance: weak_model shares its network .* put those nodes before"):
        toy.sample(ours)
