"""An `Equilibrium` leaves for other runtimes as one graph, or says how it can."""

import subprocess
import sys

import pytest
import torch
from since import newer
from torch import nn

import lightning_ebm as ebm

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 1), nn.Linear(8, 5), nn.Hardtanh(0, 1), nn.Linear(5, 3))


def hopfield() -> ebm.Equilibrium:
    return ebm.Equilibrium(network(), ebm.algorithm("equilibrium-propagation", free_relaxer=ebm.FixedPoint(30)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["odd-even", "synchronous"])
def test_an_equilibrium_is_exported_as_a_graph_that_needs_nothing_of_this_library(order, tmp_path):
    """Another process runs it without the library, on another input; and the sweeps by hand agree."""
    net = network().double()
    relaxer = ebm.FixedPoint(12, order=order, damping=0.1)
    module = ebm.Equilibrium(net, ebm.algorithm("equilibrium-propagation", free_relaxer=relaxer))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.export.save(module.exported(torch.zeros_like(x)), tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys, torch
found = torch.export.load("{tmp_path}/net.pt2").module()(torch.load("{tmp_path}/x.pt"))
assert not any(name.startswith("lightning") for name in sys.modules)
torch.save(found, "{tmp_path}/found.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-14)
    with torch.no_grad():
        lower, upper = (lambda h: (net[0](x) + h @ net[2].weight).clamp(0, 1)), (lambda h: net[2](h).clamp(0, 1))
        one = net[0](x).clamp(0, 1)
        two = upper(one)
        for _ in range(12):
            new = 0.9 * lower(two) + 0.1 * one
            two, one = 0.9 * upper(new if order == "odd-even" else one) + 0.1 * two, new
        torch.testing.assert_close(found, net[4](two), rtol=0, atol=1e-14)


TRACERS = {
    "export": lambda module: torch.export.export(module, (X,)).module(),
    "export, strict": lambda module: torch.export.export(module, (X,), strict=True).module(),
    "jit.trace": lambda module: torch.jit.trace(module, (X,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    # Older ones do not say that they export.
    "tracer",
    [pytest.param(name, marks=newer if name.startswith("export") else ()) for name in TRACERS],
)
def test_torchs_own_tracers_are_told_what_can_be_exported(tracer):
    """And do not end the process, which one did when a relaxation ran under it. Dynamo puts our words into its own."""
    with pytest.raises(Exception, match=r"program = equilibrium\.exported\(\*inputs\)") as caught:
        TRACERS[tracer](hopfield())
    assert tracer == "export, strict" or isinstance(caught.value, ebm.ConfigurationError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ["predictive-coding", "backprop"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_where_the_equilibrium_is_the_forward_pass_tracers_follow_it(tracer, algorithm):
    module = ebm.Equilibrium(network(), algorithm)
    other = torch.randn(4, 6)
    torch.testing.assert_close(TRACERS[tracer](module)(other), network()(other), rtol=0, atol=0)
    torch.testing.assert_close(module.exported(X).module()(other), network()(other), rtol=0, atol=0)


@newer
def test_with_units_held_it_is_not_the_forward_pass_and_is_not_taken_for_it():
    module = ebm.Equilibrium(network(), "predictive-coding", clamp={"3": torch.ones(4, 5)})
    assert not torch.allclose(module(X), network()(X))
    with pytest.raises(ebm.ConfigurationError, match=r"equilibrium\.exported"):
        torch.export.export(module, (X,))


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_the_old_exporter_is_told_the_same():
    with pytest.raises(ebm.ConfigurationError, match=r"torch\.onnx\.export\(program"):
        torch.onnx.export(hopfield(), (X,), "unused.onnx", dynamo=False)


@newer
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_the_new_exporter_is_told_the_same():
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"torch\.onnx\.export\(program"):
        torch.onnx.export(hopfield(), (X,), "unused.onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_finds_the_free_equilibrium(tmp_path):
    """Another runtime, on another input than the graph was made with."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, path = hopfield(), tmp_path / "ep.onnx"
    torch.onnx.export(module.exported(X), f=path)
    session = runtime.InferenceSession(path)
    other = torch.randn(4, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert not torch.allclose(module(other), network()(other), atol=1e-2)  # not merely the forward pass
    torch.testing.assert_close(torch.from_numpy(found), module(other), rtol=0, atol=1e-5)


def test_a_free_phase_that_chooses_its_steps_is_not_exported():
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 1), nn.Linear(8, 3))
    algorithm = ebm.algorithm("equilibrium-propagation", free_relaxer=ebm.GradientDescent(0.5, 100, tol=1e-3))
    with pytest.raises(ebm.ConfigurationError, match="FixedPoint"):
        ebm.Equilibrium(net, algorithm).exported(torch.zeros(2, 6))
