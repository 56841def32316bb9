"""What a step gets from other ranks is a constant of it; here one rank is all there are, and gloo still writes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from since import newer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import lightning_ebm as ebm


@pytest.fixture(autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def contrast(z, others):
    return F.cross_entropy(z @ others.t() / 0.5, torch.arange(len(z)))


def into_zeros(z):
    others = [torch.zeros_like(z)]
    dist.all_gather(others, z.detach())
    return contrast(z, torch.cat(others))


def into_views(z):
    held = torch.ones(1, *z.shape, dtype=z.dtype)
    dist.all_gather(list(held.unbind(0)), z.detach())
    return contrast(z, held[0])


def with_own_slot(z):  # its argument has a gradient, which no collective of torch.distributed hands on
    others = [torch.ones_like(z), torch.zeros_like(z)]
    dist.all_gather(others[:1], z)
    others[1] = z
    return contrast(z, torch.cat(others))


def while_gradients_are_off(z):
    others = [torch.ones_like(z)]
    with torch.no_grad():
        dist.all_gather(others, z)
    return contrast(z, torch.cat(others))


def waited_for(z):
    others = torch.ones(z.shape, dtype=z.dtype)
    work = dist.all_to_all_single(others, z.detach().contiguous(), async_op=True)
    size = z.square().mean()
    work.wait()
    return contrast(z, others) + size


def read_before(z):
    others = torch.arange(float(z.numel()), dtype=z.dtype).view_as(z)
    before = contrast(z, 1 * others)
    dist.reduce_scatter(others, [z.detach().contiguous()])
    return before + contrast(z, others)


def loss_reduced_in_place(z):  # autograd does not see it, and goes on from what is there
    loss = z.square().mean()
    others = torch.full((1,), 0.7, dtype=z.dtype)
    dist.all_gather_into_tensor(loss.detach().view(1), others)
    twice = 2 * loss
    dist.all_gather_into_tensor(loss.detach().view(1), others + 1)
    loss.detach().div_(2)
    return (loss + twice).sin()


def logged(z):
    loss = z.square().mean()
    with torch.no_grad():
        dist.all_reduce(loss)
    mean = loss.detach()
    mean.div_(2)
    return loss * (1 + mean)


def differentiable_of_constants(z):
    return contrast(z, torch.cat(dist_functional.all_gather(z.detach())))


IDIOMS = [into_zeros, into_views, with_own_slot, while_gradients_are_off, waited_for, logged]
# Of gloo there is no reduce_scatter before, and what a gathering writes to is refused as unseen.
IDIOMS += [pytest.param(idiom, marks=newer) for idiom in (read_before, loss_reduced_in_place)]


@pytest.mark.parametrize("loss", [*IDIOMS, differentiable_of_constants], ids=lambda f: f.__name__)
def test_what_ranks_exchange_is_a_constant_of_the_step(loss):
    ends = []
    for learns in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        optimizer, learner = torch.optim.SGD(net.parameters(), lr=0.1), ebm.Learner(net, "zero-divergence")
        for _ in range(4):
            x = torch.randn(6, 4, dtype=torch.float64)
            optimizer.zero_grad()
            if learns:
                learner.backward(lambda net=net, x=x: loss(net(x)))
            else:
                loss(net(x)).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-12)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        others = [torch.zeros_like(z)]
        dist.all_gather(others, z)
        return others[0]

    @staticmethod
    def backward(ctx, slope):
        return slope


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, slope):
        slope = slope.clone()
        dist.all_reduce(slope)
        return slope


def by_hook(z):
    def reduced(slope):
        slope = slope.clone()
        dist.all_reduce(slope)
        return slope

    z.register_hook(reduced)
    return z


@pytest.mark.parametrize("passing", [Gather.apply, Reduce.apply, by_hook], ids=["forward", "backward", "hook"])
def test_code_that_waits_for_other_ranks_is_refused_by_name(passing, monkeypatch):
    """It would run at every state, and ranks would wait for each other until the process group times out."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    ebm.Learner(net, "predictive-coding").backward(lambda: passing(net(x)).square().mean())  # one rank waits for none
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"through a collective \(c10d::all.* in "):
        ebm.Learner(net, "predictive-coding").backward(lambda: passing(net(x)).square().mean())


def wrapped(net):
    return nn.parallel.DistributedDataParallel(net, static_graph=True)


def wrapped_part(net):  # the learner has the module within
    outer = wrapped(net)
    net.outer = [outer]
    return net


def sharded(net):
    for layer in (net[0], net[2]):
        fully_shard(layer)
    return fully_shard(net)


@pytest.mark.parametrize("wrap", [wrapped, wrapped_part, pytest.param(sharded, marks=newer)], ids=lambda f: f.__name__)
def test_what_acts_in_the_backward_pass_of_the_loss_itself_is_refused(wrap):
    """Learned wrong, in silence, or read weights that had been given back."""
    net = wrap(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    run = net.outer[0] if hasattr(net, "outer") else net
    x = torch.randn(6, 4)
    for ask in ("backward", "gradients"):
        with pytest.raises(ebm.ConfigurationError, match=r"static_graph=True|sharded"):
            getattr(ebm.Learner(net, "zero-divergence"), ask)(lambda: run(x).square().mean())
    ebm.Learner(net, "backprop").backward(lambda: run(x).square().mean())
    assert all(p.grad is not None for p in net.parameters())
