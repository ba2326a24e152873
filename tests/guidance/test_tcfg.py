import pytest
import torch
import toy
from comfy_extras.nodes_tcfg import score_tangential_damping
from steer.patches.guidance import apg, tcfg
from steer.patches.shared.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, strength=1.0, schedule=Schedule()):
    return tcfg.apply(model, strength, schedule)


def svd(eps_u, eps_c):
    """The paper's eps_u', item by item in float64."""
    out = []
    for u, c in zip(eps_u.double(), eps_c.double(), strict=True):
        v = torch.linalg.svd(torch.stack([u.flatten(), c.flatten()]), full_matrices=False)[2][0]
        out.append(((u.flatten() @ v) * v).view_as(u))
    return torch.stack(out)


def oracle(model, strength):
    """The paper's formula as a cfg function of the host, which hands x - D."""

    def cfg_function(args):
        eps_u, eps_c = args["uncond"].double(), args["cond"].double()
        eps_u = eps_u + strength * (svd(eps_u, eps_c) - eps_u)
        return (eps_u + args["cond_scale"] * (eps_c - eps_u)).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equals_the_papers_formula(kind, strength):
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    ours = toy.sample(steered(model, strength), start=start, steps=6)
    theirs = toy.sample(oracle(model, strength), start=start, steps=6)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    assert not torch.allclose(ours, toy.sample(model, start=start, steps=6), rtol=1e-2)


def test_on_a_flow_transformer():
    model = toy.flux()
    ours, theirs = toy.sample(steered(model)), toy.sample(oracle(model, 1.0))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))


@pytest.mark.parametrize("shape", [(3, 8, 50), (3, 4, 8, 8), (3, 4, 3, 6, 6)], ids=["audio", "image", "video"])
@pytest.mark.parametrize("size", [1e2, 1.0, 1e-3])
def test_closed_form_is_the_svd(shape, size):
    """Also where both are nearly parallel, as predictions at high noise are, and of very unlike length."""
    g = torch.Generator().manual_seed(1)
    c = torch.randn(shape, generator=g)
    d = torch.randn(shape, generator=g) * size
    assert torch.allclose(tcfg.damped(c + d, c, d).double(), svd(c + d, c), atol=1e-5 * (1 + size))
    # what is taken away is orthogonal to what stays
    taken = c + d - tcfg.damped(c + d, c, d)
    assert (tcfg.dot(taken, tcfg.damped(c + d, c, d)).abs() < 1e-4 * tcfg.dot(c + d, c + d)).all()


def test_what_is_across_is_halved_when_both_are_nearly_alike():
    """c + d with d across c and a thousandth of it: v lies half way, and half of d stays. Of d along c, all stays."""
    g = torch.Generator().manual_seed(1)
    c, d = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    d = 1e-3 * (d - apg.project(d, c))
    kept = tcfg.damped(c + d, c, d)
    assert (kept - c - d / 2).norm() < 2e-3 * d.norm()
    assert (kept.double() - svd(c.double() + d.double(), c)).norm() < 1e-3 * d.norm()
    assert torch.allclose(tcfg.damped(1.001 * c, c, 0.001 * c), 1.001 * c, atol=1e-6)


def test_equals_the_hosts_own_formula():
    g = torch.Generator().manual_seed(2)
    u, c = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    assert torch.allclose(tcfg.damped(u, c, u - c), score_tangential_damping(c, u), atol=1e-5)


def test_nothing_undefined():
    """Equal, opposite, zero, and orthogonal predictions of one length, where any direction is as good."""
    zero, one = torch.zeros(1, 1, 2, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    assert torch.equal(tcfg.damped(one, one, zero), one)
    assert torch.allclose(tcfg.damped(-one, one, -2 * one), -one)
    assert torch.equal(tcfg.damped(zero, zero, zero), zero)
    assert torch.equal(tcfg.damped(zero, one, -one), zero)
    assert torch.equal(tcfg.damped(one, zero, one), one)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(tcfg.damped(a, b, a - b), a)


def test_equal_prompts_change_nothing(model):
    ours, plain = (toy.sample(m, negative=toy.POSITIVE) for m in (steered(model), model))
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.std()))


def test_apg_reshapes_what_it_leaves(model):
    """APG's part parallel to D_c and its norm are those of the damped difference, whichever node comes first."""
    args = 0.0, 2.0, -0.5, Schedule()
    ours = toy.sample(steered(apg.apply(model, *args)))
    assert torch.equal(ours, toy.sample(apg.apply(steered(model), *args)))

    def damp(args):  # before all of Steer, as another pack does it
        x, (positive, negative) = args["input"], args["conds_out"]
        return [positive, x - svd(x - negative, x - positive).float()]

    before = model.clone()
    before.set_model_sampler_pre_cfg_function(damp)
    theirs = toy.sample(apg.apply(before, *args))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    assert not torch.allclose(ours, toy.sample(apg.apply(model, *args)), rtol=1e-2)


def test_a_curve_blends_with_cfg(model):
    full, plain = toy.sample(steered(model), steps=1), toy.sample(model, steps=1)
    half = toy.sample(steered(model, schedule=Schedule(curve=(0.25, 0.25))), steps=1)
    assert torch.allclose(half, plain.lerp(full, 0.25), rtol=1e-4, atol=1e-4 * float(plain.std()))


def test_no_forward_of_its_own_and_nothing_at_cfg_one(model):
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=1.0)
    assert (count.calls, count.rows) == (4, 4)
    assert torch.equal(out, toy.sample(model, cfg=1.0))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_numbers_raise(model, strength):
    with pytest.raises(ValueError, match="SteerTCFG: strength .* from 0 to 1"):
        steered(model, strength)
