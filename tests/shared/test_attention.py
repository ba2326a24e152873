import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from steer.patches.shared.attention import AttnCall, attend, perturb
from steer.patches.shared.layers import Layer


def call(rows=6):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 5, 8, generator=g) for _ in range(3))
    return AttnCall(q, k, v, 2, Layer("middle", 0))


def attention(call, chunks):
    seen.append((chunks.start, chunks.stop))
    return call.q + call.k


seen = []


def test_each_chunk_goes_through_its_own_edits():
    seen.clear()
    c = call()
    out = attend(c, [(), (partial(perturb, lambda c: c.v),), ()], attention)
    plain = c.q + c.k
    assert torch.equal(out, torch.cat([plain[:2], c.v[2:4], plain[4:]]))
    assert seen == [(0, 1), (2, 3)]  # the edited rows cost no attention


def test_a_changed_call_is_attended():
    seen.clear()
    c = call()
    same = (partial(perturb, lambda c: replace(c, q=c.q * 0)),)
    out = attend(c, [same, same], attention)
    assert torch.equal(out, c.k) and seen == [(0, 2)]


def test_edits_go_through_those_that_follow():
    """The first may ask several times for what the others make of a call."""
    seen.clear()
    c = call()

    def twice(target, attend):
        return attend(target) + attend(replace(target, k=target.v))

    def shifted(target, attend):
        return attend(replace(target, q=target.q + 1))

    out = attend(c, [(twice, shifted)], attention)
    assert torch.equal(out, (c.q + 1 + c.k) + (c.q + 1 + c.v)) and seen == [(0, 1)] * 2


def test_mask_is_cut_with_the_rows():
    c = call()
    masked = AttnCall(c.q, c.k, c.v, 2, c.layer, mask=torch.arange(6.0).view(6, 1, 1, 1))
    assert masked.rows(2, 4).mask.flatten().tolist() == [2.0, 3.0]
    shared = AttnCall(c.q, c.k, c.v, 2, c.layer, mask=torch.zeros(1, 1, 5, 5))
    assert shared.rows(2, 4).mask.shape[0] == 1


@pytest.mark.parametrize("latent, grid", [((16, 16), (1, 8, 8)), ((13, 19), (1, 7, 10)), ((4, 8, 12), (4, 4, 6))])
def test_grid_of_the_tokens(latent, grid):
    """Four frames of a quarter of the tokens are as many as one frame of all: it is the frames that are there."""
    q = torch.zeros(2, 5 + math.prod(grid), 8)
    call = AttnCall(q, q, q, 1, Layer("double", 0), "joint", text=(0, 5), image=(5, None), shape=(2, 4, *latent))
    assert call.grid() == grid
