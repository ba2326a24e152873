"""Features of a block of a UNet at latents of one's own choice, read off the host's own evaluation of the model."""

from dataclasses import dataclass, field

import torch

from .architectures import editable_layers
from .layers import Layer
from .steering import RUN, Term, steer


@dataclass(frozen=True)
class Read(Term):
    """Keeps what a block puts out, in the run's state."""

    layer: Layer = None
    node = "Steer"

    def features(self, model):
        return [(self.layer, self.keep)]

    def keep(self, h, source, call, weight):
        call.run.state[self] = h.float().clone()
        return h


@dataclass
class Probe:
    """A sampler of the host that takes no step: it asks the model at each pair (x, sigma), and keeps h and D."""

    pairs: list
    term: Read
    found: list = field(default_factory=list)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        run = extra_args["model_options"]["transformer_options"][RUN]
        for i, (x, sigma) in enumerate(self.pairs):
            x = x.to(noise)
            D = model_wrap(x, x.new_full((x.shape[0],), float(sigma)), **extra_args)
            self.found.append((run.state.pop(self.term).cpu(), D.cpu()))
            if callback is not None:
                callback(i, D, x, len(self.pairs))
        return noise


def block(model, name):
    """The one `Layer` of a ModelPatcher that `name` names; ValueError where it names several or none."""
    layers = editable_layers(model, name)
    if len(layers) > 1:
        raise ValueError(f'layer "{name}" names {len(layers)} blocks; name one, "middle" for the h-space.')
    return layers[0]


def probe(model, conditioning, pairs, layer, callback=None):
    """[(h [b, C, H, W] of the Layer, D)], on the CPU, at each (x [b, C, ...] as a sampler sees it, sigma), without
    guidance."""
    from comfy.samplers import CFGGuider

    read = Read(layer=layer)
    guider = CFGGuider(steer(model, read))
    guider.set_conds(conditioning, [])
    asked = Probe(pairs, read)
    x = torch.zeros_like(pairs[0][0])
    sigmas = torch.tensor([*(float(sigma) for _, sigma in pairs), 0.0])
    guider.sample(x, x.clone(), asked, sigmas, callback=callback, seed=0, disable_pbar=True)
    return asked.found
