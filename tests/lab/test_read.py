import json

import pytest
import torch
from steer.models.lab.portrait import FACTORS
from steer.nodes.lab.portrait import LabPortrait
from steer.nodes.lab.read import LabRead


def portrait(seed=0, **factors):
    return LabPortrait.execute(seed, **({name: "from seed" for name in FACTORS} | factors)).result


def test_portrait_node_gives_picture_caption_and_masks():
    image, caption, head, hair, background = portrait(4, hair_color="blue")
    assert image.shape == (1, 128, 128, 3) and head.shape == hair.shape == background.shape == (1, 128, 128)
    assert "blue hair" in caption
    assert torch.equal(image, portrait(4, hair_color="blue")[0])


def test_read_agrees_with_the_caption_and_knows_the_face():
    image, caption, *_ = portrait(5)
    twin, stranger = portrait(5, hat="crown", hair_color="green")[0], portrait(6)[0]
    text, table = LabRead.execute(torch.cat([image, twin, stranger]), image, caption).result
    rows = json.loads(table)
    assert rows[0]["score"] > -0.1 and "(prompt:" not in text.split("\n\n")[0]
    assert rows[0]["identity"] > 0.99
    assert rows[1]["identity"] > rows[2]["identity"] + 0.3
    assert rows[2]["score"] < rows[0]["score"] and "(prompt:" in text.split("\n\n")[2]


def test_read_says_what_is_wrong():
    image = portrait()[0]
    with pytest.raises(ValueError, match="SteerLabRead: prompt='a castle' names no factor"):
        LabRead.execute(image, None, "a castle")
    with pytest.raises(ValueError, match="SteerLabRead: reference holds 2 images for 3"):
        LabRead.execute(image.repeat(3, 1, 1, 1), image.repeat(2, 1, 1, 1))


def test_the_three_nodes_run_as_a_workflow(run_prompt):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    prompt = {
        "1": node("SteerLabModel", model="unet"),
        "2": node("SteerLabPortrait", seed=1, **{name: "from seed" for name in FACTORS}),
        "3": node("CLIPTextEncode", clip=["1", 1], text=["2", 1]),
        "4": node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "6": node("KSampler", model=["1", 0], seed=1, steps=10, cfg=5.0, sampler_name="euler", scheduler="normal",
                  positive=["3", 0], negative=["4", 0], latent_image=["5", 0], denoise=1.0),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("SteerLabRead", image=["7", 0], reference=["2", 0], prompt=["2", 1]),
    }  # fmt: skip
    text, table = run_prompt(prompt)["8"]
    assert len(json.loads(json.dumps(table))) and "hair color" in str(text)
