"""The stack as a whole: any terms together, with any sampler, any guider and other nodes on the same model."""

import gc
import itertools
import logging
import weakref

import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras import (
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_freelunch,
    nodes_model_advanced,
    nodes_nag,
    nodes_perpneg,
    nodes_sag,
)
from steer.patches.guidance import apg, cfgpp, pag
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import RUN

ALWAYS = Schedule()
TERMS = {
    "PAG": lambda m: pag.apply(m, 3.0, "auto", ALWAYS),
    "PAG output": lambda m: pag.apply(m, 1.0, "output.1", Schedule(0.2, 0.8)),
    "APG": lambda m: apg.apply(m, 0.0, 15.0, -0.5, ALWAYS),
    "CFG++": lambda m: cfgpp.apply(m, 0.6, ALWAYS),
}


def carry(model, names):
    for name in names:
        model = TERMS[name](model)
    return model


@pytest.fixture(scope="module")
def model():
    return toy.model()


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


# --- any subset ---------------------------------------------------------------------------------------------------


def test_order_of_nodes_does_not_matter(model):
    outputs = [toy.sample(carry(model, order), steps=3) for order in itertools.permutations(TERMS)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("names", [c for n in (1, 2, 3, 4) for c in itertools.combinations(TERMS, n)], ids="+".join)
def test_every_subset_is_one_call_of_the_union(model, names):
    sampling = model.get_model_object("model_sampling")
    low, high = (float(sampling.percent_to_sigma(p)) for p in (0.8, 0.2))
    inside = sum(low < float(s) <= high for s in toy.sigmas(model, 5)[:-1])
    with toy.count_forwards(model) as count:
        out = toy.sample(carry(model, names), steps=5)
    assert out.isfinite().all()
    assert count.calls == 5
    assert count.rows == 10 + 5 * ("PAG" in names) + inside * ("PAG output" in names)


def test_sum_is_the_formula(model):
    """PAG + APG + CFG++ in one step from the predictions alone: D* of D_c + (lambda - 1) d' + s (D_c - D_weak)."""
    seen = {}

    def keep(name):
        return lambda step, x0, x, total: seen.setdefault(name, x0.clone())

    def first(m, name, cfg, **options):
        toy.sample(m, cfg=cfg, steps=4, callback=keep(name), **options)
        return seen[name]

    D_c, D_u = first(model, "c", 1.0), first(model, "u", 0.0)
    D_weak = D_c - (first(pag.apply(model, 1.0, "auto", ALWAYS), "w", 1.0) - D_c)
    d = apg.APG(ALWAYS, 0.3, 15.0, 0.0)
    d = d.reshape(D_c - D_u, D_c, None, 1.0)
    D_l = D_c + (0.6 - 1) * d + 3.0 * (D_c - D_weak)
    s, s_next = toy.sigmas(model, 4)[:2]
    expected = (D_l - s_next / s * D_u) / (1 - s_next / s)
    ours = cfgpp.apply(pag.apply(apg.apply(model, 0.3, 15.0, 0.0, ALWAYS), 3.0, "auto", ALWAYS), 0.6, ALWAYS)
    assert near(first(ours, "all", 7.0), expected, 1e-4)


# --- samplers and guiders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler(model, sampler):
    steered = carry(model, ["PAG", "APG"])
    out, plain = (toy.sample(m, sampler=sampler, steps=3) for m in (steered, model))
    assert out.isfinite().all() and not torch.equal(out, plain)


def guider_of(name, model):
    middle = toy.text(3)
    if name == "BasicGuider":
        guider = nodes_custom_sampler.Guider_Basic(model)
        guider.set_conds(toy.POSITIVE)
    elif name.startswith("DualCFGGuider"):
        guider = nodes_custom_sampler.Guider_DualCFG(model)
        guider.set_conds(toy.POSITIVE, middle, toy.NEGATIVE)
        guider.set_cfg(4.0, 2.0, nested=name.endswith("nested"))
    elif name == "PerpNegGuider":
        guider = nodes_perpneg.Guider_PerpNeg(model)
        guider.set_conds(toy.POSITIVE, toy.NEGATIVE, middle)
        guider.set_cfg(5.0, 1.0)
    else:
        if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
            pytest.skip("this host has no DualModelGuider")
        guider = nodes_custom_sampler.Guider_DualModel(model, toy.model(seed=5))
        guider.set_conds(toy.POSITIVE, toy.NEGATIVE)
        guider.set_cfg(1.0 if name.endswith("cfg 1") else 3.0)
    return guider


GUIDERS = [
    "BasicGuider",
    "DualCFGGuider",
    "DualCFGGuider nested",
    "PerpNegGuider",
    "DualModelGuider",
    "DualModelGuider cfg 1",
]


@pytest.mark.parametrize("name", GUIDERS)
def test_what_is_added_is_added_under_every_guider(model, name):
    """One step: D = the guider's own D + s (D_c - D_weak), in as many forwards as without."""

    def run(m):
        with toy.count_forwards(model) as count:
            return toy.sample(m, guider=guider_of(name, m), steps=1), count.calls

    D, calls = run(model)
    steered, with_pag = run(TERMS["PAG"](model))
    share = toy.sample(TERMS["PAG"](model), cfg=1.0, steps=1) - toy.sample(model, cfg=1.0, steps=1)
    assert near(steered - D, share, 1e-4) and with_pag == calls


@pytest.mark.parametrize("name", GUIDERS[1:])
@pytest.mark.parametrize("term", ["APG", "CFG++"])
def test_guiders_that_combine_in_their_own_way_are_refused(model, name, term):
    steered = TERMS[term](model)
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match="Steer.* which Guider_.* combines in its own way; use KSampler"):
            toy.sample(steered, guider=guider_of(name, steered))
    assert count.calls == 0


def test_a_guider_that_goes_around_steering_is_refused(model):
    class Bypass(comfy.samplers.CFGGuider):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    steered = TERMS["APG"](model)
    guider = Bypass(steered)
    guider.set_conds(toy.POSITIVE, toy.NEGATIVE)
    with pytest.raises(ValueError, match="Steer: Bypass reaches the network without the host's PREDICT_NOISE"):
        toy.sample(steered, guider=guider)


# --- functions of other packs -------------------------------------------------------------------------------------


def test_functions_of_others_run_before_and_after(model):
    """pre_cfg edits what is guided, not what PAG compares; post_cfg sees the steered result."""
    seen = {}
    other = TERMS["PAG"](model)

    def pre_cfg(args):
        seen["true"] = args["conds_out"][0].clone()
        return [args["conds_out"][0] + 1.0, args["conds_out"][1]]

    def post_cfg(args):
        seen["steered"] = args["denoised"].clone()
        return args["denoised"] * 0.5

    other.set_model_sampler_pre_cfg_function(pre_cfg)
    other.set_model_sampler_post_cfg_function(post_cfg)
    out = toy.sample(other, cfg=2.0, steps=1)

    plain = toy.sample(model, cfg=2.0, steps=1)
    pag_share = toy.sample(TERMS["PAG"](model), cfg=2.0, steps=1) - plain
    latent = model.model.process_latent_in
    assert near(latent(out), 0.5 * (latent(plain) + 2.0 + latent(pag_share)), 1e-4)
    assert torch.equal(latent(out), seen["steered"] * 0.5) or near(latent(out), seen["steered"] * 0.5, 1e-6)


def test_cfg_function_of_others_gets_the_reshaped_difference(model):
    """APG under RescaleCFG is RescaleCFG of (D_c, D_c - d')."""
    rescaled = nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0]
    rescale = rescaled.model_options["sampler_cfg_function"]

    def oracle(args):
        term = apg.APG(ALWAYS, 0.0, 15.0, 0.0)
        D_c = args["cond_denoised"]
        d = term.reshape(D_c - args["uncond_denoised"], D_c, None, 1.0)
        return rescale({**args, "uncond": args["input"] - (D_c - d), "uncond_denoised": D_c - d})

    expected = model.clone()
    expected.set_model_sampler_cfg_function(oracle)
    ours = apg.apply(rescaled, 0.0, 15.0, 0.0, ALWAYS)
    assert near(toy.sample(ours), toy.sample(expected), 1e-4)
    assert not near(toy.sample(ours), toy.sample(rescaled), 0.05)


def test_calc_cond_batch_function_of_others_is_honoured(model):
    seen = []
    other = TERMS["PAG"](model)

    def theirs(args):
        seen.append(len(args["conds"]))
        keys = ("conds", "input", "sigma", "model_options")
        conds, x, sigma, options = (args[k] for k in keys)
        return comfy.samplers.calc_cond_batch(args["model"], conds, x, sigma, options)

    other.set_model_sampler_calc_cond_batch_function(theirs)
    assert near(toy.sample(other), toy.sample(TERMS["PAG"](model)), 1e-4)
    assert seen == [2] * 4


def test_model_function_wrapper_of_others_knows_the_rows(model):
    seen = set()
    other = TERMS["PAG"](model)

    def theirs(apply_model, args):
        seen.add(tuple(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    other.set_model_unet_function_wrapper(theirs)
    assert torch.equal(toy.sample(other), toy.sample(TERMS["PAG"](model)))
    assert seen == {(0, 1, 0)}


def test_host_cfgpp_samplers_get_the_true_negative(model):
    """They renoise with the negative they find in post_cfg; APG must not have put its own there."""
    steered = apg.apply(model, 1.0, 0.0, 0.0, ALWAYS)  # plain CFG
    a, b = (toy.sample(m, cfg=0.6, sampler="euler_cfg_pp") for m in (steered, model))
    assert near(a, b, 1e-4)
    bent = toy.sample(apg.apply(model, 0.0, 1.0, 0.0, ALWAYS), cfg=1.0, sampler="euler_cfg_pp")
    assert near(bent, toy.sample(model, cfg=1.0, sampler="euler_cfg_pp"), 1e-4)  # at w = 1 APG is D_c


# --- nodes of the host on the same model --------------------------------------------------------------------------


def lora(model):
    model = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    weight = model.model.state_dict()[key]
    model.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1,))})
    return model


CORE = {
    "FreeU": lambda m: nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2).result[0],
    "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0],
    "SAG": lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0).result[0],
    "NAG": lambda m: nodes_nag.NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0],
    "LoRA": lora,
    "EasyCache": lambda m: nodes_easycache.EasyCacheNode.execute(m, 1e-6, 0.15, 0.95, False).result[0],
}


@pytest.mark.parametrize("core", CORE)
@pytest.mark.parametrize("term", ["PAG", "APG", "CFG++"])
def test_core_nodes_and_steer_in_either_order(model, core, term):
    start = toy.noise(height=32, width=32)
    before, after = CORE[core](TERMS[term](model)), TERMS[term](CORE[core](model))
    a, b = toy.sample(before, start=start), toy.sample(after, start=start)
    assert near(a, b, 1e-4) and a.isfinite().all()
    alone = [toy.sample(m, start=start) for m in (TERMS[term](model), CORE[core](model))]
    if core == "EasyCache":  # with this threshold it skips nothing, and must not change anything
        assert near(a, alone[0], 1e-4)
    else:
        assert not near(a, alone[0], 1e-3) and not near(a, alone[1], 1e-3)


def test_nag_acts_on_the_positive_row(model):
    """NAG looks for the first row of the positive: with PAG's row in the batch that must still be the positive."""
    nag, steps = CORE["NAG"](model), 1
    share = toy.sample(nag, steps=steps) - toy.sample(model, steps=steps)
    both = toy.sample(pag.apply(nag, 1e-6, "auto", ALWAYS), steps=steps) - toy.sample(model, steps=steps)
    assert near(both, share, 1e-3)


def test_easycache_does_not_mix_the_branches(model):
    """Without CFG a cache keyed by the positive's uuid would answer the weak row with it, and PAG would vanish."""
    cached = nodes_easycache.EasyCacheNode.execute(model, 50.0, 0.0, 0.99, False).result[0]
    steered = pag.apply(cached, 3.0, "auto", ALWAYS)
    out, plain = (toy.sample(m, cfg=1.0, steps=8) for m in (steered, cached))
    full = toy.sample(TERMS["PAG"](model), cfg=1.0, steps=8) - toy.sample(model, cfg=1.0, steps=8)
    assert (out - plain).std() > 0.3 * full.std()


def test_easycache_still_skips_when_the_window_closes(model):
    cached = nodes_easycache.EasyCacheNode.execute(model, 50.0, 0.0, 0.99, False).result[0]
    ran = []
    handle = model.model.diffusion_model.middle_block[0].register_forward_pre_hook(lambda *a: ran.append(1))
    toy.sample(pag.apply(cached, 3.0, "auto", Schedule(0.0, 0.3)), steps=10)
    handle.remove()
    assert len(ran) < 8


def test_controlnet_is_asked_once_per_step(model):
    control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    positive, negative = ([[c, {**o, "control": control}] for c, o in cond] for cond in (toy.POSITIVE, toy.NEGATIVE))
    calls = []
    handle = control.control_model.register_forward_pre_hook(lambda *a: calls.append(1))
    conds = dict(positive=positive, negative=negative)
    out = toy.sample(carry(model, TERMS), **conds)
    assert len(calls) == 4 and out.isfinite().all()
    handle.remove()
    assert not near(out, toy.sample(carry(model, TERMS)), 1e-3)
    one = toy.sample(TERMS["PAG"](model), steps=1, **conds) - toy.sample(model, steps=1, **conds)
    share = toy.sample(TERMS["PAG"](model), steps=1) - toy.sample(model, steps=1)
    assert not near(one, share, 1e-3)  # the weak row has the ControlNet too


def test_lora_hooks_on_the_positive(model):
    """A LoRA by hook weighs on the positive and its weak row, in one forward; the negative has its own."""
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    shape = model.model.state_dict()[f"{name}.weight"].shape
    g = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.lora_up.weight": torch.randn(shape[0], 4, generator=g),
        f"{name}.lora_down.weight": torch.randn(4, shape[1], generator=g),
    }
    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(toy.POSITIVE, hooks)
    with toy.count_forwards(model) as count:
        hooked = toy.sample(TERMS["PAG"](model), positive=positive)
    assert (count.calls, count.rows) == (8, 12)
    assert not near(hooked, toy.sample(TERMS["PAG"](model)), 1e-3)


def test_context_windows(model):
    """Windows over the items of a batch, which do not know each other, change nothing."""
    windows = nodes_context_windows.ContextWindowsManualNode.execute(
        model, 2, 1, "standard_uniform", 1, False, "flat", 0, False
    ).result[0]
    start = toy.noise(batch=4)
    a, b = (toy.sample(carry(m, TERMS), start=start, steps=2) for m in (windows, model))
    assert near(a, b, 1e-4)


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_nothing_of_a_run_outlives_it(model):
    refs = []
    steered = carry(model, TERMS)

    def post_cfg(args):
        run = args["model_options"]["transformer_options"][RUN]
        refs.append(weakref.ref(run))
        refs.extend(weakref.ref(t) for state in run.state.values() for t in state if torch.is_tensor(t))
        return args["denoised"]

    steered.set_model_sampler_post_cfg_function(post_cfg)
    toy.sample(steered)
    gc.collect()
    assert len(refs) > 4 and all(ref() is None for ref in refs)


def test_the_log_says_what_was_run(model, caplog):
    with caplog.at_level(logging.INFO):
        toy.sample(TERMS["PAG"](model), start=toy.noise(batch=2), steps=3)
    assert "Steer: 3 evaluations, 3 forwards, 18 rows, work of 16.26 single-image forwards " in caplog.text
    assert "(negative 6 rows = 6, positive 6 rows = 6, weak:PAG[middle] 6 rows = 4.258)" in caplog.text


def test_wrappers_are_installed_once(model):
    steered = carry(model, TERMS)
    kinds = comfy.patcher_extension.WrappersMP
    for kind in (kinds.OUTER_SAMPLE, kinds.PREDICT_NOISE, kinds.CALC_COND_BATCH, kinds.APPLY_MODEL):
        assert len(steered.get_wrappers(kind, "steer")) == 1
        assert not model.get_wrappers(kind, "steer")
