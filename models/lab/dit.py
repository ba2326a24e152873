"""Stage "dit": Lab-DiT, rectified flow on whitened latents; the text encoder is the UNet's, frozen."""

import random
from contextlib import contextmanager

import comfy.ldm.flux.math
import comfy.model_management
import torch

from . import common, latents
from .load import TOKENS, dit_model
from .portrait import Portrait
from .text import Encoder, Vocabulary
from .unet import swapped

ZERO = ("mod.lin", "modulation", "final_layer.linear")  # zero at the start: every block adds nothing, the output is 0
DROP_POOLED, DROP_CONTEXT = 0.3, 0.25  # see Trainer.text


def network(stats, **changes):
    """The host's Flux, initialised, with what its in-place sums need to be differentiable."""
    base = dit_model(stats, **changes)
    for name, p in base.diffusion_model.named_parameters():
        if p.ndim < 2:
            torch.nn.init.constant_(p, float("norm" in name))
        elif any(word in name for word in ZERO):
            torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    for name, module in base.diffusion_model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):  # keeps its own copy: the host adds to its input in place later
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
        elif name in ("img_in", "txt_in"):  # the residual stream in fp32
            module.register_forward_hook(lambda _, args, out: out.float())
    base.diffusion_model.requires_grad_(True)
    return base.to(common.device())


def plain_attention(q, k, v, heads, mask=None, **kwargs):
    """softmax(q k') v of [B, heads, N, C] -> [B, N, heads C]; see `unet.plain_attention`."""
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1)
        return (weights @ v).transpose(1, 2).flatten(2)


def times(n, device):
    """n stratified times in (0, 1), halfway between a uniform and a logit-normal distribution."""
    u = (torch.randperm(n, device=device) + torch.rand(n, device=device)) / n
    return (u + torch.special.ndtri(u).sigmoid()) / 2


class Trainer:
    """Model, optimiser, data and state of one training run in `work`."""

    def __init__(self, work, name="dit", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        self.work, self.path, self.lr, self.rng = work, work / f"{name}.ckpt", lr, random.Random(seed)
        self.base = network(latents.moments(work))
        self.model = self.base.diffusion_model
        self.vocabulary = Vocabulary()
        self.encoder = Encoder(len(self.vocabulary.ids) + 1).to(common.device()).requires_grad_(False)
        trained = common.restore(work / "unet.ckpt")
        if trained is None:
            raise FileNotFoundError(f"{work / 'unet.ckpt'} holds the text encoder: run the stage unet first.")
        text = trained["average"]
        self.encoder.load_state_dict({k.removeprefix("text."): v for k, v in text.items() if k.startswith("text.")})
        adam = ("mod", "final_layer", "_in.")
        self.optimiser = common.Muon(*common.split(self.model.named_parameters(), adam), lr=lr)
        self.average, self.step, self.seconds = common.Average(self.model, 0.997), 0, 0.0
        state = common.restore(self.path)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.shadow, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            self.average.steps = self.step
            self.rng.seed(self.step)
            torch.manual_seed(seed + self.step)
        z, seeds = latents.ready(work)
        self.z = self.base.latent_format.process_in(torch.from_numpy(z).float()).to(common.device())
        self.portraits = [Portrait.from_seed(int(s)) for s in seeds]

    def batch(self, size):
        at = self.rng.choices(range(len(self.portraits)), k=size)
        return self.z[at], self.vocabulary.batch([self.portraits[i] for i in at], self.rng).to(self.z.device)

    def text(self, rows):
        """[B, 77] rows -> context [B, TOKENS, D] and pooled y [B, D].

        The pooled vector alone names every factor. It is zero for DROP_POOLED of the items, so that the context is
        read; the context is the empty prompt's for DROP_CONTEXT of them, so that the pooled vector is heard.
        """
        empty = torch.tensor([self.vocabulary.encode([])], device=rows.device)
        x = self.encoder(torch.cat([rows, empty])).float()
        end = (rows == self.vocabulary.rows[self.vocabulary.end]).int().argmax(1)
        context, y, dice = x[:-1, :TOKENS], x[torch.arange(len(rows)), end], torch.rand(len(rows), device=rows.device)
        y = torch.where((dice < DROP_POOLED)[:, None], 0.0, y)
        return torch.where((dice > 1 - DROP_CONTEXT)[:, None, None], x[-1:, :TOKENS], context), y

    def loss(self, z, rows):
        """z [B, 4, 16, 16] whitened latents, rows [B, 77] caption tokens -> error of the velocity noise - z."""
        t, noise = times(len(z), z.device), torch.randn_like(z)
        at = t.view(-1, 1, 1, 1)
        x = self.base.model_sampling.noise_scaling(at, noise, z)
        with common.autocast():
            context, y = self.text(rows)
            v = self.model(x, t, context, y)
        return (v.float() - (noise - z)).square().mean()

    def save(self, log):
        state = dict(model=self.model.state_dict(), average=self.average.shadow, optimiser=self.optimiser.state_dict())
        common.save(self.path, **state, step=self.step, seconds=log.seconds)

    def run(self, budget, batch):
        """Train until `budget` seconds of training have been spent in all, then the learning rate is zero."""
        log, seen = common.Log(self.path.stem, round(budget), round(self.seconds), batch, self.seconds), []
        while log.seconds < budget:
            self.optimiser.set_rate(self.lr * common.schedule(log.seconds / budget, hold=0.6))
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.loss(*self.batch(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update(self.model)
            self.step += 1
            seen.append(loss.detach())
            if self.step % 100 == 0:
                log.write(self.step, loss=torch.stack(seen).mean().item())
                log.tick(round(log.seconds))
                seen = []
            if self.step % 500 == 0:
                self.save(log)
        self.save(log)


@contextmanager
def trainable():
    """Lets gradients through the host's Flux."""
    mm = comfy.model_management
    usual, mm.in_training = mm.in_training, True  # the host's own switch: a rotary embedding that has a gradient
    try:
        with swapped(comfy.ldm.flux.math, plain_attention):
            yield
    finally:
        mm.in_training = usual


def train(work, budget, batch=48, lr=2e-3, seed=0, name="dit"):
    with trainable():
        Trainer(work, name, seed, lr).run(budget, batch)
