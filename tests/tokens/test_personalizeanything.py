"""Tokens in place of others against hidden states that are replaced by hand, tokens beside others against attention
written out, layouts, limits and the lab."""

from dataclasses import replace

import pytest
import torch
import toy
import toy_dit
from attention.by_hand import attention, near, one_step, path
from attention.by_hand import noise as flux_noise
from steer.patches.attention import masactrl
from steer.patches.guidance import apg, pag
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory, fingerprint
from steer.patches.tokens import personalizeanything
from steer.patches.tokens.personalizeanything import Layout

ALWAYS = Schedule()
BOX = (0.5, 0.375, 0.25, 0.375)  # the subject below goes 3 to the right and 1 down
GRID = (8, 8)


def mask(side=128, item=0):
    """Of rows 2 to 4 and columns 1 to 2 of 8 x 8 tokens; of the item 1 one row more."""
    m = torch.zeros(1, side, side)
    m[:, 2 * side // 8 : (5 + item) * side // 8, side // 8 : 3 * side // 8] = 1
    return m


def moved():
    """[(token of the source, token of the picture)] for the mask in the BOX."""
    return [(8 * r + c, 8 * (r + 1) + c + 3) for r in (2, 3, 4) for c in (1, 2)]


def steered(model, trajectory, threshold=1.0, strength=0.0, subject=None, schedule=ALWAYS, **options):
    subject = mask() if subject is None else subject
    options = {"box": BOX, **options}
    return personalizeanything.apply(model, trajectory, subject, threshold, strength, schedule, **options)


def network(name):
    return toy.flux() if name == "flux" else toy_dit.model(name)


def trajectory_of(name, model):
    if name == "flux":
        return path(name, model)
    sigmas, noise = toy.sigmas(model, 4), [toy_dit.noise(name, 1, 16, 16, seed) for seed in (40, 50)]
    latents = torch.stack([0.3 * noise[0] + s * noise[1] for s in sigmas])
    return Trajectory(sigmas, latents, fingerprint(model), toy_dit.text(5))


def prompts(name):
    text = toy.text if name == "flux" else toy_dit.text
    return {"positive": text(1), "negative": text(2)}


def asked(block):
    """The projection that modulated hidden states go into, and where the image is in them."""
    double = hasattr(block, "img_attn")
    return (block.img_attn.qkv, slice(None)) if double else (block.linear1, slice(-64, None))


def by_hand(name, model, subjects, **options):
    """One step in which what the image tokens' attention is asked with is replaced. subjects: [(trajectory, pairs)]."""
    net = model.model.diffusion_model
    blocks, kept = [*net.double_blocks, *net.single_blocks], {}

    def keep(n, number):
        return lambda module, args: kept.__setitem__((n, number), args[0].clone())

    def change(number, image):
        def hook(module, args, output):
            hidden = args[0].clone()
            for n, (_, pairs) in enumerate(subjects):
                for i, j in pairs:
                    hidden[:, image][:, j] = kept[n, number][:, image][:, i]
            width = 3 * net.hidden_size  # the rest of a single block's is its perceptron
            asks = torch.nn.functional.linear(hidden, module.weight, module.bias)[..., :width]
            return torch.cat((asks, output[..., width:]), -1)

        return hook

    for n, (trajectory, _) in enumerate(subjects):
        handles = [asked(b)[0].register_forward_pre_hook(keep(n, i)) for i, b in enumerate(blocks)]
        own = {"positive": trajectory.conditioning, "start": trajectory.latents[0] / trajectory.sigmas[0]}
        toy.sample(model, **{**one_step("flux", trajectory), **options, **own})
        for handle in handles:
            handle.remove()
    handles = [asked(b)[0].register_forward_hook(change(i, asked(b)[1])) for i, b in enumerate(blocks)]
    try:
        return toy.sample(model, **{**one_step("flux", subjects[0][0]), **options})
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name, cfg", [("flux", 1.0), ("flux", 5.0), ("chroma", 5.0), ("flux2", 5.0)])
def test_is_what_replacing_the_modulated_hidden_states_is(name, cfg):
    """In double and in single blocks, at another place, for the positive and for the negative."""
    model = network(name)
    trajectory, options = trajectory_of(name, model), {**prompts(name), "cfg": cfg}
    start = trajectory.latents[0].flip(-1) / trajectory.sigmas[0]
    options["start"] = start
    expected = by_hand(name, model, [(trajectory, moved())], **options)
    options = {**one_step("flux", trajectory), **options}
    assert near(toy.sample(steered(model, trajectory), **options), expected, 1e-5)
    assert not near(toy.sample(model, **options), expected, 1e-3)


def test_a_source_with_a_prompt_of_another_length_runs_before():
    model = network("flux")
    trajectory = replace(path("flux", model), conditioning=toy.text(5, 70))
    options = {**prompts("flux"), "cfg": 1.0}
    expected = by_hand("flux", model, [(trajectory, moved())], **options)
    assert near(toy.sample(steered(model, trajectory), **{**one_step("flux", trajectory), **options}), expected, 1e-5)


def test_several_subjects_each_go_to_their_place():
    model = network("flux")
    first = path("flux", model)
    second = Trajectory(first.sigmas, first.latents.flip(-1), first.model, toy.text(6))
    both = steered(steered(model, first), second, box=None)
    in_place = [(i, i) for i, _ in moved()]
    expected = by_hand("flux", model, [(first, moved()), (second, in_place)])
    options = one_step("flux", first)
    assert near(toy.sample(both, **options), expected, 1e-5)
    over = toy.sample(steered(steered(model, first, box=None), second, box=None), **options)
    expected = by_hand("flux", model, [(second, in_place)], start=options["start"])
    assert near(over, expected, 1e-5)  # the later counts


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_later_the_subjects_tokens_stand_beside_the_others(strength):
    """Their keys as they are before they get a place."""
    model, kept, turn = network("flux"), [], -1
    trajectory = path("flux", model)
    numbers = 77 + torch.tensor([i for i, _ in moved()])

    def keep(q, k, v, pe, attn_mask, extra_options):
        kept.append([t.transpose(1, 2).flatten(2)[:, numbers] for t in (k, v)])
        return {}

    def written_out(function, q, k, v, heads, *args, **kwargs):
        nonlocal turn
        turn += 1
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
        k, v = (torch.cat((t, s), 1) for t, s in zip((k, v), kept[turn], strict=True))
        bias = torch.zeros(k.shape[1])
        bias[-len(numbers) :] = torch.tensor(strength).log()
        return attention(q, k, v, heads, bias=bias)

    options, looking, by_hand_ = one_step("flux", trajectory), model.clone(), model.clone()
    looking.set_model_attn1_patch(keep)
    toy.sample(looking, **{**options, "positive": trajectory.conditioning})
    by_hand_.model_options["transformer_options"]["optimized_attention_override"] = written_out
    expected = toy.sample(by_hand_, **options)
    assert near(toy.sample(steered(model, trajectory, 0.0, strength), **options), expected, 1e-5)
    assert not near(toy.sample(model, **options), expected, 1e-3)


def test_later_several_subjects_stand_beside_each_other():
    """Two nodes with a part of the subject each are one with all of it; beside one that replaces, in any order."""
    model, upper = network("flux"), mask()
    trajectory = path("flux", model)
    upper[:, 48:] = 0
    lower = mask() - upper
    options = one_step("flux", trajectory)
    whole = steered(model, trajectory, 0.0, 0.5, box=None)
    parts = steered(model, trajectory, 0.0, 0.5, upper, box=None)
    assert near(toy.sample(steered(parts, trajectory, 0.0, 0.5, lower, box=None), **options),
                toy.sample(whole, **options), 1e-5)
    assert not near(toy.sample(parts, **options), toy.sample(whole, **options), 1e-3)
    beside, instead = dict(threshold=0.0, strength=0.5, subject=upper), dict(threshold=1.0, subject=lower)
    one, other = (steered(steered(model, trajectory, **a), trajectory, **b)
                  for a, b in ((beside, instead), (instead, beside)))
    assert near(toy.sample(one, **options), toy.sample(other, **options), 1e-5)


def test_layouts():
    shape = (1, 4, 16, 16)

    def pairs(**options):
        index, there = Layout(mask(), **options).on(shape, GRID)
        return [(int(index[0, j]), j) for j in there[0].nonzero()[:, 0].tolist()]

    assert pairs() == [(i, i) for i, _ in moved()]
    assert sorted(pairs(box=BOX)) == moved()
    target = torch.zeros(1, 128, 128)
    target[:, 48:96, 64:96] = 1  # as the box
    assert sorted(pairs(target=target)) == moved()
    target[:, :64] = target[:, 80:] = 0  # its middle row alone
    assert sorted(pairs(target=target)) == moved()[2:4]
    large = pairs(box=(0.0, 0.0, 1.0, 0.75), fits=True)  # twice as large
    assert len(large) == 24 and {i for i, _ in large} == {i for i, _ in moved()}
    assert large[0] == (17, 2) and large[-1] == (34, 45)
    assert len(pairs(cells=2)) == 5 * 4


def test_perturbation_shuffles_within_windows_and_moves_the_edge():
    layout = Layout(torch.ones(1, 128, 128), perturbation=1.0, seed=3)
    state = torch.get_rng_state()
    index, there = layout.on((1, 4, 16, 16), GRID, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert there.float().mean() > 0.5 and sorted(index[0].tolist()) == list(range(64))
    moved_ = [(i, j) for j, i in enumerate(index[0].tolist())]
    assert all(i // 8 // 3 == j // 8 // 3 and i % 8 // 3 == j % 8 // 3 for i, j in moved_)
    assert sum(i != j for i, j in moved_) > 32
    assert torch.equal(layout.on((1, 4, 16, 16), GRID, 0.5)[0], index)
    assert not torch.equal(layout.on((1, 4, 16, 16), GRID, 0.4)[0], index)
    sizes = {int(Layout(mask(), perturbation=0.01, seed=s).on((1, 4, 16, 16), GRID, 0.5)[1].sum()) for s in range(20)}
    assert sizes == {0, 6, 20}  # one token further in, as it is, one further out
    model = network("flux")
    trajectory = path("flux", model)
    a, again, other = (
        toy.sample(
            steered(model, trajectory, subject=torch.ones(1, 128, 128), box=None, perturbation=1.0, seed=s),
            **one_step("flux", trajectory),
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(a, again) and not near(a, other, 1e-3)


def test_off_is_off():
    model = network("flux")
    trajectory, before = path("flux", model), toy.sample(model)
    for options in (dict(threshold=0.0), dict(strength=1.0, threshold=0.5, schedule=Schedule(0.4, 0.4))):
        with toy.count_forwards(model) as count:
            assert torch.equal(toy.sample(steered(model, trajectory, **options)), before)
        assert (count.calls, count.rows) == (4, 8)
    with toy.count_forwards(model) as count:
        early = toy.sample(steered(model, trajectory, 0.5))
    assert count.calls == 4 and 8 < count.rows < 16 and not near(early, before, 1e-3)
    both = toy.sample(steered(model, trajectory, 0.5, 1.0))
    assert not near(both, early, 1e-3)


def test_the_source_itself_stays():
    model = network("flux")
    trajectory = path("flux", model)
    options = {**one_step("flux", trajectory), "positive": trajectory.conditioning}
    assert near(toy.sample(steered(model, trajectory, box=None), **options), toy.sample(model, **options))


def test_a_batch_is_its_runs_each_with_its_mask():
    model = network("flux")
    both, masks = path("flux", model, 2), torch.cat((mask(), mask(item=1)))
    out = toy.sample(steered(model, both, 0.5, 1.0, masks), start=flux_noise("flux", 0, 2))
    for i in range(2):
        one = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, both.conditioning)
        alone = toy.sample(steered(model, one, 0.5, 1.0, masks[i : i + 1]), start=flux_noise("flux", i))
        assert near(out[i : i + 1], alone, 1e-3)
    index, there = Layout(masks, box=BOX).on((2, 4, 16, 16), GRID)
    assert there.sum(1).tolist() == [6, 8]


def test_with_guidance_and_other_edits_and_half_precision():
    model = network("flux")
    trajectory = path("flux", model)
    for threshold, strength in ((1.0, 0.0), (0.0, 1.0)):
        ours = steered(model, trajectory, threshold, strength)
        alone = toy.sample(ours)
        together = apg.apply(pag.apply(ours, 2.0, "single.1", ALWAYS), 0.0, 15.0, -0.5, ALWAYS)
        out = toy.sample(together)
        assert out.isfinite().all() and not near(out, alone, 1e-3)
        again = apg.apply(pag.apply(model, 2.0, "single.1", ALWAYS), 0.0, 15.0, -0.5, ALWAYS)
        assert torch.equal(toy.sample(steered(again, trajectory, threshold, strength)), out)
        mutual = masactrl.apply(ours, trajectory, 1.0, "single.1", ALWAYS)
        assert not near(toy.sample(mutual), alone, 1e-3)
    half = toy.model(toy.FLUX, "flow", torch.bfloat16, base=toy.comfy.model_base.Flux)
    found = path("flux", half)
    assert toy.sample(steered(half, found, 0.5, 1.0, perturbation=0.5)).isfinite().all()


def test_nothing_else_changes_not_even_after_an_error():
    model = network("flux")
    trajectory = path("flux", model)
    before, ours = toy.sample(model), steered(model, trajectory, 0.5, 1.0)
    first = toy.sample(ours)

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, callback=stop)
    assert torch.equal(toy.sample(ours), first) and torch.equal(toy.sample(model), before)


def test_bad_input_raises_before_sampling():
    model = network("flux")
    trajectory = path("flux", model)
    corner = torch.zeros(1, 128, 128)
    corner[:, :32, :32] = 1
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(threshold=1.5), "threshold 1.5 must be a finite number from 0 to 1"),
            (dict(threshold=0.5, strength=-1.0), "strength -1.0 must be a finite number"),
            (dict(perturbation=2.0), "perturbation 2.0"),
            (dict(subject=torch.zeros(1, 128, 128)), "the subject mask has no token"),
            (dict(target=torch.zeros(1, 128, 128)), "the target mask has no token"),
            (dict(target=corner), "comes to lie outside of the picture or the target mask"),
            (dict(box=(0.5, 0.5, 0.0, 0.5)), "must lie between 0 and 1"),
            (dict(subject=torch.ones(1, 16, 48)), "another aspect than the picture: 48x16"),
            (dict(layers="double.77"), 'no layer "double.77"'),
            (dict(trajectory=path("flux", model, 3)), "of a batch other than the latent's"),
            (dict(trajectory=path("flux", model, conditioning=[])), "there is no source prompt"),
        ):
            with pytest.raises(ValueError, match=f"SteerPersonalizeAnything: .*{words}"):
                toy.sample(steered(model, **{"trajectory": trajectory, **options}))
    assert count.calls == 0
    unet = toy.model()
    with pytest.raises(ValueError, match="replaces tokens of transformers of the family Flux"):
        steered(unet, path("unet", unet))


def test_on_the_lab_the_subject_is_kept_at_its_new_place():
    """Portraits from the left go to the right: nearest to the face of their own source, and as prompted."""
    from bench.lab_tokens import moved as measured

    plain, ours = (measured(8, 0, 10, threshold, strength) for threshold, strength in ((0.0, 0.0), (0.8, 1.0)))
    assert ours["its own"] >= 0.75 and ours["identity"] > plain["identity"] + 0.3
    assert ours["place"] >= 0.85 and ours["around"] >= 0.85 and ours["inside"] < plain["inside"] - 0.5


def test_on_the_lab_two_subjects_come_together():
    """The head of one portrait and the body of another, neither of which the prompt names."""
    from bench.lab_subjects import Together

    both = Together(6, 0, 8, "body")
    plain, ours = (both.figures(threshold, strength) for threshold, strength in ((0.0, 0.0), (0.8, 1.0)))
    assert ours["head"] >= 0.9 and ours["second"] >= 0.8 and ours["prompted"] >= 0.9
    assert plain["head"] <= 0.5 and plain["second"] <= 0.6
    assert ours["identity"] > plain["identity"] + 0.3


def test_on_the_lab_the_rest_stays_where_a_part_is_painted_anew():
    from bench.lab_subjects import Anew

    inside = Anew(6, 0, 8, "inside")
    plain, ours = (inside.figures(threshold, 0.0) for threshold in (0.0, 0.9))
    assert plain["kept"] <= 0.6 and ours["kept"] >= 0.85 and ours["new"] >= 0.7
    assert ours["PSNR"] > plain["PSNR"] + 6
