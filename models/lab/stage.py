"""A stage of the training with a budget of processor time: what vision.py and adapters.py share. Resumable."""

import random

import torch
from safetensors.torch import load_file, save_file

from . import common


class Stage:
    """Trains `model`; a subclass gives `loss(size)` -> (loss, {name: figure to log}), and `files()` or an `export(out)`
    of its own.

    work: folder of the checkpoint `name`.ckpt.  adam: words in names of the matrices that Adam trains, not Muon.
    kept: {name: tensor} that is changed in place and belongs to the checkpoint too.
    """

    progress = 0.0  # share of the budget that is spent

    def __init__(self, work, name, model, adam=(), seed=0, lr=1e-3, decay=0.99, kept=None):
        self.path, self.lr, self.rng = work / f"{name}.ckpt", lr, random.Random(seed)
        self.model = model.to(common.device())
        self.optimiser = common.Muon(*common.split(model.named_parameters(), adam), lr=lr)
        self.average, self.step, self.seconds = common.Average(model, decay), 0, 0.0
        self.kept = kept or {}
        state = common.restore(self.path)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.shadow, self.average.steps = state["average"], state["step"]
            self.step, self.seconds = state["step"], state["seconds"]
            for key, value in self.kept.items():
                value.copy_(state[key])
            self.rng.seed(self.step)
            torch.manual_seed(seed + self.step)

    def loss(self, size):
        raise NotImplementedError

    def files(self):
        """{file: {key in it: the model's}}."""
        raise NotImplementedError

    def export(self, out):
        """fp16, in the layout of the public files."""
        for file, names in self.files().items():
            weights = {key: self.average.shadow[name] for key, name in names.items()}
            save_file({key: v.half().contiguous().cpu() for key, v in weights.items()}, out / file)

    def load(self, out):
        """Go on at half the learning rate, from what was exported where there is no checkpoint; what is not exported
        begins anew."""
        self.lr /= 2
        if self.step == 0:
            given = {name: load_file(out / file)[key].float() for file, names in self.files().items()
                     for key, name in names.items()}
            self.model.load_state_dict(self.model.state_dict() | given)
            self.average = common.Average(self.model, self.average.decay)

    def save(self, log):
        state = dict(model=self.model.state_dict(), average=self.average.shadow, optimiser=self.optimiser.state_dict())
        common.save(self.path, **state, **self.kept, step=self.step, seconds=log.seconds)

    def run(self, budget, batch):
        """Train until `budget` seconds of processor time have been spent in all; the learning rate is zero then."""
        begun, seen, names = round(self.seconds), [], ()
        log = common.Log(self.path.stem, round(budget), begun, batch, self.seconds)
        while log.seconds < budget:
            self.progress = log.seconds / budget
            self.optimiser.set_rate(self.lr * common.schedule(self.progress, hold=0.5))
            self.optimiser.zero_grad(set_to_none=True)
            loss, figures = self.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update(self.model)
            self.step += 1
            if figures.keys() != names:
                seen, names = [], figures.keys()
            seen.append(torch.stack([loss.detach(), *figures.values()]))
            if self.step % 50 == 0:
                log.write(self.step, **dict(zip(("loss", *figures), torch.stack(seen).mean(0).tolist(), strict=True)))
                log.tick(round(log.seconds))
                self.save(log)
                seen = []
        self.save(log)
