"""Temporal alignment by Bayes' rule on data whose levels are known, the paper's algorithm, and the lab's predictors."""

from dataclasses import dataclass, field

import comfy.model_base
import folder_paths
import pytest
import torch
import toy
from measurement.by_hand import SMALL, made, once, scales
from measurement.test_classifierguidance import MEANS, STD, Mixture
from measurement.test_classifierguidance import Known as Class
from safetensors.torch import save_file
from steer.models.measurement import timepredictor
from steer.nodes.measurement.temporalalignment import LoadTimePredictor
from steer.patches.guidance import cfgpp
from steer.patches.measurement import classifierguidance, temporalalignment
from steer.patches.shared.energy import Energy, push
from steer.patches.shared.euler import next_sigma
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import steer

import nodes

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)
LEVELS = torch.logspace(-1.5, 1.2, 60)


@dataclass(frozen=True)
class Known:
    """The exact p(t | x) of the mixture, all levels alike, of x / sqrt(1 + s^2)."""

    levels: torch.Tensor = field(default_factory=lambda: LEVELS, compare=False, repr=False)
    kind: str = "eps"
    channels: int = 4

    def __call__(self, x):
        return torch.stack([density(x * (1 + s**2).sqrt(), s) + x[0].numel() * (1 + s**2).log() / 2
                            for s in self.levels], 1).log_softmax(1)


def density(x, s):
    """log p_s(x) [n] of x = x0 + s n."""
    var = STD**2 + s**2
    of_class = torch.stack([-(x - m).square().flatten(1).sum(1) / (2 * var) for m in MEANS], 1)
    return of_class.logsumexp(1) - x[0].numel() / 2 * var.log()


def score(x, s):
    """d log p_s(x) / dx, written out."""
    var = STD**2 + s**2
    shares = torch.stack([-(x - m).square().flatten(1).sum(1) / (2 * var) for m in MEANS], 1).softmax(1)
    return sum(p.view(-1, 1, 1, 1) * (m - x) / var for p, m in zip(shares.T, MEANS, strict=True))


def time_linked(x, s):
    """Theorem 3.3: the sum over levels k of p_k / p_tot (score at s - score at k), in the paper's scaling
    y = x / sqrt(1 + s^2) at all levels; here back in x."""
    c = (1 + s**2).sqrt()

    def at(k):
        return score(x / c * (1 + k**2).sqrt(), k) * (1 + k**2).sqrt()  # d / dy

    gammas = Known()(x / c).exp()[0]
    return sum(g * (at(s) - at(k)) for g, k in zip(gammas, LEVELS, strict=True)) / c


@dataclass(frozen=True)
class Drift(Energy):
    """Noise that each step adds to x, of this standard deviation: the paper's corrupted process, whose random numbers
    are of the level."""

    amount: float = 0.0
    node = "SteerDrift"

    def energy(self, denoised, call, weight):
        s, s_next = call.level, next_sigma(call)
        noise = torch.randn(denoised.shape, generator=torch.Generator().manual_seed(round(1e6 * s)))
        return noise * (self.amount * (1 + s_next**2) ** 0.5 / (1 - s_next / s)) if s_next else None


@pytest.fixture(scope="module")
def mixture():
    class Model(comfy.model_base.BaseModel):
        def __init__(self, config, kind, device=None):
            super().__init__(config, kind, device=device, unet_model=Mixture)

    return toy.model(kind="eps", base=Model)


def steered(model, strength=1.0, form="score", schedule=ALWAYS, predictor=None, **more):
    how = push(strength, norm="none", **more)
    return temporalalignment.apply(model, predictor or Known(), form, how, schedule)


def at_level(s, off=1.0):
    """x of the first class at the level s, its noise `off` times as large, and what `once` takes to begin there."""
    x = MEANS[0] + off * (STD**2 + s**2) ** 0.5 * toy.noise(**SMALL)
    return x, dict(start=x / s, sigmas=torch.tensor([s, 0.0]), cfg=1.0)


@pytest.mark.parametrize("n", [20, 35, 50])
@pytest.mark.parametrize("off", [0.9, 1.2])
def test_the_estimate_moves_by_the_theorem(mixture, n, off):
    s = LEVELS[n]
    x, given = at_level(s, off)
    moved = once(steered(mixture, 0.7), **given) - once(mixture, **given)
    expected = 0.7 * s**2 * time_linked(x, s)
    assert torch.allclose(moved, expected, atol=2e-3 * float(expected.abs().max()))
    assert float((moved * (x - MEANS[0])).sum()) * (1 - off) > 0  # outward where the noise is too small


def test_it_vanishes_where_the_level_is_sure(mixture):
    sure = Known(torch.tensor([0.1, 1.0, 10.0]))
    _, given = at_level(1.0)
    D = once(mixture, **given)
    assert torch.allclose(once(steered(mixture, 100.0, predictor=sure), **given), D, atol=1e-4)


def test_between_two_levels_it_is_between_them():
    x = toy.noise(3, 2, **SMALL)
    sampling = made("unet").get_model_object("model_sampling")
    low, high = LEVELS[30], LEVELS[31]
    known = Known()(x / (1 + (0.75 * low + 0.25 * high) ** 2) ** 0.5)
    between = temporalalignment.aligned(Known(), x, (0.75 * low + 0.25 * high).expand(2), sampling)
    assert torch.allclose(between, 0.75 * known[:, 30] + 0.25 * known[:, 31], atol=1e-3)
    ends = temporalalignment.position(LEVELS, torch.tensor([0.0, LEVELS[0], LEVELS[7], LEVELS[-1], 99.0]))
    assert ends.tolist() == pytest.approx([0, 0, 7, 59, 59], abs=1e-4)


def test_form_sample_is_the_papers_algorithm(mixture):
    """Algorithm 1 with omega (1 - abar), in the paper's scaling, DDIM's step with the noise predicted at x."""
    sigmas, omega, start = toy.sigmas(mixture, 5), 0.6, toy.noise(4, **SMALL) * 1.1
    found = mixture.model.process_latent_in(toy.sample(steered(mixture, omega, "sample"), 1.0, start=start, steps=5))
    sampling = mixture.get_model_object("model_sampling")
    abar = 1 / (1 + sigmas**2)
    y = sampling.noise_scaling(sigmas[0], start, torch.zeros_like(start)) * abar[0].sqrt()
    for i in range(5):
        s, now, after = sigmas[i], abar[i], abar[i + 1]
        eps = -s * score(y / now.sqrt(), s)
        at = temporalalignment.position(LEVELS, s[None])
        low = int(at)
        with torch.enable_grad():
            z = y.clone().requires_grad_()
            known = Known()(z)[:, low : low + 2] @ torch.tensor([1 - (at - low), at - low])
            (slope,) = torch.autograd.grad(known.sum(), z)
        tilde = y + omega * (1 - now) * slope
        y = after.sqrt() * (tilde - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
    assert torch.allclose(found, y, atol=2e-3 * float(y.abs().max()))


@pytest.mark.parametrize("form", ["score", "sample"])
def test_it_brings_back_what_drifts(mixture, form):
    """Samples of the mixture are of one class, with its spread; noise added on the way widens them."""
    start = toy.noise(10, 8, **SMALL)

    def spread(model):
        out = mixture.model.process_latent_in(toy.sample(model, 1.0, start=start, steps=16))
        return float(out.flatten(1).std(1).mean())

    drifting = steer(mixture, Drift(amount=0.3))
    off, on = spread(drifting), spread(steered(drifting, 1.0, form))
    assert off > 1.25 * STD and abs(on - STD) < 0.5 * abs(off - STD)


def test_flow_has_its_own_factor():
    """D' - D = w s^2 / (1 - s) d log p(t | x) / dx, of x as it is; form sample brings all of it into the next x."""
    flow, s = made("flux"), 0.5
    slopes = torch.linspace(0.1, 1.0, 8)

    @dataclass(frozen=True)
    class Linear(Known):
        def __call__(self, x):
            return x[..., 0, 0].sum(1, keepdim=True) * self.levels

    for form, s_next in (("score", 0.0), ("sample", 0.2)):  # the host divides what is left at s' by 1 - s'
        given = dict(sigmas=torch.tensor([s, s_next]), start=toy.noise(**SMALL), cfg=1.0)
        ours = steered(flow, 0.3, form, predictor=Linear(slopes, "flow"))
        moved = once(ours, **given) - once(flow, **given)
        expected = torch.zeros_like(moved)
        expected[..., 0, 0] = 0.3 * s**2 / (1 - s) * s
        assert torch.allclose(moved, expected, atol=1e-5)


def test_off_is_bit_equal_and_a_batch_is_its_items(mixture):
    start = toy.noise(batch=2, **SMALL)
    plain = toy.sample(mixture, 3.0, start=start)
    for off in (dict(strength=0.0), dict(schedule=NEVER)):
        assert torch.equal(toy.sample(steered(mixture, **off), 3.0, start=start), plain)
    ours = steered(mixture)
    with toy.count_forwards(mixture) as count:
        out = toy.sample(ours, 3.0, start=start)
    assert count.calls == 4 and not torch.equal(out, plain)
    assert torch.equal(toy.sample(ours, 3.0, start=start), out)
    for i in range(2):
        alone = toy.sample(ours, 3.0, start=start[i : i + 1])
        assert torch.allclose(out[i : i + 1], alone, atol=1e-4 * float(alone.abs().max()))
    assert torch.equal(toy.sample(mixture, 3.0, start=start), plain)


def test_it_adds_to_other_energies_and_to_cfg(mixture):
    classes = classifierguidance.apply(mixture, Class(1), push(norm="none"), ALWAYS)
    D, alone, both = (once(model, cfg=4.0) for model in (mixture, classes, steered(classes)))
    assert torch.allclose(both - alone, once(steered(mixture), cfg=1.0) - once(mixture, cfg=1.0), atol=1e-4)
    assert not torch.equal(alone, D)


def test_a_mask_and_every(mixture):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    D, whole = once(mixture, cfg=1.0), once(steered(mixture), cfg=1.0)
    assert torch.equal(once(steered(mixture, mask=mask), cfg=1.0), torch.cat([D[..., :4], whole[..., 4:]], -1))
    start = toy.noise(**SMALL)
    every = toy.sample(steered(mixture, every=5), 1.0, start=start)
    first = toy.sample(steered(mixture, schedule=Schedule(0.0, 1e-3)), 1.0, start=start)
    assert torch.equal(every, first) and not torch.equal(every, toy.sample(mixture, 1.0, start=start))


def test_bad_input_raises_before_sampling(mixture):
    with toy.count_forwards(mixture) as count:
        for options, words in (
            (dict(strength=-1.0), "strength -1.0 must be"),
            (dict(every=0), "every 0 must be"),
            (dict(form="x"), "form 'x' is unknown; choose one of score, sample"),
            (dict(predictor=Known(kind="flow")), "knows the noise of flow models, and this is eps"),
            (dict(predictor=Known(channels=16)), "knows pictures with 16 channels, and these latents are .4, 8, 8."),
        ):
            with pytest.raises(ValueError, match=f"SteerTemporalAlignment: .*{words}"):
                once(steered(mixture, **options))
        with pytest.raises(ValueError, match='the sampler dpmpp_2m does not take the step of form "sample"'):
            toy.sample(steered(mixture, form="sample"), 1.0, "dpmpp_2m", start=toy.noise(**SMALL))
        with pytest.raises(ValueError, match="SteerCFGPP keeps a step's noise too"):
            toy.sample(cfgpp.apply(steered(mixture, form="sample"), 0.6, ALWAYS), 1.0, start=toy.noise(**SMALL))
    assert count.calls == 0


def test_a_file_is_read_and_another_refused(tmp_path):
    torch.manual_seed(0)
    network = timepredictor.Network(16, 5, (8, 12))
    levels = torch.linspace(0.1, 0.9, 5)
    path = tmp_path / "own.safetensors"
    save_file(timepredictor.state_dict(network.state_dict(), levels, "flow"), path)
    ours = timepredictor.load(path)
    assert (ours.kind, ours.channels, ours.levels.tolist()) == ("flow", 16, pytest.approx(levels.tolist()))
    assert str(ours) == "own.safetensors: 5 noise levels of flow models with 16 channels"
    x = torch.randn(2, 16, 9, 5)
    assert torch.allclose(ours(x), network(x).log_softmax(1), atol=2e-3)
    for wrong, words in (
        ({"a": levels}, "no levels.eps or levels.flow, but keys such as a"),
        ({"levels.eps": levels.flip(0)}, "levels.eps must rise"),
        ({**timepredictor.state_dict(network.state_dict(), levels, "eps"), "out.bias": torch.zeros(4)}, "do not fit"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=f"own.safetensors .*{words}"):
            timepredictor.load(path)


def test_the_loader_offers_the_folder_and_the_labs(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    own = tmp_path / "time_predictors" / "sub" / "own.safetensors"
    own.parent.mkdir(parents=True)
    weights = timepredictor.Network(4, 3, (8,)).state_dict()
    save_file(timepredictor.state_dict(weights, torch.tensor([0.1, 1.0, 10.0]), "eps"), own)
    options = next(i for i in LoadTimePredictor.define_schema().inputs if i.id == "file").options
    assert options == ["sub/own.safetensors", "time.safetensors [lab]", "time_dit.safetensors [lab]"]
    found = [LoadTimePredictor.execute(file).args for file in options]
    assert [predictor.kind for predictor, _ in found] == ["eps", "eps", "flow"]
    assert found[2][1] == "time_dit.safetensors: 128 noise levels of flow models with 4 channels"
    assert "there is no time predictor 'x'" in LoadTimePredictor.validate_inputs("x")
    with pytest.raises(ValueError, match="SteerLoadTimePredictor: there is no time predictor 'x'; put it into"):
        LoadTimePredictor.execute("x")
    before = LoadTimePredictor.fingerprint_inputs(options[0])
    own.write_bytes(b"<html>")
    assert LoadTimePredictor.fingerprint_inputs(options[0]) != before
    with pytest.raises(ValueError, match="SteerLoadTimePredictor: own.safetensors is no safetensors file: it is a web"):
        LoadTimePredictor.execute(options[0])


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_in_a_node_of_the_host_the_slope_is_that_by_differences(run_prompt, monkeypatch, which):
    """The lab's predictor as the host's executor loads and runs it."""
    found = []

    class Work:
        RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "work", "test"

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802
            return {"required": {"plain": ("MODEL",), "ours": ("MODEL",), "predictor": ("STEER_TIME_PREDICTOR",),
                                 "positive": ("CONDITIONING",)}}

        def work(self, plain, ours, predictor, positive):
            start = toy.noise() * 1.1
            given = dict(cfg=1.0, positive=positive, negative=positive, start=start)
            s, a = scales(plain)
            slope = (once(ours, **given) - once(plain, **given)) / (s**2 / a)
            x, way = start * s, slope / slope.square().mean().sqrt()
            sampling, h = plain.get_model_object("model_sampling"), 3e-3 * s
            ends = [float(temporalalignment.aligned(predictor, x + sign * h * way, torch.tensor([s]), sampling))
                    for sign in (1, -1)]
            found.append((float((slope * way).sum()), (ends[0] - ends[1]) / (2 * h)))
            return ("done",)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Work", Work)
    file = {"unet": "time.safetensors [lab]", "dit": "time_dit.safetensors [lab]"}[which]
    numbers = {"strength": 1.0, "form": "score", "every": 1, "start_percent": 0.0, "end_percent": 1.0}
    run_prompt({
        "1": {"class_type": "SteerLabModel", "inputs": {"model": which}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a comic portrait"}},
        "3": {"class_type": "SteerLoadTimePredictor", "inputs": {"file": file}},
        "4": {"class_type": "SteerTemporalAlignment",
              "inputs": {"model": ["1", 0], "predictor": ["3", 0], **numbers}},
        "5": {"class_type": "Work", "inputs": {"plain": ["1", 0], "ours": ["4", 0], "predictor": ["3", 0],
                                               "positive": ["2", 0]}},
    })
    ((exact, difference),) = found
    assert exact == pytest.approx(difference, rel=0.1) and abs(exact) > 1.0  # ReLU has kinks


@pytest.mark.parametrize("which, gap, hits, psnr", [("unet", 0.9, 0.07, 2.0), ("dit", 0.5, 0.0, 0.05)])
def test_on_the_lab_it_repairs_what_too_much_noise_broke(which, gap, hits, psnr):
    """Ancestral Euler whose fresh noise is half as much again as is due.

    Three sets of four, off and on. UNet: time gap 409, 403, 407 and 346, 335, 340, hits 0.82, 0.75, 0.77 and 0.95,
    0.91, 0.95, PSNR 3.3 to 4.2 dB more. DiT: 169, 176, 166 and 61, 68, 61, hits the same, PSNR 0.1 to 0.9 dB more.
    """
    from bench.lab_temporal import run

    off, on = (
        {name: float(each.mean()) for name, each in run(which, 4, 14000, 12, options, ancestral=1.5).items()}
        for options in (None, (2.0, "score"))
    )
    assert on["gap"] < gap * off["gap"]
    assert on["hits"] >= off["hits"] + hits and on["PSNR"] > off["PSNR"] + psnr
