"""AutoGuidance (Karras et al. 2024, arXiv 2406.02507): guided by a bad version of the model itself."""

import copy
from dataclasses import dataclass

import torch

from ..shared.run import KEY
from ..shared.steering import STACK, Away, Other, blame, steer


@dataclass(frozen=True)
class AutoGuidance(Away):
    """D + s (D - D_weak), both of the positive conditioning; the paper's D_weak + w (D - D_weak) with w = 1 + s."""

    s: float = 1.1
    weak: Other = None
    node = "SteerAutoGuidance"

    def prepare(self, run):
        weak = self.weak.model
        if weak.model is run.model.model and not same_weights(weak, run.model):
            raise ValueError(
                "weak_model shares its network with the model, whose weights or sampling were changed afterwards "
                "(a LoRA, ModelSampling...); put those nodes before SteerAutoGuidance, on the way to both."
            )

    def branches(self, model):
        return (self.weak,)


def refuse(model, weak):
    """Raises ValueError where `weak` cannot guide `model` (ModelPatchers)."""
    from comfy.model_sampling import CONST

    strong_net, weak_net = model.model, weak.model
    if weak.model_options.get(STACK):
        nodes = ", ".join(sorted({term.node for term in weak.model_options[STACK]}))
        raise ValueError(f"weak_model carries steering of its own ({nodes}); connect it before those nodes.")
    for what, of in (
        ("latent format", lambda m: type(m.latent_format).__name__),
        ("architecture", lambda m: f"{type(m).__name__} ({type(m.diffusion_model).__name__})"),
    ):
        if of(strong_net) != of(weak_net):
            raise ValueError(
                f"weak_model has another {what}: {of(weak_net)}, the model has {of(strong_net)}; take a weaker "
                "version of the same model."
            )
    flows = [isinstance(m.get_model_object("model_sampling"), CONST) for m in (model, weak)]
    if flows[0] != flows[1]:
        raise ValueError("one of model and weak_model predicts a flow, the other noise; take two of the same kind.")
    if strong_net is weak_net and same_weights(model, weak) and _same(_options(model), _options(weak)):
        raise ValueError(
            "AutoGuidance with the same object: weak_model is the model without any difference; take an earlier "
            "checkpoint, or weaken it (LoRA, perturbed or skipped layers)."
        )


def same_weights(a, b):
    """Whether two clones of one ModelPatcher leave the same weights and objects in the network that they share."""
    return a.patches_uuid == b.patches_uuid and _same(a.object_patches, b.object_patches)


def _options(model):
    """What changes a forward of a ModelPatcher beside its weights, without Steer's own part."""
    wrappers = {kind: {k: v for k, v in keyed.items() if k != KEY} for kind, keyed in model.wrappers.items()}
    options = {k: v for k, v in model.model_options.items() if k != STACK}
    return [options, {kind: keyed for kind, keyed in wrappers.items() if keyed}, model.injections]


def _same(a, b):
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b


def own_network(weak):
    """`weak` on a network of its own: the host cannot hold one network with two sets of weights."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    made = getattr(weak, "cached_patcher_init", None)  # how the host's loaders make another one like it
    if made is not None:
        fresh = made[0](*made[1], disable_dynamic=True)
        fresh = fresh[made[2]] if len(made) > 2 else fresh
    else:
        comfy.model_management.unload_all_models()  # takes patches off the weights
        config = weak.model.model_config  # answers to every name and cannot be copied
        network = copy.deepcopy(weak.model, {id(config): config})
        fresh = ModelPatcher(network, weak.load_device, weak.offload_device)
    own = weak.clone(model_override=fresh.get_clone_model_override())
    own.parent = None  # whom the host would unload in its place; that one has the other network
    return own


def apply(model, weak, s, schedule):
    with blame(AutoGuidance):
        refuse(model, weak)
    branch = Other("weak", f"{id(weak):x}", weak)
    term = AutoGuidance(schedule, s, branch)
    with blame(term):
        term.check()
    if term.off:
        return steer(model, term)
    if weak.model is model.model and not same_weights(model, weak):
        term = AutoGuidance(schedule, s, Other("weak", branch.digest, own_network(weak)))
    model = model.clone()
    if term.weak.model.model is not model.model:
        model.set_additional_models(f"{KEY}.{branch}-{branch.digest}", [term.weak.model])
    return steer(model, term)
