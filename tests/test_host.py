"""The pack in the host: loaded once under two names, run by the host's executor."""

import sys

import host
import pytest


def test_alias_is_the_module_the_host_loaded():
    import steer.nodes.guidance

    assert steer is sys.modules[str(host.ROOT).replace(".", "_x_")]
    assert steer.nodes.guidance is sys.modules[steer.__name__ + ".nodes.guidance"]
    assert steer.nodes.guidance.__spec__.name == steer.nodes.guidance.__name__


def test_alias_does_not_invent_modules():
    with pytest.raises(ModuleNotFoundError, match="steer.nothing"):
        import steer.nothing  # noqa: F401


def test_outputs_of_every_node_come_back(run_prompt):
    result = run_prompt({
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 2}},
        "2": {"class_type": "LatentUpscaleBy",
              "inputs": {"samples": ["1", 0], "upscale_method": "nearest-exact", "scale_by": 2.0}},
    })
    assert result["1"][0]["samples"].shape == (2, 4, 4, 8)
    assert result["2"][0]["samples"].shape == (2, 4, 8, 16)


def test_refused_prompt_names_node_and_input(run_prompt):
    with pytest.raises(host.PromptError, match=r'node 1 "Canvas" \(EmptyLatentImage\), input \'width\': .*smaller'):
        run_prompt({"1": {"class_type": "EmptyLatentImage", "_meta": {"title": "Canvas"},
                          "inputs": {"width": 1, "height": 32, "batch_size": 2}}})


def test_unknown_node_is_named(run_prompt):
    with pytest.raises(host.PromptError, match=r"node 7 \(NoSuchNode\): .*not found"):
        run_prompt({"7": {"class_type": "NoSuchNode", "inputs": {}}})


def test_failing_node_is_named(run_prompt):
    with pytest.raises(host.PromptError, match=r"node 2 \(LatentAdd\): \S*Error"):
        run_prompt({
            "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 1}},
            "3": {"class_type": "EmptyHunyuanLatentVideo",
                  "inputs": {"width": 64, "height": 32, "length": 5, "batch_size": 1}},
            "2": {"class_type": "LatentAdd", "inputs": {"samples1": ["3", 0], "samples2": ["1", 0]}},
        })
