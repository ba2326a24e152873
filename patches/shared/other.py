"""A second model in the same run: what a weaker model says of the same noisy latent."""

from .rows import Unit


class Model:
    """A ModelPatcher asked for the positive conditioning of a run, under its own model_options.

    It may have a network of its own, which the host loads beside the main one (`set_additional_models`), or share the
    main one's network. Conditionings are prepared for it at the first prediction, when it is loaded.
    """

    def __init__(self, patcher, run):
        self.patcher, self.run = patcher, run
        self.shared = patcher.model is run.model.model
        self.start = self.positive = self.conds = self.options = None

    def begin(self, noise, latent_image, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **shapes):
        """Before the host loads models; the arguments are the guider's `outer_sample`'s."""
        import comfy.model_patcher
        from comfy.sampler_helpers import prepare_model_patcher
        from comfy.samplers import filter_registered_hooks_on_conds

        self.start = noise, latent_image, denoise_mask, seed, shapes
        self.positive = [cond.copy() for cond in self.run.guider.conds["positive"]]
        self.options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        self.options["transformer_options"]["sample_sigmas"] = self.run.sigmas
        # hooks of the conditioning (a LoRA for one prompt) change weights: on a shared network they are the main's
        prepare_model_patcher(self.patcher, {} if self.shared else {"positive": self.positive}, self.options)
        if self.shared and "registered_hooks" in self.run.guider.model_options:
            self.options["registered_hooks"] = self.run.guider.model_options["registered_hooks"]
        filter_registered_hooks_on_conds({"positive": self.positive}, self.options)
        self.patcher.pre_run()

    def predict(self, x, sigma):
        """D of `x` at `sigma`, for the run's positive conditioning."""
        import comfy.samplers

        if self.conds is None:
            self._prepare(x.device)
        self.run.stats.count([Unit("model", 0, None, 0)], x)
        return comfy.samplers.calc_cond_batch(self.patcher.model, [self.conds], x, sigma, self.options)[0]

    def _prepare(self, device):
        import comfy.samplers

        noise, latent, mask, seed, shapes = self.start
        network = self.patcher.model
        noise, latent = noise.to(device), latent.to(device)
        if latent.count_nonzero() > 0:  # as the guider: an empty latent is not shifted
            latent = network.process_latent_in(latent)
        comfy.samplers.cast_to_load_options(self.options, device=device, dtype=self.patcher.model_dtype())
        self.options["transformer_options"]["sample_sigmas"] = self.run.sigmas.to(device)
        conds = {"positive": self.positive}
        conds = comfy.samplers.process_conds(network, noise, conds, device, latent, mask, seed, **shapes)
        self.conds = conds["positive"]

    def end(self):
        """After the run, on success, error and interrupt."""
        import comfy.samplers

        if self.options is None:  # it never began
            return
        self.patcher.cleanup()
        comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        if not self.shared:
            self.patcher.restore_hook_patches()
        self.start = self.positive = self.conds = self.options = None
