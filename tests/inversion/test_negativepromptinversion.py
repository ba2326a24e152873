import pytest
import torch
import toy
from steer.patches.inversion import negativepromptinversion as npi


def near(a, b):
    return torch.allclose(a, b, atol=1e-4 * float(b.std()), rtol=1e-4)


@pytest.mark.parametrize("model", [toy.model(), toy.flux()], ids=["unet", "flux"])
@pytest.mark.parametrize("cfg", [2.0, 7.5])
def test_under_the_prompt_of_the_source_guidance_is_the_conditional_prediction(model, cfg):
    start = toy.noise(height=8, width=8)
    guided = toy.sample(model, cfg, start=start, negative=npi.apply(toy.POSITIVE))
    assert near(guided, toy.sample(model, 1.0, start=start))
    assert not near(toy.sample(model, cfg, start=start), guided)


def test_an_edit_is_pushed_off_the_source():
    """The paper's equation: D(source) + w (D(target) - D(source))."""
    model, start = toy.model(), toy.noise(height=8, width=8)
    sigmas = torch.tensor([4.0, 0.0])  # one step ends at D
    source, target = toy.text(5), toy.POSITIVE
    D_source, D_target = (toy.sample(model, 1.0, positive=c, start=start, sigmas=sigmas) for c in (source, target))
    out = toy.sample(model, 6.0, negative=npi.apply(source), start=start, sigmas=sigmas)
    assert near(out, D_source + 6 * (D_target - D_source))


def test_interpolation_is_slerp_of_the_whole_matrix_of_tokens():
    a, b = toy.text(1), toy.text(2)
    (made, options), = npi.apply(a, b, 0.3)
    u, v = a[0][0].flatten(), b[0][0].flatten()
    angle = (u @ v / u.norm() / v.norm()).acos()
    expected = ((0.7 * angle).sin() * u + (0.3 * angle).sin() * v) / angle.sin()
    assert torch.allclose(made.flatten(), expected, atol=1e-5)
    p, q = (c[0][1]["pooled_output"].flatten() for c in (a, b))
    angle = (p @ q / p.norm() / q.norm()).acos()
    expected = ((0.7 * angle).sin() * p + (0.3 * angle).sin() * q) / angle.sin()
    assert torch.allclose(options["pooled_output"].flatten(), expected, atol=1e-5)


def test_the_ends_and_parallel_prompts():
    a, b = toy.text(1, area=(4, 4, 0, 0)), toy.text(2)
    assert npi.apply(a) is a and npi.apply(a, b, 0.0) is a
    (made, options), = npi.apply(a, b, 1.0)
    assert torch.allclose(made, b[0][0], atol=1e-6) and options["area"] == (4, 4, 0, 0)
    (same, _), = npi.apply(a, a, 0.4)
    assert torch.allclose(same, a[0][0], atol=1e-6)
    doubled = [[3 * a[0][0], {}]]
    (between, options), = npi.apply(a, doubled, 0.5)
    assert torch.allclose(between, 2 * a[0][0], atol=1e-4) and torch.equal(
        options["pooled_output"], a[0][1]["pooled_output"])


def test_what_was_wired_is_not_changed():
    a, b = toy.text(1), toy.text(2)
    npi.apply(a, b, 0.5)
    for given, fresh in ((a, toy.text(1)), (b, toy.text(2))):
        assert torch.equal(given[0][0], fresh[0][0])
        assert torch.equal(given[0][1]["pooled_output"], fresh[0][1]["pooled_output"])


@pytest.mark.parametrize("arguments, says", [
    (([],), "the source prompt is empty"),
    ((toy.POSITIVE, None, 0.5), "interpolation 0.5 is towards a negative, and there is none"),
    ((toy.POSITIVE, toy.NEGATIVE, 1.5), "interpolation 1.5 must be a finite number from 0 to 1"),
    ((toy.POSITIVE, toy.NEGATIVE, float("nan")), "interpolation nan"),
    ((toy.POSITIVE, toy.text(2, tokens=154), 0.5), "has 77 tokens of width 64, the negative 154"),
    ((toy.POSITIVE, toy.text(2, width=32), 0.5), "of width 64, the negative 77 of width 32"),
    ((toy.POSITIVE + toy.NEGATIVE, toy.NEGATIVE, 0.5), "has 2 parts and the negative 1"),
])
def test_nonsense_is_refused(arguments, says):
    with pytest.raises(ValueError, match=f"SteerNegativePromptInversion: .*{says}"):
        npi.apply(*arguments)


def test_the_node_in_the_host(run_prompt):
    text = lambda words: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": words}}  # noqa: E731
    done = run_prompt({
        "1": {"class_type": "SteerLabModel", "inputs": {"model": "unet"}},
        "2": text("a comic portrait"),
        "3": text(""),
        "4": {"class_type": "SteerNegativePromptInversion",
              "inputs": {"source": ["2", 0], "negative": ["3", 0], "interpolation": 0.5}},
    })
    made, source, negative = (done[i][0][0][0] for i in ("4", "2", "3"))
    assert torch.allclose(made, npi.slerp(source, negative, 0.5))
    assert not torch.allclose(made, source, atol=0.1) and not torch.allclose(made, negative, atol=0.1)
