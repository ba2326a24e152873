from comfy_api.latest import io


class LabControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLabControlNet",
            display_name="Lab ControlNet",
            category="steer/lab",
            description="Loads the tiny ControlNet that ships with the pack, of the kind that Load ControlNet Model "
            "loads. It sees the keypoints of a portrait's face, and in place of a text the face: InstantID's part of "
            "Lab Model's UNet.",
            search_aliases=["lab", "controlnet", "load controlnet", "IdentityNet", "keypoints", "InstantID"],
            inputs=[],
            outputs=[io.ControlNet.Output(tooltip="For InstantID, with adapter_instantid.safetensors [lab].")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ...models.lab.load import load_control

        return io.NodeOutput(load_control())


NODES = [LabControlNet]
