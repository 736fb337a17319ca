"""Libraries that a training script uses, run on both backends.

What works with mirrored models gives the same bits. What requires a `torch.nn.Module` gets
`nnmirror.to_torch(model)`, and must raise if it is given the mirrored model itself. The table in
nnmirror/libraries.md is compared with the libraries tested here.
"""

import copy
import functools
import inspect
import io
import pickle
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.utils.prune
from torch.optim import swa_utils
from torch.utils import data

import nnmirror

from .parity import cpu_only, exact_only, parity, same, same_bits, trained

AS_IT_IS, BRIDGED = set(), set()


def as_it_is(library):
    """Register that the test runs `library` with mirrored models, parameters and tensors."""
    AS_IT_IS.add(library)
    return lambda test: test


def bridged(library):
    """Register that the test runs `library` with `to_torch(model)`."""
    BRIDGED.add(library)
    return lambda test: test


def quiet(test):
    """Ignore the library's own warnings, which come once per process."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with warnings.catch_warnings(action="ignore"):
            return test(*args, **kwargs)

    return run


def for_torch(nn, model):
    return nnmirror.to_torch(model) if nn is nnmirror else model


def small(nn):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))


def with_grads(nn, scale=10.0):
    net = small(nn)
    (net(torch.randn(5, 3)) * scale).pow(2).sum().backward()
    return net


def parameters(model):
    return dict(model.named_parameters())


# -- torch.optim ---------------------------------------------------------------------------

OPTIMISERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and name not in ("Optimizer", "SparseAdam")
)
SCHEDULES = {
    "LambdaLR": lambda s, o: s.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda s, o: s.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda s, o: s.StepLR(o, 2),
    "MultiStepLR": lambda s, o: s.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda s, o: s.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda s, o: s.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda s, o: s.ExponentialLR(o, 0.8),
    "SequentialLR": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o, 0.1), s.ExponentialLR(o, 0.9)], [2]),
    "CosineAnnealingLR": lambda s, o: s.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda s, o: s.ChainedScheduler([s.ConstantLR(o, 0.1), s.StepLR(o, 1)]),
    "ReduceLROnPlateau": lambda s, o: s.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "CyclicLR": lambda s, o: s.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=has_momentum(o)),
    "CosineAnnealingWarmRestarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda s, o: s.OneCycleLR(o, 1e-2, 5, cycle_momentum=has_momentum(o)),
    "PolynomialLR": lambda s, o: s.PolynomialLR(o, 4),
    "SWALR": lambda s, o: swa_utils.SWALR(o, 1e-3, anneal_epochs=3),
}  # fmt: skip


def has_momentum(optimizer):
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def stepped(nn, name, schedule=None, steps=5, **options):
    """A net trained by one of torch.optim's own optimisers, and that optimiser."""
    model = small(nn)
    held = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]  # Muon needs matrices
    optimizer = getattr(torch.optim, name)(held, lr=0.01, **options)
    scheduler = None if schedule is None else schedule(torch.optim.lr_scheduler, optimizer)
    go_on(nn, model, optimizer, scheduler, steps)
    return model, optimizer


def go_on(nn, model, optimizer, scheduler=None, steps=3):
    x, t = torch.randn(6, 3), torch.randn(6, 2)

    def closure():
        optimizer.zero_grad()
        loss = nn.MSELoss()(model(x), t)
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()


def test_every_scheduler_is_tried():
    every = {*torch.optim.lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}
    assert set(SCHEDULES) == every


@as_it_is("torch.optim")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMISERS)
@parity
@exact_only("LBFGS divides by differences of gradients: a last bit in BatchNorm1d's grows")
def test_every_optimiser_with_every_scheduler(nn, optim, name, schedule):
    model, optimizer = stepped(nn, name, SCHEDULES[schedule])
    return parameters(model), [group["lr"] for group in optimizer.param_groups]


OPTIONS = {
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "line search": {"line_search_fn": "strong_wolfe"},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in OPTIMISERS
        for options, given in OPTIONS.items()
        if set(given) <= set(inspect.signature(getattr(torch.optim, name)).parameters)
    ],
)
@parity
@exact_only("LBFGS divides by differences of gradients: a last bit in BatchNorm1d's grows")
def test_options_and_a_loaded_state(nn, optim, name, options):
    """The state goes through a file, as in a run that was interrupted."""
    model, optimizer = stepped(nn, name, **OPTIONS[options])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    again, second = stepped(nn, name, steps=1, **OPTIONS[options])
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    go_on(nn, again, second)
    return parameters(model), parameters(again), second.state_dict()["state"]


@parity
def test_sparse_adam(nn, optim):
    """SparseAdam steps with sparse gradients and refuses dense ones."""
    layer = nn.Linear(3, 4)
    adam = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    for p in layer.parameters():
        p.grad = torch.ones(p.shape).to_sparse()
    adam.step()
    changed = [p.detach().clone() for p in layer.parameters()]
    adam.zero_grad()
    layer(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        adam.step()
    return changed


@parity
def test_averages_of_parameters(nn, optim):
    nets = small(nn), small(nn)
    old, new = ([p.detach() for p in net.parameters()] for net in nets)
    swa_utils.get_ema_multi_avg_fn(0.9)(old, new, 1)
    swa_utils.get_swa_multi_avg_fn()(old, new, torch.tensor(3))
    return [parameters(net) for net in nets]


@bridged("torch.optim.swa_utils")
@parity
def test_averaged_model_and_update_bn(nn, optim):
    """The average is that of the mirrored weights, which the torch twin shares."""
    model = small(nn)
    twin = for_torch(nn, model)
    average = swa_utils.AveragedModel(twin)
    for _ in range(3):
        trained(nn, optim, model, torch.randn(5, 3), torch.randn(5, 2))
        average.update_parameters(twin)
    batches = [torch.randn(6, 3) for _ in range(4)]
    swa_utils.update_bn(batches, average)
    if nn is nnmirror:
        with pytest.raises(TypeError, match=r"update_bn would update nothing; give it .*to_torch"):
            swa_utils.update_bn(batches, model)
    swa_utils.update_bn(batches, twin)
    return parameters(average), list(average.buffers()), list(model.buffers())


# -- torch.utils.data ----------------------------------------------------------------------


class Features(data.Dataset):
    """Outputs of a model that runs in the worker process."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 10

    def __getitem__(self, i):
        with torch.no_grad():
            return {"x": self.model(torch.full((3,), i / 10)), "i": i}


class Stream(data.IterableDataset):
    def __iter__(self):
        worker = data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, 12, step):
            yield torch.full((3,), float(i)), torch.full((2,), i / 10)


def numbers():
    return data.TensorDataset(torch.randn(20, 3), torch.randn(20, 2))


LOADERS = {
    "shuffled": lambda: data.DataLoader(numbers(), 6, shuffle=True),
    "workers": lambda: data.DataLoader(numbers(), 6, shuffle=True, num_workers=2),
    "kept workers": lambda: data.DataLoader(
        numbers(), 6, num_workers=2, persistent_workers=True, prefetch_factor=3),
    "stream": lambda: data.DataLoader(Stream(), 4),
    "stream of workers": lambda: data.DataLoader(Stream(), 4, num_workers=2),
    "weights": lambda: data.DataLoader(
        numbers(), 6, sampler=data.WeightedRandomSampler(torch.rand(20), 30)),
    "batches": lambda: data.DataLoader(
        numbers(), batch_sampler=data.BatchSampler(data.RandomSampler(range(20)), 7, True)),
    "generator": lambda: data.DataLoader(
        numbers(), 6, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "split": lambda: data.DataLoader(data.random_split(numbers(), [0.7, 0.3])[0], 5),
    "several": lambda: data.DataLoader(
        data.ConcatDataset([data.Subset(numbers(), range(5)), numbers()]), 8, drop_last=True),
    "stacked": lambda: data.DataLoader(
        data.StackDataset(torch.randn(9, 3), torch.randn(9, 2)), 5),
    "collated": lambda: data.DataLoader(
        numbers(), 6, collate_fn=lambda rows: [torch.stack(c) for c in zip(*rows, strict=True)]),
}  # fmt: skip


@as_it_is("torch.utils.data")
@pytest.mark.parametrize("name", LOADERS)
@parity
@cpu_only("a forked process cannot use a GPU")
def test_training_from_a_loader(nn, optim, name):
    model, loader = small(nn), LOADERS[name]()
    return [
        trained(nn, optim, model, x, t, steps=1, lr=0.01)[0] for _ in range(2) for x, t in loader
    ], parameters(model)


@pytest.mark.parametrize("workers", [0, 2])
@parity
@cpu_only("a forked process cannot use a GPU")
def test_a_model_that_runs_in_the_workers(nn, optim, workers):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    return list(data.DataLoader(Features(model), 4, num_workers=workers))


# -- files ---------------------------------------------------------------------------------


@as_it_is("torch.save")
@pytest.mark.parametrize("what", ["state", "parameters", "whole", "mapped"])
@parity
def test_a_model_through_a_file(nn, optim, what, tmp_path):
    model, path = (
        with_grads(nn),
        tmp_path / f"{nn.__name__}.pt",
    )  # one file each, as one stays mapped
    if what == "whole":
        torch.save(model, path)
        new = torch.load(path, weights_only=False)
    elif what == "parameters":
        torch.save(parameters(model), path)
        new = small(nn)
        new.load_state_dict(torch.load(path), strict=False)
    else:
        torch.save(model.state_dict(), path)
        new = small(nn)
        new.load_state_dict(torch.load(path, mmap=what == "mapped"), assign=what == "mapped")
    return parameters(new), trained(nn, optim, new, torch.randn(5, 3), torch.randn(5, 2))


@as_it_is("torch.distributed.checkpoint")
@parity
@quiet
def test_a_distributed_checkpoint_of_one_process(nn, optim, tmp_path):
    model = small(nn)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    loaded = {"model": small(nn).state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    return loaded


@as_it_is("safetensors")
@parity
def test_safetensors(nn, optim, tmp_path):
    """Both libraries write the same bytes; tied weights are written once."""
    model, path = with_grads(nn), str(tmp_path / "model.safetensors")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    found = [safetensors.torch.save(parameters(model)), safetensors.torch.save(model.state_dict())]
    for each in (model, tied):
        safetensors.torch.save_model(each, path)
        found.append(Path(path).read_bytes())
        new = copy.deepcopy(each)
        with torch.no_grad():
            for p in new.parameters():
                p.zero_()
        found.append(safetensors.torch.load_model(new, path))
        found.append(parameters(new))
    return found


# -- TensorBoard ---------------------------------------------------------------------------


def events(directory):
    """What TensorBoard reads from the files: names, steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory), {"histograms": 0, "scalars": 0, "images": 0})
    read.Reload()
    return (
        {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]},
        {
            tag: [(e.step, list(e.histogram_value.bucket)) for e in read.Histograms(tag)]
            for tag in read.Tags()["histograms"]
        },
        {tag: read.Images(tag)[0].encoded_image_string for tag in read.Tags()["images"]},
    )


@as_it_is("torch.utils.tensorboard")
@parity
@quiet
def test_weights_and_gradients_in_tensorboard(nn, optim, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    model = small(nn)
    sgd, log = optim.SGD(model.parameters(), lr=0.1), tmp_path / nn.__name__
    with SummaryWriter(log) as writer:
        for step in range(3):
            sgd.zero_grad()
            loss = nn.MSELoss()(model(torch.randn(5, 3)), torch.randn(5, 2))
            loss.backward()
            sgd.step()
            writer.add_scalar("loss", loss, step)
            writer.add_scalars("losses", {"tracked": loss, "item": loss.item()}, step)
            for name, p in model.named_parameters():
                writer.add_histogram(name, p, step)
                writer.add_histogram(f"{name}.grad", p.grad, step)
                writer.add_scalar(f"{name}.norm", p.grad.norm(), step)
        writer.add_image("first layer", model[0].weight, dataformats="HW")
        writer.add_embedding(model[0].weight)
        writer.add_pr_curve("pr", torch.tensor([0, 1, 1, 0]), model[0].bias.sigmoid())
        writer.add_hparams({"lr": 0.1}, {"end": loss})
    return events(log)


@bridged("SummaryWriter.add_graph")
@parity
@quiet
def test_the_graph_in_tensorboard(nn, optim, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    log = tmp_path / nn.__name__
    with SummaryWriter(log) as writer:
        writer.add_graph(for_torch(nn, small(nn)), torch.randn(5, 3))
    read = EventAccumulator(str(log))
    read.Reload()
    return [(node.op, node.name) for node in read.Graph().node]


# -- scikit-learn, skorch ------------------------------------------------------------------


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x[:400].astype(np.float32), y[:400]


def estimator(nn, optim):
    """An estimator for scikit-learn that a user writes around a net."""
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Net(ClassifierMixin, BaseEstimator):
        def __init__(self, width=16, epochs=3):
            self.width = width
            self.epochs = epochs

        def fit(self, x, y):
            torch.manual_seed(0)
            self.classes_ = np.unique(y)
            self.model_ = nn.Sequential(
                nn.Linear(x.shape[1], self.width), nn.ReLU(), nn.Linear(self.width, 10)
            )
            adam = optim.Adam(self.model_.parameters(), lr=0.01)
            rows = data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
            for _ in range(self.epochs):
                for batch, target in data.DataLoader(rows, 32, shuffle=True):
                    adam.zero_grad()
                    nn.CrossEntropyLoss()(self.model_(batch), target).backward()
                    adam.step()
            return self

        def predict_proba(self, x):
            with torch.no_grad():
                return self.model_(torch.from_numpy(x)).softmax(1).numpy()

        def predict(self, x):
            return self.predict_proba(x).argmax(1)

    return Net


@pytest.mark.slow
@as_it_is("sklearn")
@parity
@cpu_only("its estimator makes tensors of NumPy arrays and back")
@quiet
def test_a_scikit_learn_pipeline(nn, optim):
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = digits()
    pipeline = make_pipeline(StandardScaler(), estimator(nn, optim)())
    grid = GridSearchCV(pipeline, {"net__width": [4, 16]}, cv=2)
    grid.fit(x, y)
    chances = grid.predict_proba(x)
    guess = torch.from_numpy(chances).argmax(1)
    model = grid.best_estimator_["net"].model_
    return (
        grid.best_params_,
        grid.cv_results_["mean_test_score"].tolist(),
        torch.from_numpy(chances),
        accuracy_score(torch.from_numpy(y), guess),
        float(log_loss(y, chances)),
        confusion_matrix(y, guess).tolist(),
        parameters(model),
        parameters(pickle.loads(pickle.dumps(model))),
    )


def skorch_net(module, **settings):
    from skorch import NeuralNetClassifier

    return NeuralNetClassifier(
        module,
        criterion=torch.nn.CrossEntropyLoss,
        **{"max_epochs": 3, "lr": 0.1, "batch_size": 64, "verbose": 0, **settings},
    )


def history(net):
    return [
        (float(e["train_loss"]), float(e["valid_loss"]), float(e["valid_acc"])) for e in net.history
    ]


def classifier(nn):
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


@bridged("skorch")
@parity
@cpu_only("skorch moves batches to a device of its own, the CPU")
@quiet
def test_skorch(nn, optim, tmp_path):
    """PyTorch trains the twin; the mirrored model shares its weights."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler

    x, y = digits()
    model = classifier(nn)
    callbacks = [EarlyStopping(), GradientNormClipping(1.0), LRScheduler("StepLR", step_size=2)]
    net = skorch_net(for_torch(nn, model), optimizer=torch.optim.Adam, callbacks=callbacks, lr=0.01)
    pipeline = make_pipeline(StandardScaler(), net).fit(x, y)
    with torch.no_grad():
        own = model.eval()(torch.from_numpy(pipeline[0].transform(x))).softmax(1)
    assert torch.equal(own, torch.from_numpy(pipeline.predict_proba(x)))
    net.save_params(f_params=tmp_path / "params.pt")
    saved = torch.load(tmp_path / "params.pt")
    return history(net), pipeline.score(x, y), dict(model.state_dict()), saved


# -- others --------------------------------------------------------------------------------


@as_it_is("tqdm")
@parity
@quiet
@exact_only("what is printed has as many digits as there are")
def test_tqdm(nn, optim):
    from tqdm import tqdm

    model, said = small(nn), io.StringIO()
    with tqdm(range(3), file=said, mininterval=0) as bar:
        for _ in bar:
            losses, _ = trained(nn, optim, model, torch.randn(5, 3), torch.randn(5, 2))
            bar.set_description(f"{losses[-1]:.6f}")
            bar.set_postfix(tracked=losses[-1], item=losses[-1].item())
    return re.findall(r"0\.\d{6}|tracked=tensor.*?\)|item=[\d.]+", said.getvalue())


@as_it_is("torchinfo")
@parity
@quiet
def test_torchinfo(nn, optim):
    import torchinfo

    return str(torchinfo.summary(small(nn), input_size=(5, 3), verbose=0))


@as_it_is("torchmetrics")
@parity
@quiet
def test_torchmetrics(nn, optim):
    """Metrics of tracked outputs, and a backward from a loss that a metric computed."""
    import torchmetrics

    model, y = small(nn), torch.tensor([0, 1, 0, 1, 1])
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
    mean, error = torchmetrics.MeanMetric(), torchmetrics.MeanSquaredError()
    for _ in range(3):
        output = model(torch.randn(5, 3))
        accuracy.update(output, y)
        mean.update(output.mean().detach())
        step = error(output, torch.zeros(5, 2))
    step.backward()
    return accuracy.compute(), mean.compute(), error.compute().detach(), parameters(model)


@as_it_is("ignite")
@parity
@quiet
def test_ignite(nn, optim):
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy, Loss

    model, criterion = small(nn), nn.CrossEntropyLoss()
    batches = [(torch.randn(5, 3), torch.randint(0, 2, (5,))) for _ in range(4)]
    sgd = optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, sgd, criterion)
    metrics = {"accuracy": Accuracy(), "loss": Loss(criterion)}
    evaluator, seen = create_supervised_evaluator(model, metrics=metrics), []

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine):
        seen.append((engine.state.output, dict(evaluator.run(batches).metrics)))

    trainer.run(batches, max_epochs=3)
    return seen, parameters(model)


@as_it_is("torch.profiler")
@parity
@quiet
def test_profilers_and_counters(nn, optim):
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    with torch.profiler.profile() as seen:
        model = with_grads(nn)
    assert "aten::addmm" in {event.key for event in seen.key_averages()}
    assert Timer("m(x)", globals={"m": model, "x": torch.ones(5, 3)}).timeit(2).mean > 0
    with FlopCounterMode(display=False) as counted:
        with_grads(nn)
    return counted.get_total_flops()


@as_it_is("torch.utils.checkpoint")
@parity
def test_checkpointing(nn, optim):
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    model, x = classifier(nn), torch.randn(5, 64)
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    checkpoint_sequential(model, 2, x, use_reentrant=False).sum().backward()
    return parameters(model)


# -- torch.nn.utils and torch.nn.init ------------------------------------------------------

U = torch.nn.utils


def of_a_list(model):
    return [p.grad for p in model.parameters()]


def pruned(net, how):
    how(net)
    net.zero_grad()
    net(torch.randn(5, 3)).sum().backward()
    before = parameters(net)
    U.prune.remove(net[0], "weight")
    return before, dict(net.state_dict())


def normed(net, old):
    layer = old(net[0])
    for _ in range(2):
        layer(torch.randn(5, 3)).sum().backward()
    return parameters(layer), dict(layer.state_dict())


def from_vector(net):
    vector = U.parameters_to_vector(net.parameters())
    (vector * 2).square().sum().backward()
    U.vector_to_parameters(vector * 0.5, net.parameters())
    return vector.detach(), parameters(net)


UTILS = {
    "clip_grad_norm_": lambda m: U.clip_grad_norm_(m.parameters(), 1.0),
    "clip_grad_norm": lambda m: U.clip_grad_norm(m.parameters(), 1.0),
    "clip_grad_norm_ inf": lambda m: U.clip_grad_norm_(m.parameters(), 1.0, float("inf")),
    "clip_grad_value_": lambda m: U.clip_grad_value_(m.parameters(), 0.1),
    "get_total_norm": lambda m: U.get_total_norm(of_a_list(m)),
    "clip_grads_with_norm_": lambda m: U.clip_grads_with_norm_(
        m.parameters(), 1.0, U.get_total_norm(of_a_list(m))),
    "parameters_to_vector vector_to_parameters": from_vector,
    "prune.l1_unstructured": lambda m: pruned(
        m, lambda m: U.prune.l1_unstructured(m[0], "weight", amount=0.3)),
    "prune.random_structured": lambda m: pruned(
        m, lambda m: U.prune.random_structured(m[0], "weight", amount=1, dim=0)),
    "prune.ln_structured": lambda m: pruned(
        m, lambda m: U.prune.ln_structured(m[0], "weight", amount=1, n=2, dim=1)),
    "prune.global_unstructured": lambda m: pruned(m, lambda m: U.prune.global_unstructured(
        [(m[0], "weight"), (m[3], "weight")], U.prune.L1Unstructured, amount=4)),
    "spectral_norm": lambda m: normed(m, U.spectral_norm),
    "remove_spectral_norm": lambda m: U.remove_spectral_norm(U.spectral_norm(m[0])).weight,
    "convert_conv3d_weight_memory_format": lambda m: parameters(
        U.convert_conv3d_weight_memory_format(m, torch.channels_last_3d)),
    "convert_conv2d_weight_memory_format": lambda m: parameters(
        U.convert_conv2d_weight_memory_format(m, torch.channels_last)),
    "rnn.unpad_sequence": lambda m: sum(
        y.square().sum()
        for y in U.rnn.unpad_sequence(m[0](torch.randn(2, 4, 3)), torch.tensor([4, 2]), True)
    ).backward(),
    "functional_call": lambda m: torch.func.functional_call(
        m, {k: v * 2 for k, v in m.named_parameters()}, torch.randn(5, 3)).detach(),
    "init": lambda m: [
        torch.nn.init.kaiming_normal_(m[0].weight), torch.nn.init.zeros_(m[0].bias),
        torch.nn.init.orthogonal_(m[3].weight), torch.nn.init.trunc_normal_(m[3].bias)],
}  # fmt: skip


@as_it_is("torch.nn.utils")
@pytest.mark.parametrize("name", UTILS)
@parity
@quiet
def test_torch_nn_utils(nn, optim, name):
    model = with_grads(nn)
    return UTILS[name](model), parameters(model)


INTO_OTHER_PARTS = {
    "weight_norm": lambda m: normed(m, U.weight_norm),
    "remove_weight_norm": lambda m: parameters(U.remove_weight_norm(U.weight_norm(m[0]))),
    "parametrizations.weight_norm": lambda m: normed(m, U.parametrizations.weight_norm),
    "parametrizations.spectral_norm": lambda m: normed(m, U.parametrizations.spectral_norm),
    "parametrizations.orthogonal": lambda m: normed(m, U.parametrizations.orthogonal),
    "fuse_linear_bn_eval": lambda m: parameters(
        U.fuse_linear_bn_eval(m[0].eval(), m[2].eval())),
    "fuse_linear_bn_weights": lambda m: U.fuse_linear_bn_weights(
        *m[0].parameters(), m[2].running_mean, m[2].running_var, 1e-5, *m[2].parameters()),
}  # fmt: skip


def test_every_function_of_torch_nn_utils_is_tried():
    functions = {name for name, f in vars(U).items() if inspect.isfunction(f) and name[0] != "_"}
    tried = {name for key in (*UTILS, *INTO_OTHER_PARTS) for name in key.split()}
    assert functions - tried == {"fuse_conv_bn_eval", "fuse_conv_bn_weights", "skip_init"}


def test_sequences_are_padded_or_refused():
    """Padding has no backward rule: tensors that require grad are refused."""
    plain = [torch.ones(n, 2) for n in (4, 2)]
    tracked = [nnmirror.Linear(2, 3)(x) for x in plain]
    for pad in (U.rnn.pad_sequence, U.rnn.pack_sequence):
        pad(plain)
        pad([y.detach() for y in tracked])
        with pytest.raises(NotImplementedError, match="pad_sequence has no backward rule"):
            pad(tracked)


@bridged("torch.nn.utils.parametrize")
@pytest.mark.parametrize("name", INTO_OTHER_PARTS)
@parity
@quiet
def test_torch_nn_utils_that_build_modules(nn, optim, name):
    """These functions put PyTorch's own modules, parameters or functions into the model."""
    model = for_torch(nn, small(nn))
    return INTO_OTHER_PARTS[name](model), parameters(model)


# -- what insists on a torch.nn.Module -----------------------------------------------------


def skorch_fit(model, optim):
    x, y = digits()
    skorch_net(lambda: model, optimizer=optim.SGD).fit(x, y)


def onnx(model, path):
    """The output that ONNX Runtime computes for an input of ones."""
    import onnxruntime

    x = torch.ones(5, 3)
    torch.onnx.export(model, (x,), str(path), dynamo=True, input_names=["x"], verbose=False)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.slow
@bridged("torch.onnx")
@quiet
def test_onnx(tmp_path):
    """onnxruntime has kernels of its own: close, not the same bits."""
    model = with_grads(nnmirror).eval()
    with torch.no_grad():
        expected = model(torch.ones(5, 3))
    torch.testing.assert_close(onnx(nnmirror.to_torch(model), tmp_path / "m.onnx"), expected)


@bridged("torch.export")
@bridged("torch.jit.trace")
@parity
@quiet
def test_graphs_of_the_model(nn, optim):
    model, x = with_grads(nn).eval(), torch.randn(5, 3)
    twin = for_torch(nn, model)
    return [
        torch.export.export(twin, (x,)).module()(x).detach(),
        torch.jit.trace(twin, (x,))(x).detach(),
        model(x).detach(),
    ]


GIVEN_THE_MODEL = {
    "torch.onnx": lambda m, d: onnx(m, d / "m.onnx"),
    "torch.export": lambda m, d: torch.export.export(m, (torch.ones(5, 3),)),
    "torch.jit.trace": lambda m, d: torch.jit.trace(m, (torch.ones(5, 3),)),
    "SummaryWriter.add_graph": lambda m, d: graph(m, d),
    "skorch": lambda m, d: skorch_fit(m, torch.optim),
    "skorch, mirrored optimiser": lambda m, d: skorch_fit(m, nnmirror.optim),
    "AveragedModel": lambda m, d: swa_utils.AveragedModel(m),
    "skip_init": lambda m, d: U.skip_init(type(m[0]), 3, 4),
    **{name: lambda m, d, f=f: f(m) for name, f in INTO_OTHER_PARTS.items()},
}


def graph(model, directory):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory) as writer:
        writer.add_graph(model, torch.ones(5, 3))


@pytest.mark.parametrize("name", GIVEN_THE_MODEL)
@quiet
def test_given_a_mirrored_model_they_raise(name, tmp_path):
    """An error of any kind will do, but no net may silently be trained in part."""
    model = small(nnmirror)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        GIVEN_THE_MODEL[name](model, tmp_path)
    after = model.state_dict()
    assert all(same_bits(before[key], after[key]) for key in before if key in after)


# -- the text ------------------------------------------------------------------------------

TEXT = (Path(__file__).parent.parent / "nnmirror" / "libraries.md").read_text()
SECTION = TEXT[TEXT.index("## Libraries") :]


def test_the_table_of_libraries():
    """The table lists the libraries tested here, as they are used here, and no others."""
    rows = re.findall(r"^\| (`.*?) \| (as it is|bridge)", SECTION, re.M)
    named = {kind: [] for _, kind in rows}
    for names, kind in rows:
        named[kind] += re.findall(r"`([\w.]+)`", names)
    assert sorted(named["as it is"]) == sorted(AS_IT_IS)
    assert sorted(named["bridge"]) == sorted(BRIDGED)


def blocks():
    """The code below the table: trained by PyTorch's backward, and by the mirror's."""
    return re.findall(r"```python\n(.*?)```", SECTION, re.S)


@quiet
def test_the_bridges_in_the_text(tmp_path, monkeypatch):
    """Both train the mirrored model in skorch with PyTorch's bits; the second by the mirror."""
    monkeypatch.chdir(tmp_path)
    x, y = digits()

    def seeded(nn):
        torch.manual_seed(0)
        return classifier(nn)

    expected = seeded(torch.nn)
    reference = skorch_net(expected, optimizer=torch.optim.Adam, lr=0.01).fit(x, y)
    twin, shell = blocks()
    for code, held in ((twin, torch.nn.Parameter), (shell, nnmirror.Parameter)):
        module = types.ModuleType("of_the_text")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # where pickle finds the class
        scope = vars(module)
        scope.update(model=seeded(nnmirror), X=x, y=y)
        exec(code, scope)
        same(history(reference), history(scope["net"]), "history")
        same(dict(expected.state_dict()), dict(scope["model"].state_dict()), "weights")
        same(
            dict(reference.module_.state_dict()), dict(scope["net"].module_.state_dict()), "twin's"
        )
        assert {type(p) for p in scope["net"].module_.parameters()} == {held}
        goes_on = []
        for net in (copy.deepcopy(reference), copy.deepcopy(scope["net"]), scope["net"]):
            torch.manual_seed(1)
            goes_on.append(history(net.partial_fit(x, y)))
        assert goes_on[0] == goes_on[1] == goes_on[2]


TAKERS = {
    "trace": lambda m, x: torch.jit.trace(m, x)(x),
    "trace_module": lambda m, x: torch.jit.trace_module(m, {"forward": x})(x),
    "script": lambda m, x: torch.jit.script(m)(x),
    "symbolic_trace": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "parametrize": lambda m, x: torch.nn.utils.parametrize.register_parametrization(
        m[0], "weight", torch.nn.Identity())(x),
    "weight_norm": lambda m, x: torch.nn.utils.parametrizations.weight_norm(m[0])(x),
    "orthogonal": lambda m, x: torch.nn.utils.parametrizations.orthogonal(m[0])(x),
    "func.grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "jacrev": lambda m, x: torch.func.jacrev(lambda x: m(x))(x[0]),
    "vmap": lambda m, x: torch.vmap(lambda x: m(x))(x),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKERS)
@quiet
def test_the_way_that_a_refusal_names_works(name):
    """The error names `to_torch`, which works; the model is not changed by the failed call."""
    torch.manual_seed(0)
    model = nnmirror.Sequential(nnmirror.Linear(2, 3), nnmirror.Tanh(), nnmirror.Linear(3, 1))
    x, take = torch.randn(4, 2), TAKERS[name]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, NotImplementedError), match=r"nnmirror: .*nnmirror\.to_torch\("):
        take(model, x)
    same(dict(before), dict(model.state_dict()), name)
    take(nnmirror.to_torch(model), x)


def test_transforms_of_what_needs_no_gradient():
    """The refusal of torch.func's transforms also names this: freeze the parameters."""
    nn = nnmirror
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(4, 2)
    model.requires_grad_(False)
    twin = nnmirror.to_torch(model)
    for name in ("func.grad", "jacrev", "vmap"):
        same(TAKERS[name](twin, x), TAKERS[name](model, x), name)


def test_the_alternative_for_beta_and_dirichlet():
    p = nnmirror.Parameter(torch.tensor([0.5, 2.0]))
    for law in (
        lambda: torch.distributions.Beta(p[0], p[1]),
        lambda: torch.distributions.Dirichlet(p),
    ):
        with pytest.raises(NotImplementedError, match=r"divide Gamma\(concentration, 1\)\.rsample"):
            law().rsample()
    torch.manual_seed(0)
    drawn = torch.distributions.Gamma(p.expand(20000, 2), 1).rsample()
    drawn = drawn / drawn.sum(-1, keepdim=True)
    # E x0 = a / (a + b), and its gradient (b, -a) / (a + b)^2
    drawn[:, 0].mean().backward()
    assert abs(drawn[:, 0].mean().item() - 0.2) < 0.01
    torch.testing.assert_close(p.grad, torch.tensor([0.32, -0.08]), atol=0.02, rtol=0)
