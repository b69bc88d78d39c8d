"""Every loss of torch.nn, plain and transformed further."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Built, Draw, add_case, case, of_module


def _further(d: Draw, loss):
    """The loss as it is, or with a curvature of its own on top."""
    return (lambda *xs: loss(*xs)) if d.boolean() else (lambda *xs: (1 + loss(*xs)).square())


def _pair(name, make, x=None, t=None, shape=None, **options):
    """A loss of predictions and targets of one shape."""

    def build(d: Draw) -> Built:
        size = shape or d.shape(1, 3)
        loss = _further(d, make(d, d.choice("none", "mean", "sum"), size))
        return loss, [d.tensor(*size, **(x or {})), d.tensor(*size, **(t or {}))]

    add_case(f"{name}_loss", build, **options)


def _weights(d: Draw, *size):
    return d.tensor(*size, low=0.2, high=2.0, grad=False) if d.boolean() else None


UNIT = {"low": 0.05, "high": 0.95}
_pair("l1", lambda d, r, s: nn.L1Loss(reduction=r))
_pair("mse", lambda d, r, s: nn.MSELoss(reduction=r))
_pair("huber", lambda d, r, s: nn.HuberLoss(delta=d.choice(1.0, 0.3), reduction=r))
_pair("smooth_l1", lambda d, r, s: nn.SmoothL1Loss(beta=d.choice(1.0, 0.3, 0.0), reduction=r))
_pair("bce", lambda d, r, s: nn.BCELoss(_weights(d, s[-1]), reduction=r), UNIT, UNIT)
_pair(
    "bce_with_logits",
    lambda d, r, s: nn.BCEWithLogitsLoss(_weights(d, *s), reduction=r, pos_weight=_weights(d, s[-1])),
    None,
    UNIT,
)
_pair("poisson_nll", lambda d, r, s: nn.PoissonNLLLoss(reduction=r), None, {"low": 0.5, "high": 3})
_pair(
    "poisson_nll_full",
    lambda d, r, s: nn.PoissonNLLLoss(log_input=False, full=True, reduction=r),
    {"low": 0.5, "high": 3},
    {"low": 1.5, "high": 3},
)
_pair("kl_div", lambda d, r, s: nn.KLDivLoss(reduction=r if r != "mean" else "batchmean"), None, UNIT)
_pair("kl_div_log_target", lambda d, r, s: nn.KLDivLoss(reduction=r if r != "mean" else "batchmean", log_target=True))


@case
def gaussian_nll_loss(d: Draw) -> Built:
    size = d.shape(2, 2)
    loss = nn.GaussianNLLLoss(full=d.boolean(), reduction=d.choice("none", "mean", "sum"))
    return _further(d, loss), [d.tensor(*size), d.tensor(*size), d.tensor(*size, low=0.3, high=2)]


def _signs(name, make, *shape):
    """A loss of predictions and of targets that are 1 or -1."""

    def build(d: Draw) -> Built:
        size = list(shape) or d.shape(1, 2)
        t = (2 * d.mask(*size) - 1).to(d.dtype)
        return _further(d, lambda x: make(d, d.choice("mean"), x, t)), [d.tensor(*size)]

    add_case(f"{name}_loss", build)


for _r in ("none", "mean", "sum"):
    _signs(f"soft_margin_{_r}", lambda d, _, x, t, r=_r: F.soft_margin_loss(x, t, reduction=r))
_signs("hinge_embedding", lambda d, r, x, t: F.hinge_embedding_loss(x, t, margin=0.7))
_signs("margin_ranking", lambda d, r, x, t: F.margin_ranking_loss(x, x.flip(0), t, margin=0.3))
_signs("multilabel_soft_margin", lambda d, r, x, t: F.multilabel_soft_margin_loss(x, t.clamp(min=0)), 3, 4)


@case
def cross_entropy_loss(d: Draw) -> Built:
    n, c = d.sizes(2, 2)
    options = {"reduction": d.choice("none", "mean", "sum"), "label_smoothing": d.choice(0.0, 0.2)}
    weight, t = _weights(d, c), d.index(c, n)
    if d.boolean():
        t[0] = -100
    return _further(d, lambda x: F.cross_entropy(x, t, weight, **options)), [d.tensor(n, c)]


@case
def cross_entropy_loss_of_images(d: Draw) -> Built:
    n, c, *size = d.sizes(d.choice(3, 4), 2, 3)
    weight, t = _weights(d, c), d.index(c, n, *size)
    t[0, 0] = 1
    reduction = d.choice("none", "mean", "sum")
    return lambda x: F.cross_entropy(x, t, weight, ignore_index=1, reduction=reduction), [d.tensor(n, c, *size)]


@case
def cross_entropy_loss_of_probabilities(d: Draw) -> Built:
    n, c = d.sizes(2, 2)
    options = {"weight": _weights(d, c), "label_smoothing": d.choice(0.0, 0.2)}
    return lambda x, t: F.cross_entropy(x, t.softmax(1), **options), [d.tensor(n, c), d.tensor(n, c)]


@case
def nll_loss(d: Draw) -> Built:
    n, c = d.sizes(2, 2)
    weight, t = _weights(d, c), d.index(c, n)
    reduction = d.choice("none", "mean", "sum")
    return _further(d, lambda x: F.nll_loss(x, t, weight, ignore_index=0, reduction=reduction)), [d.tensor(n, c)]


@case
def nll_loss_2d(d: Draw) -> Built:
    n, c, *size = d.sizes(4, 2, 3)
    weight, t = _weights(d, c), d.index(c, n, *size)
    return _further(d, lambda x: F.nll_loss(x, t, weight, reduction="mean")), [d.tensor(n, c, *size)]


@case
def cosine_embedding_loss(d: Draw) -> Built:
    n, c = d.sizes(2, 2)
    t = 2 * d.mask(n).long() - 1
    return lambda a, b: F.cosine_embedding_loss(a, b, t, margin=0.1), [d.tensor(n, c), d.tensor(n, c)]


@case
def triplet_margin_loss(d: Draw) -> Built:
    swap, p = d.boolean(), d.choice(1.0, 2.0, 3.0)
    loss = nn.TripletMarginLoss(margin=2.0, p=p, swap=swap)
    return loss, [d.tensor(3, 4), d.tensor(3, 4), d.tensor(3, 4)]


@case
def triplet_margin_loss_with_distance(d: Draw) -> Built:
    loss = nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(), swap=d.boolean())
    return loss, [d.tensor(3, 4), d.tensor(3, 4), d.tensor(3, 4)]


@case
def adaptive_log_softmax_loss(d: Draw) -> Built:
    t = torch.tensor([0, 5, 2, 7, 3])
    function, inputs = of_module(
        d, nn.AdaptiveLogSoftmaxWithLoss(6, 8, [2, 5], div_value=2.0, head_bias=True), d.tensor(5, 6), t
    )
    return lambda *args: function(*args).loss, inputs


def _multi_margin(p, reduction, weighted):
    weight = torch.tensor([0.5, 1.5, 1.0, 0.7], dtype=torch.float64) if weighted else None
    t = torch.tensor([1, 3, 0])

    def twin(x):
        margins = (0.9 - x.gather(1, t[:, None]) + x).clamp(min=0) ** p * (1 - F.one_hot(t, 4))
        margins = margins if weight is None else margins * weight.to(x.dtype)[t, None]
        return _reduced(margins.sum(1) / 4, reduction)

    def loss(x):
        w = None if weight is None else weight.to(x.dtype)
        return F.multi_margin_loss(x, t, p, 0.9, w, reduction=reduction)

    name = f"multi_margin_loss_{p}_{reduction}{'_weighted' if weighted else ''}"
    add_case(name, lambda d: (loss, [d.tensor(3, 4)]), twin=twin)


def _reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def _multilabel_margin(reduction):
    t = torch.tensor([[1, 3, -1, 0], [2, -1, 0, 0], [0, 1, 2, 3]])
    sets = [[1, 3], [2], [0, 1, 2, 3]]

    def twin(x):
        losses = [
            sum((1 - row[j] + row[i]).clamp(min=0) for j in wanted for i in range(4) if i not in wanted) / 4
            + 0 * row[0]
            for row, wanted in zip(x, sets, strict=True)
        ]
        return _reduced(torch.stack(losses), reduction)

    add_case(
        f"multilabel_margin_loss_{reduction}",
        lambda d: (lambda x: F.multilabel_margin_loss(x, t, reduction=reduction), [d.tensor(3, 4)]),
        twin=twin,
    )


for _r in ("none", "mean", "sum"):
    _multilabel_margin(_r)
    for _p in (1, 2):
        _multi_margin(_p, _r, weighted=_r == "mean")


def _paths(frames, label):
    """All sequences of classes of this length that collapse to the label (blank 0)."""
    if frames == 0:
        return [()] if not label else []
    found = []
    for path in torch.cartesian_prod(*[torch.arange(3)] * frames).view(-1, frames).tolist():
        collapsed = [c for k, c in enumerate(path) if c != 0 and (k == 0 or path[k - 1] != c)]
        if collapsed == label:
            found.append(path)
    return found


def _ctc(name, **options):
    labels, lengths = [[1, 2], [1, 1], [2]], [4, 3, 2]
    targets = torch.tensor([1, 2, 1, 1, 2])
    target_lengths = [2, 2, 1]

    def twin(x):
        """The definition, and the sum of all probabilities, whose slope PyTorch adds to the gradient."""
        losses = []
        for n, (label, frames) in enumerate(zip(labels, lengths, strict=True)):
            scores = [sum(x[t, n, c] for t, c in enumerate(path)) for path in _paths(frames, label)]
            losses.append(x[:frames, n].exp().sum() - torch.stack(scores).logsumexp(0))
        return torch.stack(losses)

    def loss(x):
        given = (
            (torch.tensor(lengths), torch.tensor(target_lengths)) if name == "tensors" else (lengths, target_lengths)
        )
        return torch._ctc_loss(x, targets, *given, 0, False)[0]

    add_case(f"ctc_loss_{name}", lambda d: (loss, [d.tensor(4, 3, 3)]), twin=twin, **options)


_ctc("lists")
_ctc("tensors")


@case
def linear_cross_entropy_loss(d: Draw) -> Built:
    """The layer and the loss in one, plainly and in chunks."""
    options = {"reduction": d.choice("none", "mean"), "weight": _weights(d, 3)}
    if options["reduction"] == "none" and hasattr(F, "linear_cross_entropy"):
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        options["options"] = LinearCrossEntropyOptions(batch_chunk_size=2)
    t, bias = torch.tensor([0, 2, 1, 2, -100]), d.boolean()
    inputs = [d.tensor(5, 4), d.tensor(3, 4), *([d.tensor(3)] if bias else [])]

    def loss(x, w, b=None):
        if not hasattr(F, "linear_cross_entropy"):
            return F.cross_entropy(F.linear(x, w, b), t, **options)
        return F.linear_cross_entropy(x, w, t, linear_bias=b, **options)

    return _further(d, loss), inputs
