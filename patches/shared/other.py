"""A second model in the same run: what a weaker model says of the same noisy latent."""


class Model:
    """A ModelPatcher asked for the positive conditioning of a run."""

    def __init__(self, patcher, run):
        self.patcher, self.run = patcher, run
