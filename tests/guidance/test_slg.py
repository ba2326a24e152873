import comfy.samplers
import pytest
import toy
from steer.patches.guidance import slg
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


@pytest.fixture(scope="module")
def model():
    return toy.model()


def near(a, b, share=1e-4):
    return (a - b).abs().max() <= share * b.abs().max()


def skipping(model, modules, scale):
    """The paper's formula with the weak prediction in a forward of its own, modules handing on their input."""

    def post_cfg(args):
        handles = [m.register_forward_hook(lambda module, inputs, output: inputs[0]) for m in modules]
        try:
            (weak,) = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
            )
        finally:
            for handle in handles:
                handle.remove()
        return args["denoised"] + (args["cond_denoised"] - weak) * scale

    oracle = model.clone()
    oracle.set_model_sampler_post_cfg_function(post_cfg)
    return oracle


def modules(model, layers):
    network = model.model.diffusion_model
    found = {
        "middle": network.middle_block,
        "input.1": network.input_blocks[1],  # a ResBlock that keeps its channels, and a transformer
        "output.2": [network.output_blocks[2][1]],  # its ResBlock takes a skip connection: only the transformer
    }
    return [module for layer in layers for module in found[layer]]


ONE = [["middle"], ["input.1"], ["output.2"]]


@pytest.mark.parametrize("layers", [*ONE, sum(ONE, [])], ids="+".join)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_equals_skipped_modules_in_a_forward_of_its_own(model, layers, cfg):
    oracle = skipping(model, modules(model, layers), 2.0)
    ours = slg.apply(model, 2.0, ", ".join(layers), ALWAYS)
    options = dict(cfg=cfg, start=toy.noise(batch=2))
    assert near(toy.sample(ours, **options), toy.sample(oracle, **options))
    assert not near(toy.sample(ours, **options), toy.sample(model, **options), 1e-2)


def test_a_skipped_block_is_not_computed(model):
    seen = []
    norm = model.model.diffusion_model.middle_block[1].norm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    toy.sample(slg.apply(model, 2.0, "middle", ALWAYS), steps=1)
    handle.remove()
    assert seen == [2]  # positive and negative, not the weak row


def test_alone_in_its_call(model, monkeypatch):
    """Where the host gives the weak row a call of its own, there is nobody else in the block."""
    joined = toy.sample(slg.apply(model, 2.0, "middle", ALWAYS))
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    assert near(toy.sample(slg.apply(model, 2.0, "middle", ALWAYS)), joined)


def test_blocks_that_change_the_shape_cannot_be_left_out(model):
    with pytest.raises(ValueError, match='SteerSLG: no layer "input.2"; this model has input.1, input.3, middle'):
        slg.apply(model, 2.0, "input.2", ALWAYS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_values(model, value):
    with pytest.raises(ValueError, match="SteerSLG: scale .* finite number from 0"):
        slg.apply(model, value, "auto", ALWAYS)
