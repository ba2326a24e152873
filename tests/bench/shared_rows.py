"""What sharing rows saves, in FLOPs, at the real size of the models; no weights are needed to count.

    python tests/bench/shared_rows.py

Per fork point, for positive, negative and one weak row (or positive and weak, at cfg 1):
    naive     two calls, as one extra forward per node costs: F per row
    bound     the rows without what the weak row has in common with the positive: 2F + (F - P)
    ours      one call whose rows share
Writes tests/bench/shared_rows.md.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402

RESULTS = Path(__file__).with_name("shared_rows.md")
SDXL = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
    context_dim=2048,
    num_classes="sequential",
    adm_in_channels=2816,
    num_head_channels=64,
    use_spatial_transformer=True,
    use_linear_in_transformer=True,
    legacy=False,
)


def unet(config, size, context, y=None):
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    heads = {} if "num_head_channels" in config else {"num_heads": 8}
    network = UNetModel(
        **config, **heads, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
    )
    meta = dict(device="meta", dtype=torch.bfloat16)

    def forward(rows, options):
        given = {} if y is None else {"y": torch.empty(rows, y, **meta)}
        x, t = torch.empty(rows, 4, size, size, **meta), torch.empty(rows, **meta)
        return network(x, t, torch.empty(rows, 77, context, **meta), transformer_options=options, **given)

    return network, forward, (4, size, size)


def flux():
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    config = dict(in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=3072)
    config |= dict(mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000)
    config |= dict(qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
    meta = dict(device="meta", dtype=torch.bfloat16)
    network = Flux(**config, operations=comfy.ops.disable_weight_init, **meta)

    def forward(rows, options):
        x, t, y = torch.empty(rows, 16, 128, 128, **meta), torch.empty(rows, **meta), torch.empty(rows, 768, **meta)
        return network(x, t, torch.empty(rows, 512, 4096, **meta), y, t, transformer_options=options)

    return network, forward, (16, 128, 128)


def sd3():
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    meta = dict(device="meta", dtype=torch.bfloat16)
    linear = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=24, pos_embed_scaling_factor=None, adm_in_channels=2048,
        context_embedder_config=linear, pos_embed_max_size=192, num_patches=36864, qk_norm="rms",
        operations=comfy.ops.disable_weight_init, **meta,
    )  # fmt: skip

    def forward(rows, options):
        x, t, y = torch.empty(rows, 16, 128, 128, **meta), torch.empty(rows, **meta), torch.empty(rows, 2048, **meta)
        return network(x, t, context=torch.empty(rows, 154, 4096, **meta), y=y, transformer_options=options)

    return network, forward, (16, 128, 128)


def models():
    import toy

    yield "SD1.5, 512 px", unet(toy.SD15, 64, 768), ("input.8", "middle", "output.5", "output.8", "output.11")
    yield "SDXL, 1024 px", unet(SDXL, 128, 2048, 2816), ("input.8", "middle", "output.0", "output.2", "output.5")
    yield "Flux-dev, 1024 px", flux(), ("double.9", "single.10", "single.30")
    yield "SD3.5 medium-like, 1024 px", sd3(), ("double.7", "double.12", "double.20")


def measure(network, forward, shape, layer, cfg):
    """(naive, bound, ours, weak row alone / F) in FLOPs."""
    import uuid

    import torch
    from comfy.ldm.modules.attention import attention_pytorch
    from steer.patches.guidance.pag import identity_attention
    from steer.patches.shared.architectures import ADAPTERS, depth, hold
    from steer.patches.shared.attention import perturb
    from steer.patches.shared.layers import Layer
    from steer.patches.shared.rows import Edited, Rows, Unit
    from steer.patches.shared.steering import Weak
    from torch.utils.flop_counter import FlopCounterMode

    adapter = next(a for a in ADAPTERS if a.matches(network))
    blocks = adapter.blocks(network)
    group, _, index = layer.partition(".")
    weak = Weak("PAG", identity_attention, (Layer(group, int(index or 0)),))
    first = depth(weak, blocks)

    def count(roles, joins, look=None):
        units = [Unit(role, 0, uuid.uuid4(), *((0, joins) if role is weak else (n, 0))) for n, role in enumerate(roles)]
        # the host's own choice asks for free memory, which meta tensors do not have
        options = {"optimized_attention_override": lambda function, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        edit = Edited(partial(perturb, identity_attention))
        edits = {(layer, "self"): {weak: [edit]} for layer in weak.layers} if weak in roles else {}
        rows = Rows(options, units, (len(units), *shape), edits, {})
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            handle = look and blocks[first].module.register_forward_pre_hook(lambda *_: look(counter.get_total_flops()))
            with hold(adapter, network, options, rows):
                forward(len(units), options)
            if handle:
                handle.remove()
        return counter.get_total_flops()

    seen = []
    F = count(["positive"], 0, seen.append)
    others = ["negative"] if cfg else []
    alone = count([weak], 0)
    naive = F * (1 + len(others)) + alone
    bound = F * (1 + len(others)) + F - seen[0]
    ours = count(["positive", weak, *others], first)
    return naive, bound, ours, (ours - F * (1 + len(others))) / F


def main():
    host.enter()
    host.load_pack()
    lines = [
        "# What sharing rows saves",
        "",
        "Made by `python tests/bench/shared_rows.py`: FLOPs of one step of PAG on one layer, counted at the real size "
        "of the models without weights. The naive way is one extra forward per node. The bound is 2F + (F - P), "
        "F + (F - P) at cfg 1, where F is a row and P its part before the perturbed block; ours can lie below, since "
        "the weak row's attention is not computed.",
        "",
        "| model | layer | ours / naive | ours / bound | ours / naive at cfg 1 | weak row costs |",
        "|---|---|---|---|---|---|",
    ]
    for name, (network, forward, shape), layers in models():
        for layer in layers:
            naive, bound, ours, cost = measure(network, forward, shape, layer, True)
            single = measure(network, forward, shape, layer, False)
            ratios = ours / naive, ours / bound, single[2] / single[0]
            lines.append(f"| {name} | {layer} | {' | '.join(f'{r:.3f}' for r in ratios)} | {cost:.2f} F |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
