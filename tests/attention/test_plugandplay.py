"""Features and attention of the source against the host's own hooks, their limits, and what they do on the lab."""

import comfy.ops
import pytest
import torch
import toy
from attention.by_hand import attention, drawn, image_of, near, network, one_step, path, text
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from steer.patches.attention import masactrl, plugandplay
from steer.patches.guidance import apg, pag, slg
from steer.patches.hspace import injectfusion
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE
from steer.patches.shared.trajectory import Trajectory

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)


def steered(model, trajectory, layers="auto", schedule=ALWAYS, features="auto", features_schedule=ALWAYS, **options):
    return plugandplay.apply(model, trajectory, layers, schedule, features, features_schedule, **options)


def features_alone(model, trajectory, features="auto", schedule=ALWAYS):
    return steered(model, trajectory, schedule=NEVER, features=features, features_schedule=schedule)


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


@pytest.mark.parametrize("name", ["unet", "flux", "sd3", "qwen", "lumina", "wan"])
def test_the_source_says_who_attends_to_whom(name):
    """Equation 4: softmax(q_s k_s^T) v_t, in both halves of cfg."""
    model = network(name)
    trajectory = path(name, model)

    def injected(target, source, image, heads):
        (*qk, v), (*its, _) = target, source
        return attention(*(image_of(s, t, image) for t, s in zip(qk, its, strict=True)), v, heads)

    layers = "input, middle, output" if name == "unet" else "auto"
    out = toy.sample(steered(model, trajectory, layers, features_schedule=NEVER), **one_step(name, trajectory))
    assert near(out, drawn(name, model, trajectory, injected), 1e-4)
    assert not near(out, toy.sample(model, **one_step(name, trajectory)), 1e-3)


def residual_by_hand(model, trajectory, blocks, **options):
    """A step whose ResBlocks of the output `blocks` add what they add in a step of the source, by the host's patch."""
    kept, sampling_source = {}, True

    def handler(layer, x, emb, context, transformer_options, *args):
        h, block = layer(x, emb), transformer_options["block"]
        if block not in [("output", i) for i in blocks]:
            return h
        skip = layer.skip_connection(x)
        if sampling_source:
            kept[block] = h - skip
        return h if sampling_source else skip + kept[block]

    hooked = model.clone()
    hooked.set_model_patch((ResBlock, handler), "forward_timestep_embed_patch")
    given = one_step("unet", trajectory)
    toy.sample(hooked, **{**given, "positive": trajectory.conditioning})
    sampling_source = False
    return toy.sample(hooked, **{**given, **options})


@pytest.mark.parametrize("blocks, names", [((1,), "auto"), ((0, 2, 3), "output.0, output.2-3")])
@pytest.mark.parametrize("case", ["plain", "batch", "conds apart"])
def test_a_block_adds_what_the_sources_adds(blocks, names, case, monkeypatch):
    """Equation 3; the skip that it is added to is the target's own."""
    model = network("unet")
    trajectory = path("unet", model, 2 if case == "batch" else 1)
    expected = residual_by_hand(model, trajectory, blocks)
    if case == "conds apart":
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
    out = toy.sample(features_alone(model, trajectory, names), **one_step("unet", trajectory))
    assert near(out, expected, 1e-4)
    assert not near(out, toy.sample(model, **one_step("unet", trajectory)), 1e-3)


@pytest.mark.parametrize("case", ["PAG", "SLG"])
def test_rows_that_share_blocks_have_the_features_too(case):
    """A weak branch has what the positive has, whether it begins with it or runs in full."""
    model = network("unet")
    trajectory = path("unet", model)
    weak = pag.apply(model, 2.0, "output.3", ALWAYS) if case == "PAG" else slg.apply(model, 2.0, "output.1", ALWAYS)
    shared, full = steered(weak, trajectory), steered(weak, trajectory)
    full.model_options[SHARE] = False
    assert near(toy.sample(shared), toy.sample(full), 1e-4)


def test_other_packs_patches_of_the_block_are_called():
    """One that runs the ResBlock in its own way gets ours inside; one of the block's output comes after."""
    model, seen = network("unet"), []
    trajectory = path("unet", model)
    theirs = model.clone()

    def handler(layer, x, emb, *args):
        seen.append(len(x))
        return layer(x, emb)

    theirs.set_model_patch((ResBlock, handler), "forward_timestep_embed_patch")
    theirs.set_model_output_block_patch(lambda h, hsp, options: (h * 0.9, hsp))
    plain = model.clone()
    plain.set_model_output_block_patch(lambda h, hsp, options: (h * 0.9, hsp))
    assert near(toy.sample(steered(theirs, trajectory)), toy.sample(steered(plain, trajectory)))
    assert seen and not near(toy.sample(steered(theirs, trajectory)), toy.sample(steered(model, trajectory)), 1e-3)


def test_a_target_that_is_the_source_stays(name):
    model = network(name)
    trajectory = path(name, model)
    options = one_step(name, trajectory, positive=5)
    assert near(toy.sample(steered(model, trajectory), **options), toy.sample(model, **options))


def test_auto_is_the_papers_blocks_of_stable_diffusion():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from steer.patches.shared.architectures import unet

    with torch.device("meta"):
        network = UNetModel(**toy.SD15, num_heads=-1, num_head_channels=64, operations=comfy.ops.disable_weight_init)
    attends = [block.layer.index for block in unet.blocks(network) if block.attends and block.layer.group == "output"]
    assert attends[1:] == list(range(4, 12))  # as `decoder` takes them


def test_off_is_no_node(name):
    model = network(name)
    off = steered(model, path(name, model), schedule=NEVER, features_schedule=Schedule(0.5, 0.5))
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    with toy.count_forwards(model) as count:
        assert torch.equal(toy.sample(off), toy.sample(model))
    assert (count.calls, count.rows) == (8, 16)


def test_each_window_is_its_own():
    """Rows beside the target are there while either is open."""
    model = network("unet")
    trajectory, rows = path("unet", model), []
    for attention_end, features_end in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.6), (0.0, 0.6)):
        ours = steered(
            model, trajectory, schedule=Schedule(0.0, attention_end), features_schedule=Schedule(0.0, features_end)
        )
        with toy.count_forwards(model) as count:
            toy.sample(ours)
        rows.append(count.rows)
    assert rows[0] == 8 < rows[1] < rows[2] == rows[3] < 16


def test_a_batch_is_its_runs(name):
    model = network(name)
    both, start = path(name, model, 2), toy.noise(batch=2)
    out = toy.sample(steered(model, both), start=start)
    for i in range(2):
        one = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, both.conditioning)
        assert near(out[i : i + 1], toy.sample(steered(model, one), start=start[i : i + 1]), 1e-3)


def test_with_guidance_and_other_edits(name):
    """MasaCtrl's keys are refused in the same layers, not in others; features stack with the h-space's."""
    model = network(name)
    trajectory = path(name, model)
    first, second = ("output.1", "output.3") if name == "unet" else ("double.1", "single.1")
    base = steered(model, trajectory, first)
    alone = toy.sample(base)
    together = masactrl.apply(base, trajectory, 1.0, second, ALWAYS)
    together = apg.apply(pag.apply(together, 2.0, second, ALWAYS), 0.0, 15.0, -0.5, ALWAYS)
    if name == "unet":
        together = injectfusion.apply(together, trajectory, 0.3, ALWAYS)
    out = toy.sample(together)
    assert out.isfinite().all() and not near(out, alone, 1e-3)
    with pytest.raises(ValueError, match="both replace the keys of the attention in"):
        toy.sample(masactrl.apply(base, trajectory, 1.0, first, ALWAYS))


def test_nothing_else_changes_not_even_after_an_error(name):
    model = network(name)
    before, ours = toy.sample(model), steered(model, path(name, model))
    first = toy.sample(ours)

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, callback=stop)
    assert torch.equal(toy.sample(ours), first) and torch.equal(toy.sample(model), before)


def test_half_precision_is_near():
    half, full = toy.model(dtype=torch.float16), toy.model()
    assert near(*(toy.sample(steered(model, path("unet", model)), steps=2) for model in (half, full)), 0.03)


def test_bad_input_raises_before_sampling(name):
    model = network(name)
    trajectory = path(name, model)
    low = Trajectory(trajectory.sigmas[2:], trajectory.latents[2:], trajectory.model, text(name, 5))
    features = 'no layer "output.9"; this model has output.0-3' if name == "unet" else "takes features of .* a UNet"
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(layers="double.77"), 'no layer "double.77"; this model has'),
            (dict(features="output.9"), features),
            (dict(trajectory=path(name, model, 3)), "of a batch other than the latent's"),
            (dict(trajectory=low), "the sampler starts at sigma .* invert it with"),
            (dict(trajectory=path(name, model, conditioning=[])), "there is no source prompt"),
            (dict(trajectory=path("unet", toy.model(kind="v"))), "another model"),
        ):
            with pytest.raises(ValueError, match=f"SteerPlugAndPlay: .*{words}"):
                toy.sample(steered(model, **{"trajectory": trajectory, **options}))
    assert count.calls == 0


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_on_the_lab_colours_change_and_shapes_stay(which):
    """Eight portraits under a prompt with three other colours that says nothing of the shapes. On three sets layout
    rose by 0.40 to 0.53 (UNet) and 0.33 to 0.45 (DiT); the new colours were always there."""
    from bench.lab_editing import trajectory
    from bench.lab_layout import layout, plugandplay, row

    lab, steps = layout(which, 8, 9000, "recoloured"), 8
    found = trajectory(lab, steps)
    plain, ours = (row(lab, steps, plugandplay, options, found) for options in (None, {}))
    assert float(ours["layout"].mean()) > float(plain["layout"].mean()) + 0.2
    assert float(ours["new"].mean()) >= 0.7
