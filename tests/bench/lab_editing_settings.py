"""What tests/bench/lab_editing.py measures: [(name, models, edit(lab, steps, seed) -> latent [B, C, H, W])]."""

from bench.lab_editing import redraw, trajectory
from bench.lab_fluxspace import steered as fluxspace
from bench.lab_inversion_edit import editfriendly, flowedit, sdedit
from bench.lab_layout import diffuseit, freecontrol, kvreuse, masactrl, plugandplay
from bench.lab_unified import edit as unified
from bench.lab_words import prompttoprompt
from steer.patches.inversion import directinversion
from steer.patches.shared.schedule import Schedule

ALWAYS, BOTH = Schedule(), ("unet", "dit")


def last(share, edit):
    """An edit of the inversion room that begins `share` of the steps before the end."""
    return lambda lab, steps, seed: edit(lab, steps, round(share * steps), seed)


def steered(steer):
    """The new prompt from the inverted pictures on steer(lab, trajectory)."""
    return lambda lab, steps, seed: redraw(lab, steps, steer(lab, trajectory(lab, steps)))


def anew(steer):
    """The new prompt from noise of its own: the source is there through the method alone."""
    return lambda lab, steps, seed: lab.sample(
        steer(lab, trajectory(lab, steps)), lab.after, "euler", lab.sigmas(steps), start=lab.noise(seed))


def shown(fine, share):
    """FluxSpace from the inverted pictures, under prompts that say nothing of the edit."""
    return lambda lab, steps, seed: redraw(lab, steps, *fluxspace(lab, fine, share))


SETTINGS = [
    ("re-prompt, same noise", BOTH, steered(lambda lab, path: lab.model)),
    ("SDEdit, last 40 %", BOTH, last(0.4, sdedit)),
    ("SDEdit, last 60 %", BOTH, last(0.6, sdedit)),
    ("SDEdit, last 80 %", BOTH, last(0.8, sdedit)),
    ("FlowEdit, last 60 %", BOTH, last(0.6, flowedit)),
    ("FlowEdit, last 80 %", BOTH, last(0.8, flowedit)),
    ("edit-friendly, last 80 %", BOTH, last(0.8, editfriendly)),
    ("direct inversion 0.75", BOTH, steered(lambda lab, path: directinversion.apply(lab.model, path, 0.75, ALWAYS))),
    ("Prompt-to-Prompt", BOTH, steered(prompttoprompt)),
    ("Prompt-to-Prompt 0.4, 0.2", BOTH, steered(lambda lab, path: prompttoprompt(
        lab, path, cross_replace=0.4, self_replace=0.2))),
    ("MasaCtrl", BOTH, steered(masactrl)),
    ("MasaCtrl from 30 %", BOTH, steered(lambda lab, path: masactrl(lab, path, start=0.3))),
    ("Plug-and-Play", BOTH, steered(plugandplay)),
    ("Plug-and-Play to 30 %", BOTH, steered(lambda lab, path: plugandplay(lab, path, end=0.3, features_end=0.3))),
    ("FluxSpace", ("dit",), shown(5.0, 0.5)),
    ("FluxSpace, fine 1, coarse 0", ("dit",), shown(1.0, 0.0)),
    ("prompt alone, own noise", BOTH, anew(lambda lab, path: lab.model)),
    ("FreeControl", BOTH, anew(freecontrol)),
    ("FreeControl, gradient, strength 3", BOTH, anew(lambda lab, path: freecontrol(
        lab, path, 3.0, method="gradient"))),
    ("DiffuseIT by Lab Vision", BOTH, anew(lambda lab, path: diffuseit(lab, path, eye="vision"))),
    ("Keep Region, the true one", BOTH, steered(lambda lab, path: kvreuse(lab, path, alone=True))),
    ("KV Reuse, the true region", BOTH, steered(kvreuse)),
    ("KV Reuse, attention scale 1", BOTH, steered(lambda lab, path: kvreuse(lab, path, 1.0))),
    ("KV Reuse, re_init", BOTH, steered(lambda lab, path: kvreuse(lab, path, re_init=True))),
    ("DDCM", ("unet",), lambda lab, *run: unified(lab, "DDCM", *run)),
    ("DDCM, unified attention 0.5", ("unet",), lambda lab, *run: unified(lab, "DDCM", *run, (0.3, 0.5, 0.5))),
    ("DDCM, words for 0.7, blended at 0.6", ("unet",), lambda lab, *run: unified(
        lab, "DDCM", *run, (0.0, 1.0, 1.0), 0.7, 0.6)),
    ("FlowEdit, unified attention 0.5", BOTH, lambda lab, *run: unified(lab, "FlowEdit", *run, (0.3, 0.5, 0.5))),
]
