"""Runs a prompt in this process, in the host that tests/host.py finds or installs."""

import os
from pathlib import Path

import host

from .run_error import RunError


class Local:
    def __init__(self, out):
        found = host.boot()
        host.load_pack()
        import folder_paths
        from utils.extra_config import load_extra_path_config

        extra = found.path / "extra_model_paths.yaml"
        if extra.is_file():
            load_extra_path_config(str(extra))
        self.out = Path(out).absolute()
        folder_paths.set_output_directory(str(self.out))

    def definition(self, kind):
        return host.definition(kind)

    def run(self, prompt, workflow, show):
        extra = {} if workflow is None else {"extra_pnginfo": {"workflow": workflow}}
        report_steps(prompt, show)
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            return host.run(prompt, extra).ui
        except host.PromptError as error:
            raise RunError(str(error), before_start=error.before_start) from None

    def fetch(self, item):
        """The path of a written file, None for a preview."""
        if item.get("type") != "output":
            return None
        return self.out / os.path.normpath(os.path.join(item.get("subfolder") or "", item["filename"]))


def report_steps(prompt, show):
    """Takes the place of the server as listener to the progress of nodes."""
    import comfy.model_management
    import comfy.utils
    from comfy_execution.utils import get_executing_context

    def hook(value, total, preview, prompt_id=None, node_id=None):
        comfy.model_management.throw_exception_if_processing_interrupted()
        context = get_executing_context()
        show(node_id or (context.node_id if context else None), value, total)

    comfy.utils.set_progress_bar_global_hook(hook)
    comfy.utils.set_progress_bar_enabled(False)  # the samplers' own bars on the terminal
