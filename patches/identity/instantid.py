"""InstantID (Wang et al. 2024, arXiv 2401.07519): a face as a prompt, and a ControlNet for its place that sees the face
and no text."""

from dataclasses import dataclass, replace

import torch

from ..shared.conditioning import digest
from ..shared.face import face_of
from ..shared.owncontext import controlled
from ..shared.reference import Reference, check_node
from ..shared.steering import blame, number, steer
from .faceid import seen_of
from .ipadapter import weights_of


@dataclass(frozen=True)
class InstantID(Reference):
    node = "SteerInstantID"


def apply(model, positive, negative, adapter, control_net, face, image, strength, control_strength, weight_type, layers,
          schedule, mask=None):
    """(model, positive, negative) with a face: a `Face` of one person, or embeddings [n, 512], whose mean counts.

    image: the face's keypoints, drawn, [n, h, w, 3].  strength: of the tokens in the UNet's cross-attention;
    control_strength: of the ControlNet.  The negative sees the tokens of no face, in both.
    """
    with blame(InstantID):
        check_node(adapter, InstantID.node)
        number("control_strength", control_strength, high=10.0)
        weights = weights_of(model, adapter, weight_type, layers)
        (who,) = seen_of(adapter, face_of(face), None)
        who = who.mean(0, keepdim=True)
        tokens, blank = adapter.project(who), adapter.project(torch.zeros_like(who))
        if control_strength and not schedule.closed:
            window = schedule.start_percent, schedule.end_percent
            positive, negative = controlled(
                (positive, negative), control_net, image, control_strength, window, (tokens, blank), mask=mask
            )
    term = InstantID(schedule, adapter, strength, weights, mask=mask)
    if not term.off:
        term = replace(term, content=digest([tokens, blank, mask]), tokens=tokens, unconditional=blank)
    return steer(model, term), positive, negative
