"""The model card: figures of scores.json and training.csv in words."""

from .portrait import FACTORS


def last_rows(path):
    """The last logged value of every (stage, name), with its step, samples and seconds."""
    with path.open() as f:
        rows = [line.strip().split(",") for line in f][1:]
    return {(stage, name): (int(a), int(b), int(c), value) for stage, a, b, c, name, value in rows}


def card(scores, log, **fixed):
    """The model card in Markdown; `fixed` says how it was measured."""
    mean = {which: sum(scores[which].values()) / len(FACTORS) for which in ("unet", "unet-weak", "dit", "dit-weak")}

    def shares(which, name):
        return " / ".join(f"{share:.2f}" for share in scores[which][name])

    seen = {name: scores["reader"][name] for name in ("renders", "reconstructions")}
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {1 / len(values):.2f} | {seen['renders']['accuracy'][name]:.3f} "
        f"| {seen['reconstructions']['accuracy'][name]:.3f} | {scores['unet'][name]:.3f} "
        f"| {scores['unet-weak'][name]:.3f} | {scores['dit'][name]:.3f} | {scores['dit-weak'][name]:.3f} "
        f"| {scores['unet-edit']['factors'][name]:.3f} | {scores['clip'][name]:.3f} "
        f"| {shares('leak', name)} | {shares('dit-leak', name)} | {shares('dit-heeds', name)} |"
        for name, values in FACTORS.items()
    )
    stages = "\n".join(
        f"| {stage} | {step} | {samples} | {seconds / 60:.1f} | {name} {value} |"
        for (stage, name), (step, samples, seconds, value) in log.items()
        if name in ("loss", "psnr", "eps_error", "accuracy")
    )
    amounts = "\n".join(
        f"| {title} | {amount} | " + " | ".join(f"{row[key]:.3f}" if key in row else "" for key in TOLD) + " |"
        for which, title in ADAPTERS.items() if which in scores for amount, row in scores[which].items()
    )
    two = "\n".join(
        f"| {setting} | " + " | ".join(f"{row[key]:.3f}" for key in TWO) + " |"
        for setting, row in scores.get("fastcomposer", {}).items()
    )
    two = f"\n{PERSONS}{two}\n" if two else ""
    quarters = [f"quarter {n + 1}" for n in range(4)]
    times = {which: ", ".join(f"{found[q]:.0f}" for q in quarters) for which, found in scores["time"].items()}
    r2 = {name: ", ".join(f"{v:.2f}" for v in x["geometry_r2"]) for name, x in seen.items()}
    auc = {name: x["identity_auc"] for name, x in seen.items()}
    made = dict(rows=rows, amounts=amounts, two=two, stages=stages, auc=auc, r2=r2, mean=mean, times=times)
    return CARD.format(**made, **fixed, **scores)


TOLD = "obeyed", "taken", "identity", "strangers"
ADAPTERS = {"adapter": "plus", "faceid": "FaceID", "instantid": "InstantID", "adapter-dit": "InstantX, DiT",
            "pulid": "PuLID, DiT"}
TWO = "obeyed", "taken", "mixed", "nearer", "identity", "other's"
PERSONS = """FastComposer: as many scenes of two held-out persons, two factors of each said, the halves read one by one;
taken: the others as in a person's own reference, mixed: as in the other's, where they differ; nearer: persons whose
face is more alike to their own; merge: share of the steps without pictures; off: Lab-UNet as it is.

| setting | obeyed | taken | mixed | nearer | identity | other's |
|---|---|---|---|---|---|---|
"""
CARD = """# The lab models

Tiny models that ship with Steer, trained from nothing on portraits drawn by `models/lab/portrait.py`. They make every
method runnable in seconds and its effect measurable. They prove an implementation, not the picture quality that the
same method reaches on a large model. {megabytes} MB together, fp16, Apache-2.0, no third-party data.

This file, `scores.json` and `sheet.jpg` are written by `python models/lab/train.py eval`; so are `sheet_dit.jpg` and
`sheet_edit.jpg`.

UNet:

![samples of the UNet](sheet.jpg)

DiT:

![samples of the DiT](sheet_dit.jpg)

UNet for edits, sources above, below what it makes of them when told one factor:

![edits of the UNet](sheet_edit.jpg)

## Parts

| file | network | serves as |
|---|---|---|
| vae.safetensors | TAESD, 8x, 4 channels | VAE |
| text.safetensors | CLIP text transformer, 2 layers, 128 wide; one token row for all words unknown to captions | CLIP |
| unet.safetensors | UNetModel, 64 channels, 16x16 and 8x8, attention everywhere, eps-prediction | MODEL |
| unet_weak.safetensors | the same network early in its training | MODEL |
| unet_edit.safetensors | what of it differs once it takes an image as four more channels: encoder and middle | MODEL |
| dit.safetensors | Flux, 192 wide, 3 double and 5 single blocks, 64 image and 48 text tokens, rectified flow | MODEL |
| dit_weak.safetensors | the same network, trained for minutes | MODEL |
| vision.safetensors | CLIP vision transformer, 4 layers, 192 wide, 16 patches, embedding 128 wide | CLIP_VISION |
| clip.safetensors | projection of the pooled text into the space of what the vision transformer sees | CLIP |
| adapter.safetensors | IP-Adapter, plus layout: 16 tokens, keys and values of 7 cross-attentions | Load Adapter |
| adapter_faceid.safetensors | IP-Adapter, FaceID layout with LoRA: 4 tokens from 512-d identity | Load Adapter |
| adapter_instantid.safetensors | InstantID's layout: 4 tokens from 512-d identity, 7 layers | Load Adapter |
| controlnet.safetensors | ControlNet of the UNet: keypoints as its picture, the 4 tokens as its text | CONTROL_NET |
| adapter_dit.safetensors | IP-Adapter, InstantX' layout, for the DiT: 16 tokens, 8 blocks | Load Adapter |
| adapter_fastcomposer.safetensors | FastComposer's layout: image encoder, fuse, UNet transformers | Load Adapter |
| adapter_pulid.safetensors | PuLID's layout, for the DiT: 8 tokens, 4 cross-attentions | Load Adapter |
| time.safetensors | four convolutions: the UNet's noise level, in 128 classes | Load Time Predictor |
| time_dit.safetensors | the same for the DiT's | Load Time Predictor |
| reader.safetensors | convolutions; factors, face geometry, 512-d identity | Lab Read |

## Recipe

`python models/lab/train.py all`, resumable, on one core of a CPU with AMX. Muon for matrices and
convolutions, Adam for the rest, weight averages shipped. VAE: 64x64 crops, L1 + 10 L2 + 0.25 edges, latent noise.
Text: first taught to name the factors of a caption, then trained with the UNet for the first eighth, then frozen.
UNet: latents whitened to a standard deviation of 0.4 so that the layout does not show through the starting noise,
noise levels stratified, the eps error divided by its running mean per noise level, 10 % empty prompts, captions with
random omissions, order and unknown words; the transformers at 16x16 join late, so that the level at 8x8 and the middle
are used. UNet for edits, as InstructPix2Pix: the UNet with four input channels more, at zero first; encoder and middle
are trained, decoder and text encoder stay; pairs of portraits that differ in one factor, a caption that names this
one and often others; 5 % without image, 5 % without text, 5 % without both. DiT: latents whitened to a standard
deviation of 1, times halfway between uniform and logit-normal, the UNet's text encoder as it is, the same captions;
the pooled vector is zero for 30 % of the pictures, so that the context is read, and the context empty for 25 %, so
that the pooled vector is heard where the context is silent (the shipped weights: 50 % and 0 % for the first 1000
steps, 40 % and 15 % for the next 1000).
Image encoder: the patch embedding begins as principal components; the embedding tells factors (cross-entropy) and
geometry (squares) through linear heads that are dropped; sharp and degraded renders. After 3 minutes it went on for
13.5, with heads made anew, where geometry counts for four times as much, three of four renders are sharp, and all
states are held near what they were; the table has this run. CLIP: the projection alone, from captions that name a
part of a portrait, by cross-entropy among 256; not anew for the later encoder. Adapters: Lab-UNet stays frozen, keys
and values begin as its own for the text, the eps error as of the UNet. The plus adapter is first taught to say of a
portrait what the text encoder makes of its caption; then the reference is the picture itself beside an empty prompt
(20 %) or a caption (10 %), or differs in all that the prompt names (58 %), or there is none (12 %). The FaceID
adapter's reference shares nothing with the picture but the face, the prompt tells all or much of the rest; 10 %
without face; it has a LoRA of rank 8 for every attention. InstantID: as FaceID, its tokens and a ControlNet that
begins as the UNet's encoder and adds nothing at first, together. Stage geometry: a judge that reads face geometry and
factors off latents. From then on adapters are also trained so that it finds the reference's face in their clean
estimates, which counts four times, under a cfg from 1 to 5, which exaggerates faces, until time 950 (until 850 for
the first 66 minutes of FaceID and 74 of InstantID; guidance for FaceID after 41 minutes, for InstantID after 31; plus
had 7 without a judge). Half of a batch are drawings of the network itself, under way at all times down to 100; all
that is not the portrait in them is noise. Only the last runs of plus, FaceID and InstantID had these; the run of plus
before, of 28 minutes, had half of the portraits mixed with the same of somebody else in their place. For the DiT,
which stays frozen too: an adapter of InstantX' layout, taught as the plus adapter, and one of PuLID's, as FaceID; for
these the judge counts once, and sees no guidance and no drawings. Of four of them the table tells the last run alone,
which went on from what had shipped: plus had 7, 45, 18, 40, 28 and 45 minutes, FaceID 66 and 20, InstantID 31, 64, 20
and 20, InstantX' layout 20, 16, 17 and 25; the last of InstantX' and the last three of plus with the later encoder.
Half the learning rate, and the shares above, are those of the last run of FaceID, the last two of InstantID, the last
four of plus and the last three of InstantX' layout; in the runs before, the prompt was empty for 50 %, and named
other than the reference for 28 %. All that have a judge were trained in fp32, from 4200 portraits in batches of 16,
with judges like the table's.
FastComposer: scenes of two of them side by side, in batches of 8, up to three factors said of each, the word of each
fused with a picture of that person who looks otherwise in what is said; the fusing network and the UNet's transformers
are trained, with the judge on each half, and so that each word is looked at from its own half.
Reader: pairs of pictures of one face; renders, degraded renders, and reconstructions from noisy latents. Time
predictors: noisy latents as the network sees them, times uniform, cross-entropy.

| stage | steps | samples | minutes | last logged |
|---|---|---|---|---|
{stages}

## Figures

VAE on 256 held-out renders: PSNR {vae[psnr]} dB on average, {vae[psnr_min]} dB at worst.
A {steps}-step picture of the UNet took {seconds} s with one CPU thread, of the DiT {dit-seconds} s, text encoding
and decoding included.

Prompt hits: share of {prompts} full held-out prompts x {seeds} noises whose factor the reader finds in the sample
({steps} steps of euler; UNet normal, CFG {cfg}; DiT {flow[scheduler]}, CFG {flow[cfg]}). Mean {mean[unet]:.3f}; the
weaker sibling {mean[unet-weak]:.3f} (one noise); the DiT {mean[dit]:.3f}, its weaker sibling {mean[dit-weak]:.3f}
(one noise).
Edits: {edit[count]} held-out portraits, one noise, told one factor to change (CFG {edit[cfg]}, no image guidance);
the share whose factor shows. Mean {unet-edit[edited]:.3f}; all other factors kept {unet-edit[kept]:.3f},
PSNR to the drawn truth {unet-edit[PSNR]:.1f} dB, cosine of the face with the truth's {unet-edit[identity]:.3f}.
Image encoder: a linear map fitted on 600 held-out portraits reads {vision[embedding][0]:.3f} of the factors and the
geometry with R2 {vision[embedding][1]:.3f} off the embedding of 200 others, {vision[hidden states][0]:.3f} and
{vision[hidden states][1]:.3f} off the hidden states.
Adapters: {references} held-out references, one noise; obeyed: factors as the prompt names them (pictures: four that
differ from the reference; faces: all), taken: the others as in the reference, identity: cosine of the face with the
reference's, strangers: with other references'.

| adapter | strength | obeyed | taken | identity | strangers |
|---|---|---|---|---|---|
{amounts}
{two}
Time predictors on 256 unseen portraits: mean distance of the likeliest level from the true one, in thousandths of the
model's time, by quarters of it from clean to noise: {times[unet]} (UNet), {times[dit]} (DiT); cross-entropy
{time[unet][loss]} and {time[dit][loss]} of at most 4.85 nats.
Leak: an unrelated picture hides under the full starting noise; where it and the prompt differ, the share of samples
that show the factor as prompted / as hidden. Heeds: the DiT is given the context of one prompt and the pooled vector
of another; where they differ, the share that shows the context's / the pooled vector's; and the share that shows the
pooled vector's factor when the context is that of the empty prompt.
Renders, VAE: accuracy of the reader on renders and through the VAE. CLIP: share of 500 unseen portraits whose value is
that of the nearest of the texts that name one value each.

| factor | chance | renders | VAE | UNet | weaker | DiT | weaker | edits | CLIP | UNet leak | DiT leak | DiT heeds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Identity verification on unseen faces (same face geometry, everything else drawn anew): AUC {auc[renders]} on renders,
{auc[reconstructions]} through the VAE. R2 of the geometry (face aspect, eye spacing, eye size, nose length, mouth
width, brow angle): {r2[renders]} on renders; {r2[reconstructions]} through the VAE.
"""
