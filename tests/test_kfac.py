"""Kronecker factors against their definitions, written out in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import EKFAC, KFAC, KFLR, KFRA, BatchGrad, CurvatureError, GGNBlock, Kronecker, SqrtGGNMC, extend

from . import models
from .kronecker_factors import N, Recorded, classes, factors, near, recorded, swept, waves, with_one
from .reference import gauss_newton

pytestmark = pytest.mark.usefixtures("float64")


settings = pytest.mark.parametrize("setting", ["expand", "reduce"])


@settings
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_positions(setting, bias):
    x = torch.randn(N, 4, 2)
    layer, s = recorded(nn.Linear(2, 5, bias=bias), x, setting)
    near(layer.weight.kflr, list(factors(s, x, setting)))
    near(list(layer.kflr.factors), list(factors(s, with_one(x) if bias else x, setting)))
    if bias:  # its own block, as for every parameter that is no weight
        near(layer.bias.kflr, [torch.einsum("cno,cnp->op", s.sum(2), s.sum(2))])


def transposed_in_some_way(weight):
    views = (weight.T, weight.t(), weight.mT, weight.transpose(0, -1), weight.permute(1, 0))
    return (*views, weight.clone().T, weight.T.unsqueeze(0).squeeze(0))


@pytest.mark.parametrize("k", range(7))
def test_functional_layer(k):
    weight, x, y = torch.randn(3, 3, requires_grad=True), torch.randn(N, 3), classes(N)

    def output(w):
        return x @ transposed_in_some_way(w)[k]

    swept([weight], lambda: F.cross_entropy(output(weight), y))
    z = output(weight)
    s = waves(lambda z: F.cross_entropy(z, y), z, z)
    near(weight.kflr, list(factors(s.unsqueeze(2), x.unsqueeze(1))))


def test_functional_layer_with_the_inputs_features_first():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    x = torch.randn(N, 2)
    layer, s = recorded(Conv1D(), x)
    near(layer.weight.kflr, list(factors(s.unsqueeze(2), x.unsqueeze(1)))[::-1])
    near(list(layer.kflr.factors), list(factors(s.unsqueeze(2), with_one(x).unsqueeze(1)))[::-1])
    assert layer.kflr.bias_along == 1
    weight, bias = layer.kflr @ (layer.weight, layer.bias)
    assert weight.shape == (2, 5) and bias.shape == (5,)


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": (2, 1)},
    {"groups": 2, "stride": (1, 2)},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "groups": 4},
]


@settings
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options, setting):
    """Patches by F.unfold, padded by hand."""
    x = torch.randn(N, 4, 6, 5)
    layer, s = recorded(nn.Conv2d(4, 8, 3, **options), x, setting)
    s = s.flatten(3).mT  # C N T O
    p = (1, 1) if layer.padding == "same" else layer.padding
    padded = F.pad(x, (p[1], p[1], p[0], p[0]), "circular" if "padding_mode" in options else "constant")
    patches = F.unfold(padded, 3, layer.dilation, 0, layer.stride).mT  # N T I·k
    g = layer.groups
    of_group = [factors(*pair, setting) for pair in zip(s.split(8 // g, 3), patches.split(36 // g, 2), strict=True)]
    want = [torch.stack(f) if g > 1 else f[0] for f in zip(*of_group, strict=True)]
    near(layer.weight.kflr, want)
    joint = [
        factors(a, with_one(b), setting) for a, b in zip(s.split(8 // g, 3), patches.split(36 // g, 2), strict=True)
    ]
    near(layer.kflr.dense(), torch.block_diag(*[torch.kron(*pair) for pair in joint]))


@settings
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(setting, groups):
    """A linear map from each position of the input to a patch of the output."""
    x = torch.randn(N, 4, 3, 4)
    layer, s = recorded(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=False), x, setting)
    patches = F.unfold(s.flatten(0, 1), 3, 1, 1, 2).mT.unflatten(0, (-1, N))  # C N T O·k
    inputs = x.flatten(2).mT
    pairs = zip(patches.split(54 // groups, 3), inputs.split(4 // groups, 2), strict=True)
    of_group = [factors(*pair, setting)[::-1] for pair in pairs]
    near(layer.weight.kflr, [torch.stack(f) if groups > 1 else f[0] for f in zip(*of_group, strict=True)])
    assert layer.kflr.like == layer.weight.shape


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_position_of_one_sample_is_exact(kind, groups):
    """The block of each group is a Kronecker product then."""
    transposed, d = "Transpose" in kind.__name__, int(kind.__name__[-2])
    x = torch.randn(1, 4, *[1 if transposed else 2] * d)
    model = Recorded(kind(4, 2, 2, groups=groups), x)
    swept(model, lambda: F.cross_entropy(model(x), torch.tensor([1])), KFLR(), GGNBlock())
    weight = model.layer.weight
    size = weight.numel() // groups
    got = Kronecker(weight.kflr, weight.shape).dense()
    for k in range(groups):
        group = slice(k * size, (k + 1) * size)
        near(got[group, group], weight.ggn_block[group, group])
    assert hasattr(model.layer, "kflr") == (not transposed), "its bias is added to sums of the map's outputs"


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Identity])
def test_one_sample_is_exact(activation):
    model, x = models.mlp(activation), torch.randn(1, 4)
    swept(model, lambda: F.cross_entropy(model(x), torch.tensor([2])), KFLR(), KFRA(), GGNBlock())
    for p in model.parameters():
        near(Kronecker(p.kflr).dense(), p.ggn_block)
        near(Kronecker(p.kfra).dense(), p.ggn_block)


@pytest.mark.parametrize("same", ["inputs", "waves"])
def test_a_factor_that_all_samples_share_is_exact(same):
    model, y = nn.Linear(4, 3), classes(N)
    x = torch.randn(1, 4).expand(N, -1) if same == "inputs" else torch.randn(N, 4)
    loss = F.cross_entropy if same == "inputs" else lambda z, y: F.mse_loss(z, F.one_hot(y, 3) * 1.0)
    swept(model, lambda: loss(model(x), y), KFLR(), GGNBlock())
    near(Kronecker(model.weight.kflr).dense(), model.weight.ggn_block)


class Shared(nn.Module):
    """Two linear maps at every position; their mean, or all of them, is the output."""

    def __init__(self, mean):
        super().__init__()
        self.first, self.second, self.mean = nn.Linear(3, 4), nn.Linear(4, 2), mean

    def forward(self, x):
        z = self.second(self.first(x))
        return z.mean(1) if self.mean else z


@settings
@pytest.mark.parametrize("mean", [True, False])
def test_deep_linear_networks(setting, mean):
    """Of squared errors: expand is exact if every position is an output, reduce if their mean is.

    Eschenhagen et al. 2023; weight and bias together.
    """
    model, x = Shared(mean), torch.randn(N, 5, 3)
    target = torch.randn(model(x).shape)
    swept(model, lambda: F.mse_loss(model(x), target), KFLR(setting))
    for layer in (model.first, model.second):
        block = gauss_newton(lambda: model(x), lambda z: F.mse_loss(z, target), [layer.weight, layer.bias])
        place = layer.kflr.join(*torch.arange(len(block)).split([layer.weight.numel(), len(layer.bias)])).flatten()
        exact = torch.allclose(layer.kflr.dense(), block[place][:, place], rtol=1e-8, atol=1e-11)
        assert exact == (setting == ("reduce" if mean else "expand"))


@settings
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvlinops(setting, reduction):
    """Its factors of weights, where it is right, and weight and bias together."""
    curvlinops = pytest.importorskip("curvlinops")
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    loss, x, y = nn.CrossEntropyLoss(reduction=reduction), torch.randn(N, 2, 4, 4), classes(N)
    swept(model, lambda: loss(model(x), y), KFLR(setting))
    parameters = list(model.parameters())
    for apart in (True, False):
        theirs = curvlinops.KFACLinearOperator(
            *(model, loss, parameters, [(x, y)]), fisher_type="type-2", kfac_approx=setting,
            separate_weight_and_bias=apart, check_deterministic=False,
        )  # fmt: skip
        want, start = theirs @ torch.eye(theirs.shape[0]), 0
        for layer in (model[0], model[3]):
            p, q = layer.weight.numel(), layer.weight.numel() + layer.bias.numel()
            if apart:
                near(Kronecker(layer.weight.kflr).dense(), want[start : start + p, start : start + p])
            else:
                place = start + layer.kflr.join(torch.arange(p), torch.arange(p, q)).flatten()
                near(layer.kflr.dense(), want[place][:, place])
            start += q


def test_known_draws():
    """The columns of SqrtGGNMC are those that KFAC sees."""
    model, x, y = models.mlp(), torch.randn(N, 4), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y), KFAC(3), SqrtGGNMC(3))
    inputs = [x, model[:2](x), model[:4](x)]
    for layer, a in zip((model[0], model[2], model[4]), inputs, strict=True):
        s = layer.bias.sqrt_ggn_mc
        near(layer.weight.kfac, list(factors(s.unsqueeze(2), a.unsqueeze(1))))
        near(layer.bias.kfac, [torch.einsum("vno,vnp->op", s, s)])


def test_expectation():
    """Within 4 sigma over 2000 draws of one column."""
    model, x, y = models.mlp(), torch.randn(N, 4), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y), KFLR(), SqrtGGNMC(2000))
    draws = torch.einsum("vno,vnp->vop", model[2].bias.sqrt_ggn_mc, model[2].bias.sqrt_ggn_mc) * 2000
    error = (draws.mean(0) - model[2].weight.kflr[0]).abs()
    assert (error <= 4 * draws.std(0) / 2000**0.5 + 1e-12).all()


@settings
@pytest.mark.parametrize("padding", [None, 0])
def test_embedding(setting, padding):
    tokens = classes(N, 5, c=7)
    layer, s = recorded(nn.Embedding(7, 3, padding_idx=padding), tokens, setting)
    if padding is not None:
        s = s * (tokens != padding).unsqueeze(-1)
    out, inputs = factors(s, F.one_hot(tokens, 7).double(), setting)
    near(layer.weight.kflr, [inputs.diagonal(), out])
    near(layer.kflr.dense(), torch.kron(inputs.diagonal().diag(), out))


class Various(nn.Module):
    """Parameters that are no weights of linear maps."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.head = nn.LayerNorm((4, 3)), nn.Parameter(torch.randn(3)), nn.Linear(12, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.temperature * self.head(torch.tanh(self.norm(x) * self.scale).flatten(1))


def test_other_parameters_have_their_own_block():
    model, x, y = Various(), torch.randn(N, 4, 3), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y), KFLR(dense_up_to=5), EKFAC(None, dense_up_to=5), GGNBlock())
    for p in (model.norm.weight, model.norm.bias):
        near(p.kflr, [p.ggn_block.diagonal()])
        near(p.ekfac.dense(), p.ggn_block.diagonal().diag())
    for p in (model.scale, model.temperature):
        near(p.kflr, [p.ggn_block])
        near(p.ekfac.dense(), p.ggn_block)
    assert not hasattr(model.norm, "kflr")
    assert [f.shape for f in model.head.weight.kflr] == [(3, 3), (12, 12)]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_parameter_has_a_block(name):
    model, loss = models.MODELS[name]()
    swept(model.eval(), loss, KFLR(), KFAC(2), EKFAC(), samples=2 if name in ("attention", "tied") else None)
    for p in model.parameters():
        size = p.numel()
        assert [Kronecker(f, p.shape).shape for f in (p.kflr, p.kfac)] == [(size, size)] * 2
        assert p.ekfac.shape == (size, size) and p.ekfac.like == tuple(p.shape)
        assert Kronecker(p.kflr).trace() > 0


def test_a_module_used_twice():
    """Its uses are positions; so for a weight that two modules share, which then have no matrix of their own."""
    layer, head, x, y = nn.Linear(4, 4), nn.Linear(4, 3), torch.randn(N, 4), classes(N)
    model = nn.ModuleList([layer, head])
    uses = []

    def output():
        uses[:] = [layer(x)]
        uses.append(layer(torch.tanh(uses[0])))
        return head(torch.tanh(uses[1]))

    swept(model, lambda: F.cross_entropy(output(), y))
    z = output()
    s = torch.stack([waves(lambda z: F.cross_entropy(z, y), z, use) for use in uses], 2)
    a = torch.stack([x, torch.tanh(uses[0])], 1)
    near(layer.weight.kflr, list(factors(s, a)))
    near(list(layer.kflr.factors), list(factors(s, with_one(a))))

    twin = nn.Linear(4, 4)
    twin.weight = layer.weight
    model = nn.ModuleList([layer, twin, head])
    swept(model, lambda: F.cross_entropy(head(torch.tanh(twin(torch.tanh(layer(x))))), y))
    assert not hasattr(layer, "kflr") and not hasattr(twin, "kflr") and hasattr(head, "kflr")
    assert layer.weight.kflr[0].shape == (4, 4)


LOSSES = {
    "class weights": lambda z, y: F.cross_entropy(z, y, torch.tensor([0.1, 2.0, 5.0])),
    "ignored": lambda z, y: F.cross_entropy(z, y.clone().index_fill_(0, torch.tensor([0, 2]), -100)),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "scaled sum of two": lambda z, y: 3 * F.cross_entropy(z, y) + 0.5 * z.square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_losses(loss):
    """Where other libraries' factors ignore the options."""
    x, y = torch.randn(N, 4), classes(N)
    model = Recorded(nn.Linear(4, 5), x)
    swept(model, lambda: loss(model(x), y))
    z = model(x)
    s = waves(lambda z: loss(z, y), z, model.y)
    near(model.layer.weight.kflr, list(factors(s.unsqueeze(2), x.unsqueeze(1))))


def test_all_targets_ignored():
    model, x = nn.Linear(4, 3), torch.randn(1, 4)
    for loss in (lambda: F.cross_entropy(model(x), torch.tensor([-100]), reduction="sum"), lambda: model(x).sum()):
        swept(model, loss, KFLR(), KFAC(), EKFAC())
        assert Kronecker(model.weight.kflr, model.weight.shape).trace() == 0
        assert model.weight.kfac[0].norm() == model.weight.ekfac.values.norm() == 0


@settings
def test_empirical(setting):
    """Gradients in place of columns."""
    x, y = torch.randn(N, 4, 2), classes(N)
    model = Recorded(nn.Linear(2, 5), x)
    swept(model, lambda: F.cross_entropy(model(x), y), KFAC(empirical=True, setting=setting), BatchGrad())
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.y)
    near(model.layer.weight.kfac, list(factors(g.unsqueeze(0), x, setting)))
    gradients = model.layer.bias.grad_batch
    near(model.layer.bias.kfac, [gradients.T @ gradients])


@settings
def test_several_backward_passes(setting):
    """Those of a batch in parts, each with its share of the loss, add up to the batch's."""
    x, y = torch.randn(N, 3, 2), classes(N)
    model = Recorded(nn.Linear(2, 5), x)
    whole = swept(model, lambda: F.cross_entropy(model(x), y), KFLR(setting)).kflr
    joint = model.layer.kflr
    with extend(model, KFLR(setting)) as parts:
        for part in (slice(0, 2), slice(2, N)):
            (F.cross_entropy(model(x[part]), y[part]) * len(y[part]) / N).backward()
    for name, want in whole.items():
        near(parts.kflr[name], want)
    near(model.layer.kflr.dense(), joint.dense())


def test_uses_that_do_not_add_up():
    weight, x = nn.Parameter(torch.randn(3, 4)), torch.randn(N, 4)
    with pytest.raises(CurvatureError, match="cannot be added"), extend([weight], KFLR(dense_up_to=5)):
        F.cross_entropy(x @ weight.T, classes(N)).backward()
        F.cross_entropy(x[:, :3] * weight.sum(1), classes(N)).backward()


def test_batch_normalisation_in_training():
    """The batch is one sample then, and its rows are positions."""
    x = torch.randn(N, 4, 5, 5)
    body = nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 5), nn.Tanh())
    model, head, y = body, nn.Linear(5, 3), classes(N)
    every = nn.ModuleList([model, head])
    swept(every, lambda: F.cross_entropy(head(model(x)), y), KFLR(), GGNBlock(), samples=1)
    ys = [model[0](x)]
    ys.append(model[3](model[1:3](ys[0])))
    z = head(model[4](ys[1]))
    b = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z.detach()).flatten(2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(b.view(z.numel(), -1))
    columns = (vectors * values.clamp(min=0).sqrt()).T.view(-1, *z.shape)
    first, second = (torch.stack([torch.autograd.grad(z, t, c, retain_graph=True)[0] for c in columns]) for t in ys)
    rows = F.unfold(x, 3).mT.flatten(0, 1).unsqueeze(0)
    near(model[0].weight.kflr, list(factors(first.flatten(3).movedim(2, -1).flatten(1, 2).unsqueeze(1), rows)))
    near(model[3].weight.kflr, list(factors(second.unsqueeze(1), model[1:3](ys[0]).unsqueeze(0))))
    for p in (model[1].weight, model[1].bias, model[0].bias):
        near(p.kflr, [p.ggn_block])


def test_sixteen_bits():
    """Factors are added up in 32."""
    model, x, y = models.mlp().bfloat16(), torch.randn(N, 4).bfloat16(), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y), KFAC(), EKFAC(), KFRA())
    for p in model.parameters():
        assert all(f.dtype is torch.float32 for f in (*p.kfac, *p.kfra)) and p.ekfac.dtype is torch.float32
    assert model[0].kfac.solve((model[0].weight, model[0].bias), 0.1)[0].dtype is torch.bfloat16


def test_penalty_on_the_weights():
    model, x, y = nn.Linear(4, 3), torch.randn(N, 4), classes(N)
    with pytest.raises(CurvatureError, match="KFLR: a term of the loss that no sample owns"):
        swept(model, lambda: F.cross_entropy(model(x), y) + model.weight.square().sum())


def test_copies():
    """A model can be copied and pickled with its matrices, made already or not."""
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(N, 4), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in (*copies, copy.deepcopy(model)):
        near(other[0].kflr.dense(), model[0].kflr.dense())
        near(other[0].kflr.factors[1], factors(torch.zeros(1, N, 1, 3), with_one(x).unsqueeze(1))[1])


def test_bad_options():
    for make in (lambda: KFAC(0), lambda: EKFAC(0), lambda: KFLR("fold"), lambda: KFAC(setting="fold")):
        with pytest.raises(ValueError, match=r"(mc_samples|setting) must be"):
            make()


def test_modules_keep_no_matrix_of_an_earlier_block():
    model, x, y = nn.Linear(4, 3), torch.randn(N, 4), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y))
    before = model.kflr
    swept(model, lambda: F.cross_entropy(model(2 * x), y))
    assert model.kflr is not before
    swept(model, lambda: F.cross_entropy(model(x), y), KFLR().only("weight"))
    assert not hasattr(model, "kflr")
    swept(dict(model.named_parameters()), lambda: F.cross_entropy(model(x), y))
    assert model.weight.kflr[0].shape == (3, 3)


def test_a_layer_that_no_sample_is_sent_to():
    """Under a loss of two terms, whose factors are added."""
    model, x, y = nn.ModuleDict({"idle": nn.Linear(4, 4), "head": nn.Linear(4, 3)}), torch.randn(N, 4), classes(N)
    none = torch.zeros(0, dtype=torch.long)

    def loss():
        z = model["head"](x.index_add(0, none, model["idle"](x[none])))
        return F.cross_entropy(z, y) + z.square().sum()

    swept(model, loss)
    assert not any(factor.any() for p in model["idle"].parameters() for factor in p.kflr)
