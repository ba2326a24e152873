"""InfiniteYou: InfuseNet's residuals in a small Flux, with a context of its own, written out with the host's parts."""

import comfy.model_base
import pytest
import torch
import toy
from attention.by_hand import near
from identity import control, oracle
from identity.by_hand import load
from steer.models.identity import adapter as files
from steer.models.lab.load import load_vae
from steer.patches.identity import infiniteyou
from steer.patches.shared.face import Face
from torch.nn.functional import adaptive_avg_pool2d, normalize

from nodes import ControlNetApplyAdvanced

CONFIG = dict(toy.FLUX, guidance_embed=True)
WHO = 20 * oracle.rand(1, 512, seed=80)
POSITIVE, NEGATIVE = (toy.text(i, tokens=7, guidance=3.5) for i in (1, 2))


@pytest.fixture(scope="module")
def model():
    return toy.model(CONFIG, "flow", base=comfy.model_base.Flux)


@pytest.fixture(scope="module")
def net():
    return control.flux(CONFIG)


@pytest.fixture(scope="module")
def vae():
    return load_vae()


def adapter():
    tree = {"image_proj": oracle.resampler(96, 512, 64, queries=8)}
    return tree, files.from_state_dict(oracle.flat(tree), "image_proj_model.bin")


def tokens(tree, who=WHO):
    """(tokens of the face, of none)."""
    faces = normalize(who, dim=-1), torch.zeros(1, 512)
    return [oracle.tokens("face-resampler", tree["image_proj"], face=e) for e in faces]


def steered(made, net, vae, positive=POSITIVE, negative=NEGATIVE, face=WHO, strength=0.8, guidance=1.0, start=0.0,
            end=1.0, **options):
    return infiniteyou.apply(positive, negative, made, net, face, vae, strength, guidance, start, end, **options)


def sampled(model, conds, **options):
    positive, negative = conds
    return toy.sample(model, positive=positive, negative=negative, cfg=2.0, **options)


def part(tree, net, vae, image=None, mask=None, guidance=1.0, **options):
    """InfuseNet, asked by itself."""
    def share(h):
        return h if mask is None else h * adaptive_avg_pool2d(mask[None], (8, 8)).flatten(1)[..., None]

    image = torch.zeros(1, 128, 128, 3) if image is None else image
    return control.part(net, image, 0.8, contexts=tokens(tree), share=share, vae=vae, guidance=guidance, **options)


def test_the_file_is_known_and_projects_as_published():
    tree, made = adapter()
    assert (made.kind, made.tokens, made.width, made.face) == ("InfiniteYou's projector", 8, 64, 512)
    assert near(made.project(WHO), oracle.tokens("face-resampler", tree["image_proj"], face=WHO))
    assert "SteerInfiniteYou" in str(made)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_infusenet_sees_the_face_and_its_own_guidance(model, net, vae, guidance):
    tree, made = adapter()
    before = sampled(model, (POSITIVE, NEGATIVE))
    out = sampled(model, steered(made, net, vae, guidance=guidance))
    hand = control.summed((POSITIVE, NEGATIVE), part(tree, net, vae, guidance=guidance))
    assert near(out, sampled(model, hand)) and not near(out, before, 1e-2)
    another = control.summed((POSITIVE, NEGATIVE), part(tree, net, vae, guidance=2.0))
    assert not near(out, sampled(model, another), 1e-4)
    assert torch.equal(sampled(model, (POSITIVE, NEGATIVE)), before)


def test_keypoints_and_other_controlnets(model, net, vae):
    """The face reaches InfuseNet alone, wherever another stands in the chain."""
    tree, made = adapter()
    other, image, points = control.flux(CONFIG), control.hint(1), control.hint(2)
    toy.random_weights(other.control_model, 41)

    def apply(positive, negative):
        return ControlNetApplyAdvanced().apply_controlnet(positive, negative, other, image, 0.6, 0.0, 1.0, vae)

    hand = control.summed(
        (POSITIVE, NEGATIVE), part(tree, net, vae, points), control.part(other, image, 0.6, vae=vae)
    )
    expected = sampled(model, hand)
    before = steered(made, net, vae, *apply(POSITIVE, NEGATIVE), image=points)
    behind = apply(*steered(made, net, vae, image=points))
    assert near(sampled(model, before), expected) and near(sampled(model, behind), expected)
    assert not near(expected, sampled(model, steered(made, net, vae, image=points)), 1e-2)


def test_mask(model, net, vae):
    tree, made = adapter()
    left = torch.zeros(16, 16)
    left[:, :7] = 1
    fine = left.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    out = sampled(model, steered(made, net, vae, mask=fine))
    assert near(out, sampled(model, control.summed((POSITIVE, NEGATIVE), part(tree, net, vae, mask=left))))
    ones = sampled(model, steered(made, net, vae, mask=torch.ones(1, 128, 128)))
    assert near(ones, sampled(model, steered(made, net, vae)))


def test_odd_sizes_and_batches(model, net, vae):
    tree, made = adapter()
    start = toy.noise(batch=2, height=15, width=17)
    mask = torch.zeros(1, 120, 136)
    mask[..., :40] = 1
    both = sampled(model, steered(made, net, vae, mask=mask), start=start)
    for i in range(2):
        assert near(both[i : i + 1], sampled(model, steered(made, net, vae, mask=mask), start=start[i : i + 1]))
    assert not near(both, sampled(model, (POSITIVE, NEGATIVE), start=start), 1e-3)


def test_several_pictures_and_off(model, net, vae):
    tree, made = adapter()
    three = 20 * oracle.rand(3, 512, seed=81)
    mean = normalize(three, dim=-1).mean(0)
    conds = steered(made, net, vae, face=Face(three))
    (key,) = conds[0][0][1]["model_conds"]
    e = oracle.tokens("face-resampler", tree["image_proj"], face=mean[None])
    assert near(conds[0][0][1]["model_conds"][key].cond, e)
    for options in (dict(strength=0.0), dict(start=0.5, end=0.5)):
        positive, negative = steered(made, net, vae, **options)
        assert positive is POSITIVE and negative is NEGATIVE


def test_bad_input_is_told(net, vae):
    (_, made), (_, portrait) = adapter(), load("face-resampler")
    for args, options, words in (
        ((portrait, net), {}, "is IP-Adapter face-resampler; use SteerFaceID or SteerInstantID for it"),
        ((made, None), {}, "control_net is NoneType, which has no context"),
        ((made, net), dict(strength=-1.0), "strength -1.0 must be"),
        ((made, net), dict(face=WHO[:, :128]), "takes face embeddings of width 512, and this one has 128"),
    ):
        with pytest.raises(ValueError, match=f"^SteerInfiniteYou: .*{words}"):
            steered(*args, vae, **options)
