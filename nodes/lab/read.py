from comfy_api.latest import io, ui


class LabRead(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLabRead",
            display_name="Lab Read",
            category="steer/lab",
            description="Reads a portrait of the lab: which factors it shows, whether they fit a prompt, and whether "
            "it is the face of a reference. Made for pictures of the lab models and of Lab Portrait; on anything else "
            "the answer means nothing.",
            search_aliases=["lab", "read", "classify", "score", "measure", "identity similarity", "hit rate"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="Portraits to read; a batch gives one row each."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="A portrait whose face to compare with: 1 is the same face, whatever it wears. One "
                    "reference for all images, or one each.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    tooltip="A prompt to check: the text marks the factors that do not fit it, the table gains a score "
                    "(mean log-probability, 0 is a perfect fit).",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What was read, for people."),
                io.String.Output(display_name="table", tooltip="The same as JSON: a list with one object per image."),
            ],
        )

    @classmethod
    def execute(cls, image, reference=None, prompt="") -> io.NodeOutput:
        import json

        from ...models.lab import report

        rows = report.rows(image, reference, prompt)
        text = "\n\n".join(report.text(row) for row in rows)
        return io.NodeOutput(text, json.dumps(rows), ui=ui.PreviewText(text))


NODES = [LabRead]
