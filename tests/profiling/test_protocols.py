"""The outputs that the report compares are those of the mechanisms, and its inputs are apart from their draws."""

import pytest
import torch

from visionattn.attention import ATTENTION
from visionattn.ops.slay import POLYNOMIALS
from visionattn.profiling.protocols import (
    Inputs,
    ablation,
    build,
    clustered,
    cosines,
    deviation,
    given,
    output,
    plain,
    truth,
    weighted,
)

PROTOCOLS = [plain(8, 24), clustered(8, 24), ablation(24, True, 8, 2), ablation(24, False, 8, 2)]


@pytest.fixture(params=PROTOCOLS, ids=lambda protocol: protocol.name)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    drawn: Inputs = request.param.sample(0)
    return drawn


@pytest.mark.filterwarnings("ignore:slay. poly=:UserWarning")
@pytest.mark.parametrize("poly", POLYNOMIALS)
def test_slay_from_its_kernel_is_its_fast_form(inputs: Inputs, poly: str) -> None:
    layer = build("slay", {"poly": poly, "features": 4, "anchors": 4}, inputs, 0)
    fast = inputs.project(layer.attend(inputs.q, inputs.k, inputs.v, None, inputs.is_causal))
    assert deviation(output(layer, inputs), fast)[0] < 1e-8


@pytest.mark.parametrize("name", [name for name, cls in ATTENTION.items() if not cls.random])
def test_exact_mechanisms_have_no_error(inputs: Inputs, name: str) -> None:
    layer = build(name, {}, inputs, 0)
    if inputs.is_causal and not layer.ordered:
        pytest.skip("has no causal form")
    own = given(layer, inputs)
    error, cosine = deviation(output(layer, own), truth(layer, own))
    assert error < 1e-12
    assert cosine == pytest.approx(1)


def test_truth_is_the_target(inputs: Inputs) -> None:
    layer = build("performer", {"features": 8}, inputs, 0)
    assert deviation(output(layer, inputs), truth(layer, inputs))[0] > 1e-3
    if not inputs.is_causal:
        torch.testing.assert_close(truth(layer, inputs), layer.target(inputs.q, inputs.k, inputs.v))
    else:
        reference = build("softmax", {}, inputs, 0).reference(inputs.q, inputs.k, inputs.v, is_causal=True)
        torch.testing.assert_close(truth(layer, inputs), inputs.project(reference))


def test_the_control_is_the_squared_cosine(inputs: Inputs) -> None:
    layer = build("x^2", {}, inputs, 0)
    assert deviation(output(layer, inputs), weighted(cosines(inputs) ** 2, inputs))[0] < 1e-12


def test_inputs_are_not_the_draws() -> None:
    """A generator's numbers must not serve both: keys would be their own features."""
    inputs = plain(16, 64, 2).sample(0)
    layer = build("performer", {"features": 64, "draws": "iid"}, inputs, 0)
    correlation = float((layer.get_buffer("draws") * inputs.q[0]).mean())
    assert abs(correlation) < 0.15


def test_without_biases_the_protocol_has_none() -> None:
    biased, free = (ablation(8, bias).sample(0) for bias in (True, False))
    assert biased.bias is not None
    assert free.bias is not None
    assert float(biased.bias.abs().max()) > 0.05
    assert float(free.bias.abs().max()) == 0
    assert float(biased.bias.abs().max()) <= 64**-0.5
    torch.testing.assert_close(biased.weight, free.weight)


def test_tokens_of_a_cluster_are_alike() -> None:
    inputs = clustered(64, 32, 1, clusters=1).sample(0)
    assert float(cosines(inputs).mean()) == pytest.approx(0.5, abs=0.05)
    assert float(cosines(plain(64, 32, 1).sample(0)).mean()) == pytest.approx(0, abs=0.05)


def test_deviation() -> None:
    x = torch.tensor([3.0, 4.0])
    assert deviation(x, x) == pytest.approx((0, 1))
    assert deviation(2 * x, x) == pytest.approx((1, 1))
    assert deviation(torch.tensor([-4.0, 3.0]), x) == pytest.approx((2**0.5, 0))
    assert deviation(torch.zeros(2), x) == pytest.approx((1, 0))
