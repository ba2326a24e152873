"""Stage "unet": Lab-UNet and the text encoder, eps-prediction on latents drawn from Stable Diffusion's schedule."""

import random
from contextlib import contextmanager

import torch

from . import common, latents
from .load import unet_model
from .portrait import Portrait
from .text import Encoder, Vocabulary


def network(stats, **changes):
    """The host's UNetModel, initialised: residual branches start at zero."""
    base = unet_model(stats, **changes)
    for name, p in base.diffusion_model.named_parameters():
        if p.ndim < 2:
            torch.nn.init.constant_(p, float(name.endswith("weight")))
        elif any(name.endswith(end) for end in ("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
            torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    base.diffusion_model.requires_grad_(True)
    return base.to(common.device())


def plain_attention(q, k, v, heads, mask=None, **kwargs):
    """softmax(q k') v with batched products, in the precision of `q`: on a CPU its backward is twice as fast as
    the fused one's, and autocast's detour of the softmax through fp32 would double the whole step."""
    b, n, c = q.shape
    q, k, v = (t.view(b, t.shape[1], heads, c // heads).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax((q * (c // heads) ** -0.5) @ k.mT, -1)
        return (weights @ v).view(b, heads, n, c // heads).transpose(1, 2).reshape(b, n, c)


@contextmanager
def swapped(module, attention=plain_attention):
    """Gives a module of the host `attention` for the time of the block, on a CPU."""
    usual = module.optimized_attention
    if common.device().type == "cpu":
        module.optimized_attention = attention
    try:
        yield
    finally:
        module.optimized_attention = usual


class Balance:
    """Weights the eps error by the inverse of its running mean per noise level, so that every level counts alike.

    An unweighted eps loss hardly sees the decisions taken at high noise (position, background colour), where
    eps is nearly known whatever the picture is (compare Karras et al., EDM2, 2024, section 2.2).
    """

    def __init__(self, bins=50):
        self.mean = torch.full((bins,), 1.0, device=common.device())

    def __call__(self, error, t):
        at = t * len(self.mean) // 1000
        for i in at.unique():
            self.mean[i] = 0.97 * self.mean[i] + 0.03 * error.detach()[at == i].mean()
        return (error / self.mean[at]).mean()


FREEZE = 0.12  # share of the training after which the text encoder stands still
JOIN = 0.4  # share after which the transformers at 16x16 join; see Trainer.hold_back


class Trainer:
    """Models, optimiser, data and state of one training run in `work`."""

    def __init__(self, work, name="unet", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        self.work, self.path, self.lr, self.rng = work, work / f"{name}.ckpt", lr, random.Random(seed)
        self.base = network(latents.moments(work))
        self.vocabulary = Vocabulary()
        self.encoder = Encoder(len(self.vocabulary.ids) + 1).to(common.device())
        self.model = torch.nn.ModuleDict({"unet": self.base.diffusion_model, "text": self.encoder})
        ends = ("unet.input_blocks.0.", "unet.out.", "embedding", "time_embed.0")
        self.optimiser = common.Muon(*common.split(self.model.named_parameters(), ends), lr=lr)
        self.balance, self.step, self.seconds, self.frozen = Balance(), 0, 0.0, False
        self.unet = self.base.diffusion_model._forward
        self._resume()

    def _resume(self):
        state = common.restore(self.path)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.balance.mean, self.step, self.seconds = state["balance"], state["step"], state["seconds"]
            self.rng.seed(self.step)
        elif text := common.restore(self.work / "text.ckpt"):
            self.encoder.load_state_dict(text["model"])
        self.average = common.Average(self.model, 0.997)
        if state:
            self.average.shadow, self.average.steps = state["average"], state["step"]

    def hold_back(self):
        """The transformers at 16x16 pass their input on.

        Where they learn from the start they learn everything, and the bottleneck at 8x8 stays nearly unused: then
        nothing lives in h-space, and guidance that perturbs the middle has nothing to perturb.
        """
        for layer in self.fine():
            layer.forward = lambda x, *args, **kwargs: x

    def join(self):
        for layer in self.fine():
            vars(layer).pop("forward", None)

    def fine(self):
        """The SpatialTransformers at 16x16."""
        unet = self.base.diffusion_model
        return [unet.input_blocks[1][1], unet.output_blocks[2][1], unet.output_blocks[3][1]]

    def save(self, log):
        state = dict(model=self.model.state_dict(), average=self.average.shadow, balance=self.balance.mean)
        common.save(self.path, **state, optimiser=self.optimiser.state_dict(), step=self.step, seconds=log.seconds)

    def freeze_text(self):
        """From here on the encoder is its own average, so that all later checkpoints share one text encoder."""
        text = {k.removeprefix("text."): v for k, v in self.average.shadow.items() if k.startswith("text.")}
        self.encoder.load_state_dict(text)
        self.encoder.requires_grad_(False)
        self.frozen = True

    def snapshot(self):
        """The averaged weights as they are now, for the weaker sibling and for looking at progress."""
        common.save(self.work / f"{self.path.stem}-{self.step}.ckpt", average=self.average.shadow, step=self.step)

    def refill(self):
        z, seeds = latents.ready(self.work)
        self.z = self.base.latent_format.process_in(torch.from_numpy(z).float()).to(common.device())
        self.portraits = [Portrait.from_seed(int(s)) for s in seeds]

    def batch(self, size):
        at = self.rng.choices(range(len(self.portraits)), k=size)
        return self.z[at], self.vocabulary.batch([self.portraits[i] for i in at], self.rng).to(self.z.device)

    def loss(self, z, rows):
        """z [B, 4, 16, 16] whitened latents, rows [B, 77] caption tokens -> (balanced loss, plain eps error)."""
        sampling, n = self.base.model_sampling, len(z)
        t = ((torch.randperm(n, device=z.device) + torch.rand(n, device=z.device)) * (1000 / n)).long().clamp(max=999)
        sigma, noise = sampling.sigmas[t].view(-1, 1, 1, 1), torch.randn_like(z)
        x = sampling.calculate_input(sigma, z + sigma * noise)
        with common.autocast():
            with torch.set_grad_enabled(not self.frozen):
                context = self.encoder(rows)
            eps = self.unet(x, t.float(), context, transformer_options={})
        error = (eps.float() - noise).square().mean((1, 2, 3))
        return self.balance(error, t), error.detach().mean()

    def run(self, budget, batch, snapshots=6):
        """Train until `budget` seconds of training have been spent in all, then the learning rate is zero."""
        self.refill()
        log = common.Log(self.path.stem, round(budget), round(self.seconds), batch, self.seconds)
        seen, marks = [], [budget * (i + 1) / snapshots for i in range(snapshots)]
        marks = [m for m in marks if m > self.seconds]
        self.hold_back()
        while log.seconds < budget:
            if log.seconds >= JOIN * budget:
                self.join()
            if not self.frozen and log.seconds >= FREEZE * budget:
                self.freeze_text()
            self.optimiser.set_rate(self.lr * common.schedule(log.seconds / budget, hold=0.7))
            self.optimiser.zero_grad(set_to_none=True)
            loss, error = self.loss(*self.batch(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update(self.model)
            self.step += 1
            seen.append((loss.detach(), error))
            if self.step % 100 == 0:
                loss, error = torch.tensor(seen).mean(0).tolist()
                log.write(self.step, loss=loss, eps_error=error, **self.levels())
                log.tick(round(log.seconds))
                seen = []
            if self.step % 500 == 0:
                self.save(log)
                self.refill()
            if marks and log.seconds >= marks[0]:
                marks.pop(0)
                self.snapshot()
        self.save(log)

    def levels(self):
        """Running eps error at three noise levels, the quantity that tells layout, shape and detail apart."""
        at = {"t150": 7, "t500": 25, "t850": 42}
        return {name: self.balance.mean[i - 1 : i + 2].mean().item() for name, i in at.items()}


def train(work, budget, batch=48, lr=2e-3, seed=0, name="unet"):
    import comfy.ldm.modules.attention as host

    with swapped(host):
        Trainer(work, name, seed, lr).run(budget, batch)
