"""Methods together: the order of nodes does not matter, each prediction is made once, and the sum is the formula."""

from itertools import islice, permutations

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
import toy
from steer.patches.guidance import (
    apg,
    autoguidance,
    betacfg,
    cfgpp,
    cfgzerostar,
    fdg,
    guidanceschedule,
    negative,
    pag,
    rescale,
    sag,
    seg,
    slg,
    tag,
    tcfg,
)
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
EARLY = Schedule(0.0, 0.5)
N1, N2 = toy.text(11), toy.text(12)
WEAK = toy.model(seed=9)
TERMS = {
    "PAG": lambda m: pag.apply(m, 3.0, "auto", ALWAYS),
    "PAG late block": lambda m: pag.apply(m, 1.0, "output.2", EARLY),
    "SEG": lambda m: seg.apply(m, 2.0, 3.0, "middle", ALWAYS),
    "SLG": lambda m: slg.apply(m, 1.0, "input.3", EARLY),
    "SAG": lambda m: sag.apply(m, 0.5, 2.0, ALWAYS),
    "APG": lambda m: apg.apply(m, 0.0, 15.0, -0.5, ALWAYS),
    "TCFG": lambda m: tcfg.apply(m, 1.0, ALWAYS),
    "CFG-Zero*": lambda m: cfgzerostar.apply(m, 0.0, ALWAYS),
    "beta-CFG": lambda m: betacfg.apply(m, 2.0, 2.0, 0.0, True, ALWAYS),
    "FDG": lambda m: fdg.apply(m, 3.0, 8.0, 1, ALWAYS),
    "rescale": lambda m: rescale.apply(m, 0.7, ALWAYS),
    "CFG++": lambda m: cfgpp.apply(m, 0.6, ALWAYS),
    "TAG": lambda m: tag.apply(m, 0.3, ALWAYS),
    "schedule": lambda m: guidanceschedule.apply(m, 2.0, 7.0, "custom", EARLY),
    "negative": lambda m: negative.apply(m, N1, 2.0, ALWAYS),
    "negative 2": lambda m: negative.apply(m, N2, 1.0, EARLY),
    "AutoGuidance": lambda m: autoguidance.apply(m, WEAK, 1.0, ALWAYS),
}
# rows early and late in the run, beside positive and negative; AutoGuidance and SAG ask in a call of their own
EXTRA = {name: (1, 1) for name in ("PAG", "SEG", "negative")}
EXTRA |= {name: (1, 0) for name in ("PAG late block", "SLG", "negative 2")}
COMBINATIONS = [
    ("PAG", "APG"),
    ("PAG", "SEG", "SLG"),
    ("PAG", "PAG late block", "rescale"),
    ("APG", "TCFG", "CFG-Zero*"),
    ("APG", "FDG", "rescale"),
    ("TCFG", "CFG++", "TAG"),
    ("negative", "negative 2", "PAG"),
    ("negative", "schedule", "rescale"),
    ("beta-CFG", "SEG", "TAG"),
    ("SAG", "PAG", "APG"),
    ("AutoGuidance", "PAG", "negative"),
    ("APG", "TCFG", "PAG", "SLG", "rescale", "TAG"),
    ("PAG", "SEG", "negative", "negative 2", "AutoGuidance"),
]
STEPS = 4


@pytest.fixture(scope="module")
def model():
    return toy.model()


def carry(model, names):
    for name in names:
        model = TERMS[name](model)
    return model


def near(a, b, share=1e-4):
    return (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_order_of_nodes_does_not_matter(model, names):
    """To the last bit, in every order; beyond three nodes in eight that begin with each other."""
    orders = list(permutations(names))
    orders = orders if len(names) <= 3 else list(islice(orders, 0, None, len(orders) // 8))
    outputs = [toy.sample(carry(model, order), steps=2) for order in orders]
    assert outputs[0].isfinite().all()
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_forwards_are_the_union(model, names):
    sampling = model.get_model_object("model_sampling")
    edge = float(sampling.percent_to_sigma(0.5))
    early = [float(sigma) > edge for sigma in toy.sigmas(model, STEPS)[:-1]]
    rows = sum(2 + sum(EXTRA.get(name, (0, 0))[0 if is_early else 1] for name in names) for is_early in early)
    with toy.count_forwards(model) as ours, toy.count_forwards(WEAK) as weak:
        toy.sample(carry(model, names), steps=STEPS)
    second = STEPS * ("SAG" in names)
    assert (ours.calls, ours.rows) == (STEPS + second, rows + second)
    assert (weak.calls, weak.rows) == (STEPS * ("AutoGuidance" in names),) * 2


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_sum_is_the_formula(model, cfg):
    """CFG + PAG + SEG + two negatives + AutoGuidance, each prediction in a forward of its own, and summed by hand."""

    def blurred(q, k, v, extra):
        rows, columns = (seg.gaussian(8, 3.0, q) for _ in "hw")
        grid = q.view(-1, 8, 8, q.shape[-1])
        q = torch.einsum("ij,kl,bjlc->bikc", rows, columns, grid).reshape(q.shape)
        return comfy.ldm.modules.attention.attention_basic(q, k, v, extra["n_heads"])

    def by_hand(args):
        x, sigma, options = args["input"], args["sigma"], args["model_options"]

        def D(conds, options=options, network=args["model"]):
            return comfy.samplers.calc_cond_batch(network, [conds], x, sigma, options)[0]

        def weak(attention):
            return D(
                args["cond"],
                comfy.model_patcher.set_model_options_patch_replace(options.copy(), attention, "attn1", "middle", 0),
            )

        def text(conditioning):
            (c,) = args["cond"]
            cross = comfy.conds.CONDCrossAttn(conditioning[0][0])
            return D([{**c, "model_conds": {**c["model_conds"], "c_crossattn": cross}}])

        D_p, D_0 = D(args["cond"]), text(toy.NEGATIVE)
        out = D_0 + cfg * (D_p - D_0)
        out = out + 3.0 * (D_p - weak(lambda q, k, v, extra: v)) + 2.0 * (D_p - weak(blurred))
        out = out - 2.0 * (text(N1) - D_0) - 1.0 * (text(N2) - D_0)
        return out + 1.0 * (D_p - D(args["cond"], network=WEAK.model))

    oracle = model.clone()
    oracle.set_model_sampler_post_cfg_function(by_hand)
    oracle.set_additional_models("weak", [WEAK])
    WEAK.pre_run()
    expected = toy.sample(oracle, cfg=cfg, steps=2)
    WEAK.cleanup()
    ours = carry(model, ("negative 2", "AutoGuidance", "PAG", "negative", "SEG"))
    assert near(toy.sample(ours, cfg=cfg, steps=2), expected, 1e-3)


@pytest.mark.parametrize("pair", [("CFG++", "FDG"), ("CFG++", "beta-CFG"), ("FDG", "beta-CFG")], ids="+".join)
def test_two_weights_for_one_difference_are_refused(model, pair):
    with pytest.raises(ValueError, match="sets the guidance weight, and so does Steer.*; keep one, or give them w"):
        toy.sample(carry(model, pair))


@pytest.mark.parametrize("name", ["APG", "TCFG", "rescale"])
def test_a_term_that_can_do_nothing_says_so_once(model, name, caplog):
    toy.sample(carry(model, [name]), cfg=1.0, steps=3)
    assert caplog.text.count("has no effect in this run: cfg is 1, and it acts on what cfg adds") == 1


def test_a_window_that_no_step_falls_into_says_so_once(model, caplog):
    toy.sample(pag.apply(model, 3.0, "auto", Schedule(0.0101, 0.0102)), steps=3)
    assert caplog.text.count("SteerPAG has no effect in this run: none of the 3 steps falls into its window") == 1
