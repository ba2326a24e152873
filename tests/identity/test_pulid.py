"""PuLID against the official arithmetic on the host's own hooks, its limits, and what composes with it."""

import comfy.model_management as mm
import pytest
import torch
import toy
import toy_dit
from attention.by_hand import near, one_step, path
from identity import oracle, oracle_eva, oracle_pulid
from identity.by_hand import ORDER
from identity.oracle_pulid import FLUX, V1, V1_1, file, person, tokens
from steer.models.identity import adapter as files
from steer.models.identity import evaclip
from steer.patches.attention import masactrl
from steer.patches.guidance import apg, pag, slg
from steer.patches.identity import pulid
from steer.patches.shared.face import Face, align
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE
from torch.nn.functional import interpolate

ALWAYS = Schedule()
KINDS = (V1, V1_1, FLUX)


def load(variant, seed=0, form="official"):
    sd = file(variant, form, seed)
    return sd, files.from_state_dict(dict(sd), f"{variant}-{seed}.safetensors")


def steered(model, adapter, who=None, strength=0.8, method="fidelity", zeros=-1, combine="one person",
            unconditional="as trained", schedule=ALWAYS, **options):
    face, features = person() if who is None else who
    return pulid.apply(
        model, adapter, face, features, strength, method, zeros, combine, unconditional, schedule, **options
    )


def by_hand(variant, model, sd, cond, uncond, method="fidelity", zeros=None, **options):
    if variant == FLUX:
        return oracle_pulid.flux_by_hand(model, sd, cond, uncond, **options)
    if zeros is None:
        zeros = {("fidelity", V1): 8, ("style", V1): 16}.get((method, variant), 0 if method == "neutral" else 20)
    return oracle_pulid.sdxl_by_hand(model, sd, cond, uncond, ORDER, method, zeros, **options)


def draw(variant, made, **options):
    if variant == FLUX:
        return toy_dit.sample("flux", made, **{"steps": 2, **options})
    return toy.sample(made, **{"steps": 2, **options})


@pytest.fixture(scope="module")
def models():
    unet = toy.model()
    return {V1: unet, V1_1: unet, FLUX: toy_dit.model("flux")}


SHIFT = 30, 50


def portrait():
    """(picture [1, 600, 560, 3], its Face), which the aligned square cuts out pixel for pixel at SHIFT."""
    picture = torch.rand(1, 600, 560, 3, generator=torch.Generator().manual_seed(3))
    return picture, Face(person()[0], (torch.tensor(pulid.TEMPLATE) + torch.tensor(SHIFT))[None], picture)


def both(variant, sd, who=None):
    return tokens(variant, sd, person() if who is None else who), tokens(variant, sd, None)


@pytest.mark.parametrize("variant, method", [
    (V1, "fidelity"), (V1, "style"), (V1, "neutral"), (V1_1, "fidelity"), (V1_1, "style"), (V1_1, "neutral"),
    (FLUX, "fidelity"),
])
def test_is_the_official_arithmetic(models, variant, method):
    sd, adapter = load(variant)
    model = models[variant]
    plain = draw(variant, model)
    out = draw(variant, steered(model, adapter, method=method))
    hand = by_hand(variant, model, sd, *both(variant, sd), method)
    assert near(out, draw(variant, hand)) and not near(out, plain, 1e-2)
    assert torch.equal(draw(variant, model), plain)


def test_files_are_known_and_project_as_published():
    for variant in KINDS:
        sd, adapter = load(variant)
        assert (adapter.variant, adapter.kind, adapter.nodes) == (variant, variant, ("SteerPuLID",))
        assert (adapter.face, adapter.eva, adapter.image) == (512, oracle_pulid.EVA, oracle_pulid.STATES)
        who, states = pulid.seen_of(adapter, Face(person(2)[0]), person(2)[1])
        for combine in pulid.COMBINE:
            e = tokens(variant, sd, person(2), combine == "mix")
            assert near(pulid.tokens_of(adapter, who, states, combine), e)
        assert variant in str(adapter) and "EVA02-CLIP-L-14-336" in str(adapter)
    (_, official), (_, converted) = load(V1), load(V1, form="converted")
    assert (converted.variant, converted.hidden) == (V1, oracle.HIDDEN)
    assert near(official.project(who, states), converted.project(who, states))


@pytest.mark.parametrize("variant", KINDS)
def test_rows_masks_and_several_pictures(models, variant):
    """Positive and negative apart, a negative that is left alone, a mask, two pictures of one person."""
    sd, adapter = load(variant)
    model, (cond, uncond) = models[variant], both(variant, sd)
    side = 8 if variant == FLUX else 16
    mask = torch.zeros(side, side)
    mask[:, : side // 2] = 1.0
    mask[2:4] = 0.5
    fine = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    other = toy_dit.text(1, tokens=13) if variant == FLUX else toy.text(1, tokens=331)
    two = person(2)
    twice = torch.cat((uncond, uncond[:, :5]), 1) if variant == V1 else uncond
    for ours, given, options, sampling in (
        ({}, (cond, uncond), {}, dict(positive=other)),
        (dict(unconditional="none"), (cond, None), {}, {}),
        (dict(mask=fine), (cond, uncond), dict(mask=mask), {}),
        (dict(who=two), (tokens(variant, sd, two), twice), {}, {}),
        (dict(zeros=3, method="style"), (cond, uncond), dict(zeros=3, method="style"), {}),
    ):
        out = draw(variant, steered(model, adapter, **ours), **sampling)
        if variant == FLUX:
            options = {name: value for name, value in options.items() if name == "mask"}
        assert near(out, draw(variant, by_hand(variant, model, sd, *given, **options), **sampling)), ours


@pytest.mark.parametrize("variant", KINDS)
def test_eva_clip_sees_the_face(models, variant):
    """From the picture to what is drawn: aligned, grey, white around it, seen and projected."""
    (sd, adapter), eva = load(variant), oracle_eva.file()
    picture, face = portrait()
    mask = torch.zeros(1, 600, 560)
    mask[:, 200:480, 150:400] = 1.0
    grey = torch.lerp(torch.ones(1), picture @ torch.tensor([0.299, 0.587, 0.114]), mask)
    square = grey[:, SHIFT[1] : SHIFT[1] + 512, SHIFT[0] : SHIFT[0] + 512, None].expand(-1, -1, -1, 3)
    assert torch.allclose(pulid.shown(face, face_mask=mask), square, atol=1e-3)
    side = oracle_eva.SIDE * oracle_eva.PATCH
    small = interpolate(square.movedim(-1, 1), (side, side), mode="bicubic", antialias=True).movedim(1, -1)
    who = face.embedding, oracle_eva.seen(eva, small)
    encoder = evaclip.from_state_dict(dict(eva), "eva.pt")
    out = draw(variant, steered(models[variant], adapter, (face, encoder), face_mask=mask))
    hand = by_hand(variant, models[variant], sd, *both(variant, sd, who))
    assert near(out, draw(variant, hand), 1e-3)
    assert not near(out, draw(variant, steered(models[variant], adapter, (face, encoder))), 1e-2)


def test_what_eva_clip_is_shown():
    """Grey where the face is, white where the mask ends or the picture; a crop as it is."""
    picture, face = portrait()
    seen = pulid.shown(face)
    grey = align(picture, face.keypoints, 512, torch.tensor(pulid.TEMPLATE)) @ torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(seen[..., 1], grey, atol=1e-5) and seen.shape == (1, 512, 512, 3)
    beyond = pulid.shown(Face(face.embedding, face.keypoints + torch.tensor([300.0, 0]), picture))
    assert bool((beyond[:, :, 232:] == 1).all()) and bool((beyond[:, :, :228] < 1).any())
    crop = picture[:, :40, :50]
    assert torch.allclose(pulid.shown(face, crop)[..., 0], crop @ torch.tensor([0.299, 0.587, 0.114]))
    half = torch.ones(1, 40, 50)
    half[:, :, 20:] = 0
    assert bool((pulid.shown(face, crop, half)[:, :, 20:] == 1).all())
    for args, words in (
        ((Face(face.embedding), ), "the face comes without its picture; wire crop"),
        ((face, None, half), r"face_mask is \(1, 40, 50\), and the picture of the face \(1, 600, 560\)"),
        ((face, crop, torch.ones(2, 40, 50)), r"face_mask is \(2, 40, 50\), and crop \(1, 40, 50\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pulid.shown(*args)


@pytest.mark.parametrize("variant", KINDS)
def test_items_of_a_batch_and_empty_masks(models, variant):
    _, adapter = load(variant)
    model = models[variant]
    start = toy_dit.noise("flux", 2) if variant == FLUX else toy.noise(batch=2)
    mask = torch.ones(2, 64, 64)
    mask[0] = 0
    out = draw(variant, steered(model, adapter, mask=mask), start=start)
    assert near(out[1:], draw(variant, steered(model, adapter), start=start[1:]))
    assert near(out[:1], draw(variant, model, start=start[:1]))


@pytest.mark.parametrize("variant", [V1, FLUX])
def test_off_is_no_node_and_two_persons_in_any_order(models, variant):
    sd, one = load(variant)
    model = models[variant]
    plain = draw(variant, model)
    for options in (dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5)), dict(mask=torch.zeros(1, 64, 64))):
        assert torch.equal(draw(variant, steered(model, one, **options)), plain)
    assert torch.equal(draw(variant, steered(model, one, schedule=Schedule(1.0, 1.0))), plain)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    persons = ((None, left), (person(seed=1), 1 - left))
    first, second = model, model
    for who, mask in persons:
        first = steered(first, one, who, mask=mask)
    for who, mask in persons[::-1]:
        second = steered(second, one, who, mask=mask)
    out = draw(variant, first)
    assert torch.equal(out, draw(variant, second))
    assert not near(out, draw(variant, steered(model, one, mask=left)), 1e-3)


@pytest.mark.parametrize("variant", [V1, FLUX])
def test_with_other_nodes_and_other_packs(models, variant):
    sd, adapter = load(variant)
    theirs = models[variant].clone()
    if variant == FLUX:

        def replace(args, extra):
            out = extra["original_block"](args)
            return {**out, "img": 0.9 * out["img"]}

        theirs.set_model_patch_replace(replace, "dit", "double_block", 2)
    ours, hand = steered(theirs, adapter), by_hand(variant, theirs, sd, *both(variant, sd))
    layers = "double.1" if variant == FLUX else "middle"
    for node in (lambda m: pag.apply(m, 2.0, layers, ALWAYS), lambda m: apg.apply(m, 0.0, 15.0, -0.5, ALWAYS)):
        assert near(draw(variant, node(ours)), draw(variant, node(hand)), 1e-4)
    if variant == V1:
        trajectory = path("unet", models[V1])
        given = one_step("unet", trajectory)
        made = masactrl.apply(ours, trajectory, 1.0, "auto", ALWAYS)
        out = toy.sample(made, **given)
        assert out.isfinite().all() and not near(out, toy.sample(ours, **given), 1e-3)


@pytest.mark.parametrize("variant", [V1, FLUX])
def test_half_precision(models, variant):
    half = toy_dit.model("flux", torch.bfloat16) if variant == FLUX else toy.model(dtype=torch.bfloat16)
    sd, adapter = load(variant)
    small = files.from_state_dict({key: value.bfloat16() for key, value in sd.items()}, "half.safetensors")
    out = draw(variant, steered(half, small, mask=torch.ones(1, 64, 64)), steps=1)
    assert out.isfinite().all() and near(out, draw(variant, steered(models[variant], adapter), steps=1), 0.1)


def test_rows_that_share_or_leave_out_blocks(models):
    """The same whether rows that begin alike are computed once or each in full."""
    _, adapter = load(FLUX)
    made = slg.apply(pag.apply(steered(models[FLUX], adapter), 2.0, "double.1", ALWAYS), 2.0, "double.2", ALWAYS)
    out = draw(FLUX, made)
    made.model_options[SHARE] = False
    assert near(out, draw(FLUX, made))


def test_the_host_loads_what_runs_at_every_step(models):
    _, adapter = load(FLUX)
    mm.unload_all_models()
    made = steered(models[FLUX], adapter)
    draw(FLUX, made, steps=1)
    assert adapter.patcher.model in [each.model.model for each in mm.current_loaded_models if each.model is not None]


def test_bad_input_raises_before_sampling(models):
    (_, v1), (_, flux) = load(V1), load(FLUX)
    face, (seen, states) = person()
    other = files.from_state_dict(oracle.flat(oracle.file("plus")), "plus.bin")
    for model, adapter, options, words in (
        (models[FLUX], flux, dict(strength=-1.0), "strength -1.0 must be"),
        (models[V1], flux, {}, "is made for Flux, and this model is BaseModel"),
        (toy.flux(), flux, {}, r"follows 3 blocks of width 128, and of this model \(Flux\) it would be 2"),
        (models[FLUX], v1, {}, "acts on the cross-attention of a UNet"),
        (models[V1], other, {}, "plus.bin is IP-Adapter plus; use SteerIPAdapter for it"),
        (models[V1], v1, dict(who=(face, None)), "eva_clip is NoneType; wire SteerLoadEVACLIP, or a pair of"),
        (models[V1], v1, dict(who=(face, (seen, states[:4]))), "takes a face embedding of width 512 and EVA-CLIP's"),
        (models[V1], v1, dict(who=(face.repeat(2, 1), (seen, states))), "2 faces and EVA-CLIP's features of 1"),
        (models[V1], v1, dict(zeros=-2), "zeros -2 must be"),
    ):
        with pytest.raises(ValueError, match=f"SteerPuLID: .*{words}"):
            draw(FLUX if model is models[FLUX] else V1, steered(model, adapter, **options))
