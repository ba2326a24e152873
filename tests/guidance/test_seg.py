import comfy.model_patcher
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras import nodes_hypertile
from steer.patches.guidance import seg
from steer.patches.shared.attention import AttnCall
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


@pytest.fixture(scope="module")
def model():
    return toy.model()


def near(a, b, share=1e-5):
    return (a - b).abs().max() <= share * b.abs().max()


def call(h=6, w=5, text=0, sigma_dims=8):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, text + h * w, sigma_dims, generator=g) for _ in "qkv")
    kind, shape = "joint" if text else "self", (2, 4, 2 * h, 2 * w)
    return AttnCall(q, k, v, 2, Layer("middle", 0), kind, text=(0, text), image=(text, None), shape=shape)


@pytest.mark.parametrize("n, sigma", [(8, 0.7), (5, 2.0), (9, 30.0), (1, 3.0), (2, 1.0)])
def test_blur_is_the_mirrored_gaussian(n, sigma):
    """Against the sum written out: mirrored about the end points, as reflect padding does, as far as it takes."""
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reach, period = int(-(-4 * sigma // 1)), max(2 * n - 2, 1)
    weights = {d: torch.exp(torch.tensor(-0.5 * (d / sigma) ** 2)) for d in range(-reach, reach + 1)}
    total = sum(weights.values())
    expected = []
    for i in range(n):
        places = {d: (i + d) % period for d in weights}
        mirrored = {d: min(place, period - place) if n > 1 else 0 for d, place in places.items()}
        expected.append(sum(w * x[mirrored[d]] for d, w in weights.items()) / total)
    assert torch.allclose(seg.gaussian(n, sigma, x) @ x, torch.stack(expected).double(), atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 4.0, 999.0])
def test_blurred_queries_are_a_blurred_map(sigma):
    """Before the softmax, blurring queries is blurring the map along them (section 4.3)."""
    plain = call()
    blurred = seg.BlurredQueries(sigma)(plain)
    weights = lambda c: (c.q @ c.k.mT).view(2, 6, 5, 30)  # noqa: E731
    rows, columns = (seg.gaussian(n, sigma, plain.q) for n in (6, 5))
    expected = torch.einsum("ij,bjwm->biwm", rows, torch.einsum("ij,bhjm->bhim", columns, weights(plain)))
    assert torch.allclose(weights(blurred), expected, atol=1e-4)


def test_limits_of_the_blur():
    plain = call()
    mean = plain.q.mean(1, keepdim=True).expand_as(plain.q)
    assert torch.allclose(seg.BlurredQueries(seg.MEAN)(plain).q, mean, atol=1e-6)
    wide = seg.BlurredQueries(300.0)(plain).q
    assert torch.allclose(wide, wide[:, :1].expand_as(wide), atol=1e-3)  # all tokens alike
    assert torch.allclose(seg.BlurredQueries(0.05)(plain).q, plain.q, atol=1e-6)


def test_text_tokens_keep_their_queries():
    plain = call(text=7)
    blurred = seg.BlurredQueries(5.0)(plain)
    assert torch.equal(blurred.q[:, :7], plain.q[:, :7]) and not torch.allclose(blurred.q[:, 7:], plain.q[:, 7:])
    assert torch.equal(blurred.k, plain.k) and torch.equal(blurred.v, plain.v)


def test_equals_replaced_attention_in_a_forward_of_its_own(model, monkeypatch):
    """The oracle blurs with the textbook convolution: reflect padding, a kernel of 9 taps (sigma 1)."""

    def blurred(q, k, v, extra):
        b, n, c = q.shape
        grid = q.mT.reshape(b * c, 1, 8, n // 8)
        taps = torch.exp(-0.5 * torch.arange(-4, 5).float() ** 2)
        kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        grid = torch.nn.functional.conv2d(torch.nn.functional.pad(grid, (4, 4, 4, 4), mode="reflect"), kernel)
        q = grid.reshape(b, c, n).mT
        return comfy.ldm.modules.attention.attention_basic(q, k, v, extra["n_heads"])

    def post_cfg(args):
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), blurred, "attn1", "middle", 0
        )
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - weak) * 3.0

    oracle = model.clone()
    oracle.set_model_sampler_post_cfg_function(post_cfg)
    start = toy.noise(height=16, width=24)
    ours = toy.sample(seg.apply(model, 3.0, 1.0, "middle", ALWAYS), start=start)
    assert near(ours, toy.sample(oracle, start=start), 1e-4)
    assert not near(ours, toy.sample(model, start=start), 1e-3)


@pytest.mark.parametrize("size", [(96, 24), (9, 33)])
@pytest.mark.parametrize("sigma", [6.0, 100.0, 1000.0])
def test_wide_and_tall_pictures(model, size, sigma):
    """Where kernels cut by the width alone cannot be padded."""
    for height, width in (size, size[::-1]):
        start = toy.noise(height=height, width=width)
        out = toy.sample(seg.apply(model, 3.0, sigma, "auto", ALWAYS), steps=1, start=start)
        assert out.isfinite().all()


@pytest.mark.parametrize("layers", ["output.0-3", "middle, input.1"])
def test_other_layers(model, layers):
    out, middle = (toy.sample(seg.apply(model, 3.0, 10.0, name, ALWAYS)) for name in (layers, "middle"))
    assert out.isfinite().all() and not near(out, middle, 1e-3)


def test_tiles_in_the_batch_are_refused(model):
    """HyperTile takes the picture apart before attention: there is no grid to blur over."""
    tiled = nodes_hypertile.HyperTile.execute(model, 32, 1, 0, False)[0]
    steered = seg.apply(tiled, 3.0, 10.0, "output.3", ALWAYS)
    with pytest.raises(ValueError, match="image tokens in layer output.3 do not cover the latent"):
        toy.sample(steered, start=toy.noise(height=32, width=32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_values(model, value):
    with pytest.raises(ValueError, match="SteerSEG: scale .* finite number from 0"):
        seg.apply(model, value, 100.0, "auto", ALWAYS)
    with pytest.raises(ValueError, match="SteerSEG: blur_sigma .* finite number from 0"):
        seg.apply(model, 3.0, value, "auto", ALWAYS)
