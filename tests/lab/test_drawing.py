"""What a network draws while it is trained."""

import random

import torch
from steer.models.lab import drawing, load


def test_drawings_come_to_their_portraits():
    """Drawn by one that knows them, each is its portrait with the noise it began with, at every time; then another
    begins, from noise."""
    rng, z, sigmas = random.Random(0), torch.randn(5, 4, 16, 16), load.load_unet().model.model_sampling.sigmas

    def example():
        at = rng.randrange(len(z))
        return at, z[at], None, None

    drawings, begun = drawing.Drawings(example, sigmas, rng), []
    times = [one.t for one in drawings.under_way]
    assert min(times) < 200 and max(times) > 900
    begin = drawings.begin

    def begins():
        begun.append(begin())
        return begun[-1]

    def noise(one):
        return (one.latent - z[one.at]) / sigmas[one.t]

    drawings.begin = begins
    for _ in range(100):
        some = drawings.some(16)
        assert len(some) == 16 and all(one is drawings.under_way[n] for n, one in some.items())
        for n, one in some.items():
            drawings.go_on(n, noise(one))
            now = drawings.under_way[n]
            assert any(now is one for one in begun[-1:]) or 50 <= one.t - now.t <= 150 and now[:3] == one[:3]
    noises = [noise(one) for one in begun]
    assert len(begun) > 2 * drawing.COUNT and {one.t for one in begun} == {999}
    assert abs(torch.stack(noises).std() - 1) < 0.05
    assert min(one.t for one in drawings.under_way) >= drawing.LAST
    for one in drawings.under_way:
        assert min((noise(one) - other).abs().max() for other in noises) < 1e-3
