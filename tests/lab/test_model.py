"""The lab model obeys prompts, and is an ordinary MODEL, CLIP and VAE of the host."""

import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from steer.models.lab import evaluate
from steer.models.lab.load import MODELS, WEIGHTS, load_clip, load_model, load_unet
from steer.models.lab.portrait import FACTORS
from steer.nodes.lab.model import LabModel

PROMPTS = ["a flat portrait of a happy person, light skin, blue hair", "a comic portrait, a crown, white background"]


def mean(rates):
    return sum(rates.values()) / len(FACTORS)


def test_prompts_are_obeyed(models, reader):
    """24 prompts, one noise: the card's 0.90 on average and 0.80 at least, less the spread of so few."""
    rates, _ = evaluate.prompt_hits(reader, models, 24, 1, first=100)
    assert mean(rates) >= 0.88
    assert min(rates.values()) >= 0.70


def test_layout_follows_the_text_and_not_the_starting_noise(models, reader):
    leak = evaluate.leak(reader, models, 12)
    for name in ("position", "background"):
        prompted, hidden = leak[name]
        assert prompted > hidden + 0.4


def test_the_weaker_sibling_is_weaker_and_speaks_the_same_language(models, reader):
    """Most factors show with it too, but its pictures fit their prompts less."""
    portraits = evaluate.data.held_out(12, 6000)[0]
    prompts = [evaluate.caption(p) for p in portraits]
    fit = []
    for model in (models[0], load_unet("unet-weak")):
        made = evaluate.sample((model, *models[1:]), prompts, 1)
        fit.append(sum(float(reader.score(made[i : i + 1], text)) for i, text in enumerate(prompts)) / len(prompts))
        rate = evaluate.hits(reader, made, portraits).float().mean()
    assert fit[0] > fit[1] + 0.02
    assert rate > 0.6


def patched(name, model):
    if name == "lora":
        key = "diffusion_model.middle_block.1.proj_in.weight"
        weight = model.model.state_dict()[key]
        draw = torch.Generator().manual_seed(0)
        up, down = (torch.randn(n, generator=draw) for n in ((len(weight), 2, 1, 1), (2, weight.shape[1], 1, 1)))
        lora = {"lora_unet_test.lora_up.weight": up, "lora_unet_test.lora_down.weight": down}
        loaded = comfy.lora.load_lora(lora, {"lora_unet_test": key})
        model = model.clone()
        assert model.add_patches(loaded, 1.0) == [key]
        return model
    apply = {
        "pag": lambda: PerturbedAttentionGuidance.execute(model, 3.0),
        "sag": lambda: SelfAttentionGuidance.execute(model, 0.5, 2.0),
        "nag": lambda: NAGuidance.execute(model, 5.0, 0.5, 1.5),
        "freeu": lambda: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2),
    }[name]
    return apply().result[0]


@pytest.mark.parametrize("name", ["lora", "pag", "sag", "nag", "freeu"])
def test_what_others_do_to_a_model_acts_on_it(models, name):
    def sample(model):
        return evaluate.sample((model, *models[1:]), PROMPTS, 0, steps=3)

    plain = sample(models[0])
    changed = sample(patched(name, models[0]))
    assert torch.isfinite(changed).all()
    assert (changed - plain).abs().mean() > 1e-3
    assert torch.equal(sample(models[0]), plain)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "heun", "ddim", "uni_pc", "lcm"])
def test_samplers(models, sampler):
    assert torch.isfinite(evaluate.sample(models, PROMPTS, 0, steps=4, sampler=sampler)).all()


def test_a_batch_equals_single_runs(models):
    both = evaluate.sample(models, PROMPTS, 5, steps=4)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    for i, text in enumerate(PROMPTS):
        one = evaluate.sample_noise(models, [text], noise[i : i + 1], steps=4)
        assert torch.allclose(one[0], both[i], atol=2e-3)


def test_the_patchers_can_be_made_again(models):
    """What hooks, multi-GPU and the non-dynamic delegate need."""
    for patcher in (models[0], models[1].patcher, models[2].patcher):
        make, arguments = patcher.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        assert type(again) is comfy.model_patcher.ModelPatcher
        for (name, a), b in zip(patcher.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert models[0].clone(disable_dynamic=True).model is not None


def test_unknown_words_share_one_row_and_hardly_matter(models, reader):
    clip = load_clip()
    table = clip.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding.weight
    row = {word: table[clip.tokenize(word)["l"][0][1][0]] for word in ("zebra", "castle", "hair")}
    assert torch.equal(row["zebra"], row["castle"]) and not torch.equal(row["zebra"], row["hair"])
    plain = "a flat portrait of a happy person, green hair, a crown, pink background"
    wanted = {"hair_color": "green", "hat": "crown", "background": "pink"}
    made = evaluate.sample(models, ["zebra castle, " + plain] * 4, 0)
    hits = [row[name][0] == value for row in reader.read(made) for name, value in wanted.items()]
    assert sum(hits) >= 9


def test_previews_have_colours(models):
    """The preview's linear map is close to the decoded picture, seen at 16x16."""
    space = models[0].model.latent_format
    pictures = torch.from_numpy(evaluate.data.held_out(8, 8000)[1]).float() / 255
    latent = space.process_in(models[2].encode(pictures))
    preview = torch.einsum("bchw,cr->bhwr", latent, torch.tensor(space.latent_rgb_factors))
    preview = (preview + torch.tensor(space.latent_rgb_factors_bias) + 1) / 2
    small = pictures.unflatten(1, (16, 8)).unflatten(3, (16, 8)).mean((2, 4))
    assert (preview - small).abs().mean() < 0.1


def test_no_part_was_left_untrained(models):
    """Residual branches start at zero; one that is still zero got no gradient."""
    weights = models[0].model.diffusion_model.state_dict()
    assert [name for name, w in weights.items() if not w.any()] == []


def test_weights_fit_in_a_repository():
    assert sum(p.stat().st_size for p in WEIGHTS.glob("*.safetensors")) < 90e6
    assert {p.name for p in WEIGHTS.glob("*.safetensors")} >= set(MODELS.values())


def test_the_node_offers_every_model():
    assert LabModel.define_schema().inputs[0].options == list(MODELS)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"SteerLabModel: model='big' is unknown; choose one of unet, .*, dit-weak\."):
        load_model("big")
