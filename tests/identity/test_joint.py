"""IP-Adapter on transformers (XLabs, InstantX) against the official arithmetic on the host's own hooks."""

from contextlib import contextmanager

import comfy.model_management as mm
import pytest
import torch
import toy
import toy_dit
from attention.by_hand import near, one_step, path
from identity import oracle
from identity import oracle_joint as by
from identity.by_hand import CONFIG, encoder, pictures
from identity.oracle_joint import INSTANTX, NETWORKS, TIMED, XLABS
from steer.models.identity import adapter as files
from steer.models.identity.siglip import PREFIX, PoolingHead, head_of
from steer.models.lab.load import vision_model
from steer.patches.attention import masactrl
from steer.patches.guidance import apg, pag, slg
from steer.patches.identity import ipadapter
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE

ALWAYS = Schedule()
KINDS = (XLABS, INSTANTX, TIMED)


class Head(torch.nn.Module):
    """SigLIP's pooling head, of the modules that the reference implementation is made of."""

    def __init__(self, width=oracle.STATES, inner=128):
        super().__init__()
        self.probe = torch.nn.Parameter(torch.empty(1, 1, width))
        self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.layernorm = torch.nn.LayerNorm(width, eps=1e-6)
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(width, inner), "fc2": torch.nn.Linear(inner, width)})

    def forward(self, x):
        x, _ = self.attention(self.probe.repeat(len(x), 1, 1), x, x)
        y = torch.nn.functional.gelu(self.mlp["fc1"](self.layernorm(x)), approximate="tanh")
        return (x + self.mlp["fc2"](y))[:, 0]


def head():
    """The reference's, and ours with its weights."""
    made = Head().eval().requires_grad_(False)
    toy.random_weights(made, 9)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05
    return made, PoolingHead({PREFIX + key: value for key, value in made.state_dict().items()}, 2)


def vision(variant):
    if variant == XLABS:
        return encoder()
    config = {**CONFIG, "model_type": "siglip_vision_model"}
    del config["projection_dim"]  # as in the host's
    made = vision_model(config)
    toy.random_weights(made.model, 6)
    return made


def load(variant, seed=0):
    sd = by.file(variant, seed)
    return sd, files.from_state_dict(dict(sd), f"{variant}-{seed}.safetensors")


def seen(variant, image):
    """What the projector takes."""
    out = vision(variant).encode_image(image)
    if variant == XLABS:
        return out.image_embeds
    return head()[0](out.last_hidden_state.clone()) if variant == INSTANTX else out.penultimate_hidden_states


def blank(variant):
    return seen(variant, torch.zeros(1, 28, 28, 3)) if variant == XLABS else torch.zeros_like(seen(variant, pictures()))


def steered(model, variant, adapter, strength=0.8, weight_type="linear", layers="auto", combine="concat",
            unconditional="as trained", schedule=ALWAYS, **options):
    options = {"image": pictures(), "clip_vision": vision(variant), "head": head()[1], **options}
    return ipadapter.apply(model, adapter, strength, weight_type, layers, combine, unconditional, schedule, **options)


@contextmanager
def hand(variant, model, sd, cond, uncond, **options):
    if variant == TIMED:
        with by.sd3_by_hand(model, sd, cond, uncond, **options) as made:
            yield made
    else:
        yield by.flux_by_hand(variant, model, sd, cond, uncond, **options)


def network(variant, name=None):
    made = toy_dit.model(name or NETWORKS[variant])
    generator = torch.Generator().manual_seed(3)
    for key, p in made.model.diffusion_model.named_parameters():
        if any(part in key for part in ("ln_q", "ln_k", "query_norm", "key_norm")):
            with torch.no_grad():
                p.copy_(0.5 + torch.rand(p.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def models():
    return {variant: network(variant) for variant in KINDS}


def draw(variant, made, **options):
    return toy_dit.sample(NETWORKS[variant], made, **{"steps": 2, "cfg": 3.0, **options})


@pytest.mark.parametrize("variant, name", [
    (XLABS, "flux"), (INSTANTX, "flux"), (XLABS, "chroma"), (TIMED, "sd3"), (TIMED, "sd3.5 medium"),
])
def test_is_the_official_arithmetic(variant, name):
    sd, adapter = load(variant)
    model = network(variant, name)
    assert (adapter.variant, adapter.hidden[0], adapter.nodes) == (variant, by.HIDDEN, ("SteerIPAdapter",))
    plain = draw(variant, model)
    out = draw(variant, steered(model, variant, adapter))
    with hand(variant, model, sd, seen(variant, pictures()), blank(variant)) as oracle_model:
        assert near(out, draw(variant, oracle_model)) and not near(out, plain, 1e-2)
    assert torch.equal(draw(variant, model), plain)


def test_each_block_of_instantx_acts_by_itself(models):
    sd, adapter = load(INSTANTX)
    cond, model = seen(INSTANTX, pictures()), models[INSTANTX]
    for layers, only in (("double.2", [2]), ("single.1", [4])):
        out = draw(INSTANTX, steered(model, INSTANTX, adapter, layers=layers, unconditional="none"))
        assert near(out, draw(INSTANTX, by.flux_by_hand(INSTANTX, model, sd, cond, None, only=only)))


@pytest.mark.parametrize("variant", KINDS)
def test_rows_masks_and_several_pictures(models, variant):
    """Positive and negative apart, no negative, a mask, two pictures side by side."""
    sd, adapter = load(variant)
    model, cond, uncond = models[variant], seen(variant, pictures()), blank(variant)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1.0
    mask[2:4] = 0.5
    fine = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    for ours, its, sampling in (
        (dict(), (cond, uncond), dict(positive=toy_dit.text(1, tokens=13))),
        (dict(unconditional="none"), (cond, None), {}),
        (dict(mask=fine), (cond, uncond), {}),
        (dict(image=pictures(2)), (seen(variant, pictures(2)), uncond), {}),
    ):
        out = draw(variant, steered(model, variant, adapter, **ours), **sampling)
        given = {"mask": mask} if "mask" in ours else {}
        with hand(variant, model, sd, *its, **given) as oracle_model:
            assert near(out, draw(variant, oracle_model, **sampling)), ours


@pytest.mark.parametrize("variant", KINDS)
def test_items_of_a_batch(models, variant):
    _, adapter = load(variant)
    model, start, two = models[variant], toy_dit.noise(NETWORKS[variant], 2), pictures(2)
    out = draw(variant, steered(model, variant, adapter, combine="one each", image=two), start=start)
    one = draw(variant, steered(model, variant, adapter, image=two[1:]), start=start[1:])
    assert near(out[1:], one)
    mask = torch.ones(2, 64, 64)
    mask[0] = 0
    out = draw(variant, steered(model, variant, adapter, image=two[1:], mask=mask), start=start)
    assert near(out[1:], one) and near(out[:1], draw(variant, model, start=start[:1]))


@pytest.mark.parametrize("variant", KINDS)
def test_off_is_no_node_and_two_add_up(models, variant):
    (_, one), (_, two) = load(variant), load(variant, seed=1)
    model = models[variant]
    plain = draw(variant, model)
    for options in (dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5)), dict(mask=torch.zeros(1, 64, 64))):
        assert torch.equal(draw(variant, steered(model, variant, one, **options)), plain)
    late = steered(model, variant, one, schedule=Schedule(1.0, 1.0))
    assert torch.equal(draw(variant, late), plain)
    first = steered(steered(model, variant, one), variant, two, 0.5)
    second = steered(steered(model, variant, two, 0.5), variant, one)
    assert torch.equal(draw(variant, first), draw(variant, second))


@pytest.mark.parametrize("variant", KINDS)
def test_with_other_nodes(models, variant):
    """Weak branches and negatives are shown what their text is; rows of a source are left alone."""
    sd, adapter = load(variant)
    model, name = models[variant], NETWORKS[variant]
    made = steered(model, variant, adapter)
    nodes = [lambda m: apg.apply(m, 0.0, 15.0, -0.5, ALWAYS)]
    if variant != TIMED:  # PAG stands in the place of the attention that the oracle for SD3 overrides
        nodes.append(lambda m: pag.apply(m, 2.0, "double.1", ALWAYS))
    with hand(variant, model, sd, seen(variant, pictures()), blank(variant)) as oracle_model:
        for node in nodes:
            assert near(draw(variant, node(made)), draw(variant, node(oracle_model)), 1e-4)
    trajectory = path(name, model, conditioning=toy_dit.text(5))
    both = masactrl.apply(made, trajectory, 1.0, "auto", ALWAYS)
    given = {**one_step(name, trajectory), "positive": toy_dit.text(1), "negative": toy_dit.text(2)}
    out = toy.sample(both, **given)
    assert out.isfinite().all()
    for other in (made, masactrl.apply(model, trajectory, 1.0, "auto", ALWAYS)):
        assert not near(out, toy.sample(other, **given), 1e-3)


@pytest.mark.parametrize("variant", KINDS)
def test_half_precision(models, variant):
    half = toy_dit.model(NETWORKS[variant], torch.bfloat16)
    whole = toy_dit.model(NETWORKS[variant])
    sd, adapter = load(variant)
    small = files.from_state_dict({key: value.bfloat16() for key, value in sd.items()}, "half.safetensors")
    out = draw(variant, steered(half, variant, small, mask=torch.ones(1, 64, 64)), steps=1)
    assert out.isfinite().all()
    assert near(out, draw(variant, steered(whole, variant, adapter), steps=1), 0.1)


@pytest.mark.parametrize("variant", KINDS)
def test_rows_that_share_or_leave_out_blocks(models, variant):
    """The same whether rows that begin alike are computed once or each in full."""
    _, adapter = load(variant)
    made = pag.apply(steered(models[variant], variant, adapter), 2.0, "double.1", ALWAYS)
    made = slg.apply(made, 2.0, "double.0", ALWAYS)
    out = draw(variant, made)
    made.model_options[SHARE] = False
    assert near(out, draw(variant, made))


def test_replacements_of_other_packs_come_first(models):
    sd, adapter = load(XLABS)
    theirs = models[XLABS].clone()

    def replace(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 0.9 * out["img"]}

    theirs.set_model_patch_replace(replace, "dit", "double_block", 1)
    out = draw(XLABS, steered(theirs, XLABS, adapter))
    assert near(out, draw(XLABS, by.flux_by_hand(XLABS, theirs, sd, seen(XLABS, pictures()), blank(XLABS))))
    assert not near(out, draw(XLABS, steered(models[XLABS], XLABS, adapter)), 1e-3)


def test_the_host_loads_what_runs_at_every_step(models):
    _, adapter = load(TIMED)
    mm.unload_all_models()
    made = steered(models[TIMED], TIMED, adapter)
    draw(TIMED, made, steps=1)
    assert adapter.patcher.model in [each.model.model for each in mm.current_loaded_models if each.model is not None]


def test_the_pooling_head_is_siglips(tmp_path):
    from safetensors.torch import save_file

    reference, ours = head()
    states = oracle.rand(2, 7, oracle.STATES, seed=4)
    assert near(ours(states), reference(states))
    clip_vision = vision(INSTANTX)
    whole = {**clip_vision.get_sd(), **{PREFIX + key: value for key, value in reference.state_dict().items()}}
    key = "vision_model.post_layernorm.weight"
    for name, sd in (
        ("bare", clip_vision.get_sd()), ("other", {**whole, key: whole[key] + 1}), ("whole", whole),
    ):
        save_file({k: v.contiguous() for k, v in sd.items()}, tmp_path / f"{name}.safetensors")
    bare, other, right = (tmp_path / f"{name}.safetensors" for name in ("bare", "other", "whole"))
    assert head_of(clip_vision, [bare, other]) is None
    assert near(head_of(clip_vision, [bare, other, right])(states), reference(states))


def test_bad_input_raises_before_sampling(models):
    flux, sd3 = models[INSTANTX], models[TIMED]
    adapters = {variant: load(variant)[1] for variant in KINDS}
    for model, variant, options, words in (
        (toy.model(), XLABS, {}, "is made for Flux, and this model is BaseModel"),
        (sd3, XLABS, {}, "is made for Flux, and this model is SD3"),
        (flux, TIMED, {}, "is made for SD3.5, and this model is Flux"),
        (toy.flux(), INSTANTX, {}, r"is made for 7 blocks of width 128; this model \(Flux\) has 4 of width 128"),
        (flux, INSTANTX, dict(head=None), "takes what SigLIP's pooling head makes of the picture"),
        (flux, XLABS, dict(weight_type="style"), '"style" is known for UNets; choose one of linear'),
        (flux, XLABS, dict(layers="single.1"), 'no layer "single.1"; this model has double.0-2'),
        (flux, XLABS, dict(clip_vision=encoder(projection_dim=64)), "needs an image encoder, whose embedding .* 48"),
        (flux, XLABS, dict(combine="one each", image=pictures(3)), "references for 3 pictures, and the batch has 1"),
    ):
        with pytest.raises(ValueError, match=f"SteerIPAdapter: .*{words}"):
            draw(variant, steered(model, variant, adapters[variant], **options))
