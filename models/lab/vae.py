"""Stage "vae": the host's TAESD architecture (8x, 4 channels) trained on 64x64 crops of the world."""

import numpy as np
import torch

from . import common, data

CROP = 64


def network():
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=4)
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_uniform_(m.weight, a=5**0.5)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
    return model.to(common.device(), memory_format=torch.channels_last)


def crops(images, rng, count):
    """Random crops on the 8 px grid, so that they see the grid of latents as whole pictures do."""
    rows = rng.integers(len(images), size=count)
    at = rng.integers((images.shape[1] - CROP) // 8 + 1, size=(count, 2)) * 8
    return np.stack([images[r, y : y + CROP, x : x + CROP] for r, (y, x) in zip(rows, at, strict=True)])


@torch.no_grad()
def psnr(model, pictures):
    """Mean and lowest PSNR in dB over uint8 pictures [N, 128, 128, 3], reconstructed as the host does."""
    values = []
    for batch in np.split(pictures, range(8, len(pictures), 8)):
        x = data.to_tensor(batch, common.device())
        with common.autocast():
            y = model.decode(model.encode(x)).float().clamp(-1, 1)
        values += (-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)))).tolist()
    return float(np.mean(values)), min(values)


def loss_of(model, x, noise=0.05):
    """L1, L2 and edge error in [0, 1] units; latents get noise and are kept inside the decoder's tanh."""
    with common.autocast():
        z = model.encode(x).float()
        spread = torch.rand(len(z), 1, 1, 1, device=z.device) * noise
        y = model.decode(z + spread * torch.randn_like(z)).float()
    error = (y - x) / 2
    edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
    outside = (z.abs() - 2.5).relu().square().mean()
    return error.abs().mean() + 10 * error.square().mean() + 0.25 * edges + outside


def train(work, budget, batch=16, lr=2e-3, seed=0):
    """Train until `budget` seconds of training have been spent in all; resumes from `work`/vae.ckpt."""
    path, model = work / "vae.ckpt", network()
    torch.manual_seed(seed)
    state = common.restore(path)
    if state:
        model.load_state_dict(state["model"])
    average = common.Average(model, 0.998)
    ends = ("vae_", "taesd_encoder.0.", "taesd_encoder.14.", "taesd_decoder.1.", "taesd_decoder.18.")
    optimiser = common.Muon(*common.split(model.named_parameters(), ends), lr=lr)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    step = seconds = 0
    if state:
        optimiser.load_state_dict(state["optimiser"])
        average.shadow, average.steps, step, seconds = state["average"], state["step"], state["step"], state["seconds"]
    images, test = data.images(work), data.held_out(64)[1]
    rng = np.random.default_rng([seed, step])
    log = common.Log("vae", round(budget), round(seconds), batch, seconds)
    while log.seconds < budget:
        x = data.to_tensor(crops(images, rng, batch), common.device()).contiguous(memory_format=torch.channels_last)
        optimiser.set_rate(lr * common.schedule(log.seconds / budget, hold=0.3))
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(model, x)
        loss.backward()
        optimiser.step()
        average.update(model)
        step += 1
        log.tick(round(log.seconds))
        if step % 50 == 0:
            log.write(step, loss=loss.item())
        if step % 250 == 0:
            save(path, model, average, optimiser, step, log, test)
    save(path, model, average, optimiser, step, log, test)


def save(path, model, average, optimiser, step, log, test):
    live = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(average.shadow)
    mean, low = psnr(model, test)
    model.load_state_dict(live)
    log.write(step, psnr=mean, psnr_min=low)
    state = dict(model=live, average=average.shadow, optimiser=optimiser.state_dict())
    common.save(path, **state, step=step, seconds=log.seconds)
