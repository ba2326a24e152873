"""Stage "instantid": InstantID (Wang et al. 2024, 2401.07519) for the exported Lab-UNet, which is frozen.

    adapter_instantid.safetensors   layout of the public ip-adapter.bin; takes the reader's identity
    controlnet.safetensors          the host's ControlNet; is shown the face's keypoints, and its tokens for a text

Both are trained together. The ControlNet begins as the UNet's encoder and middle, and adds nothing at first.
"""

from contextlib import contextmanager

import comfy.ldm.modules.diffusionmodules.openaimodel as host
import torch
from comfy.ops import disable_weight_init

from ...patches.identity.face import draw
from ..identity import projectors
from . import adapters, common, faceid, load
from .face import keypoints
from .portrait import SIZE

TOKENS, DEPTH, WIDTH = 4, 2, 128  # of the resampler
FACE = 512
ZERO = ("zero_convs", "middle_block_out", "input_hint_block.14")  # what the ControlNet says, and what it is shown


def resampler_shapes():
    """Shapes of the keys below image_proj."""
    text, w = load.TEXT["hidden_size"], WIDTH
    shapes = {"latents": (1, TOKENS, w), "proj_in.weight": (w, FACE), "proj_out.weight": (text, w)}
    for i in range(DEPTH):
        shapes |= {f"layers.{i}.0.to_q.weight": (w, w), f"layers.{i}.1.1.weight": (4 * w, w)}
    return shapes


def control_network(unet):
    """The host's ControlNet with the weights that Lab-UNet has too."""
    model, shared = load.control_model(), unet.state_dict()
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name in shared:
                p.copy_(shared[name])
            elif p.ndim < 2 or name.startswith(ZERO):
                p.zero_()
            else:
                torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    return model


class InstantID(faceid.Face):
    """The keypoints are the picture's own, the face is that of another picture of the person."""

    adam = ("latents", *ZERO, "input_hint_block.0.")

    def __init__(self, work, name="adapter_instantid", seed=0, lr=2e-3):
        super().__init__(work, name, seed, lr)

    def projector(self):
        return projectors.Resampler(resampler_shapes(), disable_weight_init)

    def parts(self):
        return {"control": control_network(self.base.diffusion_model).to(common.device())}

    def control(self, x, t, tokens, portraits):
        hints = torch.cat([draw(keypoints(p)[None], (SIZE, SIZE)) for p in portraits]).movedim(-1, 1)
        return self.model.control(x, hints.to(x), t.float(), tokens)

    def files(self):
        own = [name for name in self.model.state_dict() if name.startswith("control.")]
        return super().files() | {"controlnet.safetensors": {name.removeprefix("control."): name for name in own}}


@contextmanager
def added():
    """Lets the host add what a ControlNet says to a copy: it does so in place, which autograd refuses."""
    usual = host.apply_control
    host.apply_control = lambda h, control, name: usual(h.clone() if control else h, control, name)
    try:
        yield
    finally:
        host.apply_control = usual


def train(work, budget, batch=32, lr=2e-3, seed=0, shipped=False):
    with added():
        adapters.train(work, budget, InstantID, batch, lr, seed, shipped)
