"""SigLIP's pooling head (Zhai et al. 2023, arXiv 2303.15343): one learned query asks what the encoder saw of a picture.

The host loads the encoder without it.
"""

import torch
from torch.nn.functional import gelu, layer_norm, linear

from .projectors import attention, below

PREFIX, MARK = "vision_model.head.", "vision_model.head.probe"
OF_ENCODER = "vision_model.post_layernorm.weight"  # tells encoders apart
EPS = 1e-6


class PoolingHead:
    """sd: a state dict with its keys.  heads: of the encoder's attention."""

    def __init__(self, sd, heads):
        self.weights = {key: value.float() for key, value in below(sd, PREFIX).items()}
        self.heads = heads

    def __call__(self, states):
        """The pooled picture [n, E] of the encoder's last hidden states [n, P, E], after its last norm."""
        w, states = self.weights, states.float().cpu()
        q_w, k_w, v_w = w["attention.in_proj_weight"].chunk(3)
        q_b, k_b, v_b = w["attention.in_proj_bias"].chunk(3)
        probe = w["probe"].expand(len(states), -1, -1)
        x = attention(linear(probe, q_w, q_b), linear(states, k_w, k_b), linear(states, v_w, v_b), self.heads)
        x = linear(x, w["attention.out_proj.weight"], w["attention.out_proj.bias"])
        y = layer_norm(x, x.shape[-1:], w["layernorm.weight"], w["layernorm.bias"], EPS)
        y = gelu(linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
        return (x + linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))[:, 0]


def head_of(clip_vision, paths):
    """The `PoolingHead` of a CLIP_VISION, from the one of the safetensors files `paths` that it was loaded from; None
    where there is no such file, or it has no head."""
    from safetensors import safe_open

    own = clip_vision.model.state_dict().get(OF_ENCODER)
    for path in paths if own is not None else ():
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if {MARK, OF_ENCODER} <= keys and torch.equal(file.get_tensor(OF_ENCODER).to(own), own):
                head = {key: file.get_tensor(key) for key in keys if key.startswith(PREFIX)}
                return PoolingHead(head, clip_vision.config["num_attention_heads"])
    return None
