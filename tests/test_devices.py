"""Which device, which strategy: what lands where, and what is refused with the name to use instead."""

import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric import accelerators as fabric
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning_modules import Template
from since import newer
from torch import nn

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def gpus(count, monkeypatch):
    """A machine on which Lightning finds CUDA devices; nothing is ever sent to them."""
    for accelerator in (CUDAAccelerator, fabric.CUDAAccelerator):
        monkeypatch.setattr(accelerator, "is_available", staticmethod(lambda: count > 0))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: count))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda devices: list(range(int(devices)))))


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
@pytest.mark.parametrize("strategy", ["ebm", ebm.EBMStrategy], ids=["name", "instance"])
def test_one_gpu_is_used_by_name_and_by_instance(strategy, accelerator, monkeypatch):
    gpus(1, monkeypatch)
    chosen = strategy if isinstance(strategy, str) else strategy()
    trainer = L.Trainer(strategy=chosen, accelerator=accelerator, devices=1, **QUIET)
    assert trainer.strategy.root_device == torch.device("cuda", 0)


@pytest.mark.parametrize("strategy", ["ebm", ebm.EBMStrategy], ids=["name", "instance"])
def test_cpu_where_asked_for_or_alone(strategy, monkeypatch):
    def device(accelerator):
        chosen = strategy if isinstance(strategy, str) else strategy()
        return L.Trainer(strategy=chosen, accelerator=accelerator, devices=1, **QUIET).strategy.root_device

    gpus(1, monkeypatch)
    assert device("cpu") == torch.device("cpu")
    gpus(0, monkeypatch)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
    assert device("auto") == torch.device("cpu")


@newer
def test_many_gpus_by_ddp_and_fsdp2(monkeypatch):
    gpus(2, monkeypatch)
    for strategy in ("ebm_ddp", ebm.EBMDDPStrategy(), "ebm_fsdp2", ebm.EBMFSDP2Strategy()):
        trainer = L.Trainer(strategy=strategy, accelerator="gpu", devices=2, **QUIET)
        assert trainer.strategy.parallel_devices == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("name", "kind", "launcher"),
    [
        ("ebm_ddp", DDPStrategy, _SubprocessScriptLauncher),
        ("ebm_ddp_spawn", DDPStrategy, _MultiProcessingLauncher),
        ("ebm_ddp_fork", DDPStrategy, _MultiProcessingLauncher),
        ("ebm_ddp_notebook", DDPStrategy, _MultiProcessingLauncher),
        ("ebm_ddp_find_unused_parameters_true", DDPStrategy, _SubprocessScriptLauncher),
        pytest.param("ebm_fsdp2", ModelParallelStrategy, _SubprocessScriptLauncher, marks=newer),
    ],
)
def test_names(name, kind, launcher):
    assert name in StrategyRegistry
    strategy = L.Trainer(strategy=name, accelerator="cpu", devices=2, **QUIET).strategy
    assert isinstance(strategy, kind)
    assert isinstance(strategy.launcher, launcher)
    if launcher is _MultiProcessingLauncher:
        assert strategy.launcher.is_interactive_compatible == (name not in ("ebm_ddp_spawn",))
        assert strategy.launcher._start_method == ("spawn" if name == "ebm_ddp_spawn" else "fork")


def test_options_of_ddp_reach_ddp():
    strategy = ebm.EBMDDPStrategy("pc-nudge", bucket_cap_mb=7, process_group_backend="gloo", start_method="spawn")
    assert strategy._ddp_kwargs == {"bucket_cap_mb": 7}
    assert strategy.process_group_backend == "gloo"
    assert strategy.describe()["nudge"] == "OneSided(strength=0.0001)"


@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": 1, "num_nodes": 2}])
def test_many_devices_for_a_strategy_of_one_are_refused(options):
    trainer = L.Trainer(strategy="ebm", accelerator="cpu", **options, **QUIET)
    with pytest.raises(ebm.ConfigurationError, match="ebm_ddp"):
        trainer.fit(Template())


@newer
def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(ebm.ConfigurationError, match="find_unused_parameters=True is supported"):
        ebm.EBMDDPStrategy(static_graph=True)
    with pytest.raises(ebm.ConfigurationError, match="tensor-parallel"):
        ebm.EBMFSDP2Strategy(tensor_parallel_size=2)
    with pytest.raises(ebm.ConfigurationError, match=r"flattens the weights.*ebm_fsdp2"):
        L.Trainer(strategy="ebm_fsdp", accelerator="cpu", devices=2, **QUIET)
    with pytest.raises(ebm.ConfigurationError, match=r"engine runs the backward.*ebm_fsdp2"):
        L.Trainer(strategy="ebm_deepspeed", accelerator="cpu", devices=2, **QUIET)
    with pytest.raises(TypeError, match="devicess"):
        ebm.EBMFSDP2Strategy(devicess=2)


@newer
def test_mps_meets_lightnings_own_message(monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    for strategy in ("ebm_ddp", ebm.EBMDDPStrategy(), ebm.EBMFSDP2Strategy()):
        with pytest.raises(ValueError, match="MPS accelerator"):
            L.Trainer(strategy=strategy, accelerator="mps", devices=1, **QUIET)


@pytest.mark.parametrize("how", ["flag", "module"])
def test_batch_statistics_over_ranks_are_refused_for_relaxations_only(how, free_port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port))

    def fit(algorithm):
        module = Template()
        if how == "module":
            module.net[1] = nn.SyncBatchNorm(8)
        strategy = ebm.EBMDDPStrategy(algorithm)
        flags = {"accelerator": "cpu", "devices": 1, "sync_batchnorm": how == "flag", "max_steps": 1}
        L.Trainer(strategy=strategy, **flags, **QUIET).fit(module)

    with pytest.raises(ebm.ConfigurationError, match="sync_batchnorm"):
        fit("predictive-coding")
    with pytest.raises(ValueError, match="only work with GPU"):  # torch's: not on a CPU
        fit("backprop")


def test_one_process_of_ddp_is_one_device(free_port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    ends = []
    for strategy in ("ebm", "ebm_ddp"):
        L.seed_everything(0, verbose=False)
        module = Template(dropout=0.0)
        flags = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "use_distributed_sampler": False}
        L.Trainer(strategy=strategy, **flags, **QUIET).fit(module)
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@newer
def test_strategies_and_their_options_from_the_command_line(tmp_path, capsys):
    from lightning.pytorch.cli import LightningCLI

    def strategy(*arguments):
        flags = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.devices=2", *arguments]
        return LightningCLI(Template, run=False, args=flags, save_config_callback=None).trainer.strategy

    named = strategy("--trainer.strategy=ebm_ddp", "--trainer.num_nodes=3")
    assert (type(named), named.num_nodes, named.num_processes) == (ebm.EBMDDPStrategy, 3, 2)
    path = "--trainer.strategy=lightning_ebm.EBMDDPStrategy"
    found = strategy(path, "--trainer.strategy.algorithm=pc-nudge", "--trainer.strategy.find_unused_parameters=true")
    assert found.algorithm == ebm.algorithm("pc-nudge")
    assert found._ddp_kwargs["find_unused_parameters"] is True
    sharded = strategy("--trainer.strategy=EBMFSDP2Strategy", "--trainer.strategy.algorithm=pc-nudge")
    assert isinstance(sharded, ebm.EBMFSDP2Strategy)
    with pytest.raises(SystemExit):
        strategy(path, "--trainer.strategy.algoritm=pc-nudge")


@newer
def test_the_page_on_many_devices_runs():
    page = (Path(__file__).parents[1] / "docs" / "multi-gpu.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "multi-gpu.md", "exec"), space)
    named = set(re.findall(r'`"(ebm\w*)"`', page))
    presets = {f"ebm_{name.replace('-', '_')}" for name in ebm.algorithms()}
    ours = {name for name in StrategyRegistry if name.startswith("ebm")} - presets
    assert named >= ours - {"ebm_fsdp", "ebm_deepspeed"}
    assert named <= set(StrategyRegistry)


def test_a_modelled_ring_is_a_ring():
    """Against passing the pieces round: P - 1 times to add them up, P - 1 times to hand them on."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from scaling import efficiency, exposed, ring

    for devices in (1, 2, 8, 64):
        clock = 0.0
        for _ in range(2 * (devices - 1)):  # all send a piece at once
            clock += 5e-6 + 1e9 / devices / 25e9
        assert ring(devices, 1e9, 25e9, 5e-6) == pytest.approx(clock)
    assert exposed(8, 100.0, 1e9, 25e9, 5e-6) == 0  # hidden
    # twice the computation around the same communication
    step = 0.01 + exposed(8, 0.01, 1e9, 25e9, 5e-6)
    assert efficiency(8, 1.0, 0.01, 1e9, 25e9, 5e-6) == pytest.approx(0.01 / step)
    assert efficiency(8, 2.0, 0.01, 1e9, 25e9, 5e-6) == pytest.approx(0.02 / (step + 0.01))
