from comfy_api.latest import io

from ...models.lab.captions import caption
from ...models.lab.portrait import FACTORS, Portrait, draw, draw_masks

FROM_SEED = "from seed"
TOOLTIPS = {
    "style": "How the picture is drawn: flat colours, comic outlines, or coarse pixels.",
    "expression": "Mouth, brows and eyes together.",
    "position": "Where the person stands in the frame.",
    "skin": "Colour of the skin.",
    "hair_style": "Shape of the hair.",
    "hair_color": "Colour of the hair.",
    "glasses": "With or without glasses.",
    "hat": "What is worn on the head.",
    "shirt": "Colour of the shirt.",
    "pattern": "Pattern of the background.",
    "background": "Colour of the background.",
}


class LabPortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        combos = [
            io.Combo.Input(name, options=[FROM_SEED, *values], default=FROM_SEED, tooltip=TOOLTIPS[name])
            for name, values in FACTORS.items()
        ]
        return io.Schema(
            node_id="SteerLabPortrait",
            display_name="Lab Portrait",
            category="steer/lab",
            description="Draws a 128x128 cartoon portrait and writes its caption, exactly as the lab models were "
            "taught. The same seed with one factor changed is the same person with that factor changed: ground truth "
            "for edits.",
            search_aliases=["lab", "portrait", "face", "test image", "ground truth", "reference", "dataset"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53,
                    control_after_generate=True,
                    tooltip="Chooses the face (its proportions) and every factor left at 'from seed'.",
                ),
                *combos,
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The portrait."),
                io.String.Output(display_name="caption", tooltip="The prompt that describes it."),
                io.Mask.Output(display_name="head", tooltip="Face, visible hair and hat."),
                io.Mask.Output(display_name="hair", tooltip="Visible hair."),
                io.Mask.Output(display_name="background", tooltip="All that is not the person."),
            ],
        )

    @classmethod
    def execute(
        cls, seed, style, expression, position, skin, hair_style, hair_color, glasses, hat, shirt, pattern, background
    ) -> io.NodeOutput:
        import torch

        chosen = dict(
            style=style, expression=expression, position=position, skin=skin, hair_style=hair_style,
            hair_color=hair_color, glasses=glasses, hat=hat, shirt=shirt, pattern=pattern, background=background,
        )
        portrait = Portrait.from_seed(seed, **{name: value for name, value in chosen.items() if value != FROM_SEED})
        masks = draw_masks(portrait)
        return io.NodeOutput(
            torch.from_numpy(draw(portrait).copy())[None].float() / 255,
            caption(portrait),
            *(torch.from_numpy(masks[name])[None] for name in ("head", "hair", "background")),
        )


NODES = [LabPortrait]
