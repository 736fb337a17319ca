"""Training in several processes: each rank must get PyTorch's gradients, weights and errors."""

import copy
import inspect
import pickle
import tempfile

import pytest
import torch
import torch.distributed as dist

import nnmirror
from compat_tests import ranks
from compat_tests.parity import parity

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def found(world):
    with tempfile.TemporaryDirectory() as directory:
        return ranks.differences(directory, world, __name__)


def batches(count, columns=3):
    """Other inputs on each rank; models made afterwards have other initial weights too."""
    torch.manual_seed(100 + dist.get_rank())
    return [torch.randn(5, columns) for _ in range(count)]


def net(nn):
    return nn.Sequential(
        nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)
    )


def steps(optim, model, xs, **options):
    """This rank's losses, gradients and weights after some steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.SGD(trained, **{"lr": 0.05, "momentum": 0.9, **options})
    losses = []
    for x in xs:
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, dict(model.named_parameters())


@scenario
def sequential(nn, optim):
    xs = batches(4)
    return steps(optim, nn.parallel.DistributedDataParallel(net(nn)), xs)


@scenario
def many_buckets(nn, optim):
    """How the gradients of three ranks round depends on how buckets are filled."""
    xs = batches(4)
    model = nn.parallel.DistributedDataParallel(net(nn), bucket_cap_mb=0.0001)
    more = nn.parallel.DistributedDataParallel(net(nn), bucket_cap_mb_list=[0.0001, 0.0002])
    return steps(optim, model, xs), steps(optim, more, xs)


@scenario
def larger_than_the_first_bucket(nn, optim):
    """The default bucket sizes: 1 MiB for the first, then 25 MiB."""
    xs = batches(3, 300)
    layers = [nn.Linear(300, 600), nn.ReLU(), nn.Linear(600, 500), nn.Tanh(), nn.Linear(500, 2)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    return steps(optim, model, xs)


def branching(nn):
    class Branching(nn.Module):
        """Branches, a layer used twice, a layer of another dtype, a parameter used directly."""

        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 2).double()
            self.scale = nn.Parameter(torch.rand(4) + 0.5)
            self.shared = nn.Linear(4, 4)
            self.first = nn.Linear(3, 4)
            self.side = nn.Linear(3, 4)
            self.again = self.shared

        def forward(self, x):
            h = self.again(torch.relu(self.shared(self.first(x)))) * self.scale
            return self.last((h + self.side(x)).double())

    return Branching()


@scenario
def branches_and_shared_layers(nn, optim):
    xs, results = batches(4), []
    for options in ({}, {"bucket_cap_mb": 0.00005}, {"static_graph": True}):
        model = nn.parallel.DistributedDataParallel(branching(nn), **options)
        results.append(steps(optim, model, xs))
    return results


@scenario
def half_precision(nn, optim):
    xs, results = batches(3), []
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = nn.parallel.DistributedDataParallel(net(nn).to(dtype))
        results.append(steps(optim, model, [x.to(dtype) for x in xs]))
    return results


@scenario
def starts_from_the_weights_of_rank_0(nn, optim):
    batches(0)
    model = net(nn)
    own = [p.detach().clone() for p in model.parameters()]
    apart = nn.parallel.DistributedDataParallel(copy.deepcopy(model), init_sync=False)
    together = nn.parallel.DistributedDataParallel(model)
    return own, list(apart.parameters()), list(together.parameters())


@scenario
def accumulation_without_sync(nn, optim):
    xs, results = batches(6), []
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        model = nn.parallel.DistributedDataParallel(net(nn), **options)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for start in (0, 3):
            optimizer.zero_grad()
            with model.no_sync():
                for x in xs[start : start + 2]:
                    model(x).sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
            model(xs[start + 2]).sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
            optimizer.step()
        # A second backward without a forward of its own is not reduced, as in PyTorch.
        loss = model(xs[0]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(dict(model.named_parameters()))
    return results


@scenario
def gradients_as_views_of_buckets(nn, optim):
    """Gradients that are views of buckets are averaged by a division, which rounds differently."""
    xs = batches(4)
    model = nn.parallel.DistributedDataParallel(net(nn), gradient_as_bucket_view=True)
    results = []
    for x in xs:
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()
        results.append([(p.grad.clone(), p.grad._is_view()) for p in model.parameters()])
        model(x).sum().backward()
    model.module[0].weight.grad = torch.zeros(7, 3)
    model(xs[0]).sum().backward()
    return results, dict(model.named_parameters())


@scenario
def frozen_parameters(nn, optim):
    xs = batches(3)
    inner = net(nn)
    inner[2].weight.requires_grad_(False)
    inner[0].bias.requires_grad_(False)
    return steps(optim, nn.parallel.DistributedDataParallel(inner), xs)


def choosing(nn):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, use="abc"):
            return sum(getattr(self, name)(x) for name in use)

    return Choosing()


@scenario
def an_unused_parameter_is_an_error_at_the_next_forward(nn, optim):
    """Without the error, the ranks would hang, or train with a part of the gradients."""
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(choosing(nn))
    model(x, "ac").sum().backward()
    model(x)


@scenario
def a_loss_that_leaves_an_output_out(nn, optim):
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(choosing(nn), find_unused_parameters=True)
    model(x).sum().backward()
    kept = model(x)
    model(x[:1])
    model.module.a(x).sum().backward()
    assert kept.shape
    model(x)


@scenario
def unused_parameters_found(nn, optim):
    """A gradient missing on some ranks counts as zero; one missing on all ranks stays None."""
    (x, y), rank = batches(2), dist.get_rank()
    results = []
    for options in ({}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 0.00001}):
        model = nn.parallel.DistributedDataParallel(
            choosing(nn), find_unused_parameters=True, **options
        )
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for use in ("abc", "a", "ab" if rank else "ac", "c" if rank else "ac", "b"):
            optimizer.zero_grad()
            model(x, use).sum().backward()
            results.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            model(y, use).pow(2).sum().backward()
            optimizer.step()
        with model.no_sync():
            model(x, "a").sum().backward()
        model(x, "b").sum().backward()
        results.append(dict(model.named_parameters()))
    return results


@scenario
def outputs_of_every_kind(nn, optim):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return {"two": (self.a(x), [self.b(x)]), "x": x, "n": 3, "text": "t", "c": self.c(x)}

    (x,) = batches(1)
    results = []
    for options in ({"find_unused_parameters": True}, {"static_graph": True}):
        model = nn.parallel.DistributedDataParallel(Many(), **options)
        for _ in range(3):
            out = model(x)
            out["two"][0].sum().backward()
            results.append((out, [p.grad for p in model.parameters()]))
            model.zero_grad()
        results.append(str(out["two"][1][0].grad_fn).split()[0].rpartition(".")[2].strip("<"))
    return results


@scenario
def a_parameter_as_output(nn, optim):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            return x @ self.a.weight.T, self.a.bias

    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(Returning(), find_unused_parameters=True)
    model(x)[0].sum().backward()


@scenario
def static_graph_with_unused_parameters(nn, optim):
    xs = batches(5)
    model = nn.parallel.DistributedDataParallel(choosing(nn), static_graph=True)
    for x in xs:
        model(x, "cac").pow(2).sum().backward()
    return dict(model.named_parameters())


@scenario
def a_static_graph_that_changes(nn, optim):
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(
        choosing(nn), static_graph=True, find_unused_parameters=True
    )
    for use in ("abc", "abc", "ab", "abc"):
        model(x, use).sum().backward()


@scenario
def other_orders_of_arrival(nn, optim):
    """All ranks use rank 0's buckets; otherwise different parameters' gradients would be added."""
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(choosing(nn), bucket_cap_mb=0.00001)
    order = ["abc", "cab", "bca"][dist.get_rank()]
    for _ in range(3):
        model.zero_grad()
        model(x, order).pow(2).sum().backward()
    return dict(model.named_parameters())


@scenario
def twice_in_one_reduction(nn, optim):
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(choosing(nn))
    loss = model(x, "ac").sum()
    loss.backward(retain_graph=True)
    loss.backward()


@scenario
def buffers(nn, optim):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("seen", torch.full((2,), float(dist.get_rank() + 1)))
            self.register_buffer("calls", torch.tensor(dist.get_rank()))

        def forward(self, x):
            self.seen += x.detach().sum()
            self.calls += 1
            return self.linear(x) * self.seen.clone()

    xs, results = batches(3), []
    for options in (
        {},
        {"broadcast_buffers": False},
        {"forward_sync_buffers": False},
        {"broadcast_buffers": True, "forward_sync_buffers": True, "check_reduction": True},
    ):
        model = nn.parallel.DistributedDataParallel(Counting(), **options)
        results.append(model.will_sync_module_buffers())
        for x in xs:
            model(x).sum().backward()
            results.append([b.clone() for b in model.buffers()])
        with torch.no_grad():
            model(xs[0])
        with model.no_sync():
            model(xs[1])
        model.broadcast_buffers = False
        model(xs[2])
        results += [b.clone() for b in model.buffers()], model.forward_sync_buffers
    return results


@scenario
def a_buffer_that_was_saved(nn, optim):
    """Two forwards before a backward: broadcasting buffers keeps the first graph valid."""

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.full((2,), 1.5))

        def forward(self, x):
            return self.linear(x) * self.scale

    x, y = batches(2)
    model = nn.parallel.DistributedDataParallel(Scaling())
    (model(x) + model(y)).sum().backward()
    return dict(model.named_parameters())


@scenario
def hooks_see_the_local_gradient(nn, optim):
    (x,) = batches(1)
    inner, seen = net(nn), []
    inner[4].bias.register_hook(lambda g: seen.append(g.clone()))
    model = nn.parallel.DistributedDataParallel(inner)
    inner[4].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    inner[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    model(x).sum().backward()
    return seen, dict(model.named_parameters())


@scenario
def backward_into_chosen_inputs(nn, optim):
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(net(nn))
    for _ in range(2):
        model(x).sum().backward(inputs=list(model.parameters()))
    return dict(model.named_parameters())


@scenario
def state_and_copies(nn, optim):
    (x,) = batches(1)
    model = nn.parallel.DistributedDataParallel(net(nn))
    model(x).sum().backward()
    state = model.state_dict()
    other = nn.parallel.DistributedDataParallel(net(nn), init_sync=False)
    loaded = other.load_state_dict(state)
    clone = copy.deepcopy(model)
    results = [loaded, state, other.module is other.get_submodule("module"), type(clone).__name__]
    for m in (clone, other):
        m(x).sum().backward()
        results.append([p.grad for p in m.parameters()])
    model.module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return results, repr(model)


@scenario
def a_group_of_some_ranks(nn, optim):
    (x,) = batches(1)
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return None
    model = nn.parallel.DistributedDataParallel(net(nn), process_group=group)
    result = steps(optim, model, [x])
    with pytest.raises(RuntimeError, match="Pickling/Unpickling are only supported"):
        pickle.dumps(model)
    return result


@scenario
def models_that_are_not_alike(nn, optim):
    batches(0)
    nn.parallel.DistributedDataParallel(nn.Linear(3, 2, bias=dist.get_rank() == 0))


def refused(nn, **options):
    (x,) = batches(1)
    nn.parallel.DistributedDataParallel(nn.Linear(3, 2), **options)(x)


for name, options in {
    "two devices": {"device_ids": [0, 1]},
    "a device for a model on the CPU": {"device_ids": [0]},
    "an output device for one": {"output_device": "cpu"},
}.items():
    SCENARIOS[name] = lambda nn, optim, options=options: refused(nn, **options)


@scenario
def nothing_to_train(nn, optim):
    nn.parallel.DistributedDataParallel(nn.ReLU())


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_rank_does_what_it_does_in_pytorch(once, name, world):
    differences = once(f"ranks of {world}", lambda: found(world))[name]
    for rank, difference in enumerate(differences):
        assert not difference, f"rank {rank}: {difference}"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    """The other ranks do not hang: their next all_reduce raises an error that gives the reason."""
    codes, written = ranks.start(tmp_path, 2, __name__, "dies")
    assert all(codes), codes
    assert "rank 1 is no more" in written[1]
    assert "Connection closed by peer" in written[0] or "Connection reset" in written[0]


@parity
def test_without_a_process_group(nn, optim):
    nn.parallel.DistributedDataParallel(nn.Linear(2, 2))


@pytest.fixture
def alone(tmp_path):
    ranks.join_group(tmp_path, "alone", 0, 1)
    yield
    dist.destroy_process_group()


def test_driven_by_hand(alone):
    """model.backward(dy) of the wrapped model averages gradients as loss.backward() does."""
    x, results = torch.randn(4, 3), []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = nnmirror.parallel.DistributedDataParallel(net(nnmirror))
        y = model(x)
        model.backward(torch.ones_like(y)) if by_hand else y.backward(torch.ones_like(y))
        model(x)  # raises if the reduction was not finished
        results.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_bucket_is_sent_before_backward_has_ended(alone, monkeypatch):
    """Communication overlaps with the rest of backward: a full bucket is sent at once."""
    all_reduce, had_grad = dist.all_reduce, []
    inner = net(nnmirror)
    model = nnmirror.parallel.DistributedDataParallel(inner, bucket_cap_mb=0.00001)

    def watched(*args, **kwargs):
        assert kwargs["async_op"]
        had_grad.append([p.grad is not None for p in inner.parameters()].count(True))
        return all_reduce(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", watched)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
    assert had_grad == [5] + [2, 3, 4, 5]  # first one bucket, then one a parameter


@pytest.mark.parametrize(
    "name", ["mixed_precision", "device_mesh", "skip_all_reduce_unused_params", "batched_grad_copy"]
)
def test_what_is_not_mirrored_is_refused(alone, name):
    with pytest.raises(NotImplementedError, match=rf"{name} .* not mirrored. What to do"):
        nnmirror.parallel.DistributedDataParallel(nnmirror.Linear(2, 2), **{name: True})


def test_methods_that_are_not_mirrored_are_refused(alone):
    model = nnmirror.parallel.DistributedDataParallel(nnmirror.Linear(2, 2))
    for call in (model.join, lambda: model.register_comm_hook(None, print)):
        with pytest.raises(NotImplementedError, match=r"not mirrored\. What to do"):
            call()


def test_a_model_that_was_converted_after_is_refused(alone):
    """In PyTorch the converted model trains without reduction, and the ranks silently diverge."""
    model = nnmirror.parallel.DistributedDataParallel(nnmirror.Linear(2, 2)).double()
    loss = model(torch.ones(1, 2, dtype=torch.float64)).sum()
    with pytest.raises(RuntimeError, match=r"\.weight|\.bias.*convert and move the module before"):
        loss.backward()


@pytest.mark.parametrize("name", ["__init__", "no_sync", "join", "register_comm_hook", "forward"])
def test_parameters_of_the_methods(name):
    both = [
        [
            (p.name, p.default, p.kind)
            for p in inspect.signature(
                getattr(nn.parallel.DistributedDataParallel, name)
            ).parameters.values()
        ]
        for nn in (torch.nn, nnmirror)
    ]
    assert both[0] == both[1]


def dies(rank):
    """What each process of `test_a_rank_that_dies_ends_the_others` does."""
    model = nnmirror.parallel.DistributedDataParallel(nnmirror.Linear(3, 2))
    for step in range(10):
        if rank == 1 and step == 2:
            raise ValueError("rank 1 is no more")
        model(torch.ones(2, 3)).sum().backward()
