"""What only CUDA devices can show: skipped where there are none, as on machines that check every change."""

import contextlib
import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Template
from test_distributed import difference, launch
from test_draws_apart import ATTENTION, RECURRENT, Net
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_ebm as ebm

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "gpu"}


def fitted(make, strategy, tmp_path, callbacks=(), ckpt_path=None, **flags):
    L.seed_everything(0, verbose=False)
    module = make()
    options = {"max_epochs": 3, "devices": 1, "enable_checkpointing": bool(callbacks), **QUIET, **flags}
    trainer = L.Trainer(strategy=strategy, default_root_dir=tmp_path, callbacks=list(callbacks), **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}, trainer


@one_gpu
@pytest.mark.parametrize("strategy", ["ebm", ebm.EBMStrategy], ids=["name", "instance"])
def test_trains_on_the_device(strategy, tmp_path):
    chosen = strategy if isinstance(strategy, str) else strategy()
    _, trainer = fitted(Template, chosen, tmp_path)
    assert trainer.strategy.root_device.type == "cuda"
    assert trainer.strategy.learner.report["result"] in ("converged", "stalled")


@one_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_an_exact_rule_equals_stock_with_masks_drawn_on_the_device(precision, tmp_path):
    stock, _ = fitted(Template, "auto", tmp_path, precision=precision)
    state = torch.cuda.get_rng_state()
    exact, _ = fitted(Template, ebm.EBMStrategy("zero-divergence"), tmp_path, precision=precision)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert difference(stock, exact) < (1e-4 if precision == "32-true" else 3e-2)


@one_gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_keeps_the_direction_of_the_float32_update(precision, tmp_path):
    updates = {}
    module = Template(dropout=0.0)
    for chosen in ("32-true", precision):
        copied = copy.deepcopy(module)

        class Keep(L.Callback):
            def on_before_backward(self, trainer, pl_module, loss, key=chosen):
                found = torch.autograd.grad(loss, list(pl_module.parameters()), retain_graph=True)
                updates.setdefault(key, {str(k): g.float() for k, g in enumerate(found)})

        fitted(lambda m=copied: m, ebm.EBMStrategy("pc-nudge"), tmp_path, [Keep()], precision=chosen, max_steps=1)
    assert ebm.metrics.alignment(updates[precision], updates["32-true"])["cosine"] > 0.999


@one_gpu
def test_a_run_resumed_in_mid_epoch_has_the_devices_generator_back(tmp_path):
    saving = ModelCheckpoint(tmp_path, "at-{step}", every_n_train_steps=8, save_top_k=-1)
    whole, _ = fitted(Template, ebm.EBMStrategy(), tmp_path, [saving], deterministic=True)
    resumed, _ = fitted(
        Template, ebm.EBMStrategy(), tmp_path, ckpt_path=tmp_path / "at-step=8.ckpt", deterministic=True
    )
    assert difference(whole, resumed) == 0


@one_gpu
def test_a_compiled_network_learns_as_one_that_is_not(tmp_path):
    plain, _ = fitted(lambda: Template(dropout=0.0), ebm.EBMStrategy("zero-divergence"), tmp_path)
    make = lambda: Template(dropout=0.0, inner=torch.compile)  # noqa: E731
    compiled, _ = fitted(make, ebm.EBMStrategy("zero-divergence"), tmp_path)
    compiled = {name.replace("_orig_mod.", ""): tensor for name, tensor in compiled.items()}
    assert difference(plain, compiled) < 1e-4


@one_gpu
@pytest.mark.parametrize("capture", [True, False], ids=["code", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [*ATTENTION, *RECURRENT])
def test_attention_and_recurrent_layers_give_autograds_gradient(kind, dropout, capture):
    """By kernels of the device, over steps in which weights and batches move: code must not keep what it was made at.

    Where units are dropped autograd is given the kernels that the step is recorded by, which draw by the same seed.
    """
    torch.manual_seed(0)
    net = Net({**ATTENTION, **RECURRENT}[kind](dropout)).cuda()
    net.seen = contextlib.nullcontext()  # nobody looks on
    learner = ebm.Learner(net, "zero-divergence", layers=["activation"], capture=capture)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(4):
        x, y = torch.randn(6, 5, 4, device="cuda"), torch.randint(0, 2, (6,), device="cuda")

        def closure(x=x, y=y, step=step):
            torch.manual_seed(step)
            return F.cross_entropy(net(x), y)

        net.zero_grad()
        attention = sdpa_kernel(SDPBackend.MATH) if dropout else contextlib.nullcontext()
        with attention, torch.backends.cudnn.flags(enabled=not dropout):
            closure().backward()
        expected = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        learner.backward(closure)
        found = {name: p.grad for name, p in net.named_parameters()}
        assert ebm.metrics.alignment(found, expected)["relative_error"] < 1e-3  # tf32, in cuDNN
        optimizer.step()


@two_gpus
def test_two_devices_over_nccl_end_equal_and_where_one_ends(tmp_path):
    """The fits of the gloo tests, on CUDA: DDP with its options and hooks, and FSDP2."""
    import ranks

    flags = ("plain", "accumulation", "clipping", "unused", "view", "sharded")
    cases = [f"fit/{flag}/{name}" for flag in flags for name in ranks.ALGORITHMS]
    left, _ = launch(2, tmp_path, [*cases, "errors"], accelerator="gpu")
    for case in cases:
        one = ranks.fit(*case.split("/")[1:])
        first, second = left[case]
        assert "sharded" in case or difference(first["weights"], second["weights"]) == 0
        assert difference(first["weights"], one["weights"]) < 1e-4
    assert all("broken in mid-relaxation" in rank["mid-relaxation"][1] for rank in left["errors"])
