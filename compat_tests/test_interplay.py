"""nnmirror together with PyTorch's own graphs, data loaders, threads and processes."""

import importlib
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nnmirror

from .parity import both, cpu_only, parity, same, trained


@parity
def test_several_paths_into_pytorchs_graph(nn, optim):
    """Gradients that meet in PyTorch's part of the graph are summed in the order of one graph."""
    w = torch.randn(3, 3, requires_grad=True)
    trunk = torch.tanh(torch.randn(4, 3) @ w)
    ways = [trunk * (i + 0.3) for i in range(4)] + [trunk]
    layer = nn.Linear(3, 3)
    out = sum((layer(way) ** 2).sum() * 0.7 for way in ways)
    out.backward(retain_graph=True)
    first = w.grad.clone()
    out.backward()
    return first, w, dict(layer.named_parameters())


@parity
def test_torch_graph_freed_by_the_mirrors_backward(nn, optim):
    w = torch.randn(3, requires_grad=True)
    hidden = w.exp() * w
    nn.Linear(3, 1)(hidden).sum().backward()
    hidden.sum().backward()


@parity
def test_torch_graph_of_another_dtype_and_a_hooked_leaf(nn, optim):
    w = torch.randn(3, requires_grad=True)
    w.register_hook(lambda g: g * 2)
    layer = nn.Linear(3, 2)
    wide = (w.double() * 2).float()
    (layer(w) * layer(wide) * layer(w * 3)).sum().backward()
    return w, dict(layer.named_parameters())


class Squares(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(3, generator=generator)
        return x, (x * x).sum(0, keepdim=True)


@pytest.mark.parametrize("workers", [0, 2])
@parity
@cpu_only("a forked process cannot use a GPU")
def test_data_loader_workers(nn, optim, workers):
    loader = DataLoader(Squares(), batch_size=5, shuffle=True, num_workers=workers)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    sgd, losses = optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        for x, y in loader:
            sgd.zero_grad()
            loss = nn.MSELoss()(model(x), y)
            loss.backward()
            sgd.step()
            losses.append(loss.detach())
    return losses, dict(model.named_parameters())


@parity
def test_a_data_set_of_a_models_outputs(nn, optim):
    """Detached outputs can be batched by a DataLoader, and so can outputs that require grad."""
    model = nn.Linear(3, 2)
    outputs = model(torch.randn(8, 3))
    batches = list(DataLoader(TensorDataset(outputs.detach()), batch_size=3))
    (tracked,) = next(iter(DataLoader(TensorDataset(outputs), batch_size=8)))
    tracked.sum().backward()
    return batches, tracked, dict(model.named_parameters())


@parity
@cpu_only("a forked process cannot use a GPU")
def test_a_queue_to_another_process(nn, optim):
    """A non-leaf that requires grad is refused, as in PyTorch; a parameter shares its memory."""
    model, queue = nn.Linear(3, 2), torch.multiprocessing.get_context("fork").SimpleQueue()
    output = model(torch.ones(3))
    for way in (lambda: queue.put(output), lambda: queue.put({"kept": [output * 2]})):
        with pytest.raises(RuntimeError, match=r"Cowardly refusing.*call detach\(\)"):
            way()
    queue.put([model.weight, output.detach(), model])
    weight, values, whole = queue.get()
    with torch.no_grad():
        weight.fill_(2.0)
    return model.weight, weight, values, dict(whole.named_parameters())


def _train(nn, optim, seed, results):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x, t = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)
    results[seed] = trained(nn, optim, model, x, t, steps=40, momentum=0.9, lr=0.01)


def test_models_trained_in_several_threads_at_once():
    found = {}
    for nn, optim in ((torch.nn, torch.optim), (nnmirror, nnmirror.optim)):
        results = {}
        threads = [threading.Thread(target=_train, args=(nn, optim, i, results)) for i in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        found[nn] = [results[i] for i in range(6)]
    same(found[torch.nn], found[nnmirror], "threads")


def test_one_model_used_by_several_threads_at_once():
    """Each thread's backward is added to the same .grad; no gradient is lost."""
    model, x = nnmirror.Linear(3, 1), torch.ones(1, 3)

    def work():
        for _ in range(50):
            model(x).sum().backward()

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    sys.setswitchinterval(switch)
    assert torch.equal(model.weight.grad, torch.full((1, 3), 200.0))


@pytest.mark.slow
def test_a_forked_process_trains_as_well():
    code = """
import torch, nnmirror as nn
from nnmirror import optim
import torch.multiprocessing as mp

def work(model, queue):
    torch.set_num_threads(1)
    loss = model(torch.ones(2, 3)).pow(2).sum()
    loss.backward()
    optim.SGD(model.parameters(), lr=0.1).step()
    queue.put(1)

if __name__ == "__main__":
    model = nn.Linear(3, 2)
    model.share_memory()
    before = model.weight.detach().clone()
    queue = mp.get_context("fork").SimpleQueue()
    p = mp.get_context("fork").Process(target=work, args=(model, queue))
    p.start(); p.join()
    assert p.exitcode == 0
    assert not torch.equal(before, model.weight.detach())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_both_backends_side_by_side_in_one_script():
    """Using one library does not change the results of the other."""

    def script(nn, optim):
        torch.manual_seed(0)
        other = nnmirror if nn is torch.nn else torch.nn
        model = nn.Linear(3, 2)
        state = torch.get_rng_state()
        other.Linear(3, 2)(torch.ones(1, 3)).sum().backward()
        torch.set_rng_state(state)
        return trained(nn, optim, model, torch.randn(4, 3), torch.randn(4, 2))

    expected, actual = both(script)
    same(expected.value, actual.value, "result")


@pytest.mark.parametrize("direct", [False, True])
@parity
def test_a_gradient_through_torchs_own_graph(nn, optim, direct):
    """grad() and backward(inputs=...) continue into PyTorch's own graph, as backward() does."""
    x = torch.ones(3, requires_grad=True)
    layer = nn.Linear(3, 2)

    def loss():
        y = layer(x.exp()).sum()
        return y + layer(x).sum() if direct else y

    found = [*torch.autograd.grad(loss(), x), *torch.autograd.grad(loss(), x, allow_unused=True)]
    found += torch.autograd.grad(loss(), layer.weight)
    loss().backward(inputs=[x])
    loss().backward(inputs=[x, layer.weight])
    loss().backward()
    return [*found, x.grad, layer.weight.grad, layer.bias.grad]


@parity
def test_set_of_a_tensor_that_requires_grad(nn, optim):
    """`set_` has no derivative: an error where it would be recorded, allowed under no_grad."""
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        p.set_(torch.zeros(3))
    with pytest.raises(RuntimeError, match="derivative for set_ is not implemented"):
        (p * 2).set_(torch.zeros(3)).sum().backward()
    with torch.no_grad():
        p.set_(torch.full((3,), 2.0))
    (p * p).sum().backward()
    return p, p.grad


def _made_of_numbers(x: torch.Tensor, n: int):
    return torch.full_like(x, 2.0) + torch.full([n], 0.5) + torch.arange(n) + torch.as_tensor(1.0)


def test_scripted_functions_call_what_is_replaced_in_torch():
    """PyTorch scripts classes of its own on import, of torch.distributed.optim for example."""
    importlib.import_module("torch.distributed.optim")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(_made_of_numbers)
    assert torch.equal(scripted(torch.zeros(2), 2), torch.tensor([3.5, 4.5]))
