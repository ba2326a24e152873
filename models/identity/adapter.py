"""Adapters: public files whose tokens of a picture are a second cross-attention in a UNet, read into one frozen value.

What a file is, is seen from its keys and shapes; see VARIANTS. Layers are in the order of the files: the encoder's
cross-attentions, the decoder's, then the middle block's.
"""

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import elite, fastcomposer, files, infiniteyou, joint, photomaker, projectors, pulid
from .projectors import below

FACE = 512  # width of a face embedding
MODELS = {(16, 768): "SD1.x", (16, 1024): "SD2.x", (70, 2048): "SDXL"}  # (cross-attentions, width of the text)
ENCODERS = (  # name, width of its hidden states, of its embedding
    ("CLIP ViT-H/14 (laion2B)", 1280, 1024),
    ("CLIP ViT-bigG/14 (laion2B)", 1664, 1280),
    ("CLIP ViT-L/14 (OpenAI)", 1024, 768),
    ("SigLIP so400m/14", 1152, 1152),
)
# variants whose keys are the same; "auto" goes by the file's name
ALIKE = (("plus", "plus-face", "composition"), ("faceid-plus v1", "faceid-plus v2"))
VARIANTS = {  # projector, what its picture should be
    "base": (projectors.Linear, "the picture as a whole"),
    "plus": (projectors.Resampler, "the picture in detail"),
    "plus-face": (projectors.Resampler, "a close crop of a face"),
    "composition": (projectors.Resampler, "a picture whose layout is wanted"),
    "full-face": (projectors.MLP, "a close crop of a face"),
    "faceid": (projectors.FaceMLP, "a face embedding"),
    "faceid-plus v1": (projectors.FaceResampler, "a face embedding, and the aligned crop it is of"),
    "faceid-plus v2": (projectors.FaceResampler, "a face embedding, and the aligned crop it is of"),
    "portrait": (projectors.FaceMLP, "face embeddings, several of one person"),
    "face-resampler": (projectors.Resampler, "a face embedding as it is, not normalised (portrait unnorm, InstantID)"),
}

FAMILIES = (photomaker, fastcomposer, infiniteyou, joint, pulid, elite)  # other files, each read by a module of its own


class Network(nn.Module):
    """The projector of a file, and W_k, W_v of each layer without bias."""

    def __init__(self, projector, layers):
        super().__init__()
        self.image_proj, self.layers = projector, nn.ModuleList(layers)


@dataclass(frozen=True)
class Adapter:
    """An adapter for the cross-attentions of a UNet, as a value on the socket STEER_ADAPTER.

    tokens: for each picture; 0 where there is one for each patch that the encoder sees.
    width: of the text that the UNet attends to.  hidden: widths of the layers.
    image: width of what it takes from an image encoder, 0 for nothing; pooled: that is the embedding of the whole
        picture, otherwise the hidden states before the last layer.
    face: width of the face embedding that it takes, 0 for none.
    patcher: the host's ModelPatcher of `Network`.  lora: {number of the attention: {"to_q": (down, up), ...}}, numbers
        of self- and cross-attentions in turn in the order of the layers.
    """

    name: str
    variant: str
    tokens: int
    width: int
    hidden: tuple[int, ...]
    image: int
    pooled: bool
    face: int
    digest: str = ""  # tells files of one name apart
    patcher: Any = field(default=None, compare=False, repr=False)
    lora: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def kind(self):
        return f"IP-Adapter {self.variant}"

    @property
    def nodes(self):
        """Ids of the nodes that take it."""
        if self.variant == "face-resampler":
            return "SteerFaceID", "SteerInstantID"
        return ("SteerFaceID",) if self.face else ("SteerIPAdapter",)

    @property
    def blank(self):
        """What the negative is, as trained: "zero" for the encoder's output, else a "grey" or "black" picture."""
        return "zero" if self.pooled else "grey"

    @property
    def made_for(self):
        """The kind of UNet in brackets, " (SDXL)"; "" where its sizes are not those of a known one."""
        model = MODELS.get((len(self.hidden), self.width))
        return f" ({model})" if model else ""

    @property
    def encoder(self):
        """Name of the image encoder that it needs; "" for none."""
        if not self.image:
            return ""
        place = 2 if self.pooled else 1
        known = next((row[0] for row in ENCODERS if row[place] == self.image), "an image encoder")
        return f"{known}, whose {'embedding has' if self.pooled else 'hidden states have'} width {self.image}"

    def check_encoder(self, config):
        """Raises ValueError unless an image encoder of this config (of a CLIP_VISION) is the right one."""
        hidden = config.get("hidden_size")
        embedding = config.get("projection_dim", hidden)
        got = embedding if self.pooled else hidden
        if got != self.image:
            wired = next((row[0] for row in ENCODERS if row[1:] == (hidden, embedding)), "another encoder")
            raise ValueError(
                f"{self.name} needs {self.encoder}; wired is {wired}, where it is {got}. Load the right file from "
                "models/clip_vision."
            )

    @torch.no_grad()
    def project(self, *given, **options):
        """Tokens [n, T, width] on the CPU, in fp32, from what the projector takes."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher])
        given = (x.to(self.patcher.load_device, torch.float32) for x in given)
        return self.patcher.model.image_proj(*given, **options).cpu()

    @torch.no_grad()
    def keys_and_values(self, tokens, numbers):
        """{number of the layer: [(W_k e, W_v e) for each e of `tokens`]}, each [n, T, hidden], where the adapter is."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher])
        tokens = [e.to(self.patcher.load_device, torch.float32) for e in tokens]
        layers = self.patcher.model.layers
        return {n: [(layers[n]["to_k_ip"](e), layers[n]["to_v_ip"](e)) for e in tokens] for n in numbers}

    def __str__(self):
        """What it is and what it needs, for people."""
        size = sum(p.numel() * p.element_size() for p in self.patcher.model.parameters()) / 2**20
        lines = [
            f"{self.name}: IP-Adapter {self.variant} for a UNet with {len(self.hidden)} cross-attentions to a text of "
            f"width {self.width}{self.made_for}. Tokens for each picture: {self.tokens or 'one for each patch'}. "
            f"{size:,.0f} MB.",
            f"Takes {VARIANTS[self.variant][1]}.",
        ]
        if self.image:
            lines.append(f"Image encoder: {self.encoder}; from models/clip_vision.")
        if self.face:
            lines.append(f"Face embedding: {self.face} numbers of insightface's recogniser.")
        if self.lora:
            lines.append(f"Brings a LoRA for {len(self.lora)} attentions.")
        return "\n".join(lines)


def load(path, variant="auto"):
    """The `Adapter` of a file, or what one of the `FAMILIES` makes of it; ValueError, naming the file and what it is,
    where it is none."""
    name = os.path.basename(path)
    return from_state_dict(files.read(path), name, variant)


def from_state_dict(sd, name, variant="auto"):
    """The same of a flat state dict, which may be emptied."""
    sd = {re.sub(r"^adapter_modules\.", "ip_adapter.", key): value for key, value in sd.items()}
    shapes = {key: tuple(value.shape) for key, value in sd.items() if isinstance(value, torch.Tensor)}
    if family := next((each for each in FAMILIES if each.matches(shapes)), None):
        if variant != "auto":
            raise ValueError(f'{name} is no IP-Adapter and cannot be "{variant}"; set variant to "auto".')
        try:
            return family.from_state_dict(sd, name)
        except KeyError as error:
            raise ValueError(f"{name} looks cut short: it has no {error}; download it again.") from None
    found = kind_of(shapes, name)
    image, attention = below(sd, "image_proj."), below(sd, "ip_adapter.")
    sd.clear()
    try:
        return _build(name, _choose(found, variant, name), image, attention)
    except KeyError as error:
        raise ValueError(f"{name} looks like IP-Adapter {found}, but has no {error}; download it again.") from None


def kind_of(shapes, name):
    """The variant that keys and shapes of a file show; ValueError where they show none."""
    proj, attention = below(shapes, "image_proj."), below(shapes, "ip_adapter.")
    if not proj or not any(key.endswith("to_k_ip.weight") for key in attention):
        what = files.kind(shapes) or f"unknown, with keys such as {', '.join(list(shapes)[:3])}"
        raise ValueError(f"{name} is no IP-Adapter: it is {what}.")
    if "perceiver_resampler.proj_in.weight" in proj:
        return "faceid-plus v2" if "v2" in name.lower() else "faceid-plus v1"
    if "latents" in proj:
        return "face-resampler" if proj.get("proj_in.weight", ())[1:] == (FACE,) else _plus(name.lower())
    if "proj.3.weight" in proj:
        return "full-face"
    if "proj.2.weight" in proj:
        return "faceid" if any("_lora." in key for key in attention) else "portrait"
    if "proj.weight" in proj:
        return "base"
    raise ValueError(f"{name} has a projector that is not known, with keys such as {', '.join(list(proj)[:3])}.")


def _plus(name):
    return next((v for v in ("composition", "plus-face") if v in name.replace("_", "-")), "plus")


def _choose(found, variant, name):
    if variant == "auto" or variant == found:
        return found
    if not any(found in alike and variant in alike for alike in ALIKE):
        raise ValueError(f'{name} is IP-Adapter {found}, which cannot be "{variant}"; set variant to "auto".')
    return variant


def _build(name, variant, image, attention):
    import comfy.model_management as mm
    from comfy.model_patcher import CoreModelPatcher
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest

    shapes = {key: tuple(value.shape) for key, value in image.items()}
    numbers = sorted({int(key.split(".")[0]) for key in attention if "_ip." in key})
    hidden = [attention[f"{n}.to_k_ip.weight"].shape for n in numbers]
    width = hidden[0][1]
    with torch.device("meta"):
        network = Network(VARIANTS[variant][0](shapes, manual_cast), [
            nn.ModuleDict({key: manual_cast.Linear(width, out, bias=False) for key in ("to_k_ip", "to_v_ip")})
            for out, _ in hidden
        ])
    weights = {f"image_proj.{key}": value for key, value in image.items()}
    for place, n in enumerate(numbers):
        for key in ("to_k_ip.weight", "to_v_ip.weight"):
            weights[f"layers.{place}.{key}"] = attention[f"{n}.{key}"]
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} looks like IP-Adapter {variant}, but its keys do not fit: {error}") from None
    network.requires_grad_(False).eval()
    patcher = CoreModelPatcher(network, mm.get_torch_device(), mm.unet_offload_device())

    projector, image_width, face = network.image_proj, network.image_proj.image, network.image_proj.face
    if variant == "face-resampler":
        image_width, face = 0, image_width
    return Adapter(
        name, variant, projector.tokens, width, tuple(out for out, _ in hidden), image_width, variant == "base", face,
        digest([weights["layers.0.to_k_ip.weight"], *list(image.values())[-2:]]), patcher, _lora(attention),
    )


def _lora(attention):
    found = {}
    for key, down in attention.items():
        if match := re.fullmatch(r"(\d+)\.(to_[qkv]|to_out)_lora\.down\.weight", key):
            found.setdefault(int(match[1]), {})[match[2]] = down, attention[key.replace(".down.", ".up.")]
    return found
