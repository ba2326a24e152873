"""A classifier of noisy latents by Bayes' rule, one of clean pictures as a reward, and what both promise."""

from dataclasses import dataclass

import comfy.model_base
import pytest
import torch
import toy
from measurement.by_hand import SMALL, made, once, scales
from steer.patches.measurement import classifierguidance, reward
from steer.patches.shared.energy import push
from steer.patches.shared.schedule import Schedule

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)
MEANS, STD = (-1.0, 2.0), 0.5  # two classes of pictures, each Gaussian around one grey


class Mixture(torch.nn.Module):
    """The exact eps of data that are of either class, as often: D is the mean of the two, by what each is worth."""

    def __init__(self, device=None, operations=None, dtype=None, **_):
        super().__init__()
        self.dtype, self.anchor = torch.float32, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timesteps, context=None, transformer_options=None, **_):
        s = transformer_options["sigmas"][0]
        x = x * (1 + s**2).sqrt()
        share = shares(x, s)
        D = sum(p.view(-1, 1, 1, 1) * of_class(x, s, m) for p, m in zip(share.T, MEANS, strict=True))
        return (x - D) / s


def of_class(x, s, mean):
    return mean + STD**2 / (STD**2 + s**2) * (x - mean)


def shares(x, s):
    """p(class | x) [B, 2]."""
    square = torch.stack([(x - m).square().sum((1, 2, 3)) for m in MEANS], 1)
    return (-square / (2 * (STD**2 + s**2))).softmax(1)


@dataclass(frozen=True)
class Known:
    """The exact classifier of noisy latents of the mixture."""

    which: int
    noisy = True

    def __call__(self, x, sigma):
        s = sigma.max()
        square = torch.stack([(x - m).square().sum((1, 2, 3)) for m in MEANS], 1)
        return (-square / (2 * (STD**2 + s**2))).log_softmax(1)[:, self.which]


class Ramp:
    """Steeper to the right."""

    noisy, patchers = True, ()

    def __call__(self, x, sigma):
        return (x * torch.arange(x.shape[-1])).flatten(1).sum(1)


@pytest.fixture(scope="module")
def mixture():
    class Model(comfy.model_base.BaseModel):
        def __init__(self, config, kind, device=None):
            super().__init__(config, kind, device=device, unet_model=Mixture)

    return toy.model(kind="eps", base=Model)


def steered(model, classifier, strength=1.0, norm="none", schedule=ALWAYS, **more):
    return classifierguidance.apply(model, classifier, push(strength, norm=norm, **more), schedule)


@pytest.mark.parametrize("which", [0, 1])
def test_with_the_exact_classifier_it_is_the_model_of_the_class(mixture, which):
    """Bayes: grad log p(x | y) = grad log p(x) + grad log p(y | x), at every noise level."""
    for level in (0.1, 0.3, 0.6):
        s, _ = scales(mixture, level)
        D = once(steered(mixture, Known(which)), level, cfg=1.0)
        expected = of_class(toy.noise(**SMALL) * s, s, MEANS[which])
        assert torch.allclose(D, expected, atol=2e-3 * float(expected.abs().max()))


def test_samples_are_of_the_class(mixture):
    start = toy.noise(3, 4, **SMALL)
    for which, mean in enumerate(MEANS):
        out = toy.sample(steered(mixture, Known(which)), 1.0, start=start, steps=20)
        out = mixture.model.process_latent_in(out)
        assert torch.allclose(out.mean((1, 2, 3)), torch.tensor(mean), atol=0.25)


def test_the_noisy_classifier_asks_no_network(mixture):
    with toy.count_forwards(mixture) as count:
        toy.sample(steered(mixture, Known(1), gradient="network"), 1.0, steps=3, start=toy.noise(**SMALL))
    assert count.calls == 3


def test_unit_norm_a_mask_and_every(mixture):
    D, (s, a) = once(mixture, cfg=1.0), scales(mixture)
    moved = once(steered(mixture, Known(1), 0.3, "unit"), cfg=1.0) - D
    length = 0.3 * s / (a**2 + s**2) ** 0.5 * float(D.std())
    assert float(moved.square().mean().sqrt()) == pytest.approx(length, rel=1e-3)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    assert torch.equal(once(steered(mixture, Known(1), mask=mask), cfg=1.0)[..., :4], D[..., :4])
    inside = (once(steered(mixture, Ramp(), 0.3, "unit", mask=mask), cfg=1.0) - D)[..., 4:]
    assert float(inside.square().mean().sqrt()) == pytest.approx(length, rel=1e-3)
    start, first = toy.noise(**SMALL), toy.sigmas(mixture, 4)
    percent = [Schedule(0.0, 1.0), Schedule(0.0, 1e-3)]  # the second: the first step alone
    every, alone = (
        toy.sample(steered(mixture, Known(1), schedule=w, every=n), 1.0, start=start)
        for w, n in zip(percent, (len(first), 1), strict=True)
    )
    assert torch.equal(every, alone)


def test_a_classifier_of_clean_pictures_is_a_reward():
    model = made("unet")

    def likes(latents):
        return -latents.square().sum((1, 2, 3)) / 10

    for form in ("estimate", "network"):
        how = push(0.3, form)
        ours = classifierguidance.apply(model, likes, how, ALWAYS), reward.apply(model, likes, how, ALWAYS)
        assert torch.equal(*map(once, ours))


def test_off_and_a_batch(mixture):
    start = toy.noise(batch=2, **SMALL)
    plain = toy.sample(mixture, 1.0, start=start)
    for off in (dict(strength=0.0), dict(schedule=NEVER)):
        assert torch.equal(toy.sample(steered(mixture, Known(0), **off), 1.0, start=start), plain)
    out = toy.sample(steered(mixture, Known(0)), 1.0, start=start)
    for i in range(2):
        alone = toy.sample(steered(mixture, Known(0)), 1.0, start=start[i : i + 1])
        assert torch.allclose(out[i : i + 1], alone, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize(
    "options, says", [(dict(strength=-1.0), "strength -1.0"), (dict(every=0), "every 0"), (dict(norm="x"), "norm 'x'")]
)
def test_bad_input(mixture, options, says):
    with pytest.raises(ValueError, match=f"SteerClassifierGuidance: {says}"):
        steered(mixture, Known(0), **options)


def test_on_the_lab_the_class_comes_with_the_strength():
    """Lab Scorer as the classifier of clean pictures; as a reward, norm none."""
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.shared.decode import decoder

    lab, clip, vae = load_model("unet")
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a comic portrait"))
    reader = LabScorer("a person, glasses", decoder(vae), load_reader())

    def score(strength):
        ours = steered(lab, reader, strength, "none")
        out = toy.sample(ours, 1.0, positive=text, negative=text, steps=4, start=toy.noise(5, 2))
        with torch.inference_mode():
            return float(reader(out).mean())

    assert score(3.0) > score(0.0) + 0.5
