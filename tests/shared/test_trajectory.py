import pytest
import torch
import toy
from steer.patches.shared.trajectory import Trajectory, fingerprint

SIGMAS = torch.tensor([4.0, 2.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def model():
    return toy.model()


def trajectory(model, sigmas=SIGMAS, shape=(1, 4, 8, 8)):
    latents = torch.arange(len(sigmas)).view(-1, 1, 1, 1, 1) * torch.ones(shape)
    return Trajectory(sigmas, latents, fingerprint(model), [])


def test_between_two_steps_it_is_on_the_line_of_an_euler_step(model):
    path = trajectory(model)
    assert [float(path.at(s).mean()) for s in (4.0, 3.0, 2.0, 1.25, 1.0, 0.5, 0.0)] == [0, 0.5, 1, 1.75, 2, 2.5, 3]
    assert torch.equal(path.at(2.000001), path.latents[1])


def test_what_it_is_checked_for(model):
    path = trajectory(model)
    path.check(model.clone(), (1, 4, 8, 8), SIGMAS)
    path.check(model, sigmas=SIGMAS[1:])
    for kwargs, says in (
        (dict(shape=(1, 4, 8, 9)), "a size other than"),
        (dict(shape=(2, 4, 8, 8)), "a batch other than"),
        (dict(sigmas=SIGMAS[:-1]), "another schedule: 3 steps from sigma 4 to 0, the sampler's is 2 steps from"),
        (dict(sigmas=torch.linspace(4, 0, 9)), "another schedule"),
        (dict(sigmas=SIGMAS * 1.1), "another schedule.* all of them where its noise is wired too"),
    ):
        with pytest.raises(ValueError, match=says):
            path.check(model, **kwargs)


@pytest.mark.parametrize("other, says", [
    (toy.model(kind="v"), "prediction ModelSamplingDiscrete, EPS, the model's is ModelSamplingDiscrete, V_PREDICTION"),
    (toy.flux(), "network UNetModel, the model's is Flux"),
])
def test_another_model_is_told_apart(model, other, says):
    with pytest.raises(ValueError, match=says):
        trajectory(model).check(other)


def test_another_checkpoint_is_told_apart_and_another_precision_is_not(model):
    trained = toy.model()
    with torch.no_grad():
        for p in trained.model.diffusion_model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    trajectory(trained).check(trained)
    with pytest.raises(ValueError, match="other weights of the same network"):
        trajectory(model).check(trained)
    half = toy.model(dtype=torch.bfloat16)
    half.model.diffusion_model.load_state_dict(trained.model.diffusion_model.state_dict())
    trajectory(trained).check(half)


@pytest.mark.parametrize("sigmas", [torch.tensor([1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])])
def test_nonsense_is_refused(model, sigmas):
    with pytest.raises(ValueError, match="trajectory"):
        trajectory(model, sigmas)
