"""Words in their regions against attention written out, the limits, what it may be combined with, and the lab."""

import pytest
import torch
import toy
from attention.by_hand import near
from attention.texts import clip, conditioning, network, one_step, path, watched
from steer.patches.guidance import apg, pag
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.words import encode
from steer.patches.tokens import regions

PROMPT = "a portrait of two persons, a happy person, blue hair, a sad person, red hair"
LEFT, RIGHT = "a happy person, blue hair", "a sad person\nred hair"
ALWAYS = Schedule()
SIDES = {"unet": 16, "flux": 16}  # of the latent; 8 of others


def masks(side, batch=1):
    """[b, side, side]: a soft one of the left, and one of the right that overlaps it and leaves some places to none."""
    ramp = torch.linspace(1.2, -0.6, side).clamp(0, 1).expand(batch, side, side).clone()
    right = torch.zeros(batch, side, side)
    right[:, : side // 2, side // 2 - 2 :] = 1
    right[-1:, -2:] = 0.5 * (batch > 1)
    return ramp, right


def steered(model, side=16, given=None, strength=1.0, isolate="auto", layers="auto", schedule=ALWAYS, **options):
    pairs = list(zip((LEFT, RIGHT), masks(side), strict=True)) if given is None else given
    return regions.apply(model, clip(), PROMPT, pairs, strength, isolate, layers, schedule, **options)


def sampled(steering, **options):
    model, positive = steering
    return toy.sample(model, positive=positive, negative=conditioning(""), **options)


def shares(side, n, strength, isolate, text):
    """What exp(score) is multiplied by, [n, text], or [text + n, text + n] of a shared attention, entry by entry."""
    prompt, height = encode(clip(), PROMPT)[1], int(n**0.5)
    frames, height = (3, 4) if n == 48 else (1, height)
    m = [mask[0].unflatten(1, (height, -1)).unflatten(0, (height, -1)).mean((1, 3)).flatten() for mask in masks(side)]
    m = [[float(v) for v in each.repeat(frames)] for each in m]
    words = [set(prompt.find(phrases)) for phrases in (LEFT, RIGHT)]
    one = [set(w) for w in ((c for c in words[r] if c not in words[1 - r]) for r in (0, 1))]

    def apart(a, b):
        (kind_a, i), (kind_b, j) = a, b
        if kind_a == kind_b == "word":
            return (i in one[0] and j in one[1]) or (i in one[1] and j in one[0])
        if kind_a == kind_b:
            u, v = max(m[0][i], m[1][i]), max(m[0][j], m[1][j])
            return (isolate != "off") * (min(u, v) - max(min(m[r][i], m[r][j]) for r in (0, 1)))
        word, place = (i, j) if kind_a == "word" else (j, i)
        owners = [r for r in (0, 1) if word in words[r]]
        return 1 - max(m[r][place] for r in owners) if owners else 0

    places, columns = [("place", i) for i in range(n)], [("word", i) for i in range(text)]
    kinds = {"cross": (places, columns), "self": (places, places), "joint": (columns + places, columns + places)}

    def table(kind):
        queries, keys = kinds[kind]
        return torch.tensor([[1 - strength * float(apart(a, b)) for b in keys] for a in queries])

    return table


@pytest.mark.parametrize("name, strength, isolate", [
    ("unet", 1.0, "auto"), ("unet", 0.6, "on"), ("flux", 1.0, "off"), ("flux", 0.6, "on"), ("sd3", 1.0, "auto"),
    ("qwen", 1.0, "off"), ("lumina", 1.0, "auto"), ("wan", 1.0, "on"),
])
def test_attention_is_weighed_by_region(name, strength, isolate):
    model, side = network(name), SIDES.get(name, 8)
    trajectory, made = path(name, model, PROMPT), {}

    def look(kind, number, q, k, v, heads, text):
        if kind == "self" and isolate != "on":
            return None
        n = q.shape[1] - text
        key = kind, n
        if key not in made:
            made[key] = shares(side, n, strength, isolate, text or k.shape[1])(kind)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.mT * q.shape[-1] ** -0.5).exp() * made[key]
        return (a / a.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)

    ours, positive = steered(model, side, strength=strength, isolate=isolate)
    options = {**one_step(trajectory), "positive": positive, "negative": conditioning("")}
    expected = toy.sample(watched(name, model, look), 1.0, **options)
    assert near(toy.sample(ours, 1.0, **options), expected)
    assert not near(toy.sample(model, 1.0, **options), expected, 1e-3)


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


def test_without_strength_or_window_nothing_changes(name):
    model = network(name)
    before = toy.sample(model, positive=conditioning(PROMPT), negative=conditioning(""))
    for options in (dict(strength=0.0), dict(schedule=Schedule(0.4, 0.4))):
        with toy.count_forwards(model) as count:
            assert torch.equal(sampled(steered(model, **options)), before)
        assert count.calls == 4
    with toy.count_forwards(model) as count:
        late = sampled(steered(model, schedule=Schedule(0.0, 0.5)))
    assert count.calls == 4 and not near(late, before, 1e-3) and not near(late, sampled(steered(model)), 1e-3)


def test_a_mask_of_the_whole_picture_for_all_words_changes_nothing(name):
    model = network(name)
    every = [("\n".join(f"#{n}" for n in range(1, 15)), torch.ones(1, 16, 16))]
    assert near(sampled(steered(model, given=every, isolate="on")), sampled((model, conditioning(PROMPT))), 1e-4)


def test_a_word_without_a_place_is_not_seen():
    """Its columns may say anything."""
    model, prompt = network("unet"), encode(clip(), PROMPT)[1]
    nowhere, positive = [("blue hair", torch.zeros(1, 16, 16))], conditioning(PROMPT)
    context = positive[0][0].clone()
    context[:, list(prompt.find("blue hair"))] = 9.0
    changed = [[context, positive[0][1]]]
    a, b = (sampled(steered(model, given=nowhere, positive=p)) for p in (positive, changed))
    assert near(a, b) and not near(sampled((model, changed)), sampled((model, positive)), 1e-3)


def test_a_batch_is_its_runs_each_with_its_masks(name):
    model = network(name)
    both = list(zip((LEFT, RIGHT), masks(16, 2), strict=True))
    out = sampled(steered(model, given=both), start=toy.noise(0, 2))
    for i in range(2):
        one = [(words, mask[i : i + 1]) for words, mask in both]
        assert near(out[i : i + 1], sampled(steered(model, given=one), start=toy.noise(i)), 1e-3)
    assert not near(out[1:], sampled(steered(model), start=toy.noise(1)), 1e-3)


def test_with_guidance_a_controlnet_and_a_prompt_of_another_length(name):
    model = network(name)
    layer = "middle" if name == "unet" else "single.1"
    ours, positive = steered(model, isolate="on")
    alone = sampled((ours, positive))
    together = sampled((apg.apply(pag.apply(ours, 2.0, layer, ALWAYS), 0.0, 15.0, -0.5, ALWAYS), positive))
    assert together.isfinite().all() and not near(together, alone, 1e-3)
    again = pag.apply(apg.apply(model, 0.0, 15.0, -0.5, ALWAYS), 2.0, layer, ALWAYS)
    assert torch.equal(sampled(steered(again, isolate="on")), together)
    if name == "unet":
        from attention.texts import wide

        hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
        control = toy.controlnet(hint, config=wide(toy.UNET))
        controlled = [[c, {**o, "control": control, "control_apply_to_uncond": True}] for c, o in positive]
        out = sampled(steered(model, positive=controlled))
        plain = toy.sample(model, positive=controlled, negative=conditioning(""))
        assert not near(out, plain, 1e-3) and not near(out, sampled(steered(model)), 1e-3)
        long = conditioning("a " * 90)  # of two pieces: the host repeats the shorter text
        model, positive = steered(model)
        apart = toy.sample(model, 1.0, positive=positive, negative=long)
        assert near(apart, toy.sample(model, 1.0, positive=positive, negative=conditioning("")))
        assert toy.sample(model, positive=positive, negative=long).isfinite().all()


@pytest.mark.parametrize("kind, dtype", [("v", torch.float16), ("eps", torch.bfloat16)])
def test_odd_sizes_and_half_precision(kind, dtype):
    from attention.texts import wide

    model = toy.model(wide(toy.UNET), kind, dtype)
    given = [(LEFT, torch.ones(1, 104, 136).triu()), (RIGHT, torch.ones(1, 104, 136).tril())]
    start = torch.randn(1, 4, 13, 17, generator=torch.Generator().manual_seed(1))
    out = sampled(steered(model, given=given, isolate="on"), start=start)
    assert out.isfinite().all() and not near(out, sampled((model, conditioning(PROMPT)), start=start), 1e-3)


def test_nothing_else_changes_not_even_after_an_error(name):
    model = network(name)
    before, ours = sampled((model, conditioning(PROMPT))), steered(model, isolate="on")
    first = sampled(ours)

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sampled(ours, callback=stop)
    assert torch.equal(sampled(ours), first) and torch.equal(sampled((model, conditioning(PROMPT))), before)


def test_bad_input_raises_before_sampling(name):
    model, whole = network(name), torch.ones(1, 16, 16)
    area = [[c, {**o, "area": (16, 8, 0, 0), "strength": 1.0}] for c, o in conditioning(PROMPT)]
    cases = (
        (dict(given=[("a dog", whole)]), '"a dog" is not in the prompt'),
        (dict(given=[("hair, happy", whole)]), '"hair, happy" is not in the prompt'),
        (dict(given=[("hair", None)]), "words_1 is given and mask_1 is not"),
        (dict(given=[("hair", whole), ("", whole)]), "mask_2 is given and words_2 is not"),
        (dict(given=[("", None)]), "there is no region"),
        (dict(given=[("hair", torch.ones(1, 16, 48))]), "another aspect than the picture: 48x16"),
        (dict(given=[("hair", torch.ones(3, 16, 16))]), "there are 3 masks for a batch of 1"),
        (dict(strength=1.5), "strength 1.5 must be a finite number from 0 to 1"),
        (dict(layers="double.77"), 'no layer "double.77"'),
        (dict(isolate="yes"), 'isolate "yes" must be one of auto, on, off'),
        (dict(positive=toy.text(1, 12, 128)), "positive is not of this text"),
    )
    with toy.count_forwards(model) as count:
        for options, words in cases:
            with pytest.raises(ValueError, match=f"SteerRegions: .*{words}"):
                sampled(steered(model, **options))
        with pytest.raises(ValueError, match="SteerRegions: the guider's positive is not the prompt"):
            sampled((steered(model)[0], conditioning("a person")))
    assert count.calls == 0
    if name == "unet":
        with pytest.raises(ValueError, match="SteerRegions: masks are for the whole picture"):
            sampled(steered(model, positive=area))


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_on_the_lab_attributes_stay_with_their_person(which):
    """Two persons in one wide picture: what the prompt says of the other is seen less than half as often."""
    from bench.lab_tokens import two_persons

    plain, ours = (two_persons(which, 4, 0, 10, strength) for strength in (0.0, 1.0))
    assert ours["leaked"] < 0.5 * plain["leaked"] and ours["own"] > plain["own"] + 0.15
