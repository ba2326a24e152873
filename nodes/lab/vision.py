from comfy_api.latest import io


class LabVision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLabVision",
            display_name="Lab Vision",
            category="steer/lab",
            description="Loads the tiny image encoder that ships with the pack, of the kind that Load CLIP Vision "
            "loads. It knows the lab's portraits, and the lab's IP-Adapter needs it.",
            search_aliases=["lab", "clip vision", "image encoder", "load clip vision", "ViT"],
            inputs=[],
            outputs=[io.ClipVision.Output(tooltip="For IP-Adapter, or for CLIP Vision Encode.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ...models.lab.load import load_vision

        return io.NodeOutput(load_vision())


NODES = [LabVision]
