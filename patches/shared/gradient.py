"""Gradients through the network while the host runs a node.

The host runs nodes in inference mode: tensors made there, weights too, can never be saved for a backward pass. So in
`gradients` inference mode is off, and what was made in it is cloned before it is used:

    with gradients(guider.model_patcher):
        conds, x = own(guider.conds["positive"]), own(x).requires_grad_()
        D = predict(guider.inner_model, conds, x, sigma, model_options)
        slope, = torch.autograd.grad(loss(D), x)

Weights are cloned one at a time and stay so: the same numbers, in tensors that a backward pass may keep. Activations
of one forward are held until its backward; a gradient costs about twice a forward in time.
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

OPEN = ContextVar("steer.gradients", default=False)  # what makes in-place work differentiable cannot be nested


def differentiable(model):
    """`model`, a ModelPatcher, in a form that holds its weights as whole tensors; ValueError, with the reason, where no
    gradient can be had."""
    if getattr(model, "is_dynamic", lambda: False)():
        if model.cached_patcher_init is None:
            raise ValueError(
                "needs gradients, and the weights of this model are streamed by a loader that gives no other way to "
                "load it; use ComfyUI's own loader, or start ComfyUI with --disable-dynamic-vram."
            )
        model = model.clone(disable_dynamic=True)  # streamed weights are gone by the time of the backward pass
    for name, p in getattr(model.model, "diffusion_model", model.model).named_parameters():
        if type(p) not in (torch.nn.Parameter, torch.Tensor) or not p.is_floating_point():
            raise ValueError(
                f"needs gradients, and the weights of this model are quantised ({name} is {type(p).__name__}, "
                f"{str(p.dtype).removeprefix('torch.')}), which has none; load it in fp16, bf16 or fp8."
            )
    return model


@contextmanager
def gradients(*models):
    """Makes gradients possible through ModelPatchers that are loaded, for the time of the block; may be nested."""
    import comfy.model_management as mm

    mutable = nullcontext() if OPEN.get() else torch.autograd.graph.allow_mutation_on_saved_tensors()
    was, token = mm.in_training, OPEN.set(True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), mutable:
            for model in models:
                _own_weights(model.model)
            mm.in_training = True  # some networks then leave out kernels that have no backward
            yield
    finally:
        mm.in_training = was
        OPEN.reset(token)


@contextmanager
def traced(call):
    """Makes D of one evaluation, a `run.Call`, differentiable in `call.x`, through all that it is combined of."""
    guider, conds = call.run.guider, call.conds
    controls = {cond["control"] for each in conds.values() for cond in each if "control" in cond}
    with gradients(call.run.model, *(model for control in controls for model in control.get_models())):
        guider.conds = call.conds = own(conds)
        call.x, call.sigma = own(call.x).requires_grad_(), own(call.sigma)
        try:
            yield
        finally:
            guider.conds = conds


def own(value):
    """A copy, made outside of inference mode, of a tensor, or of conds as a guider holds them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: own(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(own, value))
    if isinstance(getattr(value, "cond", None), (torch.Tensor, list)):  # the host's COND objects
        return type(value)(own(value.cond))
    return value


def predict(model, conds, x, sigma, model_options):
    """D(x, sigma) [B, C, ...] under conds, with its graph. model: the guider's inner model.  sigma: a number."""
    import comfy.samplers

    level = torch.full((x.shape[0],), float(sigma), device=x.device)
    return comfy.samplers.calc_cond_batch(model, [conds], x, level, model_options)[0]


def _own_weights(module):
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None and p.is_inference():
                each._parameters[name] = torch.nn.Parameter(p.clone(), requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_inference():
                each._buffers[name] = buffer.clone()
