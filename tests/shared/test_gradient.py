"""Gradients inside a node that the host's executor runs, against finite differences."""

import comfy.model_management as mm
import comfy.samplers
import pytest
import torch
import toy
from steer.patches.shared.gradient import differentiable, gradients, own, predict

import nodes


class Slopes:
    """A sampler that takes, at its first sigma, directional derivatives of a projection of D, both ways."""

    def __init__(self, fail=False):
        self.fail, self.found = fail, {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        options, sigma = extra_args["model_options"], float(sigmas[0])
        self.inference = all(p.is_inference() for p in guider.inner_model.diffusion_model.parameters())
        with gradients(guider.model_patcher):
            conds, x = own(guider.conds["positive"]), own(noise * sigma)
            text = conds[0]["model_conds"]["c_crossattn"].cond
            generator = torch.Generator().manual_seed(1)
            weights = torch.randn(x.shape, generator=generator)
            moves = {"x": (x, 1e-2), "conditioning": (text, 1e-2)}

            def projected():
                return (predict(guider.inner_model, conds, x, sigma, options) * weights).sum()

            for t, _ in moves.values():
                t.requires_grad_()
            slopes = torch.autograd.grad(projected(), [t for t, _ in moves.values()])
            if self.fail:
                raise RuntimeError("stop")
            for (name, (t, size)), slope in zip(moves.items(), slopes, strict=True):
                along = torch.randn(t.shape, generator=generator)
                with torch.no_grad():
                    t += size * along
                    high = projected()
                    t -= 2 * size * along
                    low = projected()
                    t += size * along
                self.found[name] = (float((slope * along).sum()), float(high - low) / (2 * size))
        return latent_image


def run(run_prompt, monkeypatch, which, work):
    """`work(model, positive)` as a node of the host."""
    class Work:
        RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "work", "test"

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802
            return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",)}}

        def work(self, model, positive):
            work(model, positive)
            return ("done",)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Work", Work)
    run_prompt({
        "1": {"class_type": "SteerLabModel", "inputs": {"model": which}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a comic portrait"}},
        "3": {"class_type": "Work", "inputs": {"model": ["1", 0], "positive": ["2", 0]}},
    })


def slopes(model, positive, fail=False):
    guider = comfy.samplers.CFGGuider(differentiable(model))
    guider.set_conds(positive, positive)
    sampler = Slopes(fail)
    guider.sample(toy.noise(height=8, width=8), toy.noise(height=8, width=8), sampler, torch.tensor([0.7, 0.0]), seed=0)
    return sampler


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_gradients_in_a_node_equal_finite_differences(run_prompt, monkeypatch, which):
    kept = {}

    def work(model, positive):
        weights = {k: v.clone() for k, v in model.model.state_dict().items()}
        before = toy.sample(model, 1.0, positive=positive, steps=2, start=toy.noise(height=8, width=8))
        kept["sampler"] = slopes(model, positive)
        after = toy.sample(model, 1.0, positive=positive, steps=2, start=toy.noise(height=8, width=8))
        kept["same"] = torch.equal(before, after) and all(
            torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())
        kept["mode"] = torch.is_inference_mode_enabled(), mm.in_training
        kept["graph"] = any(p.requires_grad for p in model.model.parameters())

    run(run_prompt, monkeypatch, which, work)
    assert kept["sampler"].inference  # else this would prove nothing
    for exact, difference in kept["sampler"].found.values():
        assert exact == pytest.approx(difference, rel=0.02, abs=0.02)
        assert abs(exact) > 0.05
    assert kept["same"] and kept["mode"] == (True, False) and not kept["graph"]


def test_nothing_stays_after_an_error(run_prompt, monkeypatch):
    kept = {}

    def work(model, positive):
        before = toy.sample(model, 1.0, positive=positive, steps=2)
        with pytest.raises(RuntimeError, match="stop"):
            slopes(model, positive, fail=True)
        kept["same"] = torch.equal(before, toy.sample(model, 1.0, positive=positive, steps=2))
        kept["mode"] = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), mm.in_training

    run(run_prompt, monkeypatch, "dit", work)
    assert kept["same"] and kept["mode"] == (True, False, False)


def test_copies_are_of_their_own():
    conds = [{"model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(torch.ones(1, 2, 3))}, "strength": 1.0}]
    with torch.inference_mode():
        made = torch.ones(2)
        with torch.inference_mode(False):
            copy, mine = own(made), own(conds)
    assert made.is_inference() and not copy.is_inference()
    mine[0]["model_conds"]["c_crossattn"].cond += 1
    assert type(mine[0]["model_conds"]["c_crossattn"]) is comfy.conds.CONDCrossAttn and mine[0]["strength"] == 1.0
    assert float(conds[0]["model_conds"]["c_crossattn"].cond.sum()) == 6


class Packed(torch.nn.Parameter):
    """As packs of quantised weights make theirs."""


@pytest.mark.parametrize("weights, says", [
    (lambda p: Packed(p.data, requires_grad=False), r"quantised \(.* is Packed, float32\)"),
    (lambda p: torch.nn.Parameter(p.data.to(torch.int8), requires_grad=False), r"is Parameter, int8\)"),
])
def test_quantised_weights_are_refused_with_the_reason(weights, says):
    model = toy.model()
    last = model.model.diffusion_model.out[-1]
    last.weight = weights(last.weight)
    with pytest.raises(ValueError, match=f"needs gradients, and the weights .*{says}"):
        differentiable(model)


class Streamed(comfy.model_patcher.ModelPatcher):
    """As the host's patcher that streams weights, which it only makes where there is a GPU."""

    def is_dynamic(self):
        return True


def test_streamed_weights_that_cannot_be_loaded_in_another_way_are_refused():
    whole = toy.model()
    streamed = Streamed(whole.model, whole.load_device, whole.offload_device)
    with pytest.raises(ValueError, match="streamed .* --disable-dynamic-vram"):
        differentiable(streamed)
    streamed.cached_patcher_init = (lambda disable_dynamic: toy.model(), ())
    assert not differentiable(streamed).is_dynamic()
