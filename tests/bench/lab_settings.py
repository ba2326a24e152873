"""What tests/bench/lab_guidance.py measures: tables of (name, run(prompts, seeds) -> {column: figure})."""

from bench.lab_guidance import edit, measure, text, unconditional, without
from steer.models.lab.load import load_model
from steer.patches.guidance import (
    adaptiveguidance,
    apg,
    autoguidance,
    betacfg,
    cfgpp,
    cfgzerostar,
    fdg,
    feedbackcfg,
    guidanceschedule,
    instructpix2pix,
    negative,
    pag,
    rescale,
    sag,
    seg,
    slg,
    tag,
    tcfg,
)
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
COLUMNS = ("rows", "hits", "PSNR", "saturation", "contrast", "diversity")


def plain(model):
    return model


def pictures(name, steer=plain, **sampling):
    return name, lambda **size: measure(steer, **size, **sampling)


def high_cfg():
    for cfg in (1.0, 2.0, 4.0, 8.0, 12.0):
        yield pictures(f"CFG {cfg:g}", cfg=cfg)
    for cfg in (12.0,):
        for name, steer in {
            "APG": lambda m: apg.apply(m, 0.0, 0.75, -0.5, ALWAYS),
            "TCFG": lambda m: tcfg.apply(m, 1.0, ALWAYS),
            "CFG-Zero*": lambda m: cfgzerostar.apply(m, 0.0, ALWAYS),
            "rescale 0.7": lambda m: rescale.apply(m, 0.7, ALWAYS),
            "TAG 0.15": lambda m: tag.apply(m, 0.15, ALWAYS),
            "feedback": lambda m: feedbackcfg.apply(m, 1.0, 12.0, 23, 1.0, ALWAYS),
        }.items():
            yield pictures(f"CFG {cfg:g}, {name}", steer, cfg=cfg)
    yield pictures("CFG++ 0.6", lambda m: cfgpp.apply(m, 0.6, ALWAYS))
    yield pictures("FDG low 2, high 8", lambda m: fdg.apply(m, 2.0, 8.0, 1, ALWAYS))
    yield pictures("beta-CFG 8, gamma 0", lambda m: betacfg.apply(m, 2.0, 2.0, 0.0, True, ALWAYS), cfg=8.0)


def spared():
    yield pictures("CFG 5", cfg=5.0)
    for low, high in ((0.0, 0.5), (0.2, 0.8)):
        name = f"CFG 5 from {low:.0%} to {high:.0%}, 1 elsewhere"
        window = Schedule(low, high)
        yield pictures(name, lambda m, w=window: guidanceschedule.apply(m, 1.0, 5.0, "custom", w), cfg=5.0)
    for threshold in (0.98, 0.991, 0.998):
        name = f"CFG 5, Adaptive Guidance {threshold:g}"
        yield pictures(name, lambda m, t=threshold: adaptiveguidance.apply(m, t, ALWAYS), cfg=5.0)


def weak():
    sibling = load_model("unet-weak")[0]
    for name, steer in {
        "off": plain,
        "AutoGuidance 0.5": lambda m: autoguidance.apply(m, sibling, 0.5, ALWAYS),
        "AutoGuidance 1": lambda m: autoguidance.apply(m, sibling, 1.0, ALWAYS),
        "PAG 1": lambda m: pag.apply(m, 1.0, "auto", ALWAYS),
        "PAG 3": lambda m: pag.apply(m, 3.0, "auto", ALWAYS),
        "SEG 3": lambda m: seg.apply(m, 3.0, 100.0, "auto", ALWAYS),
        "SLG 1": lambda m: slg.apply(m, 1.0, "auto", ALWAYS),
        "SAG 0.5": lambda m: sag.apply(m, 0.5, 2.0, ALWAYS),
    }.items():

        def run(prompts, seeds, steps, steer=steer):
            figures = measure(steer, prompts, seeds, steps=steps, cfg=1.0)
            return {**figures, "FD": unconditional(steer, 96, steps=steps)}

        yield name, run


def dit():
    yield pictures("CFG 1", which="dit", cfg=1.0)
    yield pictures("CFG 4", which="dit", cfg=4.0)
    for cfg in (12.0,):
        for name, steer in {
            "": plain,
            ", CFG-Zero* zero_init 0.04": lambda m: cfgzerostar.apply(m, 0.04, ALWAYS),
            ", APG": lambda m: apg.apply(m, 0.0, 2.0, -0.5, ALWAYS),
            ", rescale 0.7": lambda m: rescale.apply(m, 0.7, ALWAYS),
        }.items():
            yield pictures(f"CFG {cfg:g}{name}", steer, which="dit", cfg=cfg)
    yield pictures("CFG++ 0.6", lambda m: cfgpp.apply(m, 0.6, ALWAYS), which="dit")
    for name, steer in {
        "PAG 1": lambda m: pag.apply(m, 1.0, "auto", ALWAYS),
        "SEG 2": lambda m: seg.apply(m, 2.0, 100.0, "auto", ALWAYS),
        "SLG 1": lambda m: slg.apply(m, 1.0, "auto", ALWAYS),
    }.items():
        yield pictures(f"CFG 1, {name}", steer, which="dit", cfg=1.0)


def dit_weak():
    """A model that obeys badly, where there is something to gain."""
    for cfg in (1.0, 2.0, 3.0, 4.0, 7.5):
        yield pictures(f"CFG {cfg:g}", which="dit-weak", cfg=cfg)
    for cfg, name, steer in (
        (1.0, "TAG 0.2", lambda m: tag.apply(m, 0.2, ALWAYS)),
        (4.0, "beta-CFG, gamma 0", lambda m: betacfg.apply(m, 2.0, 2.0, 0.0, False, ALWAYS)),
        (7.5, "feedback", lambda m: feedbackcfg.apply(m, 1.0, 7.5, 8, 0.5, ALWAYS)),
        (7.5, "TCFG", lambda m: tcfg.apply(m, 1.0, ALWAYS)),
        (7.5, "CFG-Zero*", lambda m: cfgzerostar.apply(m, 0.0, ALWAYS)),
        (7.5, "APG", lambda m: apg.apply(m, 0.0, 0.75, -0.5, ALWAYS)),
        (7.5, "rescale 0.7", lambda m: rescale.apply(m, 0.7, ALWAYS)),
        (7.5, "FDG, low 2, high 7.5", lambda m: fdg.apply(m, 2.0, 7.5, 1, ALWAYS)),
    ):
        yield pictures(f"CFG {cfg:g}, {name}", steer, which="dit-weak", cfg=cfg)


def dit_unconditional():
    for name, steer in {
        "off": plain,
        "PAG 0.25": lambda m: pag.apply(m, 0.25, "single.1", ALWAYS),
        "PAG 0.5": lambda m: pag.apply(m, 0.5, "single.1", ALWAYS),
        "SEG 0.5": lambda m: seg.apply(m, 0.5, 100.0, "single.1", ALWAYS),
        "SLG 0.25": lambda m: slg.apply(m, 0.25, "single.1", ALWAYS),
        "SLG 0.5": lambda m: slg.apply(m, 0.5, "single.1", ALWAYS),
    }.items():
        yield name, lambda s=steer, **size: {"FD": unconditional(s, 192, "dit", steps=8)}


def negatives():
    for word, words in (("glasses", "glasses"), ("crown", "a crown")):
        for scale in (0.0, 1.0, 2.0, 4.0):

            def run(word=word, words=words, scale=scale, **size):
                steer = lambda m: negative.apply(m, text(words), scale, ALWAYS)  # noqa: E731
                return {"shown": without(word, steer, **size, cfg=3.0)}

            yield f'negative "{words}", scale {scale:g}', run


def two_scales():
    for cfg in (1.5, 3.0, 5.0, 7.5):
        for s_I in (1.0, 1.25, 1.5, 2.0):

            def run(cfg=cfg, s_I=s_I, **size):
                return edit(lambda m: instructpix2pix.apply(m, s_I, ALWAYS), **size, cfg=cfg)

            yield f"CFG {cfg:g}, image_scale {s_I:g}", run


TABLES = [
    ("High guidance, Lab-UNet", COLUMNS, high_cfg),
    ("Rows spared, Lab-UNet", COLUMNS, spared),
    ("Without CFG, Lab-UNet", (*COLUMNS, "FD"), weak),
    ("Lab-DiT", COLUMNS, dit),
    ("Lab-DiT, little trained", ("rows", "hits", "fit", "diversity"), dit_weak),
    ("Without prompt and without CFG, Lab-DiT, 8 steps, layer single.1", ("FD",), dit_unconditional),
    ("Share of pictures that show what a subtractive negative names", ("shown",), negatives),
    ("InstructPix2Pix, Lab-UNet for edits", ("edited", "kept", "PSNR", "identity"), two_scales),
]
