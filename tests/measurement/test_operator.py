"""Operators against what is written out, their inverses, and chains of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from steer.patches.measurement.operator import KINDS, operator


def pictures(n=2, size=16, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def half(size=16):
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


def made(kind, **options):
    return operator(kind, mask=half() if kind == "mask" else None, **options)


def test_they_are_what_they_say():
    x = pictures()
    small = made("downsample", factor=4)(x)
    assert torch.allclose(small[1, 2, 3, 0], x[1, 2, 12:16, :4].mean())
    assert torch.equal(made("mask")(x), x * half())
    assert torch.allclose(made("grayscale")(x), 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:])
    mirrored = F.pad(x, (4, 4, 4, 4), mode="reflect")
    kernel = torch.exp(-torch.arange(-4, 5).float() ** 2 / (2 * 0.7**2))
    kernel = (kernel / kernel.sum())[:, None] * (kernel / kernel.sum())[None]
    by_hand = F.conv2d(mirrored, kernel.expand(3, 1, 9, 9), groups=3)
    assert torch.allclose(made("blur", sigma=0.7)(x)[..., 5:-5, 5:-5], by_hand[..., 5:-5, 5:-5], atol=2e-3)
    found = made("Fourier magnitude")(x)
    moved = x.roll((3, 5), (-2, -1))  # the phase is what is lost
    assert torch.allclose(found, made("Fourier magnitude")(moved), atol=1e-4)
    assert float(found.square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-4)
    assert made("random projection", share=0.25)(x).shape == (2, 48, 4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("blur", "Fourier magnitude")])
def test_the_inverse_is_the_smallest_that_meets_it(kind):
    x, op = pictures(), made(kind)
    y = op(x)
    back = op.pinv(y, x)
    assert torch.allclose(op(back), y, atol=1e-5)
    rest = x - back  # what is not seen; A^+ y is at right angles to it
    assert abs(float((rest * back).sum())) < 1e-3 * float(back.square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_and_batches(kind):
    x, op = pictures(), made(kind)
    assert torch.allclose(op(x)[1:], op(x[1:]), atol=1e-6)
    x = x.double().requires_grad_()
    way = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    (slope,) = torch.autograd.grad(op(x).square().sum(), x)
    h = 1e-4
    with torch.no_grad():
        difference = (op(x + h * way).square().sum() - op(x - h * way).square().sum()) / (2 * h)
    assert float((slope * way).sum()) == pytest.approx(float(difference), rel=1e-3)


def test_one_after_another():
    x, small = pictures(), made("downsample", factor=2)
    grey = operator("grayscale", after=small)
    assert torch.allclose(grey(x), made("grayscale")(small(x)))
    assert torch.allclose(grey(grey.pinv(grey(x), x)), grey(x), atol=1e-5)
    assert grey != operator("grayscale", after=made("downsample", factor=4)) and hash(grey) == hash(grey)


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("sharpen", {}, "kind 'sharpen' is unknown; choose one of downsample"),
        ("downsample", {"factor": 1}, "factor 1 must be a finite number from 2"),
        ("blur", {"sigma": math.nan}, "sigma nan must be"),
        ("random projection", {"share": 1.5}, "share 1.5 must be a finite number from 0 to 1"),
        ("mask", {}, "wire a mask for the kind mask"),
        ("blur", {"mask": half()}, "wire a mask for the kind mask"),
    ],
)
def test_bad_input(kind, options, says):
    with pytest.raises(ValueError, match=f"SteerOperator: {says}"):
        operator(kind, **options)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="takes sizes that divide by 4, and this is 18x18"):
        made("downsample")(pictures(size=18))
    with pytest.raises(ValueError, match="needs pictures with 3 channels, and this has 4"):
        made("grayscale")(pictures(channels=4))
    with pytest.raises(ValueError, match="blur has no inverse .* set mode to soft"):
        made("blur").pinv(pictures(), pictures())
