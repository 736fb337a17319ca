"""One call of each mirrored layer and function, for tests that cover all of them."""

from typing import Any

import torch

import nnmirror

_CLASSES = torch.tensor([2, 0, 1, 2])


def _x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3)


def _images(*size: int) -> torch.Tensor:
    """A batch of two images with four channels."""
    torch.manual_seed(1)
    return torch.randn(2, 4, *(size or (3, 2)))


def _probabilities() -> torch.Tensor:
    return _x().sigmoid()


def _signs() -> torch.Tensor:
    return torch.tensor([1.0, -1.0, 1.0, -1.0])


def _planes(n: int) -> torch.Tensor:
    """A batch of one sample with two channels and n spatial dimensions."""
    torch.manual_seed(1)
    return torch.randn(1, 2, *(5, 4, 3)[:n])


def _pair() -> tuple[Any, ...]:
    return _x(), _x().cos()


def _places(n: int) -> torch.Tensor:
    """Indices for max_unpool of `_planes(n)`: no index occurs twice in a channel."""
    shape = _planes(n).shape
    return torch.arange(shape[2:].numel()).view(shape[2:]).expand(shape).contiguous()


# The pooling layers and their arguments.
_POOLS: dict[str, tuple[Any, ...]] = {
    "MaxPool": (2, 1),
    "AvgPool": (2, 1),
    "AdaptiveMaxPool": (2,),
    "AdaptiveAvgPool": (2,),
    "LPPool": (3, 2),
    "FractionalMaxPool": (1, 2),
}
_CONTAINERS = {"Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"}
# Name: the layer, its arguments, and a function that creates its inputs. Layers that are not named
# here take no arguments, and one input. (A lazy layer changes its class at its first call.)
LAYERS: dict[str, tuple[Any, ...]] = {
    **{
        name: (name, (), lambda: (_x(),))
        for name in nnmirror.modules.__all__
        if name not in _CONTAINERS and not name.startswith("Lazy")
    },
    "ReLU inplace": ("ReLU", (True,), lambda: (_x() * 1,)),
    "Threshold": ("Threshold", (0.1, 2.0), lambda: (_x(),)),
    "Softmax": ("Softmax", (1,), lambda: (_x(),)),
    "LogSoftmax": ("LogSoftmax", (1,), lambda: (_x(),)),
    "GLU": ("GLU", (0,), lambda: (_x(),)),
    "Softmin": ("Softmin", (1,), lambda: (_x(),)),
    **{
        f"{kind}{n}d": (f"{kind}{n}d", args, lambda n=n: (_planes(n),))
        for kind, args in _POOLS.items()
        for n in (1, 2, 3)
        if n > 1 or not kind.startswith("Fractional")
    },
    **{
        f"MaxUnpool{n}d": (f"MaxUnpool{n}d", (2,), lambda n=n: (_planes(n), _places(n)))
        for n in (1, 2, 3)
    },
    "Fold": ("Fold", ((3, 3), 2), lambda: (_planes(1).expand(1, 2, 5)[:, :, :4].repeat(1, 2, 1),)),
    "Unfold": ("Unfold", (2,), lambda: (_planes(2),)),
    "Linear": ("Linear", (3, 2), lambda: (_x(),)),
    "Linear without bias": ("Linear", (3, 2, False), lambda: (_x(),)),
    **{
        f"{kind}{n}d": (f"{kind}{n}d", (2, 3, 2), lambda n=n: (_planes(n),))
        for kind in ("Conv", "ConvTranspose")
        for n in (1, 2, 3)
    },
    "BatchNorm1d": ("BatchNorm1d", (3,), lambda: (_x(),)),
    "BatchNorm2d": ("BatchNorm2d", (4,), lambda: (_images(),)),
    "BatchNorm3d": ("BatchNorm3d", (4,), lambda: (_images(1, 2, 3),)),
    "LocalResponseNorm": ("LocalResponseNorm", (3, 0.5), lambda: (_images(),)),
    "GroupNorm": ("GroupNorm", (2, 4), lambda: (_images(),)),
    "InstanceNorm1d": ("InstanceNorm1d", (4, 1e-5, 0.1, True), lambda: (_images(3),)),
    "InstanceNorm2d": ("InstanceNorm2d", (4,), lambda: (_images(),)),
    "InstanceNorm3d": ("InstanceNorm3d", (4,), lambda: (_images(1, 2, 3),)),
    "LayerNorm": ("LayerNorm", (3,), lambda: (_x(),)),
    "RMSNorm": ("RMSNorm", (3,), lambda: (_x(),)),
    "Dropout": ("Dropout", (0.4,), lambda: (_x(),)),
    "Dropout inplace": ("Dropout", (0.4, True), lambda: (_x() * 1,)),
    "Dropout1d": ("Dropout1d", (0.4,), lambda: (_x(),)),
    "Dropout2d": ("Dropout2d", (0.4,), lambda: (_images(),)),
    "Dropout2d inplace": ("Dropout2d", (0.4, True), lambda: (_images() * 1,)),
    "Dropout3d": ("Dropout3d", (0.4,), lambda: (_images(1, 2, 3),)),
    "AlphaDropout": ("AlphaDropout", (0.4,), lambda: (_x(),)),
    "FeatureAlphaDropout": ("FeatureAlphaDropout", (0.4,), lambda: (_images(),)),
    "Softmax2d": ("Softmax2d", (), lambda: (_images(),)),
    "Upsample": ("Upsample", (None, 2), lambda: (_images(),)),
    "UpsamplingNearest2d": ("UpsamplingNearest2d", (5,), lambda: (_images(),)),
    "UpsamplingBilinear2d": ("UpsamplingBilinear2d", (None, 2), lambda: (_images(4, 2),)),
    "PixelShuffle": ("PixelShuffle", (2,), lambda: (_images(),)),
    "PixelUnshuffle": ("PixelUnshuffle", (2,), lambda: (_images(4, 2),)),
    "ChannelShuffle": ("ChannelShuffle", (2,), lambda: (_images(),)),
    "ConstantPad1d": ("ConstantPad1d", (1, 0.5), lambda: (_images(3),)),
    "ConstantPad2d": ("ConstantPad2d", (1, 0.5), lambda: (_images(3, 2),)),
    "ConstantPad3d": ("ConstantPad3d", (1, 0.5), lambda: (_images(3, 2, 4),)),
    "ZeroPad1d": ("ZeroPad1d", (1,), lambda: (_images(3),)),
    "ZeroPad2d": ("ZeroPad2d", (1,), lambda: (_images(3, 2),)),
    "ZeroPad3d": ("ZeroPad3d", (1,), lambda: (_images(3, 2, 4),)),
    "ReflectionPad1d": ("ReflectionPad1d", (1,), lambda: (_images(3),)),
    "ReflectionPad2d": ("ReflectionPad2d", (1,), lambda: (_images(3, 2),)),
    "ReflectionPad3d": ("ReflectionPad3d", (1,), lambda: (_images(3, 2, 4),)),
    "ReplicationPad1d": ("ReplicationPad1d", (1,), lambda: (_images(3),)),
    "ReplicationPad2d": ("ReplicationPad2d", (1,), lambda: (_images(3, 2),)),
    "ReplicationPad3d": ("ReplicationPad3d", (1,), lambda: (_images(3, 2, 4),)),
    "CircularPad1d": ("CircularPad1d", (1,), lambda: (_images(3),)),
    "CircularPad2d": ("CircularPad2d", (1,), lambda: (_images(3, 2),)),
    "CircularPad3d": ("CircularPad3d", (1,), lambda: (_images(3, 2, 4),)),
    "Embedding": ("Embedding", (5, 2), lambda: (_CLASSES,)),
    "Flatten": ("Flatten", (0,), lambda: (_x(),)),
    "Unflatten": ("Unflatten", (0, (2, 2)), lambda: (_x(),)),
    "CosineSimilarity": ("CosineSimilarity", (), _pair),
    "PairwiseDistance": ("PairwiseDistance", (), _pair),
    "L1Loss": ("L1Loss", (), _pair),
    "MSELoss": ("MSELoss", (), _pair),
    "SmoothL1Loss": ("SmoothL1Loss", (), _pair),
    "HuberLoss": ("HuberLoss", (), _pair),
    "SoftMarginLoss": ("SoftMarginLoss", (), lambda: (_x(), _x().sign())),
    "BCELoss": ("BCELoss", (), lambda: (_probabilities(), _x().cos().abs())),
    "BCEWithLogitsLoss": ("BCEWithLogitsLoss", (), lambda: (_x(), _x().cos().abs())),
    "KLDivLoss": ("KLDivLoss", (None, None, "sum"), lambda: (_x(), _probabilities())),
    "PoissonNLLLoss": ("PoissonNLLLoss", (), lambda: (_x(), _x().exp())),
    "GaussianNLLLoss": ("GaussianNLLLoss", (), lambda: (*_pair(), _x().exp())),
    "HingeEmbeddingLoss": ("HingeEmbeddingLoss", (), lambda: (_x(), _x().sign())),
    "MarginRankingLoss": (
        "MarginRankingLoss",
        (0.1,),
        lambda: (_x()[:, 0], _x()[:, 1], _signs()),
    ),
    "CosineEmbeddingLoss": ("CosineEmbeddingLoss", (), lambda: (*_pair(), _signs())),
    "TripletMarginLoss": ("TripletMarginLoss", (), lambda: (*_pair(), _x().sin())),
    "MultiLabelSoftMarginLoss": (
        "MultiLabelSoftMarginLoss",
        (),
        lambda: (_x(), (_x() > 0).float()),
    ),
    "NLLLoss": ("NLLLoss", (), lambda: (_x().log_softmax(1), _CLASSES)),
    "CrossEntropyLoss": ("CrossEntropyLoss", (), lambda: (_x(), _CLASSES)),
    "CrossEntropyLoss of probabilities": (
        "CrossEntropyLoss",
        (),
        lambda: (_x(), _x().cos().softmax(1)),
    ),
}

_OF_TWO = """
cosine_similarity pairwise_distance l1_loss mse_loss smooth_l1_loss
huber_loss
"""
_LOSSES = {
    "soft_margin_loss": "SoftMarginLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "margin_ranking_loss": "MarginRankingLoss",
    "cosine_embedding_loss": "CosineEmbeddingLoss",
    "triplet_margin_loss": "TripletMarginLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
    "nll_loss": "NLLLoss",
    "cross_entropy": "CrossEntropyLoss",
}
# Name: a function that creates the inputs, the other positional and the keyword arguments. Functions
# that are not named here take one input.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    **{name: (lambda: (_x() * 1,), (), {}) for name in nnmirror.functional.__all__},
    **{name: (_pair, (), {}) for name in _OF_TWO.split()},
    **{name: (LAYERS[layer][2], (), {}) for name, layer in _LOSSES.items()},
    "kl_div": (LAYERS["KLDivLoss"][2], (), {"reduction": "batchmean"}),
    "threshold": (lambda: (_x(),), (0.1, 2.0), {}),
    "threshold_": (lambda: (_x() * 1,), (0.1, 2.0), {}),
    "softmax": (lambda: (_x(),), (), {"dim": 1}),
    "log_softmax": (lambda: (_x(),), (), {"dim": 1}),
    "softmin": (lambda: (_x(),), (), {"dim": 1}),
    "glu": (lambda: (_x(),), (0,), {}),
    "gumbel_softmax": (lambda: (_x(),), (0.5,), {"hard": True}),
    "scaled_dot_product_attention": (lambda: (*_pair(), _x().sin()), (), {"is_causal": True}),
    **{
        name: (lambda: (_x(),), (0.4, True), {})
        for name in ("dropout", "dropout1d", "alpha_dropout")
    },
    "dropout2d": (lambda: (_images(),), (0.4,), {}),
    "dropout3d": (lambda: (_images(2, 3, 2),), (0.4,), {}),
    "feature_alpha_dropout": (lambda: (_images(),), (0.4, True), {}),
    "interpolate": (lambda: (_images(),), (None, 2), {}),
    "upsample": (lambda: (_images(),), (None, 2), {}),
    "upsample_nearest": (lambda: (_images(),), (5,), {}),
    "upsample_bilinear": (lambda: (_images(4, 2),), (None, 2), {}),
    "pixel_shuffle": (lambda: (_images(),), (2,), {}),
    "pixel_unshuffle": (lambda: (_images(2, 4),), (2,), {}),
    "channel_shuffle": (lambda: (_images(),), (2,), {}),
    "pad": (lambda: (_x(),), ((1, 2), "replicate"), {}),
    "prelu": (lambda: (_x(), _x()[0]), (), {}),
    **{
        f"{kind}{n}d": (
            lambda n=n, turned=turned: (_planes(n), _planes(n).transpose(0, turned)[..., :2]),
            (),
            {},
        )
        for kind, turned in (("conv", 0), ("conv_transpose", 1))
        for n in (1, 2, 3)
    },
    **{
        f"{name}{n}d": (lambda n=n: (_planes(n),), _POOLS[kind], {})
        for name, kind in (
            ("max_pool", "MaxPool"),
            ("avg_pool", "AvgPool"),
            ("adaptive_max_pool", "AdaptiveMaxPool"),
            ("adaptive_avg_pool", "AdaptiveAvgPool"),
            ("lp_pool", "LPPool"),
            ("fractional_max_pool", "FractionalMaxPool"),
        )
        for n in (1, 2, 3)
        if n > 1 or not name.startswith("fractional")
    },
    **{f"max_unpool{n}d": (lambda n=n: (_planes(n), _places(n)), (2,), {}) for n in (1, 2, 3)},
    "fold": (LAYERS["Fold"][2], ((3, 3), 2), {}),
    "unfold": (lambda: (_planes(2),), (2,), {}),
    "linear": (lambda: (_x(), _x(), _x()[:, 0]), (), {}),
    "layer_norm": (lambda: (_x(),), ((3,), _x()[0], _x()[1]), {}),
    "rms_norm": (lambda: (_x(),), ((3,), _x()[0]), {}),
    "batch_norm": (
        lambda: (_x(),),
        (torch.zeros(3), torch.ones(3), _x()[0], _x()[1]),
        {"training": True},
    ),
    "local_response_norm": (lambda: (_images(),), (2, 0.5), {}),
    "group_norm": (lambda: (_images(),), (2,), {}),
    "instance_norm": (lambda: (_images(),), (), {}),
    "embedding": (lambda: (_CLASSES, _x()), (), {}),
    "one_hot": (lambda: (_CLASSES,), (3,), {}),
}


def layer(nn: Any, name: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The module, with newly drawn weights, and its inputs."""
    kind, args, inputs = LAYERS[name]
    torch.manual_seed(0)
    return getattr(nn, kind)(*args), inputs()


def function(nn: Any, name: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The function, to be called with the inputs alone, and the inputs."""
    inputs, args, kwargs = FUNCTIONS[name]
    called = getattr(nn.functional, name)
    return lambda *given: called(*given, *args, **kwargs), inputs()


CALLS = [*(("layer", name) for name in LAYERS), *(("function", name) for name in FUNCTIONS)]


def call(nn: Any, kind: str, name: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    return layer(nn, name) if kind == "layer" else function(nn, name)
