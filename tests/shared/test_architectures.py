"""Every transformer the suite knows, on the host's own class: rows that share blocks say what they say alone."""

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
import toy
import toy_dit
from steer.patches.guidance import pag
from steer.patches.guidance.pag import identity_attention
from steer.patches.shared.architectures import ADAPTERS, adapter_of, shared_blocks
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import Weak
from torch.utils.flop_counter import FlopCounterMode
from toy_dit import TOYS

every = pytest.mark.parametrize("name", TOYS)


@pytest.fixture(scope="module")
def models():
    """Double precision: with exact arithmetic a different composition of the batch may change nothing."""
    made = {}
    return lambda name: made.setdefault(name, toy_dit.model(name, torch.float64))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)  # rope has no kernel for double precision


def equal(a, b):
    """Up to the last digits of single precision, in which the host hands on what the network said."""
    return (a - b).abs().max() <= 5e-7 * b.abs().max()


def perturbed(*layers):
    return Weak("identity", identity_attention, layers)


def skipping(*layers):
    return Weak("skip", None, layers)


def identity_block(args, extra):
    return {key: args[key] for key in ("img", "txt") if key in args}


def without(name, model, skipped, **options):
    """The oracle of left-out blocks."""
    if TOYS[name].replaces:
        keys = [(f"{layer.group}_block", layer.index) for layer in skipped]
        return toy_dit.alone(name, model, replace=dict.fromkeys(keys, identity_block), **options)
    blocks = [b.module for b in adapter_of(model.model).blocks(model.model.diffusion_model) if b.layer in skipped]
    handles = [module.register_forward_hook(lambda module, args, out: args[0]) for module in blocks]
    out = toy_dit.alone(name, model, **options)
    for handle in handles:
        handle.remove()
    return out


def hooks(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@every
def test_branches_say_what_they_say_alone(models, name):
    """Several fork points in one forward, with and without sharing, against the host on each conditioning alone."""
    model = models(name)
    layers = toy_dit.layers(model)
    first, second, *_, middle, last = layers
    weak = [perturbed(first), perturbed(middle), perturbed(last), perturbed(second, last), skipping(second)]
    weak += [skipping(second, last), skipping(first)]
    for share in (True, False):
        seen = toy_dit.predictions(name, model, weak, share)
        assert equal(seen["positive"], toy_dit.alone(name, model))
        assert equal(seen["negative"], toy_dit.alone(name, model, positive=toy_dit.text(2)))
        for branch in weak:
            if branch.edit is None:
                oracle = without(name, model, branch.layers)
            else:
                override = toy_dit.masked(name, model, branch.layers)
                oracle = toy_dit.alone(name, model, override)
                assert override.calls == TOYS[name].attentions(len(layers))
            assert equal(seen[branch], oracle), (share, str(branch))
            assert (oracle - seen["positive"]).abs().max() > 1e-3 * oracle.std()
    assert hooks(model) == 0


@every
def test_what_rows_have_in_common_is_computed_once(models, name):
    """Sharing costs what the blocks from the fork on cost: 2 F + (F - P), within a hundredth."""
    model = models(name)
    network = model.model.diffusion_model
    assert bool(shared_blocks(model)) == TOYS[name].shares
    start = toy_dit.noise(name, height=16, width=16)

    def flops(*weak, **options):
        with FlopCounterMode(display=False) as counter:
            if options:
                toy_dit.sample(name, model, start=start, **options)
            else:
                toy_dit.predictions(name, model, weak, start=start)
        return counter

    row = flops(cfg=1.0)
    F, counts = row.get_total_flops(), row.get_flop_counts()
    names = {module: f"{type(network).__name__}.{path}" for path, module in network.named_modules()}
    blocks = [sum(counts[names[b.module]].values()) for b in adapter_of(model.model).blocks(network)]
    listed = adapter_of(model.model).blocks(network)
    attends = [k for k, block in enumerate(listed) if block.attends]
    for k in (attends[0], attends[len(attends) // 2], attends[-1]):
        fork = flops(perturbed(listed[k].layer)).get_total_flops()
        bound = 3 * F - (sum(blocks[:k]) if TOYS[name].shares else 0)
        assert 0.9 * bound < fork <= 1.01 * bound, listed[k].layer


class Given(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are multiples of a fixed pattern, by the mean of each row."""

    def __init__(self, names, tokens, width):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.pattern = {name: torch.randn(3, tokens, width, generator=g) for name in names}
        self.rows = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.rows.append(x_noisy.shape[0])
        means = x_noisy.flatten(1).mean(1).view(-1, 1, 1) + cond["c_crossattn"].mean((1, 2)).view(-1, 1, 1)
        return {name: [means * p for p in patterns] for name, patterns in self.pattern.items()}


@pytest.mark.parametrize("name", [name for name in TOYS if TOYS[name].controls])
def test_controlnet(models, name):
    """Every branch has the residuals of its conditioning; the ControlNet is not asked for rows that come later."""
    model = models(name)
    layers = toy_dit.layers(model)
    control = Given(TOYS[name].controls, 16 * max(TOYS[name].frames, 1), TOYS[name].width)
    positive, negative = (toy_dit.text(seed, control=control) for seed in (1, 2))
    weak = [perturbed(layers[2]), skipping(layers[-1])]
    seen = toy_dit.predictions(name, model, weak, positive=positive, negative=negative)
    assert control.rows == [2]
    assert equal(seen["positive"], toy_dit.alone(name, model, positive=positive))
    assert equal(seen["negative"], toy_dit.alone(name, model, positive=negative))
    override = toy_dit.masked(name, model, weak[0].layers)
    assert equal(seen[weak[0]], toy_dit.alone(name, model, override, positive=positive))
    assert not equal(seen["positive"], toy_dit.alone(name, model))


SITUATIONS = {
    "odd size": dict(height=5, width=9),
    "batch of 2": dict(batch=2),
    "unequal prompts": dict(negative=toy_dit.text(2, toy_dit.TOKENS + 4)),
}


@every
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
def test_situations(models, name, situation, split, monkeypatch):
    """Split: the host runs every conditioning in a call of its own."""
    if split:
        monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    model, options = models(name), dict(SITUATIONS[situation])
    size = {side: options.pop(side, 8) for side in ("height", "width")}
    if not TOYS[name].odd:
        size = {side: length + length % 2 for side, length in size.items()}
    options["start"] = toy_dit.noise(name, options.pop("batch", 1), **size)
    layers = toy_dit.layers(model)
    weak = [perturbed(layers[2]), skipping(layers[3])]
    seen = toy_dit.predictions(name, model, weak, **options)
    options.pop("negative", None)
    for row in range(options["start"].shape[0]):
        start = dict(start=options["start"][row : row + 1])
        assert equal(seen["positive"][row : row + 1], toy_dit.alone(name, model, **start))
        override = toy_dit.masked(name, model, weak[0].layers, **size)
        assert equal(seen[weak[0]][row : row + 1], toy_dit.alone(name, model, override, **start))
        assert equal(seen[weak[1]][row : row + 1], without(name, model, weak[1].layers, **start))


@pytest.mark.parametrize("name", [name for name in TOYS if TOYS[name].mask])
def test_attention_masks(models, name):
    model = models(name)
    options = [dict(positive=toy_dit.text(seed, **TOYS[name].mask(seed))) for seed in (1, 2)]
    layer = toy_dit.layers(model)[2]
    seen = toy_dit.predictions(name, model, [perturbed(layer)], **options[0], negative=options[1]["positive"])
    plain = toy_dit.alone(name, model, **options[0])
    assert equal(seen["positive"], plain) and not equal(plain, toy_dit.alone(name, model))
    assert equal(seen["negative"], toy_dit.alone(name, model, **options[1]))
    override = toy_dit.masked(name, model, [layer])
    assert equal(seen[perturbed(layer)], toy_dit.alone(name, model, override, **options[0]))


@every
def test_override_of_another_node_serves_the_other_rows(models, name):
    model = models(name).clone()
    seen = []

    def theirs(function, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        seen.append((q.shape[0], len(options["cond_or_uncond"]), len(options["uuids"])))
        return function(q, k, v * 1.5, heads, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = theirs
    layers = toy_dit.layers(model)
    said = toy_dit.predictions(name, model, [perturbed(layers[2])])
    assert all(rows == chunks == uuids for rows, chunks, uuids in seen)
    assert TOYS[name].attentions(len(layers)) == len(seen)
    assert equal(said["positive"], toy_dit.alone(name, models(name), theirs))
    mask = toy_dit.masked(name, models(name), [layers[2]])

    def mine(function, q, k, v, heads, *args, **kwargs):
        number = mask.calls in mask.numbers
        return mask(function, q, k, v if number else v * 1.5, heads, *args, **kwargs)

    assert equal(said[perturbed(layers[2])], toy_dit.alone(name, models(name), mine))


@pytest.mark.parametrize("name", [name for name in TOYS if TOYS[name].replaces])
def test_replacement_of_another_node_on_the_same_block(models, name):
    model = models(name)
    layer = toy_dit.layers(model)[2]

    def theirs(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.5}

    replace = {(f"{layer.group}_block", layer.index): theirs}
    patched = model.clone()
    for key, function in replace.items():
        patched.set_model_patch_replace(function, "dit", *key)
    seen = toy_dit.predictions(name, patched, [perturbed(layer)])
    assert equal(seen["positive"], toy_dit.alone(name, model, replace=replace))
    override = toy_dit.masked(name, model, [layer])
    assert equal(seen[perturbed(layer)], toy_dit.alone(name, model, override, replace=replace))
    assert not equal(seen["positive"], toy_dit.alone(name, model))


@every
def test_edits_are_told_where_the_picture_is(models, name):
    """The first attention of the block and no other, with the tokens of the image; untouched when handed on."""
    model, about = models(name), TOYS[name]
    calls = []

    def look(call):
        calls.append(call)
        return call

    layers = toy_dit.layers(model)
    weak = Weak("look", look, (layers[1], layers[-1]))
    seen = toy_dit.predictions(name, model, [weak])
    assert equal(seen[weak], seen["positive"])
    assert [call.layer for call in calls] == [layers[1], layers[-1]]
    for call in calls:
        oracle = toy_dit.masked(name, model, [])
        n = call.q.shape[1]
        assert call.kind == ("joint" if about.joint else "self")
        first = oracle.first or 0
        assert slice(*call.image).indices(n)[:2] == (first, first + (oracle.count or n))
        assert call.text == (0, first) and call.q.shape == call.k.shape == call.v.shape
        assert call.grid() == (max(about.frames, 1), 8 // about.patch, 8 // about.patch)


@every
def test_an_error_in_mid_forward_leaves_nothing(models, name):
    model = models(name)
    plain, layer = toy_dit.sample(name, model), toy_dit.layers(model)[2]

    def broken(function, *args, **kwargs):
        if hooks(model) and broken.count == 0:
            raise RuntimeError("broken")
        broken.count -= 1
        return function(*args, **kwargs)

    broken.count = TOYS[name].before + 3
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = broken
    with pytest.raises(RuntimeError, match="broken"):
        toy_dit.predictions(name, patched, [perturbed(layer)])
    assert hooks(model) == 0
    assert torch.equal(toy_dit.sample(name, model), plain)


@every
def test_pag(models, name):
    """The formula with the architecture's own layers, at any strength of the text."""
    model = models(name)
    steered = pag.apply(model, 2.0, "auto", Schedule())
    (weak,) = steered.model_options["steer"][0].branches(model)
    for cfg in (1.0, 4.0):
        seen = toy_dit.predictions(name, model, [weak], cfg=cfg)
        D = seen["positive"] + 2.0 * (seen["positive"] - seen[weak])
        D = D + (cfg - 1) * (seen["positive"] - seen["negative"]) if cfg != 1 else D
        out = model.model.process_latent_in(toy_dit.sample(name, steered, cfg=cfg))  # the last step hands on its D
        assert (out - D).abs().max() <= 1e-5 * D.abs().max()


@every
def test_single_precision_and_half(name, monkeypatch):
    """With the host's own kernels: rounding is the rows' own times their weights, 3 + 2 + 2 x 2."""
    monkeypatch.setattr(comfy.model_management, "in_training", False)
    steered, plain = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = toy_dit.model(name, dtype)
        steered.append(toy_dit.sample(name, pag.apply(model, 2.0, "auto", Schedule()), cfg=3.0))
        plain.append(toy_dit.sample(name, model, cfg=1.0))
    assert steered[1].isfinite().all()
    assert (steered[1] - steered[0]).std() < 9 * (plain[1] - plain[0]).std()


def test_an_unknown_network_is_refused_by_name():
    known = ".*".join(word for adapter in ADAPTERS for word in adapter.name.split(" (")[:1])
    with pytest.raises(ValueError, match=f"SteerPAG: cannot act on Gaussian .GaussianNetwork.; supported: {known}"):
        pag.apply(toy.gaussian(), 3.0, "auto", Schedule())


@every
def test_rows_that_are_spared_come_back_after_the_last_block(models, name):
    """An item whose negative is not needed: it is the positive, and the other item's is what it was."""

    class Sparing(toy_dit.Probe):
        def level(self, cfg, weight, run):
            run.spared = [True, False]
            return cfg

    model, start = models(name), toy_dit.noise(name, batch=2)
    layer = toy_dit.layers(model)[2]
    seen = toy_dit.predictions(name, model, [perturbed(layer)], start=start, probe=Sparing)
    rows = [dict(start=start[row : row + 1]) for row in (0, 1)]
    positives = [toy_dit.alone(name, model, **row) for row in rows]
    assert equal(seen["positive"], torch.cat(positives))
    negative = toy_dit.alone(name, model, positive=toy_dit.text(2), **rows[1])
    assert equal(seen["negative"], torch.cat((positives[0], negative)))
    weak = [toy_dit.alone(name, model, toy_dit.masked(name, model, [layer]), **row) for row in rows]
    assert equal(seen[perturbed(layer)], torch.cat(weak))


@pytest.mark.parametrize("name", ["z-image", "qwen", "wan"])
def test_work_of_another_node_between_blocks(models, name):
    """It may combine hidden states with rows of the latent, so that all rows must be there."""
    model = models(name)

    def theirs(args):
        assert args["img"].shape[0] == args["x"].shape[0]
        return {**args, "img": args["img"] * (1 + 0.1 * args["x"].mean())}

    patched = model.clone()
    patched.set_model_patch(theirs, "double_block")
    if equal(toy_dit.alone(name, patched), toy_dit.alone(name, model)):
        pytest.skip("this host does not call it between the blocks of this model")
    layer = toy_dit.layers(model)[2]
    seen = toy_dit.predictions(name, patched, [perturbed(layer)])
    assert equal(seen["positive"], toy_dit.alone(name, patched))
    assert equal(seen[perturbed(layer)], toy_dit.alone(name, patched, toy_dit.masked(name, model, [layer])))


REFERENCES = [
    ("flux", "offset", 7),
    ("flux2", "index_timestep_zero", 512),
    ("qwen", "index", 7),
    ("qwen", "index_timestep_zero", 7),
    ("z-image", None, 96),  # 2 x 32 of text, 32 of the reference
]


@pytest.mark.parametrize("name, method, first", REFERENCES)
def test_reference_images(models, name, method, first):
    """Some models take the batch at two noise levels, one for them; they are no part of the picture that is edited."""
    model = models(name)
    reference = toy_dit.noise(name, seed=9)
    options = dict(reference_latents=[reference], reference_latents_method=method)
    positive, negative = (toy_dit.text(seed, **options) for seed in (1, 2))
    layers = toy_dit.layers(model)
    weak = [perturbed(layers[2]), perturbed(layers[-1]), skipping(layers[1])]
    seen = toy_dit.predictions(name, model, weak, positive=positive, negative=negative)
    assert equal(seen["positive"], toy_dit.alone(name, model, positive=positive))
    assert equal(seen["negative"], toy_dit.alone(name, model, positive=negative))
    assert not equal(seen["positive"], toy_dit.alone(name, model))
    for branch in weak[:2]:
        override = toy_dit.masked(name, model, branch.layers)
        override.first = first
        assert equal(seen[branch], toy_dit.alone(name, model, override, positive=positive)), str(branch)
    assert equal(seen[weak[2]], without(name, model, weak[2].layers, positive=positive))
