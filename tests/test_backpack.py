"""curvext.backpack: BackPACK's verbs on curvext, scripts like its examples, and what BackPACK 1.7.1 gets wrong."""

from __future__ import annotations

import copy
import gc
import runpy
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvext import CurvatureError
from curvext import extend as block
from curvext.backpack import backpack, disable, extend
from curvext.backpack.extensions import (
    HMP,
    KFLR,
    PCHMP,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
)
from curvext.backpack.hessianfree.ggnvp import ggn_vector_product
from curvext.backpack.hessianfree.hvp import hessian_vector_product
from curvext.backpack.hessianfree.lop import L_op
from curvext.backpack.hessianfree.rop import R_op
from curvext.backpack.utils import kroneckers
from curvext.backpack.utils.convert_parameters import vector_to_parameter_list

from . import dense
from .models import cnn, mlp
from .reference import gauss_newton, hessian

EXAMPLES = sorted((Path(__file__).parent / "backpack_examples").glob("*.py"))
RANDOM = {"diag_ggn_optimizer"}
N = 7


def problem(model: nn.Module | None = None, *shape: int):
    model = mlp() if model is None else model
    return model, nn.CrossEntropyLoss(), torch.randn(N, *(shape or (4,))), torch.randint(0, 3, (N,))


class TestBlock:
    def test_results_are_on_the_parameters_of_extended_modules(self):
        model, loss, x, y = problem()
        assert extend(model) is model and extend(loss) is loss
        with backpack(BatchGrad(), DiagGGNExact()) as nothing:
            loss(model(x), y).backward()
        assert nothing is None
        with block(model, BatchGrad(), DiagGGNExact()) as curvature:
            loss(model(x), y).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, curvature.grad_batch[name])
            torch.testing.assert_close(p.diag_ggn_exact, curvature.diag_ggn_exact[name])

    def test_only_extended_parts_are_served(self):
        model, loss, x, y = problem(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
        extend(model[2])
        with backpack(BatchGrad()):  # per-sample gradients of the layers below would be ill-defined
            loss(model(x), y).backward()
        assert model[2].weight.grad_batch.shape == (N, 3, 4)
        assert not hasattr(model[0].weight, "grad_batch") and model[0].weight.grad is not None

    def test_parts_extended_one_by_one(self):
        model, loss, x, y = problem()
        extend(model[0]), extend(model[4]), extend(model)
        with backpack(BatchL2Grad()):
            loss(model(x), y).backward()
        assert all(p.batch_l2.shape == (N,) for p in model.parameters())

    def test_another_model_keeps_its_results(self):
        (first, loss, x, y), (second, *_) = problem(), problem()
        for model in (extend(first), extend(second)):
            with backpack(BatchL2Grad()):
                loss(model(x), y).backward()
        assert all(hasattr(p, "batch_l2") for p in (*first.parameters(), *second.parameters()))

    def test_every_backward_starts_afresh(self):
        model, loss, x, y = problem()
        extend(model)
        with backpack(SumGradSquared()):
            loss(model(x), y).backward(retain_graph=False)
            once = model[0].weight.sum_grad_squared.clone()
            loss(model(x), y).backward()
        torch.testing.assert_close(model[0].weight.sum_grad_squared, once)

    def test_extension_objects_may_be_reused_and_nested(self):
        model, loss, x, y = problem()
        extend(model)
        extension = DiagGGNExact()
        with backpack(extension):
            with backpack(BatchGrad()):
                loss(model(x), y).backward()
        assert hasattr(model[0].weight, "grad_batch") and hasattr(model[0].weight, "diag_ggn_exact")

    def test_without_extensions_it_is_the_gradient(self):
        model, loss, x, y = problem()
        extend(model)
        with backpack():
            loss(model(x), y).backward()
        assert model[0].weight.grad is not None and not model[0].weight.__dict__

    def test_disable_does_nothing(self):
        model, loss, x, y = problem()
        extend(model)
        with disable():
            value = loss(model(x), y)
            assert not disable.should_store_io()
        with backpack(BatchGrad()):
            value.backward()
        assert hasattr(model[0].weight, "grad_batch")

    def test_any_quantity_and_selections(self):
        model, loss, x, y = problem()
        extend(model)
        with backpack(DiagHessian().only(nn.Linear), DiagGGNExact().only("0.*"), BatchGrad()):
            loss(model(x), y).backward()
        assert hasattr(model[0].weight, "diag_ggn_exact") and not hasattr(model[2].weight, "diag_ggn_exact")

    def test_debug(self, capsys):
        model, loss, x, y = problem()
        extend(model, debug=True)
        with backpack(BatchGrad(), debug=True):
            loss(model(x), y).backward()
        printed = capsys.readouterr().out
        assert "Extending" in printed and "grad_batch: 6 tensors" in printed

    def test_models_are_not_kept_alive(self):
        model = extend(mlp())
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


class TestMistakes:
    def test_a_class_instead_of_an_instance(self):
        with pytest.raises(TypeError, match=r"write BatchGrad\(\)"):
            backpack(BatchGrad)

    def test_something_else_than_a_module(self):
        with pytest.raises(TypeError, match="expected a torch"):
            extend(F.mse_loss)

    def test_a_model_that_was_not_extended(self):
        model, loss, x, y = problem()
        with pytest.raises(CurvatureError, match="call extend"):
            with backpack(BatchGrad()):
                loss(copy.deepcopy(extend(model))(x), y).backward()

    def test_no_backward(self):
        with pytest.raises(CurvatureError, match="nothing was computed"):
            with backpack(BatchGrad()):
                pass

    def test_the_block_does_not_hide_an_error(self):
        with pytest.raises(KeyError):
            with backpack(BatchGrad()):
                raise KeyError


class TestHook:
    def test_is_called_once_with_every_module_that_is_ready(self):
        model, loss, x, y = problem(cnn(), 2, 6, 6)
        extend(model), extend(loss)
        model[3].bias.requires_grad_(False)
        calls = []

        def hook(module):
            calls.append(module)
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            assert own and all(p.grad_batch is not None for p in own)

        with backpack(BatchGrad(), extension_hook=hook):
            loss(model(x), y).backward()
        assert calls == [model[6], model[3], model[0]]

    def test_what_it_deletes_is_freed(self):
        model, loss, x, y = problem()
        extend(model)
        held = []

        def hook(module):
            for p in module.parameters():
                held.append(weakref.ref(p.grad_batch))
                p.mean_grad = p.grad_batch.mean(0)
                del p.grad_batch
            assert all(ref() is None for ref in held[: -len(list(module.parameters()))])

        with backpack(BatchGrad(), extension_hook=hook):
            loss(model(x), y).backward()
        assert len(held) == 6 and all(ref() is None for ref in held)
        assert not hasattr(model[0].weight, "grad_batch")
        torch.testing.assert_close(model[0].weight.mean_grad * N, model[0].weight.grad)

    def test_shared_and_partly_asked_parameters(self):
        model, loss, x, y = problem(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)))
        model[2].weight = model[0].weight
        extend(model)
        calls = []
        with backpack(BatchGrad(), extension_hook=calls.append):
            loss(model(x), y).backward(inputs=[model[0].weight, model[2].bias])
        assert sorted(map(id, calls)) == sorted(map(id, [model[0], model[2]]))


@pytest.mark.usefixtures("float64")
class TestKroneckers:
    def factors(self) -> list[Tensor]:
        return [a @ a.mT for a in (torch.randn(n, n) for n in (2, 3, 4))]

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_products(self, k):
        factors = self.factors()[:k]
        matrix = kroneckers.kfacs_to_mat(factors)
        for v in (torch.randn(len(matrix)), torch.randn(len(matrix), 2)):
            torch.testing.assert_close(kroneckers.apply_kfac_mat_prod(factors, v), matrix @ v)

    @pytest.mark.parametrize("shift", [None, 0.1, [0.1, 0.2, 0.3]])
    def test_inverses(self, shift):
        factors = self.factors()
        shifts = shift if isinstance(shift, list) else [shift or 0.0] * 3
        matrix = kroneckers.kfacs_to_mat([f + s * torch.eye(len(f)) for f, s in zip(factors, shifts, strict=True)])
        v = torch.randn(len(matrix))
        torch.testing.assert_close(matrix @ kroneckers.apply_inv_kfac_mat_prod(factors, v, shift), v)

    def test_rectangular_and_wrong(self):
        a, b = torch.randn(2, 3), torch.randn(4, 5)
        v = torch.randn(15)
        torch.testing.assert_close(kroneckers.kfac_mat_prod([a, b])(v), torch.kron(a, b) @ v)
        torch.testing.assert_close(kroneckers.two_kfacs_to_mat(a, b), torch.kron(a, b))
        with pytest.raises(ValueError, match="15 rows"):
            kroneckers.kfac_mat_prod([a, b])(torch.randn(8))
        with pytest.raises(ValueError, match="matrices"):
            kroneckers.kfac_mat_prod([torch.randn(3)])

    def test_singular_factors_are_cut(self):
        (inverse,) = kroneckers.inv_kfacs([torch.zeros(2, 2)])
        torch.testing.assert_close(inverse, 1e8 * torch.eye(2))


@pytest.mark.usefixtures("float64")
def test_products_by_autograd():
    model, loss, x, y = problem()
    parameters = list(model.parameters())
    sizes = sum(p.numel() for p in parameters)
    v = torch.randn(sizes)
    vs = vector_to_parameter_list(v, parameters)

    def flat(tensors):
        assert not any(t.requires_grad for t in tensors)
        return torch.cat([t.flatten() for t in tensors])

    z = model(x)
    value = loss(z, y)
    torch.testing.assert_close(
        flat(hessian_vector_product(value, parameters, vs)), hessian(lambda: loss(model(x), y), parameters) @ v
    )
    gradients = torch.autograd.grad(value, parameters, create_graph=True)
    assert hessian_vector_product(value, parameters, vs, gradients, detach=False)[0].requires_grad
    ggn = gauss_newton(lambda: model(x), lambda z: loss(z, y), parameters)
    torch.testing.assert_close(flat(ggn_vector_product(value, z, model, vs)), ggn @ v)
    w = torch.randn_like(z)
    (jv,), jtw = R_op(z, parameters, vs), L_op(z, parameters, w)
    torch.testing.assert_close((jv * w).sum(), flat(jtw) @ v)
    (linear,) = R_op(3 * parameters[0], parameters[0], vs[0])
    torch.testing.assert_close(linear, 3 * vs[0])
    (zero,) = hessian_vector_product((3 * parameters[0]).sum(), [parameters[0]], [vs[0]])
    assert not zero.any()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.second(torch.tanh(self.first(x)))))


class Branches(nn.Module):
    """A permuted branch and a plain one, the permutation of square matrices being a view."""

    def __init__(self, permuted_first: bool) -> None:
        super().__init__()
        self.permuted_first, self.below, self.side, self.head = permuted_first, *(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        parts = [x.transpose(1, 2), self.side(x)]
        first, second = parts if self.permuted_first else parts[::-1]
        return self.head(torch.tanh(first + second)).mean(1)


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.usefixtures("float64")
class TestSilentErrors:
    """What BackPACK 1.7.1 gets wrong without a word: here every quantity equals its dense definition."""

    def classified(self, model, *shape, classes=3):
        y = torch.randint(0, classes, (N,))
        dense.check(model, torch.randn(N, *shape), lambda z: F.cross_entropy(z, y),
                    lambda z: F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip

    def test_inputs_that_require_gradients_with_one_object_over_steps(self):
        model, loss, _, y = problem()
        extend(model)
        quantities = BatchGrad(), DiagGGNExact()
        for _ in range(6):
            x = torch.randn(N, 4, requires_grad=True)
            with backpack(*quantities):
                loss(model(x), y).backward()
            ggn = gauss_newton(lambda x=x: model(x.detach()), lambda z: loss(z, y), list(model.parameters()))
            torch.testing.assert_close(
                torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]), ggn.diagonal()
            )
            for p in model.parameters():
                torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
            model.zero_grad()

    def test_ignored_targets(self):
        y = torch.tensor([0, -100, 2, 1, -100, 1, 0])
        kept = (y != -100).sum()
        dense.check(mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y),
                    lambda z: F.cross_entropy(z, y, reduction="none") / kept)  # fmt: skip

    @pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
    def test_padding_modes(self, mode):
        conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
        self.classified(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)), 2, 4, 4)

    @pytest.mark.parametrize("view", [lambda t: t.transpose(1, 2), lambda t: t.reshape(N, -1).view(N, 4, 4).mT])
    def test_views_between_layers(self, view):
        layers = nn.Linear(4, 4), Lambda(view), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        self.classified(nn.Sequential(*layers), 4, 4)

    @pytest.mark.parametrize("permuted_first", [False, True])
    def test_a_permuted_branch(self, permuted_first):
        self.classified(Branches(permuted_first), 4, 4, classes=4)

    def test_tied_weights(self):
        self.classified(Tied(), 4)

    def test_the_divisor_of_average_pooling(self):
        pool = nn.AvgPool2d(2, divisor_override=3)
        self.classified(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Sigmoid(), pool, nn.Flatten(), nn.Linear(8, 3)), 2, 6, 6)

    def test_dropout_of_exact_zeros(self):
        first = nn.Linear(4, 6)
        with torch.no_grad():
            first.weight[:3], first.bias[:3] = 0, 0
        mask = F.dropout(torch.ones(N, 6))

        class Seeded(nn.Module):  # every forward pass of the check draws the same mask
            def forward(self, x):
                with torch.random.fork_rng():
                    torch.manual_seed(1)
                    return F.dropout(x, 0.5)

        assert mask.any()
        self.classified(nn.Sequential(first, Seeded(), nn.Linear(6, 3)), 4)

    @pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
    def test_norms_of_grouped_convolutions(self, kind):
        shape = (2, 5) if kind is nn.Conv1d else (2, 3, 3)
        body = nn.Sequential(kind(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten())
        self.classified(nn.Sequential(body, nn.Linear(body(torch.zeros(1, *shape)).shape[1], 3)), *shape)

    def test_products_with_the_positive_hessian(self):
        """Where every operation bends upwards it is the Hessian; BackPACK has the gradient twice."""
        model, x = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), torch.rand(N, 4)
        with torch.no_grad():
            for p in model.parameters():
                p.abs_()
            model[0].weight.neg_(), model[0].bias.neg_()
        extend(model)
        with backpack(PCHMP(), HMP()):
            F.mse_loss(model(x), -torch.rand(N, 3)).backward()
        for p in model.parameters():
            v = torch.randn(2, *p.shape)
            torch.testing.assert_close(p.pchmp(v), p.hmp(v))

    def test_a_first_convolution_with_many_weights_bends_nothing(self):
        model = extend(nn.Sequential(nn.Conv2d(65, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
        x = torch.randn(N, 65, 1, 1)
        with backpack(PCHMP(), HMP()):
            F.cross_entropy(model(x), torch.randint(0, 3, (N,))).backward()
        for p in model.parameters():
            v = torch.randn(2, *p.shape)
            torch.testing.assert_close(p.pchmp(v), p.hmp(v))

    def test_kronecker_factors_of_convolutions(self):
        conv, head = nn.Conv2d(2, 3, 2), nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
        x, y = torch.randn(N, 2, 4, 4), torch.randint(0, 3, (N,))
        extend(conv)
        with backpack(KFLR()):
            F.cross_entropy(head(conv(x)), y).backward()
        z = conv(x).detach().requires_grad_()
        ggn = gauss_newton(lambda: head(z), lambda z: F.cross_entropy(z, y), [z]).view(N, 3, 9, N, 3, 9)
        patches = F.unfold(x, 2)
        torch.testing.assert_close(conv.weight.kflr[0], torch.einsum("notnpt->op", ggn))
        torch.testing.assert_close(conv.weight.kflr[1], torch.einsum("nit,njt->ij", patches, patches) / (9 * N))
        torch.testing.assert_close(conv.bias.kflr[0], torch.einsum("notnps->op", ggn))

    def test_targets_that_are_no_probabilities(self):
        y = torch.rand(N, 3)
        dense.check(mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y),
                    lambda z: F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip

    def test_a_penalty_on_the_weights(self):
        model, loss, x, y = problem()
        extend(model)
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        with backpack(DiagGGNExact()):
            (loss(model(x), y) + penalty).backward()
        ggn = gauss_newton(lambda: model(x), lambda z: loss(z, y), list(model.parameters())).diagonal() + 0.2
        torch.testing.assert_close(torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()]), ggn)
        with pytest.raises(CurvatureError, match="penalty on the weights"), backpack(BatchGrad()):
            (loss(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()

    def test_after_an_error(self):
        model, loss, x, y = problem()
        extend(model)
        quantity = DiagGGNExact()

        def fail(module):
            raise KeyError

        with pytest.raises(KeyError), backpack(quantity, extension_hook=fail):
            loss(model(x), y).backward()
        assert not any(hasattr(p, "diag_ggn_exact") for p in model.parameters())
        with backpack(quantity):
            loss(model(x), y).backward()
        want = model[0].weight.diag_ggn_exact
        with backpack(DiagGGNExact()):
            loss(model(x), y).backward()
        torch.testing.assert_close(want, model[0].weight.diag_ggn_exact)


def run(path: Path, peer: bool = False):
    """An example's ``main()``, with curvext or, by a change of the import alone, with BackPACK."""
    if not peer:
        return runpy.run_path(str(path))["main"]()
    namespace = {"__name__": path.stem}
    exec(compile(path.read_text().replace("from curvext.backpack", "from backpack"), str(path), "exec"), namespace)
    return namespace["main"]()


class TestExamples:
    """Scripts in the manner of BackPACK's published examples, which differ from those by the import."""

    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
    def test_runs(self, path):
        pytest.importorskip("sklearn")
        result = run(path)
        if isinstance(result, list):  # losses
            assert result[-1] < 0.95 * result[0]

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Extension saving to")
    @pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in RANDOM], ids=lambda path: path.stem)
    def test_same_as_with_backpack(self, path):
        pytest.importorskip("sklearn")
        pytest.importorskip("backpack", reason="BackPACK is not installed")
        torch.testing.assert_close(run(path), run(path, peer=True), rtol=1e-4, atol=1e-6)
