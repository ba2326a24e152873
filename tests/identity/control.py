"""ControlNets whose contexts are written out: a chain of the host's own, each asked by itself and added up."""

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management as mm
import comfy.ops
import torch
import toy
from comfy.ldm.flux.controlnet import ControlNetFlux


def hint(seed=0, size=128):
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(100 + seed))


def unet(seed=0, config=None):
    """The host's ControlNet for toy.UNET, as its loader gives it."""
    loaded = toy.controlnet(None, config=config or toy.UNET)
    toy.random_weights(loaded.control_model, 30 + seed)
    return loaded


def flux(config):
    """The host's ControlNet for a small Flux that takes a latent, as it loads InfuseNet."""
    network = ControlNetFlux(
        latent_input=True, control_latent_channels=4, operations=comfy.ops.manual_cast, dtype=torch.float32,
        **dict(config, depth=2, depth_single_blocks=1),
    )
    toy.random_weights(network, 40)
    return comfy.controlnet.ControlNet(
        network, compression_ratio=1, latent_format=comfy.latent_formats.SD15(), load_device=mm.get_torch_device(),
        extra_conds=["y", "guidance"],
    )


class Sum(comfy.controlnet.ControlBase):
    """What several ControlNets add together. nets: [(ControlNet of the host alone, contexts or None, share, changes)];
    contexts: (e of the positive, e of the negative); share: h, its place -> h where it counts; changes of the cond."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nets

    def get_models(self):
        return [model for net, *_ in self.nets for model in net.get_models()]

    def pre_run(self, *args):
        for net, *_ in self.nets:
            net.pre_run(*args)

    def cleanup(self):
        for net, *_ in self.nets:
            net.cleanup()

    def get_control(self, x, t, cond, count, options):
        total = {}
        for net, contexts, share, changes in self.nets:
            seen = {**cond, **{k: torch.full_like(cond[k], v) for k, v in changes.items()}}
            if contexts is not None:
                rows = len(x) // count
                e = [contexts[i == 1].expand(rows, -1, -1) for i in options["cond_or_uncond"]]
                seen["crossattn_controlnet"] = torch.cat(e)
            for name, values in (net.get_control(x, t, seen, count, options) or {}).items():
                have = total.setdefault(name, [0] * len(values))
                total[name] = [a if h is None else a + share(h) for a, h in zip(have, values, strict=True)]
        return total or None


def part(control_net, image, strength=1.0, window=(0.0, 1.0), contexts=None, share=lambda h: h, vae=None, **changes):
    """One of the nets of a `Sum`."""
    return control_net.copy().set_cond_hint(image.movedim(-1, 1), strength, window, vae=vae), contexts, share, changes


def summed(conditionings, *nets):
    control = Sum(*nets)
    return [[[cond, {**options, "control": control}] for cond, options in each] for each in conditionings]
