"""FluxSpace (Dalva et al. 2024, arXiv 2412.09611): an attribute as a direction in what joint attention puts out."""

from dataclasses import dataclass, field

import torch

from ..shared.architectures import adapter_of, flux, hunyuan, qwen, sd3, self_attention_layers
from ..shared.attention import Attention, plain
from ..shared.mirror import about
from ..shared.steering import Term, Text, Weak, blame, number, steer
from ..shared.textattention import asking, attention_to
from ..shared.words import encode

AUTO = {flux.name: "double", hunyuan.name: "double", sd3.name: "0%-100%", qwen.name: "0%-100%"}  # the joint blocks
STEEPNESS = 10.0


def away_from(a, b):
    """What of a is orthogonal to b in each token, [..., C]: a - <a, b> / <b, b> b."""
    a, b = a.float(), b.float()
    return a - (a * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True).clamp(min=1e-12) * b


def region(m, tau):
    """Where the attention m [b, N] to the edit's words is high in its picture: [b, N, 1], 0 or 1."""
    low, high = m.amin(1, keepdim=True), m.amax(1, keepdim=True)
    m = (m - low) / (high - low).clamp(min=1e-12)
    return ((STEEPNESS * (m - 0.5)).sigmoid() >= tau)[..., None]


def coarse(c, c_e, share):
    """(1 - share) c + share (c_e, orthogonal to c): equations 9 and 10, pooled texts [b, D]."""
    return (1 - share) * c + share * away_from(c_e, c).to(c)


@dataclass(frozen=True)
class FluxSpace(Term):
    """l' = l + fine M (l_e - <l_e, l_0> / <l_0, l_0> l_0) for each image token, in the blocks `layers`.

    l: attention's output under the prompt.  l_e, l_0: under the edit and under an empty text, of the same image tokens;
    both texts run beside the prompt in the same forward, with the picture's tokens put in place of their own before
    each block.  M: `region` of the words.  The pooled text, where the network takes one, becomes `coarse` of the
    prompt's and the edit's, for all three.
    """

    edit: Text = None
    null: Text = None
    fine: float = 5.0
    share: float = 0.5
    tau: float = 0.5
    layers: str = "auto"
    words: tuple = ()  # columns of the edit's text
    columns: torch.Tensor = field(default=None, compare=False, repr=False)  # [1, columns], 1 at the words
    node = "SteerFluxSpace"
    edits = True

    def check(self):
        number("fine", self.fine)
        number("coarse", self.share, 0.0, 1.0)
        number("tau", self.tau, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.fine == self.share == 0.0

    def prepare(self, run):
        prompts = run.guider.conds["positive"]
        if len(prompts) != 1:
            raise ValueError(f"acts on one prompt, and the positive has {len(prompts)}; take off areas and timesteps.")
        mine, its = prompts[0]["cross_attn"].shape[1], self.columns.shape[1]
        if mine != its:
            raise ValueError(
                f"the prompt has {mine} columns of text and the edit {its}, so that they cannot run in one forward; "
                "shorten the longer one, or encode both alike."
            )

    def branches(self, model):
        return (self.edit, self.null) if self.fine else (self.edit,)

    def attention(self, model):
        if not self.fine:
            return ()
        layers = self_attention_layers(model, self.layers, AUTO)
        blocks = adapter_of(model.model).blocks(model.get_model_object("diffusion_model"))
        mixed = [str(block.layer) for block in blocks if block.layer in layers and not block.image]
        if mixed:
            raise ValueError(
                f"cannot act in {', '.join(mixed)}, where text and image are one stream, so that the picture cannot be "
                "shown to another text; name joint blocks (double)."
            )
        return (Attention("self", layers, self.move, beside=(self.edit, self.null), negative=False),)

    def move(self, target, beside, attend, call, weight, role):
        out, image = attend(target), slice(*target.image)
        l_e, l_0 = (plain(asking(each, slice(*each.image))) for each in beside)
        with blame(self):
            M = region(attention_to(beside[0], self.columns), self.tau)
        out = out.clone()
        out[:, image] += (self.fine * weight * M * away_from(l_e, l_0)).to(out)
        return out

    def pooled(self, y, rows, call, weight):
        at = dict(reversed(rows))  # the first of each role
        if not {"positive", self.edit} <= at.keys():
            return y
        c, y = y[at["positive"]], y.clone()
        c = coarse(c, y[at[self.edit]], self.share * weight) if self.share else c
        for role, its in rows:
            if role in ("positive", self.edit, self.null) or isinstance(role, Weak):
                y[its] = c
        return y


def takes_pooled(network):
    """True where a network takes a pooled text."""
    return any(getattr(network, name, None) is not None for name in ("vector_in", "y_embedder"))


def texts(clip, edit, words):
    """(CONDITIONING of the edit, of an empty text, [1, columns] with 1 at the words of the edit, all where empty)."""
    with blame(FluxSpace):
        if not edit.strip():
            raise ValueError('edit is empty; name what shall be there, as in "eyeglasses".')
        (conditioning, prompt), (empty, _) = encode(clip, edit), encode(clip, "")
        columns = torch.zeros(1, prompt.columns)
        columns[0, list(prompt.find(words if words.strip() else ", ".join(prompt.words)))] = 1.0
    return conditioning, empty, columns


def apply(model, edit, null, columns, fine, share, tau, layers, schedule):
    with blame(FluxSpace):
        adapter, network = adapter_of(model.model), model.get_model_object("diffusion_model")
        if adapter.name not in AUTO:
            raise ValueError(
                f"needs blocks that carry text and image in streams of their own, which {adapter.name} does not have; "
                f"it acts on {', '.join(AUTO)}."
            )
        if share and not takes_pooled(network):
            what = type(network).__name__
            raise ValueError(f"coarse {share} needs a pooled text, which {what} does not take; set it to 0.")
    words = tuple(columns[0].nonzero().flatten().tolist())
    branches = about("edit", edit), about("null", null)
    return steer(model, FluxSpace(schedule, *branches, fine, share, tau, layers, words, columns))
