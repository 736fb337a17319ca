"""state_dict and load_state_dict: either library loads a checkpoint that the other saved."""

import io
import pickle
from collections import OrderedDict

import pytest
import torch

import nnmirror

from .parity import parity, same


class Maker:
    @staticmethod
    def net(nn, width=2, extra=False):
        class Block(nn.Module):
            _version = 3

            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, width)
                self.register_buffer("count", torch.arange(3))
                self.register_buffer("scratch", torch.ones(2), persistent=False)
                self.register_buffer("no", None)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block()
                self.seq = nn.Sequential(nn.Tanh(), nn.Linear(width, 1))
                self.scale = nn.Parameter(torch.ones(()))
                if extra:
                    self.note = "first"

            def forward(self, x):
                return self.seq(self.block.linear(x)) * self.scale

        if extra:

            class WithExtra(Net):
                def get_extra_state(self):
                    return {"note": self.note}

                def set_extra_state(self, state):
                    self.note = state["note"] + " again"

            return WithExtra()
        return Net()


def facts(state):
    return {
        k: (type(v).__name__, v.requires_grad, v) if isinstance(v, torch.Tensor) else v
        for k, v in state.items()
    }


STATES = {
    "default": lambda m: m.state_dict(),
    "prefix": lambda m: m.state_dict(prefix="a."),
    "keep_vars": lambda m: m.state_dict(keep_vars=True),
    "destination": lambda m: m.state_dict(destination=OrderedDict(x=1)),
    "positional": lambda m: m.state_dict(OrderedDict(x=1), "p.", True),
    "positional none": lambda m: m.state_dict(None, "p."),
}


@pytest.mark.parametrize("name", STATES)
@parity
def test_state_dict(nn, optim, name):
    m = Maker.net(nn)
    state = STATES[name](m)
    shares = state[next(k for k in state if k.endswith("scale"))].data_ptr() == m.scale.data_ptr()
    return facts(state), dict(getattr(state, "_metadata", {})), type(state).__name__, shares


def without(state, *keys):
    return OrderedDict((k, v) for k, v in state.items() if k not in keys)


LOADS = {
    "same": lambda nn, m, s: m.load_state_dict(s),
    "plain dict": lambda nn, m, s: m.load_state_dict(dict(s)),
    "missing": lambda nn, m, s: m.load_state_dict(without(s, "scale", "block.count")),
    "missing not strict": lambda nn, m, s: m.load_state_dict(without(s, "scale"), strict=False),
    "unexpected": lambda nn, m, s: m.load_state_dict({**s, "what": torch.ones(1), "block.x.y": torch.ones(1)}),
    "unexpected not strict": lambda nn, m, s: m.load_state_dict({**s, "what": torch.ones(1)}, False),
    "unexpected below a parameter": lambda nn, m, s: m.load_state_dict({**s, "scale.x": torch.ones(1)}),
    "shapes": lambda nn, m, s: m.load_state_dict(Maker.net(nn, width=3).state_dict()),
    "shapes not strict": lambda nn, m, s: m.load_state_dict(Maker.net(nn, width=3).state_dict(), strict=False),
    "all at once": lambda nn, m, s: m.load_state_dict({**without(s, "scale"), "block.linear.bias": torch.ones(9), "z": torch.ones(1)}),
    "not a tensor": lambda nn, m, s: m.load_state_dict({**s, "scale": 3.0}),
    "no dict": lambda nn, m, s: m.load_state_dict([1]),
    "none": lambda nn, m, s: m.load_state_dict(None),
    "other dtype": lambda nn, m, s: m.load_state_dict({k: v.double() for k, v in s.items()}),
    "one element for a number": lambda nn, m, s: m.load_state_dict({**s, "scale": torch.full((1,), 5.0)}),
    "assign": lambda nn, m, s: m.load_state_dict({k: v.double() for k, v in s.items()}, assign=True),
    "assign parameters": lambda nn, m, s: m.load_state_dict({k: nn.Parameter(v, False) if v.is_floating_point() else v for k, v in s.items()}, assign=True),
    "broadcast is not copied": lambda nn, m, s: m.load_state_dict({**s, "block.linear.bias": torch.ones(1)}),
    "keep_vars": lambda nn, m, s: m.load_state_dict(Maker.net(nn).state_dict(keep_vars=True)),
    "extra state unexpected": lambda nn, m, s: m.load_state_dict({**s, "_extra_state": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
@parity
def test_load(nn, optim, name):
    other = Maker.net(nn)
    m = Maker.net(nn)
    ids = {k: id(p) for k, p in m.named_parameters()}
    try:
        result = LOADS[name](nn, m, other.state_dict())
        said = (repr(result), list(result.missing_keys), list(result.unexpected_keys))
    except Exception as e:
        said = (type(e).__name__, str(e))
    kept = {k: id(p) == ids[k] for k, p in m.named_parameters()}
    return said, facts(m.state_dict(keep_vars=True)), kept


@parity
def test_meta_load(nn, optim):
    m = nn.Linear(2, 2, device="meta")
    source = nn.Linear(2, 2)
    m.load_state_dict(source.state_dict())
    stays = m.weight.is_meta
    m.load_state_dict(source.state_dict(), assign=True)
    return stays, m.weight, m.weight.requires_grad, m(torch.ones(2))


@parity
def test_extra_state(nn, optim):
    m, log = Maker.net(nn, extra=True), []
    state = m.state_dict()
    m.load_state_dict(state)
    log.append((list(state), state["_extra_state"], m.note))
    for change in (lambda s: s.pop("_extra_state"), lambda s: s.update(_extra_state={"x": 1})):
        state = m.state_dict()
        change(state)
        try:
            m.load_state_dict(state)
        except Exception as e:
            log.append((type(e).__name__, str(e)))
    return log


@parity
def test_hooks(nn, optim):
    m, log = Maker.net(nn), []
    m.register_state_dict_pre_hook(lambda mod, prefix, keep: log.append(("pre", prefix, keep)))
    m.block.register_state_dict_post_hook(
        lambda mod, state, prefix, meta: log.append(("post", prefix, list(state), meta))
    )
    m._register_state_dict_hook(lambda mod, state, prefix, meta: {**state, "added": 1})
    state = m.state_dict()
    log.append(list(state))

    def before(mod, state, prefix, meta, strict, missing, unexpected, errors):
        log.append(("load pre", type(mod).__name__, prefix, dict(meta), strict, sorted(state)))
        state.pop("added", None)

    m.register_load_state_dict_pre_hook(before)
    m.block._register_load_state_dict_pre_hook(lambda *args: log.append(len(args)))
    handle = m.register_load_state_dict_post_hook(
        lambda mod, keys: log.append((list(keys.missing_keys), list(keys.unexpected_keys)))
    )
    m.load_state_dict(state)
    handle.remove()
    m.register_load_state_dict_post_hook(lambda mod, keys: keys.missing_keys.clear())
    log.append(repr(m.load_state_dict(without(state, "scale"))))
    return log


@parity
def test_hook_errors(nn, optim):
    log = []

    def run(action):
        try:
            action(nn.Linear(1, 1))
        except Exception as e:
            log.append((type(e).__name__, str(e)))

    def returning(*args):
        return 1

    def post_state(m):
        m.register_state_dict_post_hook(returning)
        m.state_dict()

    def twice(m):
        m._register_state_dict_hook(returning)

    def post_load(m):
        m.register_load_state_dict_post_hook(returning)
        m.load_state_dict(m.state_dict())

    for action in (post_state, twice, post_load):
        run(action)
    return log


@parity
def test_overridden_saving_and_loading(nn, optim):
    class Old(nn.Linear):
        _version = 2

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "w"] = destination.pop(prefix + "weight")

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            if metadata.get("version") == 2:
                state[prefix + "weight"] = state.pop(prefix + "w")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    m = nn.Sequential(Old(2, 2))
    state = m.state_dict()
    again = nn.Sequential(Old(2, 2))
    again.load_state_dict(state)
    return list(state), dict(state._metadata), again[0].weight, again[0].bias


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_interchange_through_a_file(direction, weights_only):
    """A model trained and saved in one library gives the same bits loaded in the other."""
    libraries = [(torch.nn, torch.optim), (nnmirror, nnmirror.optim)]
    if direction == "to torch":
        libraries.reverse()
    (first, first_optim), (second, _) = libraries
    model = Maker.net(first)
    optimizer = first_optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 2)
    for _ in range(3):
        optimizer.zero_grad()
        first.MSELoss()(model(x), torch.ones(8, 1)).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=weights_only)
    assert all(type(v) is torch.Tensor for v in state.values())
    other = Maker.net(second)
    assert repr(other.load_state_dict(state)) == "<All keys matched successfully>"
    same(model(x).detach(), other(x).detach(), "predictions")
    same(dict(model.state_dict()), dict(other.state_dict()), "states")


@parity
def test_checkpoint_of_results_and_parameters(nn, optim):
    """A checkpoint with the loss tensor in it, as in tutorials, loads with weights_only=True."""
    model = nn.Linear(2, 3)
    y = model(torch.randn(4, 2))
    loss = nn.MSELoss()(y, torch.zeros(4, 3))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    buffer = io.BytesIO()
    torch.save(
        {
            "epoch": 3,
            "model": model.state_dict(),
            "optimizer": optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict(),
            "loss": loss,
            "y": y.detach(),
            "parameters": list(model.parameters()),
            "frozen": frozen,
        },
        buffer,
    )
    buffer.seek(0)
    read = torch.load(buffer)
    assert isinstance(read["frozen"], nn.Parameter)
    return read


def test_results_in_a_file_are_plain_tensors():
    """PyTorch reads such a file without nnmirror."""
    buffer = io.BytesIO()
    torch.save(nnmirror.Linear(2, 3)(torch.randn(4, 2)), buffer)
    assert b"nnmirror" not in buffer.getvalue()


@parity
def test_attributes_of_a_parameter_are_pickled(nn, optim):
    layer = nn.Linear(2, 2)
    layer.weight.tag, layer.weight.scale = "first", [1, 2]
    layer(torch.ones(1, 2)).sum().backward()
    copy_ = pickle.loads(pickle.dumps(layer.weight))
    return copy_, copy_.tag, copy_.scale
