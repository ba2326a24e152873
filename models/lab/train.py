"""Trains the lab's models. Resumable: run the same command again and it goes on where it stopped.

    python models/lab/train.py all                 every stage below, in this order
    python models/lab/train.py data                draw the training portraits
    python models/lab/train.py vae                 TAESD autoencoder
    python models/lab/train.py latents             encode the portraits (--part I/N shares the work among processes)
    python models/lab/train.py text                teach the text encoder its words
    python models/lab/train.py reader              the reader, first on renders, then also through the VAE
    python models/lab/train.py unet                Lab-UNet and the text encoder
    python models/lab/train.py dit                 Lab-DiT, on the UNet's text encoder
    python models/lab/train.py dit-weak            the same network for a few minutes
    python models/lab/train.py export              fp16 safetensors beside this file
    python models/lab/train.py edit                teach the exported Lab-UNet to edit pictures; exports itself
    python models/lab/train.py vision              the image encoder; exports itself, as all below
    python models/lab/train.py clip                one space for texts and what the image encoder sees
    python models/lab/train.py geometry            a judge of faces for the adapters' training; exports nothing
    python models/lab/train.py adapter             IP-Adapter (plus) for the exported Lab-UNet and the image encoder
    python models/lab/train.py faceid              FaceID adapter for the exported Lab-UNet and the reader
    python models/lab/train.py instantid           InstantID for the exported Lab-UNet and the reader
    python models/lab/train.py adapter-dit         IP-Adapter (InstantX) for the exported Lab-DiT and the image encoder
    python models/lab/train.py fastcomposer        FastComposer on two persons, with what of Lab-UNet it tunes
    python models/lab/train.py pulid               PuLID for the exported Lab-DiT, the reader and the image encoder
    python models/lab/train.py time                time predictor for Lab-UNet's noisy latents
    python models/lab/train.py time-dit            the same for Lab-DiT's
    python models/lab/train.py eval                measure them and write weights/card.md and the contact sheet

Works on a CPU and on a GPU. Stages with a budget stop when they have trained that many minutes of processor time in
all, with the learning rate at zero; the defaults are for one core of a CPU with AMX. What the shipped
weights were given is in weights/card.md.
Weights of a stage and its optimiser lie in --work; the log is weights/training.csv.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]
STAGES = ("data", "vae", "latents", "text", "reader", "unet", "dit", "dit-weak", "export", "edit", "vision", "clip",
          "geometry", "adapter", "faceid", "instantid", "adapter-dit", "fastcomposer", "pulid", "time", "time-dit",
          "eval")  # fmt: skip
MINUTES = {"vae": 20.5, "unet": 31, "dit": 75, "dit-weak": 3.5, "edit": 25, "vision": 3, "geometry": 4, "adapter": 7,
           "faceid": 20, "instantid": 22, "adapter-dit": 15, "fastcomposer": 35, "pulid": 15, "time": 2, "time-dit": 2}
SHIPPED = "vision", "adapter", "faceid", "instantid", "adapter-dit", "pulid"  # can go on from what they exported
OWN = {"geometry": "geometry", "instantid": "instantid", "adapter-dit": "flow", "fastcomposer": "fastcomposer",
       "pulid": "pulid"}  # modules  # fmt: skip
PARTS = ("vae", "reader", "unet", "unet-weak", "unet-edit", "vision", "clip", "adapter", "faceid", "instantid",
         "adapter-dit", "fastcomposer", "pulid", "time", "dit", "dit-weak", "leak", "dit-leak", "dit-heeds", "seconds",
         "dit-seconds", "megabytes")  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", *STAGES))
    work = ROOT / ".steer" / "lab"
    parser.add_argument("--work", type=Path, default=work, help="checkpoints and data (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help=f"budget of a timed stage (default: {MINUTES})")
    parser.add_argument("--images", type=int, default=20_000, help="training portraits (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="batch of vae (16), unet, dit (48), edit, an adapter (32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the order of the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more only on an idle machine")
    shipped = f"{', '.join(SHIPPED)}: without a checkpoint, go on from the shipped weights, at half the rate"
    parser.add_argument("--shipped", action="store_true", help=shipped)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="latents: encode every N-th block from block I")
    parser.add_argument("--weak", help="export: the early checkpoint for unet-weak (default: the earliest snapshot)")
    parser.add_argument("--only", nargs="+", default=(), choices=PARTS, help="eval: measure these parts anew")
    chosen = parser.parse_args()
    if chosen.shipped and chosen.stage not in SHIPPED:
        parser.error(f"--shipped is for {', '.join(SHIPPED)}; without a checkpoint {chosen.stage} begins anew.")
    return chosen


def module(name):
    return importlib.import_module(f"steer.models.lab.{name}")


def run(stage, o):
    if stage == "data":
        module("data").build(o.work, o.images)
    elif stage == "vae":
        module("vae").train(o.work, 60 * (o.minutes or MINUTES["vae"]), o.batch or 16, seed=o.seed)
    elif stage == "latents":
        module("latents").build(o.work, tuple(int(n) for n in o.part.split("/")))
    elif stage == "text":
        module("text").train(o.work, seed=o.seed)
    elif stage == "reader":
        module("reading").train(o.work, 1500, name="reader-clean", seed=o.seed)
        module("reading").train(o.work, 500, lr=1e-3, through_vae=0.5, start="reader-clean", seed=o.seed + 1)
    elif stage == "unet":
        budget = 60 * (o.minutes or MINUTES["unet"])
        module("unet").train(o.work, budget, o.batch or 48, seed=o.seed)
    elif stage in ("dit", "dit-weak"):
        module("dit").train(o.work, 60 * (o.minutes or MINUTES[stage]), o.batch or 48, seed=o.seed, name=stage)
    elif stage == "export":
        weak = o.weak or min((p.name for p in o.work.glob("unet-*.ckpt")), key=lambda n: int(n[5:-5]))
        module("export").run(o.work, module("common").WEIGHTS, weak)
    elif stage == "edit":
        module("edit").build(o.work)
        module("edit").train(o.work, 60 * (o.minutes or MINUTES["edit"]), o.batch or 32, seed=o.seed)
    elif stage == "vision":
        module("vision").train(o.work, 60 * (o.minutes or MINUTES["vision"]), o.batch or 64, seed=o.seed,
                               shipped=o.shipped)
    elif stage == "clip":
        module("clip").train(module("common").WEIGHTS, o.seed)
    elif stage in ("adapter", "faceid"):
        module("edit").build(o.work)
        which = module("adapters").Plus if stage == "adapter" else module("faceid").Face
        budget = 60 * (o.minutes or MINUTES[stage])
        module("adapters").train(o.work, budget, which, o.batch or 32, seed=o.seed, shipped=o.shipped)
    elif stage in OWN:
        module("edit").build(o.work)
        more = {"shipped": o.shipped} if stage in SHIPPED else {}
        module(OWN[stage]).train(o.work, 60 * (o.minutes or MINUTES[stage]), o.batch or 32, seed=o.seed, **more)
    elif stage in ("time", "time-dit"):
        module("edit").build(o.work)
        which = "dit" if stage == "time-dit" else "unet"
        module("timing").train(o.work, 60 * (o.minutes or MINUTES[stage]), o.batch or 256, o.seed, which)
    elif stage == "eval":
        module("evaluate").write_card(module("common").WEIGHTS, o.only)


def main():
    o = arguments()
    sys.path.append(str(ROOT / "tests"))
    import host

    host.enter()
    host.boot()
    package = sys.modules["steer"] = types.ModuleType("steer")  # the repository's root must never be on sys.path:
    package.__path__ = [str(ROOT)]  # its folder `nodes` would shadow the host's nodes.py
    import torch

    torch.set_num_threads(o.threads)
    for stage in STAGES if o.stage == "all" else (o.stage,):
        run(stage, o)


if __name__ == "__main__":
    main()
