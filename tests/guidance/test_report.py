import pytest
import toy
from steer.patches.guidance import apg, cfgpp, pag, report, sag
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


@pytest.fixture(scope="module")
def model():
    return toy.model()


def test_says_terms_in_the_order_in_which_they_act(model):
    steered = cfgpp.apply(pag.apply(apg.apply(model, 0.0, 15.0, -0.5, ALWAYS), 3.0, "auto", ALWAYS), 0.6, ALWAYS)
    text = report.describe(steered)
    assert text.startswith("BaseModel carries 3 terms of steering")
    places = [text.index(line) for line in ("reshapes", "sets the guidance weight", "adds a", "sets the step")]
    assert places == sorted(places)
    assert "SteerAPG (eta 0.0, r 15.0, beta -0.5) from 0% to 100%" in text


def test_a_bare_model(model):
    assert report.describe(model) == (
        "BaseModel carries 0 terms of steering\nForwards per step\n  0% to 100%: 2 rows in 1 call (positive, negative)"
    )


@pytest.mark.parametrize("cfg", [True, False])
def test_predicted_rows_are_the_rows_that_run(model, cfg):
    steered = pag.apply(pag.apply(model, 3.0, "auto", Schedule(0.0, 0.4)), 1.0, "output.1", Schedule(0.2, 0.7))
    text = report.describe(steered, cfg)
    windows = [line.split() for line in text.splitlines() if "rows in 1 call" in line]
    rows = {(float(w[0][:-1]) / 100, float(w[2][:-2]) / 100): int(w[3]) for w in windows}
    assert list(rows) == [(0.0, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 1.0)]
    sampling = model.get_model_object("model_sampling")
    predicted = 0
    for sigma in toy.sigmas(model, 20)[:-1].tolist():
        predicted += next(
            n
            for (first, last), n in rows.items()
            if sigma <= sampling.percent_to_sigma(first) and (last == 1.0 or sigma > sampling.percent_to_sigma(last))
        )
    with toy.count_forwards(model) as count:
        toy.sample(steered, cfg=5.0 if cfg else 1.0, steps=20)
    assert count.rows == predicted and count.calls == 20


def test_says_what_is_shared_and_switches_it(model):
    steered = pag.apply(model, 3.0, "middle", ALWAYS)
    assert "weak:PAG[middle] is the positive up to middle (block 8 of 18)" in report.describe(steered)
    off = report.sharing(steered, False)
    assert "Weak rows are computed from the start: sharing is switched off" in report.describe(off)
    seen = []
    first = model.model.diffusion_model.input_blocks[0][0]
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    late = model.model.diffusion_model.input_blocks[1][0]
    other = late.in_layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    for m in (steered, off, report.sharing(off, True)):
        toy.sample(m, steps=1)
    handle.remove(), other.remove()
    assert seen[1::2] == [2, 3, 2]


def test_calls_of_their_own_are_counted(model):
    text = report.describe(sag.apply(model, 0.5, 2.0, ALWAYS))
    assert "2 rows in 1 call (positive, negative), and 1 row in a call of its own (a second look for SteerSAG)" in text


def test_names_what_other_nodes_left(model):
    other = model.clone()
    other.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    assert "sampler_post_cfg_function: after Steer" in report.describe(other)
