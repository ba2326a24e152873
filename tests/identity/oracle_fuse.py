"""Random files of PhotoMaker and FastComposer with the keys of the public ones, small, and what their networks make of
pictures: the official code's arithmetic (Apache-2.0, MIT), read and written down again on bare tensors."""

import comfy.sd
import comfy.supported_models_base
import torch
import toy
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from identity.oracle import linears, norm, perceive, rand, resampler
from torch.nn.functional import gelu, layer_norm, linear

L, G = 64, 192  # widths of the two text encoders
TEXT = L + G
FACE, SIDE, PATCH, STATES = 512, 28, 14, 128
BLOCKS = (  # diffusers' names of the attentions of toy.UNET, in the order of identity.by_hand.ORDER, and their widths
    ("down_blocks.0.attentions.0", 64), ("down_blocks.1.attentions.0", 128), ("up_blocks.0.attentions.0", 128),
    ("up_blocks.0.attentions.1", 128), ("up_blocks.1.attentions.0", 64), ("up_blocks.1.attentions.1", 64),
    ("mid_block.attentions.0", 128),
)
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def under(prefix, sd):
    return {prefix + key: value for key, value in sd.items()}


def below(prefix, sd):
    return {key.removeprefix(prefix): value for key, value in sd.items() if key.startswith(prefix)}


def vision(layers=2, inner=256):
    """The keys of CLIP's image encoder."""
    sd = {
        "embeddings.class_embedding": rand(STATES, seed=1),
        "embeddings.patch_embedding.weight": 0.1 * rand(STATES, 3, PATCH, PATCH, seed=2),
        "embeddings.position_embedding.weight": rand((SIDE // PATCH) ** 2 + 1, STATES, seed=3),
        "embeddings.position_ids": torch.arange((SIDE // PATCH) ** 2 + 1)[None],
    }
    for i in range(layers):
        names = {f"self_attn__{k}_proj": (STATES, STATES) for k in ("q", "k", "v", "out")}
        layer = linears(**names, mlp__fc1=(inner, STATES), mlp__fc2=(STATES, inner))
        sd |= under(f"encoder.layers.{i}.", layer | norm("layer_norm1", STATES, i) | norm("layer_norm2", STATES, i + 9))
    return sd | norm("pre_layrnorm", STATES, 40) | norm("post_layernorm", STATES, 50)


def fuse(width):
    sd = {}
    for i, given in ((1, 2 * width), (2, width)):
        sd |= under(f"mlp{i}.", norm("layernorm", given, i) | linears(fc1=(width, given), fc2=(width, width)))
    return sd | norm("layer_norm", width, 60)


def photomaker(version):
    """{"id_encoder": ..., "lora_weights": {}} as the public .bin files have it."""
    sd = under("vision_model.", vision()) | under("fuse_module.", fuse(TEXT))
    sd |= linears(visual_projection_=(L, STATES), visual_projection_2_=(G, STATES))
    if version == 2:
        faces = linears(token_proj__0=(4 * FACE, FACE), token_proj__2=(2 * TEXT, 4 * FACE)) | norm("token_norm", TEXT)
        faces |= resampler(TEXT, STATES, TEXT, inner=256, prefix="perceiver_resampler.")
        sd |= under("qformer_perceiver.", faces)
    lora = {}
    for i, (block, width) in enumerate(BLOCKS):
        for key in ("attn1.processor.to_q", "attn1.processor.to_out", "attn2.processor.to_k"):
            given = TEXT if "attn2" in key else width
            name = f"unet.{block}.transformer_blocks.0.{key}_lora"
            lora |= {f"{name}.down.weight": rand(4, given, seed=i), f"{name}.up.weight": rand(width, 4, seed=i + 50)}
    return {"id_encoder": sd, "lora_weights": lora}


def fastcomposer(width):
    """The fusing network and the image encoder of the public file."""
    sd = under("image_encoder.vision_model.", vision()) | under("postfuse_module.", fuse(width))
    return sd | under("image_encoder.", linears(visual_projection_=(width, STATES)))


def _linear(sd, name, x):
    return linear(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"))


def _norm(sd, name, x):
    return layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])


def look(sd, pixels):
    """(last hidden states [n, P, E], pooled [n, E]) of CLIP's image encoder."""
    cells = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = cells @ sd["embeddings.patch_embedding.weight"].flatten(1).T
    x = torch.cat((sd["embeddings.class_embedding"].expand(len(x), 1, -1), x), 1)
    x = _norm(sd, "pre_layrnorm", x + sd["embeddings.position_embedding.weight"])
    i = 0
    while f"encoder.layers.{i}.mlp.fc1.weight" in sd:
        at = below(f"encoder.layers.{i}.", sd)
        y = _norm(at, "layer_norm1", x)
        q, k, v = (_linear(at, f"self_attn.{n}_proj", y).unflatten(-1, (-1, 64)).transpose(1, 2) for n in "qkv")
        y = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + _linear(at, "self_attn.out_proj", y)
        y = _linear(at, "mlp.fc1", _norm(at, "layer_norm2", x))
        x = x + _linear(at, "mlp.fc2", y * torch.sigmoid(1.702 * y))
        i += 1
    return x, _norm(sd, "post_layernorm", x[:, 0])


def fused(sd, text, ids):
    """The words of a prompt, [N, width], fused with pictures."""
    def mlp(at, x):
        return _linear(at, "fc2", gelu(_linear(at, "fc1", _norm(at, "layernorm", x))))

    x = mlp(below("mlp1.", sd), torch.cat((text, ids), -1)) + text
    return _norm(sd, "layer_norm", x + mlp(below("mlp2.", sd), x))


def photomaker_ids(sd, images, face=None):
    """[n * tokens, width] of pictures [n, SIDE, SIDE, 3] and, in version 2, faces [n, 512]."""
    pixels = (((255 * images).round() / 255 - MEAN) / STD).movedim(-1, 1)
    states, pooled = look(below("vision_model.", sd), pixels)
    if face is None:
        return torch.cat((_linear(sd, "visual_projection", pooled), _linear(sd, "visual_projection_2", pooled)), -1)
    at = below("qformer_perceiver.", sd)
    e = _linear(at, "token_proj.2", gelu(_linear(at, "token_proj.0", face))).reshape(len(face), 2, -1)
    e = _norm(at, "token_norm", e)
    return (e + perceive(below("perceiver_resampler.", at), states, e, head=128)).flatten(0, 1)


def fastcomposer_ids(sd, images):
    pixels = ((images - MEAN) / STD).movedim(-1, 1)
    _, pooled = look(below("image_encoder.vision_model.", sd), pixels)
    return _linear(below("image_encoder.", sd), "visual_projection", pooled)


def clip():
    """The host's two text encoders of SDXL, small and random."""
    small = dict(num_hidden_layers=3, num_attention_heads=2)
    options = {
        "clip_l_model_config": dict(small, hidden_size=L, intermediate_size=2 * L),
        "clip_g_model_config": dict(small, hidden_size=G, intermediate_size=2 * G),
    }
    target = comfy.supported_models_base.ClipTarget(SDXLTokenizer, SDXLClipModel)
    made = comfy.sd.CLIP(target, model_options=options)
    toy.random_weights(made.cond_stage_model, 11)
    return made
