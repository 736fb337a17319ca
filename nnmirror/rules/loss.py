"""The losses: squared and absolute, those between, of probabilities and of classes.

`g` is the gradient of the loss, `n` the number of elements for the mean, else one. Where PyTorch's
kernel rounds after each operation, so does the formula here, in the same order. `h` is the gradient
of dx, if dx is a rule of its own: ddx is the gradient that x gets from it, ddt that of t and ddg
that of g.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from .._torch import DisableTorchFunctionSubclass, is_torch_function_enabled
from .._types import TorchFunction
from ..constants import constant, read_only
from ..grad_mode import outside_inference_mode
from ..tape import in_transform_or_forward_mode, is_left_to_torch, record
from ..tensor import Tensor
from .arithmetic import Add, Div, Mul, Sub
from .elementwise import Abs, WhereEqual
from .gradient import applied
from .kernel import FEW, by_path
from .reduction import Mean, Sum
from .registry import Rule, check_numbers, composed, composite, handle, rule, unplaced
from .shape import broadcast_tensors, contiguous, view
from .softmax import LogSoftmax, log_softmax_method

T = torch.Tensor

REDUCTIONS = ("none", "mean", "sum")  # by PyTorch's numbers for them
MEAN = 1
_LEAST = torch.tensor(1e-12).item()  # a float32 in the kernel, for any dtype of x


class MseLoss(Rule):
    """l = (x - t)^2, its mean or its sum:  dx = (x - t) (2 / n) g,  dt = (t - x) (2 / n) g

    n is the number of elements for the mean, else one.  Saved: x and t.
    Of dx, for its gradient h, x gets 2 (h g) / n, and t the same negated.
    """

    tuple_places = (0, 1)
    public = staticmethod(torch._C._nn.mse_loss)

    @staticmethod
    def as_called(input: T, target: T, reduction: str = "mean") -> tuple[T, T, int]:
        return input, target, REDUCTIONS.index(reduction)

    @staticmethod
    def infer(input: T, target: T, reduction: str = "mean") -> T:
        if input.shape != target.shape:
            input, target = torch.broadcast_tensors(input, target)
        return torch._C._nn.mse_loss(input, target, REDUCTIONS.index(reduction))  # type: ignore[arg-type]

    @staticmethod
    def forward(input: T, target: T, reduction: str = "mean") -> T:
        x, t = _squared(input, target)
        if reduction == "mean" and x.dtype is t.dtype in _FLOATS and x.numel():
            return _mean_square(x, t)
        d = x - t
        loss = d * d
        if reduction == "none":
            return loss
        return loss.mean() if reduction == "mean" else loss.sum()

    @classmethod
    def choose(cls, input: T, target: T, reduction: str = "mean") -> TorchFunction | None:
        alike = input.shape == target.shape and input.dtype is target.dtype in _FLOATS
        if not alike or reduction != "mean" or not input.numel() or not input.is_cpu:
            return None
        return functools.partial(_mean_of, _number(float(input.numel()), input))

    @classmethod
    def how(cls, input: T, target: T, reduction: str = "mean") -> T | None:
        """2 / n, where x and t are of one kind and laid out by rows."""
        alike = input.shape == target.shape and input.dtype is target.dtype in _FLOATS
        if not (alike and input.numel() and input.is_contiguous() and target.is_contiguous()):
            return None
        return _number(2.0 / input.numel() if reduction == "mean" else 2.0, input)

    @staticmethod
    def d_input(g: T, input: T, target: T, reduction: str, how: T | None) -> T:
        return _mse_grad(g, *of_one_shape(input, target), reduction, how)

    @staticmethod
    def d_target(g: T, input: T, target: T, reduction: str, how: T | None) -> T:
        return _mse_grad(g, *of_one_shape(target, input), reduction, how)


class MseLossBackward(Rule):
    """The gradient of `MseLoss`, with a gradient."""

    @staticmethod
    def forward(grad: T, input: T, target: T, reduction: str, scale: T | None) -> T:
        return _squared_error_grad(grad, input, target, reduction, scale)

    @staticmethod
    def d_grad(g: T, input: T, target: T, reduction: str, scale: T | None) -> T:
        return _mse_grad(g, input, target, reduction, scale)

    @staticmethod
    def d_input(g: T, grad: T, input_shape: torch.Size, reduction: str) -> T:
        ddx = g * grad * 2
        return ddx / input_shape.numel() if reduction == "mean" else ddx

    @staticmethod
    def d_target(g: T, grad: T, input_shape: torch.Size, reduction: str) -> T:
        return -MseLossBackward.d_input(g, grad, input_shape, reduction)


_mse_grad = applied(MseLossBackward)


def _number(value: float, like: T) -> T:
    return constant(value, like.dtype, like.device)


def _squared_error_grad(g: T, x: T, t: T, reduction: str, scale: T | None) -> T:
    """(x - t) (2 / n) g, multiplied in that order as PyTorch's kernel does."""
    if scale is None:
        x, t = _squared(x, t)
        d = (x - t).contiguous()  # whatever the strides of x
        count = x.numel() if reduction == "mean" else 1
        scale = _number(2.0 / count if count else float("inf"), d)
    else:
        d = torch.sub(x, t)
    d.mul_(scale)  # a new tensor
    return d if g is _number(1.0, g) else d * g  # the one that backward() starts


def _squared(input: T, target: T) -> tuple[T, T]:
    """Both with one shape, and in dtypes that can be subtracted."""
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if not (input.dtype is target.dtype is torch.float32):
        if input.is_complex() or target.is_complex():
            raise unplaced(torch._C._nn.mse_loss, (input, target), {})
        # `-` takes no booleans, PyTorch's loss does.
        wide = torch.result_type(input, target)
        input = input.to(wide) if input.dtype is torch.bool else input
        target = target.to(wide) if target.dtype is torch.bool else target
    return input, target


def _mean_square(x: T, t: T) -> T:
    """The mean with the bits of torch.mean, with fewer calls from Python."""
    if x.is_cpu:
        return _mean_of(_number(float(x.numel()), x), x, t)
    loss: T = torch._C._nn.mse_loss(x, t, 0)  # type: ignore[arg-type]
    return loss.mean()


def _mean_of(n: T, x: T, t: T, reduction: str = "mean") -> T:
    return torch._C._nn.mse_loss(x, t, 0).sum().div_(n)  # type: ignore[arg-type]


_FLOATS = (torch.float32, torch.float64)


def _mse_loss_by_number(input: T, target: T, reduction: int = 1) -> T:
    return record(MseLoss, (input, target, REDUCTIONS[reduction]))[0]


handle(torch._C._nn.mse_loss, _mse_loss_by_number)


def absolute_error(input: T, target: T, reduction: str) -> T:
    error = record(Abs, (record(Sub, (input, target))[0],))[0]
    if reduction == "none":
        return error
    return record(Mean if reduction == "mean" else Sum, (error,))[0]


def _l1_loss_by_number(input: T, target: T, reduction: int = 1) -> T:
    return absolute_error(input, target, REDUCTIONS[reduction])


handle(torch._C._nn.l1_loss, _l1_loss_by_number)


def _reduced(grad: T, weight: T | None, reduction: int, count: int) -> T:
    """The gradient of each element, weighted, and over n for the mean."""
    if weight is not None:
        grad = grad * weight
    return grad / count if reduction == MEAN else grad


@rule(torch._C._nn.binary_cross_entropy)
class BinaryCrossEntropy(Rule):
    """l = -w (t log x + (1 - t) log(1 - x)), its mean or its sum, for probabilities x

    dx = g (x - t) / (x (1 - x)) w / n,  dt = -g log(x / (1 - x)) w / n.
    The logarithms are kept above -100 and the divisor above 1e-12.  Saved: x, t and w.
    """

    tuple_places = (0, 1)

    always_saved = ("target",)  # for the gradient of an input that does not require one

    @staticmethod
    def forward(input: T, target: T, weight: T | None = None, reduction: int = MEAN) -> T:
        return torch._C._nn.binary_cross_entropy(input, target, weight, reduction)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input: T, target: T, weight: T | None, reduction: int) -> T:
        return _binary_cross_entropy_grad(g, input, target, weight, reduction)

    @staticmethod
    def d_target(g: T, input: T, weight: T | None, reduction: int) -> T:
        return _reduced(-input.logit() * g, weight, reduction, input.numel())


class BinaryCrossEntropyBackward(Rule):
    """dx = g (x - t) / (x (1 - x)) w / n:  with e = 1e-12,

    ddg = (x - t) / ((x + e) (1 - x + e)) h w / n,
    ddx = (x x - 2 x t + t) / ((x + e)^2 (1 - x + e)^2) (h g) w / n,
    ddt = -h g w / (x (1 - x)) / n, the divisor at least e, where ddx sees it as it was.
    """

    @staticmethod
    def forward(grad: T, input: T, target: T, weight: T | None, reduction: int) -> T:
        x, t = input, target
        dx = grad * (x - t) / torch.clamp_min((1 - x) * x, _LEAST)
        return _reduced(dx, weight, reduction, x.numel())

    @staticmethod
    def d_grad(g: T, input: T, target: T, weight: T | None, reduction: int) -> T:
        x, t = input, target
        rest = 1 - x + _E
        divisor = (x + _E) * rest
        return _reduced((x - t) / divisor * g, weight, reduction, x.numel())

    @staticmethod
    def d_input(g: T, grad: T, input: T, target: T, weight: T | None, reduction: int) -> T:
        x, t = input, target
        more, rest = x + _E, 1 - x + _E
        rest = rest.pow(2)
        divisor = more.pow(2) * rest
        twice = x * 2 * t
        slope = (x * x - twice + t) / divisor
        return _reduced(slope * (g * grad), weight, reduction, x.numel())

    @staticmethod
    def d_target(g: T, grad: T, input: T, weight: T | None, reduction: int) -> T:
        dt = -g * grad
        if weight is not None:
            dt = dt * weight
        divisor = (1 - input) * input
        with DisableTorchFunctionSubclass(), torch.no_grad():
            divisor.clamp_min_(_E)
        return _reduced(dt / divisor, None, reduction, input.numel())


_E = 1e-12
_binary_cross_entropy_grad = applied(BinaryCrossEntropyBackward)


@rule(torch.binary_cross_entropy_with_logits)
class BinaryCrossEntropyWithLogits(Rule):
    """l = -w (p t log s + (1 - t) log(1 - s)), its mean or its sum, with s = sigmoid(x)

    dx = g ((p t + 1 - t) s - p t) w / n,  without p: g (s - t) w / n;
    dt = g (log(1 - s) - p log s) w / n,  without p: -g x w / n.
    p is pos_weight.  Saved: x, t, w and p.
    """

    tuple_places = (0, 1)

    always_saved = ("target",)  # for the gradient of an input that does not require one

    @staticmethod
    def forward(
        input: T,
        target: T,
        weight: T | None = None,
        pos_weight: T | None = None,
        reduction: int = MEAN,
    ) -> T:
        return torch.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)

    @staticmethod
    def d_input(
        g: T, input: T, target: T, weight: T | None, pos_weight: T | None, reduction: int
    ) -> T:
        if is_torch_function_enabled():  # in a recorded walk, not in place
            if pos_weight is None:
                dx = input.sigmoid() - target
            else:
                pt = pos_weight * target
                dx = (pt + 1 - target) * input.sigmoid() - pt
            return _reduced(dx * g, weight, reduction, input.numel())
        # In place, as in PyTorch: if dtypes differ, each step rounds to the first one's.
        if pos_weight is None:
            dx = input.sigmoid().sub_(target)
        else:
            pt = pos_weight * target
            dx = (pt + 1).sub_(target).mul_(input.sigmoid()).sub_(pt)
        dx.mul_(g)
        if weight is not None:
            dx.mul_(weight)
        return _reduced(dx, None, reduction, input.numel())

    @staticmethod
    def d_target(g: T, input: T, weight: T | None, pos_weight: T | None, reduction: int) -> T:
        if pos_weight is None:
            dt = -input * g
        else:
            log_sigmoid = torch._C._nn.log_sigmoid
            dt = (log_sigmoid(-input) - log_sigmoid(input) * pos_weight) * g
        return _reduced(dt, weight, reduction, input.numel())


class NllLoss(Rule):
    """l = -w_c x_c with c the class t of each row, its mean weighted by w or its sum

    dx_c = -g w_c, for the mean over the sum of all w_c, and 0 for the other classes.
    Rows whose class is ignore_index are left out.  Saved: x, t and w. For h, the gradient of dx, g
    gets the loss of h in place of x, and x gets zeros.
    """

    uncounted = (1, 2)

    aten_name = "nll_loss_forward"
    loss = staticmethod(torch.ops.aten.nll_loss_forward.default)
    grad_of: Callable[..., T]  # the function for dx
    keeps = derived = ("total",)  # the sum of the weights, which have no gradient

    @classmethod
    def forward(
        cls, input: T, target: T, weight: T | None, reduction: int, ignore_index: int
    ) -> tuple[T, T]:
        return cls.loss(input, target, weight, reduction, ignore_index)  # type: ignore[no-any-return]

    @staticmethod
    def total_again(total: T) -> T:
        return total

    @classmethod
    def d_input(
        cls,
        g: T,
        input: T,
        target: T,
        weight: T | None,
        reduction: int,
        ignore_index: int,
        total: T,
    ) -> T:
        return cls.grad_of(g, input, target, weight, reduction, ignore_index, total)


class NllLossBackward(Rule):
    """The gradient of `NllLoss`, whose gradient it has."""

    of = NllLoss

    @staticmethod
    def forward(
        grad: T,
        input: T,
        target: T,
        weight: T | None,
        reduction: int,
        ignore_index: int,
        total: T,
    ) -> T:
        g = grad
        along = 0 if input.dim() == 1 else 1
        zero = constant(0.0, input.dtype, input.device)
        if reduction == MEAN:
            share = -g / total
        else:
            share = -g if g.dim() == 0 else -g.unsqueeze(along)
        t = target.unsqueeze(along)
        if input.numel() < FEW:
            classes = _classes(input.shape[along], ignore_index, input.dim(), input.device)
            if weight is not None:
                share = share * weight.view(classes.shape)
            return torch.where(torch.eq(classes, t), share, zero)
        t = t.long()  # it may have been of uint8
        ignored = t == ignore_index
        t = t.masked_fill(ignored, 0)
        if weight is not None:
            share = share * weight[t]
        share = share.expand(t.shape).masked_fill(ignored, 0)
        return torch.zeros_like(input).scatter_(along, t, share)

    @classmethod
    def d_grad(cls, g: T, target: T, weight: T | None, reduction: int, ignore_index: int) -> T:
        return record(cls.of, (g, target, weight, reduction, ignore_index))[0]

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


NllLoss.grad_of = staticmethod(applied(NllLossBackward))


@functools.lru_cache(maxsize=256)
def _classes(count: int, ignore_index: int, dims: int, device: torch.device) -> T:
    """The class indices, to be compared with the targets; without ignore_index."""
    with outside_inference_mode():
        classes = torch.arange(count, device=device)
        if 0 <= ignore_index < count:
            classes[ignore_index] = -1  # no target is
        return read_only(classes.view(-1, *[1] * (dims - 2)))


class NllLoss2D(NllLoss):
    """`NllLoss` of images: x is (N, C, H, W), t is (N, H, W)."""

    aten_name = "nll_loss2d_forward"
    loss = staticmethod(torch.ops.aten.nll_loss2d_forward.default)


class NllLoss2DBackward(NllLossBackward):
    """The gradient of `NllLoss2D`, whose gradient it has."""

    of = NllLoss2D


NllLoss2D.grad_of = staticmethod(applied(NllLoss2DBackward))


@composed(torch._C._nn.nll_loss_nd)
def nll_loss_nd(
    input: T,
    target: T,
    weight: T | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> T:
    """The negative log-likelihood of x (C), (N, C) or (N, C, d1, d2, ...)."""
    rest = weight, reduction, ignore_index
    check_numbers(torch._C._nn.nll_loss_nd, (input, target, *rest), {})  # its kernel takes tensors
    with DisableTorchFunctionSubclass():
        tensors = isinstance(input, T) and isinstance(target, T)
        shape = input.shape if tensors else ()
        is_valid = len(shape) == 1 or (len(shape) > 1 and shape[:1] + shape[2:] == target.shape)
    if not is_valid:
        raise unplaced(torch._C._nn.nll_loss_nd, (input, target, *rest), {})
    if len(shape) <= 2:
        return record(NllLoss, (input, target, *rest))[0]
    if len(shape) == 4:
        return record(NllLoss2D, (input, target, *rest))[0]
    # Any other shape is reshaped to images of one row.
    n, c = shape[:2]
    row = (1, -1) if shape.numel() else (0, 0)
    image = view(contiguous(input), n, c, *row)
    loss = record(NllLoss2D, (image, target.contiguous().view(n, *row), *rest))[0]
    return loss.view(target.shape) if reduction == 0 else loss


@composite(torch._C._nn.cross_entropy_loss)
def cross_entropy_loss(
    input: T,
    target: T,
    weight: T | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> T:
    """The negative log-likelihood of log_softmax(x), made of recorded operations as in PyTorch.

    The target holds classes, or probabilities if it has the shape of x. With label smoothing
    e, a share e of the probability is spread over all classes: Szegedy et al., 2016
    (arXiv:1512.00567).
    """
    if (
        type(input) is Tensor
        and weight is None
        and label_smoothing == 0
        and not in_transform_or_forward_mode()
    ):
        with DisableTorchFunctionSubclass():
            rows = type(target) is T and input.dim() == 2 and target.shape == input.shape[:1]
        if rows and not target.is_floating_point():  # the most frequent case
            likelihood = record(LogSoftmax, (input, 1))[0]
            return record(NllLoss, (likelihood, target, None, reduction, ignore_index))[0]
    given = input, target, weight, reduction, ignore_index, label_smoothing
    if is_left_to_torch(given):
        with DisableTorchFunctionSubclass():
            return torch._C._nn.cross_entropy_loss(*given)  # type: ignore[arg-type]
    with DisableTorchFunctionSubclass():
        is_valid = isinstance(input, T) and isinstance(target, T) and input.dim() > 0
        if is_valid and weight is not None:
            along = 0 if input.dim() == 1 else 1
            is_valid = isinstance(weight, T) and weight.shape == input.shape[along : along + 1]
        probabilities = is_valid and input.shape == target.shape
        if probabilities:
            is_valid = target.is_floating_point() and ignore_index < 0
        is_valid = is_valid and label_smoothing <= 1
    if not is_valid:
        raise unplaced(torch._C._nn.cross_entropy_loss, given, {})
    if probabilities:
        return _of_probabilities(*given)
    if label_smoothing > 0:
        return _smoothed(*given)
    likelihood = log_softmax_method(input, 0 if input.dim() == 1 else 1, input.dtype)
    return nll_loss_nd(likelihood, target, weight, reduction, ignore_index)


def _weighted(likelihood: T, weight: T | None, along: int) -> T:
    if weight is None:
        return likelihood
    shape = [1] * likelihood.dim()
    shape[along] = -1
    return record(Mul, (likelihood, view(weight, *shape)))[0]


def _of_probabilities(
    input: T, target: T, weight: T | None, reduction: int, _: int, smoothing: float
) -> T:
    along = 0 if input.dim() == 1 else 1
    classes = input.shape[along]
    if smoothing > 0:
        kept = record(Mul, (target, 1 - smoothing))[0]
        target = record(Add, (kept, smoothing / classes))[0]
    likelihood = record(Mul, (log_softmax_method(input, along, input.dtype), target))[0]
    likelihood = _weighted(likelihood, weight, along)
    if reduction == 0:
        return -likelihood.sum(along)
    if reduction == MEAN and input.numel() == 0:
        return -likelihood.sum().fill_(float("nan"))
    loss = -likelihood.sum()
    if reduction != MEAN:
        return loss
    mean, node = record(Div, (loss, input.numel() / classes))
    if node is not None:
        node.label = "DivBackward1"  # by a C++ number
    return mean


class _ZeroWhereEqual(WhereEqual):
    """As PyTorch's, which fills what it has computed."""

    @classmethod
    def node_name(cls) -> str:
        return "MaskedFillBackward0"


class _CountOfOthers(Rule):
    """z = the number of elements of x, integers, that differ from a number"""

    @staticmethod
    def forward(input: T, number: int) -> T:
        return (input != number).sum()

    @staticmethod
    def d_input(g: T) -> None:
        return None


def _smoothed(
    input: T, target: T, weight: T | None, reduction: int, ignore_index: int, smoothing: float
) -> T:
    along = 0 if input.dim() == 1 else 1
    likelihood = log_softmax_method(input, along, input.dtype)
    loss = nll_loss_nd(likelihood, target, weight, reduction, ignore_index)
    spread = -_weighted(likelihood, weight, along).sum(along)
    spread = record(_ZeroWhereEqual, (target, ignore_index, 0.0, spread))[0]
    if reduction != 0:
        spread = spread.sum()
    if reduction == MEAN:
        if weight is None:
            total = record(_CountOfOthers, (target, ignore_index))[0]
        else:
            counted = target != ignore_index
            total = weight.gather(0, target.masked_select(counted).flatten()).sum()
        spread = record(Div, (spread, total))[0]
    return loss * (1 - smoothing) + spread * (smoothing / input.shape[along])


@rule(torch._C._nn.soft_margin_loss)
class SoftMarginLoss(Rule):
    """l = log(1 + exp(-t x)), its mean or its sum:  dx = -g t z / (1 + z) / n, z = exp(-t x)

    ddx = (h g) t^2 z / (1 + z)^2 / n.  Saved: x and t.
    """

    uncounted = (1,)

    tuple_places = (0, 1)

    @staticmethod
    def forward(input: T, target: T, reduction: int = MEAN) -> T:
        return torch._C._nn.soft_margin_loss(input, target, reduction)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input: T, target: T, reduction: int) -> T:
        return _soft_margin_grad(g, input, target, reduction)


class SoftMarginLossBackward(Rule):
    """The gradient of `SoftMarginLoss`, with a gradient."""

    @staticmethod
    def forward(grad: T, input: T, target: T, reduction: int) -> T:
        x, t = input, target
        z = torch.exp(-t * x)
        dx = t * z
        if dx.dtype is not x.dtype:
            dx = dx.to(x.dtype)
        share = 1.0 / x.numel() if reduction == MEAN and x.numel() else 1.0
        return dx.mul_(constant(-share, x.dtype, x.device)).div_(z + 1).mul_(grad)

    @staticmethod
    def d_grad(g: T, grad: T, input: T, target: T, reduction: int) -> T:
        if reduction == 0:
            return _soft_margin_grad(g, input, target, reduction)
        return (_soft_margin_grad(torch.ones_like(grad), input, target, reduction) * g).sum()

    @staticmethod
    def d_input(g: T, grad: T, input: T, target: T, reduction: int) -> T:
        slope = g * grad
        z = (input * -target).exp()
        more = z + 1
        square = more * more
        ddx = slope * (target * target) * z / square
        return _reduced(ddx, None, reduction, input.numel())


_soft_margin_grad = applied(SoftMarginLossBackward)


class _OfDifference(Rule):
    """A loss of d = x - t whose slope is bounded:  dx = slope(d) g / n,  dt = -dx.

    PyTorch's kernels have different formulas on their vectorized and their scalar path; the scalar
    path has its parameters in double precision. With a threshold of 1 the two have the same bits.
    """

    tuple_places = (0, 1)
    widens = False  # computes 16 bits in float32, and two dtypes in the wider one

    @staticmethod
    def bounded(d: T, threshold: float) -> T:
        """slope(d), a new tensor."""
        raise NotImplementedError

    @staticmethod
    def scalar(d: T, g: T, n: T, threshold: float) -> T:
        raise NotImplementedError

    @classmethod
    def slope(cls, g: T, x: T, t: T, reduction: int, threshold: float) -> T:
        """slope(x - t) g / n, for x and t of one shape"""
        dtype = wide = x.dtype if x.dtype is t.dtype else torch.result_type(x, t)
        if cls.widens:
            wide = torch.float32 if dtype.itemsize == 2 else dtype
        elif t.dtype is not x.dtype:
            names = _NAMES.get(t.dtype, t.dtype), _NAMES.get(x.dtype, x.dtype)
            raise RuntimeError("Found dtype {} but expected {}".format(*names))
        result = x.dtype
        is_one = g is constant(1.0, wide, x.device)  # the one that backward() starts with
        x, t, g = x.to(wide), t.to(wide), g.to(wide)
        d = x - t
        share = 1.0 / x.numel() if reduction == MEAN and x.numel() else 1.0
        n = constant(share, wide, x.device)

        def vectorized(d: T, g: T) -> T:
            slope = cls.bounded(d, threshold)
            if share != 1:
                slope.mul_(n)
            return slope if is_one else slope.mul_(g)

        def scalar(d: T, g: T) -> T:
            return cls.scalar(d, g, n, threshold)

        if wide is dtype and d.is_cpu and threshold != 1:
            made = d if d.is_contiguous() else d.contiguous()  # as the kernel's dx
            g = g.expand_as(x)
            dx = by_path(vectorized, scalar, (d, g), (made, x, t, g), short=True)
        else:
            dx = vectorized(d, g)
        return dx.contiguous().to(result)


def of_one_shape(x: T, t: T) -> Sequence[T]:
    return (x, t) if x.shape == t.shape else broadcast_tensors(x, t)


class _OfDifferenceBackward(Rule):
    """The gradient of a loss of d, with a gradient."""

    of: type[_OfDifference]

    @classmethod
    def forward(cls, grad: T, input: T, target: T, reduction: int, threshold: float) -> T:
        return cls.of.slope(grad, input, target, reduction, threshold)

    @staticmethod
    def second(slope: T, x: T, t: T, threshold: float) -> T:
        """slope times the derivative of slope(d)"""
        raise NotImplementedError

    @classmethod
    def d_input(cls, g: T, grad: T, input: T, target: T, reduction: int, threshold: float) -> T:
        ddx = cls.second(g * grad, input, target, threshold)
        return _reduced(ddx, None, reduction, input.numel())

    @classmethod
    def d_target(cls, g: T, grad: T, input: T, target: T, reduction: int, threshold: float) -> T:
        return -cls.d_input(g, grad, input, target, reduction, threshold)


# Thresholds between these are neither zero nor infinite in any dtype.
_SMALL, _LARGE = 1e-4, 1e4

_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
}


@rule(torch._C._nn.smooth_l1_loss)
class SmoothL1Loss(_OfDifference):
    """l = d^2 / (2 b) where |d| < b, else |d| - b / 2, its mean or its sum, with d = x - t

    dx = g d / (b n) where |d| < b, else g sign(d) / n;  dt = -dx.  Saved: x and t.
    ddx = (h g) / b / n where |d| < b, else 0;  ddt = -ddx.
    Girshick, 2015 (arXiv:1504.08083).
    """

    widens = True

    @staticmethod
    def forward(input: T, target: T, reduction: int = MEAN, beta: float = 1.0) -> T:
        return torch._C._nn.smooth_l1_loss(input, target, reduction, beta)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input: T, target: T, reduction: int, beta: float) -> T:
        return _smooth_l1_grad(g, *of_one_shape(input, target), reduction, beta)

    @staticmethod
    def d_target(g: T, input: T, target: T, reduction: int, beta: float) -> T:
        return _smooth_l1_grad(g, *of_one_shape(target, input), reduction, beta)

    @staticmethod
    def bounded(d: T, threshold: float) -> T:
        one, minus, at = (constant(float(v), d.dtype, d.device) for v in (1, -1, threshold))
        if threshold == 1:
            return torch.clamp(d, minus, one)
        if _SMALL < threshold < _LARGE:
            return torch.div(d, at).clamp_(minus, one)
        sign = torch.where(d < 0, minus, one)
        return torch.where(d.abs() >= at, sign, d / at)

    @staticmethod
    def scalar(d: T, g: T, n: T, threshold: float) -> T:
        wide = d.double()
        inside = (n * d * g).double().div(threshold).to(d.dtype)
        outside = torch.where(wide >= threshold, n * g, inside)
        return torch.where(wide <= -threshold, -n * g, outside)


class SmoothL1LossBackward(_OfDifferenceBackward):
    """The gradient of `SmoothL1Loss`, with a gradient."""

    of = SmoothL1Loss

    @staticmethod
    def d_grad(g: T, input: T, target: T, reduction: int, threshold: float) -> T:
        return _smooth_l1_grad(g, input, target, reduction, threshold)

    @staticmethod
    def second(slope: T, x: T, t: T, threshold: float) -> T:
        if threshold == 0:
            return torch.zeros_like(slope)
        return slope * ((x - t).abs() < threshold).to(slope.dtype) / threshold


_smooth_l1_grad = applied(SmoothL1LossBackward)


@rule(torch._C._nn.huber_loss)
class HuberLoss(_OfDifference):
    """l = d^2 / 2 where |d| < a, else a (|d| - a / 2), its mean or its sum, with d = x - t

    dx = g d / n where |d| < a, else g a sign(d) / n;  dt = -dx.  Saved: x and t.
    ddx = (h g) / n where |d| < a, else 0;  ddt = -ddx.
    Huber, 1964 (doi:10.1214/aoms/1177703732).
    """

    @staticmethod
    def forward(input: T, target: T, reduction: int = MEAN, delta: float = 1.0) -> T:
        return torch._C._nn.huber_loss(input, target, reduction, delta)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input: T, target: T, reduction: int, delta: float) -> T:
        return _huber_grad(g, *of_one_shape(input, target), reduction, delta)

    @staticmethod
    def d_target(g: T, input: T, target: T, reduction: int, delta: float) -> T:
        return _huber_grad(g, *of_one_shape(target, input), reduction, delta)

    @staticmethod
    def bounded(d: T, threshold: float) -> T:
        at = constant(float(threshold), d.dtype, d.device)
        if _SMALL < threshold < _LARGE:
            return torch.clamp(d, -at, at)
        return torch.where(d <= -at, -at, torch.where(d >= at, at, d))

    @staticmethod
    def scalar(d: T, g: T, n: T, threshold: float) -> T:
        wide = d.double()
        outside = (n * g).double().mul(threshold).to(d.dtype)
        return torch.where(
            wide <= -threshold, -outside, torch.where(wide >= threshold, outside, n * d * g)
        )


class HuberLossBackward(_OfDifferenceBackward):
    """The gradient of `HuberLoss`, with a gradient."""

    of = HuberLoss

    @staticmethod
    def d_grad(g: T, grad: T, input: T, target: T, reduction: int, threshold: float) -> T:
        if reduction == 0:
            return _huber_grad(g, input, target, reduction, threshold)
        return (_huber_grad(torch.ones_like(grad), input, target, reduction, threshold) * g).sum()

    @staticmethod
    def second(slope: T, x: T, t: T, threshold: float) -> T:
        return slope * ((x - t).abs() < threshold)


_huber_grad = applied(HuberLossBackward)
