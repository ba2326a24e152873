import pytest
import torch
import toy
from steer.patches.guidance import apg, fdg, pag
from steer.patches.shared.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, low=5.0, high=10.0, levels=1, schedule=Schedule()):
    return fdg.apply(model, low, high, levels, schedule)


def pyramid_matrix(n):
    """Blur, halve, double and blur of a line of n numbers as an n x n matrix, written down number by number."""
    taps = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]

    def blur(n):
        m = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for k, tap in enumerate(taps):
                m[i, min(max(i + k - 2, 0), n - 1)] += tap
        return m

    def resize(n, to):
        m = torch.zeros(to, n, dtype=torch.float64)
        for i in range(to):
            at = max((i + 0.5) * n / to - 0.5, 0.0)
            j = min(int(at), n - 1)
            m[i, j] += 1 - (at - j)
            m[i, min(j + 1, n - 1)] += at - j
        return m

    half = (n + 1) // 2
    return blur(n) @ resize(half, n) @ resize(n, half) @ blur(n)


def low_pass(d):
    """The coarse band of [..., H, W] in float64."""
    rows, columns = pyramid_matrix(d.shape[-2]), pyramid_matrix(d.shape[-1])
    return rows @ d.double() @ columns.T


def oracle(model, low, high):
    """D_c + sum of (w_k - 1) psi_k(D_c - D_u) as a cfg function of the host."""

    def cfg_function(args):
        D_c, D_u = args["cond_denoised"].double(), args["uncond_denoised"].double()
        coarse = low_pass(D_c) - low_pass(D_u)
        fine = D_c - D_u - coarse
        return args["input"] - (D_c + (low - 1) * coarse + (high - 1) * fine).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function, disable_cfg1_optimization=True)
    return model


def near(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.std()))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("low, high", [(5.0, 10.0), (7.0, 1.0), (1.0, 4.0), (0.0, 2.0), (-1.0, 3.0)])
def test_equals_the_papers_formula(kind, low, high):
    model, start = toy.model(kind=kind), toy.noise(batch=2, height=13, width=18)
    ours = toy.sample(steered(model, low, high), start=start)
    assert near(ours, toy.sample(oracle(model, low, high), start=start))
    assert not torch.allclose(ours, toy.sample(model, start=start), rtol=1e-2)


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model)), toy.sample(oracle(model, 5.0, 10.0)))


@pytest.mark.parametrize("cfg", [1.0, 3.0, 12.0])
def test_the_samplers_cfg_is_not_used(model, cfg):
    """Not even cfg 1, where the host leaves the negative out and peers take zeros for it."""
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=cfg)
    assert torch.equal(out, toy.sample(steered(model), cfg=5.0))
    assert (count.calls, count.rows) == (4, 8)


@pytest.mark.parametrize("w", [1.0, 2.0, 7.5])
def test_equal_scales_are_cfg(model, w):
    ours, cfg = toy.sample(steered(model, w, w), cfg=4.0), toy.sample(model, cfg=w)
    assert torch.allclose(ours, cfg, rtol=1e-4, atol=1e-5 * float(cfg.std()))


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 9, 6), (2, 3, 2, 6, 5), (1, 4, 1, 1)])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_bands_of_any_shape(shape, levels):
    """Constants are low, whatever the border and the size; what alternates is high; items and frames are apart."""
    ones = torch.full(shape, 3.0)
    assert torch.allclose(fdg.smooth(ones, levels), ones)
    d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    both = fdg.smooth(d, levels)
    assert both.shape == d.shape
    for i in range(shape[0]):
        assert torch.allclose(fdg.smooth(d[i : i + 1], levels), both[i : i + 1], atol=1e-6)
    if len(shape) == 5:
        assert torch.allclose(fdg.smooth(d[:, :, 1], levels), both[:, :, 1], atol=1e-6)


def test_one_level_is_the_pyramid_and_each_more_is_lower():
    d = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fdg.smooth(d, 1).double(), low_pass(d), atol=1e-6)
    energy = [float(fdg.smooth(d, levels).var()) for levels in range(1, 5)]
    assert all(2 * after < before for before, after in zip(energy, energy[1:], strict=False))
    checkers = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).mul(2.0).sub(1).expand(1, 1, 32, 32)
    assert fdg.smooth(checkers, 1)[..., 6:-6, 6:-6].abs().max() < 1e-6


def test_levels_matter(model):
    assert not torch.equal(toy.sample(steered(model, levels=3)), toy.sample(steered(model)))


def test_a_curve_blends_with_the_samplers_cfg(model):
    full, plain = toy.sample(steered(model), steps=1, cfg=3.0), toy.sample(model, steps=1, cfg=3.0)
    half = toy.sample(steered(model, schedule=Schedule(curve=(0.25, 0.25))), steps=1, cfg=3.0)
    assert torch.allclose(half, plain.lerp(full, 0.25), rtol=1e-4, atol=1e-4 * float(plain.std()))


def test_splits_what_apg_leaves(model):
    ours = toy.sample(apg.apply(steered(model), 0.0, 2.0, 0.0, Schedule()))

    def reshape(args):
        x, positive, negative = args["input"], args["cond_denoised"], args["uncond_denoised"]
        d = positive - negative
        d = d * (2.0 / apg.norm(d)).clamp(max=1.0)
        d = d - apg.project(d, positive)
        coarse = low_pass(d).float()
        return x - (positive + 4.0 * coarse + 9.0 * (d - coarse))

    theirs = model.clone()
    theirs.set_model_sampler_cfg_function(reshape)
    assert near(ours, toy.sample(theirs))


def test_adds_to_pag(model):
    """What PAG adds has a scale of its own, and comes on top."""
    both = pag.apply(steered(model, 4.0, 4.0), 2.0, "auto", Schedule())
    assert near(toy.sample(both), toy.sample(pag.apply(model, 2.0, "auto", Schedule()), cfg=4.0))


def test_equal_prompts_are_defined(model):
    ours, plain = (toy.sample(m, negative=toy.POSITIVE) for m in (steered(model), model))
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.std()))


@pytest.mark.parametrize("name, value", [("low", float("nan")), ("high", float("inf")), ("levels", 0), ("levels", 9)])
def test_bad_numbers_raise(model, name, value):
    with pytest.raises(ValueError, match=f"SteerFDG: {name} .* must be a finite number"):
        steered(model, **{name: value})
