"""IP-Adapter against attention written out by the host's own hooks, its limits, and what composes with it."""

import comfy.model_management as mm
import pytest
import torch
import toy
from attention.by_hand import attention, near
from comfy.patcher_extension import WrappersMP
from identity import oracle
from identity.by_hand import ORDER, by_hand, e_of, encoder, load, pictures, seen
from steer.models.identity import adapter as files
from steer.patches.guidance import apg, negative, pag
from steer.patches.identity import ipadapter
from steer.patches.shared import reference
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


def steered(model, adapter, strength=0.8, weight_type="linear", layers="auto", combine="concat",
            unconditional="as trained", schedule=ALWAYS, **options):
    options = {"image": pictures(), "clip_vision": encoder(), **options}
    return ipadapter.apply(model, adapter, strength, weight_type, layers, combine, unconditional, schedule, **options)


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.mark.parametrize("variant", ["base", "plus", "full-face"])
def test_is_the_papers_attention(model, variant):
    """Equation 5 in all seven layers, the middle's among them, for positive and negative over a whole run."""
    tree, adapter = load(variant)
    hand = by_hand(model, tree, e_of(variant, tree, pictures()), e_of(variant, tree))
    out = toy.sample(steered(model, adapter))
    assert near(out, toy.sample(hand))
    assert not near(out, toy.sample(model), 1e-2)


@pytest.mark.parametrize("block", ORDER, ids=str)
def test_every_layer_acts_by_itself(model, block):
    tree, adapter = load()
    cond, uncond = e_of("plus", tree, pictures()), e_of("plus", tree)
    out = toy.sample(steered(model, adapter, layers=str(Layer(*block))), steps=2)
    assert near(out, toy.sample(by_hand(model, tree, cond, uncond, only=[block]), steps=2))
    assert not near(out, toy.sample(model, steps=2), 1e-4)


def test_several_transformers_in_a_layer():
    """As in SDXL: a file has one layer for each."""
    model = toy.model(dict(toy.UNET, transformer_depth=[1, 2], transformer_depth_output=[1, 1, 2, 2],
                           transformer_depth_middle=3))
    order = [("input", 1), *(("input", 3, i) for i in range(2)), *(("output", n, i) for n in (0, 1) for i in range(2)),
             ("output", 2), ("output", 3), *(("middle", 0, i) for i in range(3))]
    tree = oracle.file("plus", (64, *(128,) * 6, 64, 64, *(128,) * 3))
    adapter = files.from_state_dict(oracle.flat(tree), "deep.bin")
    hand = by_hand(model, tree, e_of("plus", tree, pictures()), e_of("plus", tree), order=order)
    assert near(toy.sample(steered(model, adapter), steps=2), toy.sample(hand, steps=2))


@pytest.mark.parametrize("options, calls", [
    (dict(cfg=1.0), 4), (dict(positive=toy.text(1, tokens=331)), 8), (dict(negative=toy.text(1)), 4),
], ids=["without negative", "apart", "one text"])
def test_rows_get_the_tokens_of_their_own(model, options, calls):
    tree, adapter = load()
    hand = by_hand(model, tree, e_of("plus", tree, pictures()), e_of("plus", tree))
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, adapter), **options)
    assert count.calls == calls and near(out, toy.sample(hand, **options))


def test_context_windows_are_refused(model):
    """They cut the conditionings, so that it is not known whose rows are whose."""
    from comfy import context_windows

    ours = steered(model, load()[1])
    ours.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_windows.get_matching_context_schedule("standard_static"),
        context_windows.get_matching_fuse_method("flat"), context_length=8, dim=2,
    )
    with pytest.raises(ValueError, match="SteerIPAdapter: cannot tell the positive from the negative"):
        toy.sample(ours)


def test_what_the_negative_is_shown(model):
    tree, adapter = load()
    cond = e_of("plus", tree, pictures())
    black, other = torch.zeros(1, 28, 28, 3), pictures(seed=4)
    for uncond, options in (
        (None, dict(unconditional="none")),
        (e_of("plus", tree, black), dict(unconditional="black picture")),
        (e_of("plus", tree, other), dict(negative_image=other)),
        (e_of("plus", tree), dict(image=None, embeds=encoder().encode_image(pictures()))),
    ):
        out = toy.sample(steered(model, adapter, **options), steps=2)
        assert near(out, toy.sample(by_hand(model, tree, cond, uncond), steps=2))


def test_several_pictures(model):
    """Side by side for concat, one of them otherwise."""
    tree, adapter = load()
    three, x = pictures(3), seen("plus", pictures(3))
    for how, e in (
        ("concat", oracle.tokens("plus", tree["image_proj"], x).reshape(1, -1, oracle.TEXT)),
        ("average", oracle.tokens("plus", tree["image_proj"], x.mean(0, keepdim=True))),
        ("add", oracle.tokens("plus", tree["image_proj"], x.sum(0, keepdim=True))),
        ("subtract", oracle.tokens("plus", tree["image_proj"], x[:1] - (x[1:2] + x[2:]) / 2)),
    ):
        out = toy.sample(steered(model, adapter, combine=how, image=three), steps=2)
        assert near(out, toy.sample(by_hand(model, tree, e, e_of("plus", tree)), steps=2)), how


def test_each_item_of_a_batch_has_its_own(model):
    _, adapter = load()
    start, two = toy.noise(batch=2), pictures(2)
    out = toy.sample(steered(model, adapter, combine="one each", image=two), start=start)
    for i in range(2):
        one = toy.sample(steered(model, adapter, image=two[i : i + 1]), start=start[i : i + 1])
        assert near(out[i : i + 1], one)
    shared = toy.sample(steered(model, adapter), start=start)
    assert near(shared[1:], toy.sample(steered(model, adapter), start=start[1:]))


@pytest.mark.parametrize("height, width", [(14, 18), (15, 17)])
def test_a_mask_at_odd_sizes(model, height, width):
    tree, adapter = load()
    start = toy.noise(height=height, width=width)
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1.0
    mask[2:5] = 0.4
    hand = by_hand(model, tree, e_of("plus", tree, pictures()), e_of("plus", tree), mask=mask)
    fine = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    assert near(toy.sample(steered(model, adapter, mask=fine), start=start), toy.sample(hand, start=start))
    ones = toy.sample(steered(model, adapter, mask=torch.ones(1, 8 * height, 8 * width)), start=start)
    assert torch.equal(ones, toy.sample(steered(model, adapter), start=start))


def test_an_item_whose_mask_is_empty_is_left_alone(model, monkeypatch):
    _, adapter = load()
    start, mask, rows = toy.noise(batch=3), torch.ones(3, 128, 128), []
    mask[1] = 0
    plain = reference.plain
    monkeypatch.setattr(reference, "plain", lambda call: (rows.append(len(call.q)), plain(call))[1])
    out = toy.sample(steered(model, adapter, mask=mask), start=start)
    assert set(rows) == {2}
    assert near(out[1:2], toy.sample(model, start=start[1:2]))
    assert near(out[2:], toy.sample(steered(model, adapter), start=start[2:]))


def test_two_adapters_add_up_in_any_order(model):
    (tree, one), (other, two) = load("plus"), load("base", seed=1)
    image = pictures(seed=3)

    def both(first):
        options = (one, dict()), (two, dict(strength=0.5, image=image))
        made = model
        for adapter, its in options if first else options[::-1]:
            made = steered(made, adapter, **its)
        return toy.sample(made)

    out = both(True)
    assert torch.equal(out, both(False))
    hand = by_hand(model, tree, e_of("plus", tree, pictures()), e_of("plus", tree))
    assert near(out, toy.sample(by_hand(hand, other, e_of("base", other, image), e_of("base", other), 0.5)))
    twice = steered(steered(model, one, 0.3), one, 0.5)
    assert near(toy.sample(twice), toy.sample(steered(model, one, 0.8)))


@pytest.mark.parametrize("options", [
    dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5)), dict(mask=torch.zeros(1, 64, 64)),
], ids=["strength", "window", "mask"])
def test_off_is_no_node(model, options):
    looked = encoder()
    looked.model.register_forward_pre_hook(lambda *_: pytest.fail("the picture was looked at"))
    off = steered(model, load()[1], clip_vision=looked, **options)
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    assert torch.equal(toy.sample(off), toy.sample(model))


def test_projected_once_for_a_run_and_asked_in_its_window_only(model):
    _, adapter = load()
    ours, calls = steered(model, adapter, schedule=Schedule(0.0, 0.5), layers="middle, output"), []
    for layer in adapter.patcher.model.layers:
        layer["to_k_ip"].register_forward_hook(lambda *_: calls.append(1))
    with toy.count_forwards(model) as count:
        toy.sample(ours, steps=8)
    assert len(calls) == 2 * 5 and (count.calls, count.rows) == (8, 16)
    for start, end in ((0.0, 1e-4), (1.0, 1.0)):
        assert near(toy.sample(steered(model, adapter, schedule=Schedule(start, end)), sigmas=torch.tensor([5.0, 0.0])),
                    toy.sample(model, sigmas=torch.tensor([5.0, 0.0])), 1e-7)


def test_the_host_manages_the_adapters_memory(model):
    _, adapter = load()
    mm.unload_all_models()
    toy.sample(steered(model, adapter), steps=1)
    assert adapter.patcher.model in [each.model.model for each in mm.current_loaded_models]


@pytest.mark.parametrize("weight_type, expected", [
    ("linear", (1,) * 7),
    ("ease in", [0.05 + 0.95 * (1 - t / 7) for t in range(7)]),
    ("weak middle", (1, 1, 0.2) + (1,) * 4),
    ("strong middle", (0.2, 0.2, 1) + (0.2,) * 4),
    ("reverse in-out", [0.05 + 0.95 * abs(t - 3.5) / 3.5 for t in range(7)]),
])
def test_weight_types(model, weight_type, expected):
    """In the order of the forward, each layer by its own weight."""
    tree, adapter = load()
    weights = ipadapter.weights_of(model, adapter, weight_type, "auto")
    forward = [*ORDER[:2], ORDER[-1], *ORDER[2:6]]
    assert [tuple(layer) for layer, _ in weights] == forward
    assert [w for _, w in weights] == pytest.approx(list(expected))
    hand, cond, uncond = model, e_of("plus", tree, pictures()), e_of("plus", tree)
    for block, w in zip(forward, expected, strict=True):
        hand = by_hand(hand, tree, cond, uncond, 0.8 * w, only=[block])
    assert near(toy.sample(steered(model, adapter, weight_type=weight_type), steps=2), toy.sample(hand, steps=2))


def test_with_other_nodes_and_other_packs(model):
    """Another pack's replacement and patches of the same layers are called, and ours is added to what they make."""
    tree, adapter = load()
    cond, uncond, called = e_of("plus", tree, pictures()), e_of("plus", tree), set()
    theirs = model.clone()
    theirs.set_model_attn2_patch(lambda n, c, v, extra: (called.add("patch"), (n, 1.1 * c, v))[1])
    theirs.set_model_attn2_output_patch(lambda n, extra: (called.add("output"), 0.9 * n)[1])

    def replace(q, k, v, extra):
        called.add("replace")
        return attention(q, k, 0.5 * v, extra["n_heads"])

    for block in (("middle", 0), ("output", 1)):
        theirs.set_model_attn2_replace(replace, *block)
    out = toy.sample(steered(theirs, adapter))
    assert called == {"patch", "output", "replace"}
    assert near(out, toy.sample(by_hand(theirs, tree, cond, uncond)))


def test_with_guidance_of_other_kinds(model):
    """Weak branches and negatives of other nodes are shown what their text is shown."""
    tree, adapter = load()
    hand = by_hand(model, tree, e_of("plus", tree, pictures()), e_of("plus", tree))
    made = [pag.apply(each, 2.0, "middle", ALWAYS) for each in (steered(model, adapter), hand)]
    assert near(*(toy.sample(each) for each in made))
    made = [apg.apply(each, 0.0, 15.0, -0.5, ALWAYS) for each in (steered(model, adapter), hand)]
    assert near(*(toy.sample(each) for each in made))
    step = dict(sigmas=torch.tensor([6.0, 0.0]))
    out = toy.sample(negative.apply(steered(model, adapter), toy.text(8), 3.0, ALWAYS), **step)
    D_p, D_0, D_n = (toy.sample(hand, cfg, **step, **given)
                     for cfg, given in ((1.0, {}), (0.0, {}), (0.0, dict(negative=toy.text(8)))))
    assert near(out, D_0 + 5.0 * (D_p - D_0) - 3.0 * (D_n - D_0), 1e-4)


def test_half_precision(model):
    for dtype in (torch.float16, torch.bfloat16):
        half = toy.model(dtype=dtype)
        _, adapter = load(dtype=dtype)
        out = toy.sample(steered(half, adapter, mask=torch.ones(1, 64, 64)), steps=2)
        assert out.isfinite().all()
        assert near(out, toy.sample(steered(model, load()[1]), steps=2), 0.1)


def test_nothing_else_changes_not_even_after_an_error(model):
    _, adapter = load()
    before, ours = toy.sample(model), steered(model, adapter)
    sibling = steered(model, load("base", 1)[1])
    its, first = toy.sample(sibling), toy.sample(ours)

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, callback=stop)
    assert torch.equal(toy.sample(ours), first)
    assert torch.equal(toy.sample(sibling), its) and torch.equal(toy.sample(model), before)


def test_bad_input_raises_before_sampling(model):
    _, adapter = load()
    _, face = load("faceid")
    small = files.from_state_dict(oracle.flat(oracle.file("plus", hidden=(64, 128))), "small.bin")
    large = files.from_state_dict(oracle.flat(oracle.file("plus", hidden=(64,) * 7)), "large.bin")
    area = [[toy.POSITIVE[0][0], {**toy.POSITIVE[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    embeds, wrong = encoder().encode_image(pictures()), encoder(hidden_size=64)
    with toy.count_forwards(model) as count:
        for made, options, words in (
            (adapter, dict(strength=-1.0), "strength -1.0 must be a finite number from 0"),
            (adapter, dict(layers="double.1"), 'no layer "double.1"; this model has'),
            (adapter, dict(weight_type="style"), "is known for SD1.x and SDXL, and this model has 7 layers"),
            (face, {}, "faceid-0.safetensors is IP-Adapter faceid; use SteerFaceID for it"),
            (small, {}, "small.bin is made for a UNet with 2 cross-attentions to a text of width 64; this model has 7"),
            (large, {}, "7 to a text of width 64, of other sizes"),
            (adapter, dict(image=None), "needs one of image and embeds"),
            (adapter, dict(clip_vision=None), "needs clip_vision to look at a picture"),
            (adapter, dict(clip_vision=wrong), "needs an image encoder, whose hidden .* 96; wired is"),
            (adapter, dict(image=None, clip_vision=None, embeds=embeds), "wire clip_vision too"),
            (adapter, dict(image=None, embeds=wrong.encode_image(pictures())), "have width 64"),
            (adapter, dict(combine="one each", image=pictures(3)), "references for 3 pictures, and the batch has 1"),
            (adapter, dict(mask=torch.ones(1, 16, 48)), "another aspect than the picture"),
        ):
            with pytest.raises(ValueError, match=f"SteerIPAdapter: .*{words}"):
                toy.sample(steered(model, made, **options))
        with pytest.raises(ValueError, match="SteerIPAdapter: mask is for the whole picture, and a conditioning has"):
            toy.sample(steered(model, adapter, mask=torch.ones(1, 64, 64)), positive=area)
        with pytest.raises(ValueError, match="acts on the cross-attention of a UNet .*, which Flux does not have"):
            steered(toy.flux(), adapter)
    assert count.calls == 0
