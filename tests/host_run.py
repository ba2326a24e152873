"""Runs prompts in this process through the host's own validation and executor. Needs `host.load_pack()` before."""

import asyncio
import json
import logging
import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a run left behind: `outputs[node id]` is the tuple of a node's outputs, `ui[node id]` what it shows."""

    outputs: dict
    ui: dict

    def __getitem__(self, node_id):
        return self.outputs[str(node_id)]


class PromptError(RuntimeError):
    """The host refused a prompt or failed while running it. `faults` is a list of (node id, input or None, text);
    `before_start` tells that nothing has run."""

    def __init__(self, faults, before_start=False):
        self.faults, self.before_start = faults, before_start
        super().__init__("\n".join(text for _, _, text in faults))


def executor():
    """A PromptExecutor as the server makes it. One per run unless the cache between runs is wanted."""
    import execution
    import server

    return execution.PromptExecutor(server.PromptServer.instance, cache_type=execution.CacheType.CLASSIC,
                                    cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})


def execute(prompt, extra_data=None, runner=None):
    """`run` for tests: the host runs nothing that leads to no output node, so a prompt without one gets a preview of
    every leaf."""
    return run(with_output(prompt), extra_data, runner)


def run(prompt, extra_data=None, runner=None):
    """Runs an API prompt through the host's validation and executor. Raises PromptError, else returns a Result."""
    prompt_id = str(uuid.uuid4())
    valid, error, targets, node_errors = validate(prompt, prompt_id)
    if node_errors or not valid:
        raise PromptError(faults_of(prompt, node_errors, error), before_start=True)
    runner = runner or executor()
    runner.execute(prompt, prompt_id, extra_data or {}, targets)
    if not runner.success:
        raise PromptError(faults_of_run(prompt, runner.status_messages))
    return Result(asyncio.run(cached_outputs(runner, prompt)), runner.history_result["outputs"])


def validate(prompt, prompt_id):
    import execution

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the host logs what it also returns, and that is told by PromptError
    try:
        return asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
    finally:
        logger.setLevel(level)


def definition(kind):
    """What the server tells about a node type under /object_info, or None. Asked without a socket."""
    import server
    from aiohttp.test_utils import make_mocked_request

    path = "/object_info/{node_class}"
    handler = next(route.handler for route in server.PromptServer.instance.routes if route.path == path)
    request = make_mocked_request("GET", "/", match_info={"node_class": kind})
    return json.loads(asyncio.run(handler(request)).text).get(kind)


def with_output(prompt):
    import nodes

    kinds = [nodes.NODE_CLASS_MAPPINGS.get(node.get("class_type")) for node in prompt.values()]
    if any(kind is None or getattr(kind, "OUTPUT_NODE", False) for kind in kinds):
        return prompt
    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    leaves = [key for key in prompt if key not in used]
    previews = {f"preview-{key}": {"class_type": "PreviewAny", "inputs": {"source": [key, 0]}} for key in leaves}
    return {**prompt, **previews}


async def cached_outputs(runner, prompt):
    """The executor keeps every node's outputs, per output a list of values: one value unless the output is a list."""
    outputs = {}
    for node_id in prompt:
        entry = await runner.caches.outputs.get(node_id)
        if entry is not None:
            outputs[node_id] = tuple(slot[0] if len(slot) == 1 else slot for slot in entry.outputs)
    return outputs


def node_label(prompt, node_id):
    node = prompt.get(node_id, {})
    title = node.get("_meta", {}).get("title")
    kind = node.get("class_type", "unknown type")
    return f'node {node_id} "{title}" ({kind})' if title and title != kind else f"node {node_id} ({kind})"


def faults_of(prompt, node_errors, error=None):
    """The host's validation report as (node id, input, sentence) triples."""
    faults = []
    for node_id, report in node_errors.items():
        for e in report["errors"]:
            name = e.get("extra_info", {}).get("input_name")
            where = node_label(prompt, node_id) + (f", input {name!r}" if name else "")
            details = f": {e['details']}" if e.get("details") else ""
            faults.append((node_id, name, f"{where}: {e['message']}{details}"))
    if not faults:
        info = error.get("extra_info", {})
        where = f"{node_label(prompt, info['node_id'])}: " if info.get("node_id") in prompt else ""
        faults.append((info.get("node_id"), None, f"{where}{error['message']} {error['details']}".strip()))
    return faults


def faults_of_run(prompt, messages):
    faults = []
    for event, data in messages:
        if event == "execution_error":
            node_id = data["node_id"]
            text = f"{node_label(prompt, node_id)}: {data['exception_type']}: {data['exception_message'].strip()}"
            faults.append((node_id, None, text))
        elif event == "execution_interrupted":
            faults.append((data["node_id"], None, f"{node_label(prompt, data['node_id'])}: interrupted"))
    return faults
