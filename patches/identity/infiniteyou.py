"""InfiniteYou (Jiang et al. 2025, arXiv 2503.16418): InfuseNet, a ControlNet of Flux that sees a face and no text."""

import torch

from ..shared.face import face_of
from ..shared.owncontext import controlled
from ..shared.reference import check_node
from ..shared.steering import blame, number

BLACK = 64  # side of the picture that stands for no keypoints


class InfiniteYou:
    node = "SteerInfiniteYou"


def apply(positive, negative, adapter, control_net, face, vae, strength, guidance, start_percent, end_percent,
          image=None, mask=None):
    """(positive, negative) with a face: a `Face` of one person, or embeddings [n, 512], whose mean counts.

    image: the face's keypoints, drawn, [n, h, w, 3]; None for a black picture, which leaves its place free.
    guidance: InfuseNet's own distilled guidance.  The negative sees the tokens of no face.
    """
    with blame(InfiniteYou):
        check_node(adapter, InfiniteYou.node)
        number("strength", strength, high=10.0)
        number("guidance", guidance)
        who = face_of(face).identity.mean(0, keepdim=True)
        if who.shape[-1] != adapter.face:
            raise ValueError(
                f"{adapter.name} takes face embeddings of width {adapter.face}, and this one has {who.shape[-1]}."
            )
        if strength == 0.0 or start_percent >= end_percent:
            return positive, negative
        contexts = adapter.project(who), adapter.project(torch.zeros_like(who))
        image = torch.zeros(1, BLACK, BLACK, 3) if image is None else image
        return tuple(controlled(
            (positive, negative), control_net, image, strength, (start_percent, end_percent), contexts, vae, mask,
            guidance,
        ))
