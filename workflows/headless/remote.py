"""Runs a prompt on a ComfyUI server that is up already, and fetches what it wrote."""

import asyncio
import json
import urllib.parse
import uuid
from functools import cached_property
from pathlib import Path

import aiohttp
from host_run import faults_of, node_label

from .run_error import RunError, Unreachable

TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10)


class Remote:
    def __init__(self, url, out):
        self.url = (url if "://" in url else "http://" + url).rstrip("/")
        self.out = Path(out).absolute()

    @cached_property
    def definitions(self):
        return self.request("/object_info")

    def definition(self, kind):
        return self.definitions.get(kind)

    def request(self, path, body=None):
        return asyncio.run(self._request(path, body))

    async def _request(self, path, body=None, raw=False):
        try:
            async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
                async with session.request("GET" if body is None else "POST", self.url + path, json=body) as answer:
                    if answer.status == 400:
                        raise RunError(refusal(body["prompt"], await answer.json()), before_start=True)
                    answer.raise_for_status()
                    return await (answer.read() if raw else answer.json())
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{self.url}: {error}") from None

    def run(self, prompt, workflow, show):
        return asyncio.run(self._run(prompt, workflow, show))

    async def _run(self, prompt, workflow, show):
        client = uuid.uuid4().hex
        extra = {} if workflow is None else {"extra_pnginfo": {"workflow": workflow}}
        body = {"prompt": prompt, "client_id": client, "extra_data": extra}
        try:
            async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
                async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket:
                    answer = await self._request("/prompt", body)
                    prompt_id = answer["prompt_id"]
                    if answer.get("node_errors"):  # the server would run what does not depend on the faulty nodes
                        await self._stop(prompt_id)
                        raise RunError(refusal(prompt, answer), before_start=True)
                    try:
                        await self._follow(socket, prompt, prompt_id, show)
                    except asyncio.CancelledError:  # Ctrl-C here stops the run there
                        await self._stop(prompt_id)
                        raise
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{self.url}: {error}") from None
        history = await self._request(f"/history/{prompt_id}")
        return history[prompt_id]["outputs"]

    async def _stop(self, prompt_id):
        """Waiting or running, it ends."""
        await self._request("/queue", {"delete": [prompt_id]}, raw=True)
        await self._request("/interrupt", {"prompt_id": prompt_id}, raw=True)

    async def _follow(self, socket, prompt, prompt_id, show):
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # previews are binary
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress":
                show(data["node"], data["value"], data["max"])
            elif event["type"] == "executing" and data["node"] is None:
                return  # sent after the history is written; execution_success comes before
            elif event["type"] == "execution_error":
                raise RunError(f"{node_label(prompt, data['node_id'])}: {data['exception_type']}: "
                               f"{data['exception_message'].strip()}")
            elif event["type"] == "execution_interrupted":
                raise RunError(f"{node_label(prompt, data['node_id'])}: interrupted on the server")
        raise Unreachable(f"{self.url}: the connection ended before the run did.")

    def fetch(self, item):
        """Downloads a written file; None for a preview. A file that is there already is never overwritten."""
        if item.get("type") != "output":
            return None
        query = urllib.parse.urlencode({key: item.get(key) or "" for key in ("filename", "subfolder", "type")})
        data = asyncio.run(self._request(f"/view?{query}", raw=True))
        folder = self.out / (item.get("subfolder") or "")
        if not folder.resolve().is_relative_to(self.out.resolve()):
            raise RunError(f"{self.url} names a file outside its output folder: {item}")
        folder.mkdir(parents=True, exist_ok=True)
        name = Path(Path(item["filename"]).name)
        path, count = folder / name, 1
        while path.exists():
            count += 1
            path = folder / f"{name.stem}-{count}{name.suffix}"
        path.write_bytes(data)
        return path


def refusal(prompt, answer):
    return "\n".join(text for _, _, text in faults_of(prompt, answer.get("node_errors") or {}, answer.get("error")))
