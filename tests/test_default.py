"""The default: equation (2) for any operation, without a rule; and how third parties put rules in its place."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import CurvatureError, SampledOperationWarning, extend, registry
from curvext.diagonal import pass_diagonal
from curvext.graph import Graph, edge_of
from curvext.registry import find
from curvext.rules.default import default
from curvext.sweep import Settings
from curvext.testing import EXACT, check_operation, check_rule, without_rules

from .reference import equation_2, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def topmost(function, inputs, **settings):
    """The topmost operation of function(*inputs), and a leaf for each of its differentiable inputs."""
    y = function(*inputs)
    targets = {edge_of(x): i for i, x in enumerate(inputs) if x.requires_grad}
    op = Graph([y.grad_fn]).operations(targets, Settings(**{"enumerate_up_to": EXACT, **settings}))[0]
    return op, torch.randn_like(y), torch.randn_like(y), targets


OPERATIONS = {
    "tanh": (torch.tanh, [leaf(2, 3)]),
    "gelu": (F.gelu, [leaf(2, 3)]),
    "softmax": (lambda x: torch.softmax(x, 1), [leaf(2, 3)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [leaf(3, 4), leaf(4), leaf(4)]),
    "mm": (torch.mm, [leaf(2, 3), leaf(3, 4)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [leaf(2, 2, 3, 3), leaf(3, 2, 2, 2), leaf(3)]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [leaf(5, 2), leaf(2), leaf(2)]),
    "logsumexp": (lambda x: torch.logsumexp(x, 1), [leaf(2, 3)]),
    "broadcast product": (torch.mul, [leaf(3, 4), leaf(4)]),
    "broadcast quotient": (torch.div, [leaf(1, 4), leaf(3, 1)]),
    "broadcast power": (lambda x, y: torch.pow(x.exp(), y), [leaf(3, 1), leaf(1, 2)]),
    "broadcast sum": (lambda x, y: torch.add(x, y, alpha=3), [leaf(3, 4), leaf(1, 4)]),
    "batched product": (torch.bmm, [leaf(2, 2, 3), leaf(2, 3, 2)]),
    "double": (lambda x: torch.tanh(x) * 1, [leaf(2, 3)]),
}


class TestExact:
    @pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("broadcast power", "double")])
    def test_equals_autograd_functional(self, name):
        function, inputs = OPERATIONS[name]
        inputs = [x.double().detach().requires_grad_() for x in inputs]
        op, g, h, targets = topmost(function, inputs)
        for g_, h_ in ((g, h), (g, None), (None, h)):
            waves = default(op, [g_] + [None] * (len(op.outputs) - 1), [h_] + [None] * (len(op.outputs) - 1))
            for i, edge in enumerate(op.edges):
                zero = torch.zeros_like(g)
                k = targets[edge]
                want = equation_2(function, inputs, k, zero if g_ is None else g_, zero if h_ is None else h_)
                got = torch.zeros(()) if waves[i] is None else op.reduced(waves[i], i)
                close(got.expand(want.shape), want)

    @pytest.mark.parametrize("name", ["mm", "conv2d", "broadcast sum"])
    def test_a_linear_operation_makes_no_wave(self, name):
        function, inputs = OPERATIONS[name]
        inputs = [x.double().detach().requires_grad_(i == 0) for i, x in enumerate(inputs)]
        op, g, _, _ = topmost(function, inputs)
        assert default(op, [g], None)[0] is None

    @pytest.mark.parametrize("way", ["default", "rules"])
    @pytest.mark.parametrize(
        "function",
        [
            lambda a, b: a * b,
            lambda a, b: a / b,
            lambda a, b: torch.pow(a, b),
            lambda a, b: a @ b,
            lambda a, b: torch.atan2(a, b),
        ],
        ids=["mul", "div", "pow", "mm", "atan2"],
    )
    def test_inputs_that_depend_on_each_other_are_held_fixed(self, function, way):
        """In a * tanh(a), what the product saved leads back to a; (2) is about the product alone."""
        w = torch.rand(3, 3, requires_grad=True)
        a = w.exp()
        b = torch.tanh(a)
        y = function(a, b)
        g, h = torch.randn_like(y), torch.randn_like(y)
        op = Graph([y.grad_fn]).operations({edge_of(w): 0}, Settings(enumerate_up_to=EXACT))[0]
        pairs = {edge_of(a): (0, a), edge_of(b): (1, b)}
        waves = default(op, [g], [h]) if way == "default" else pass_diagonal(op, [g], [h])
        values = [value.detach() for _, value in sorted(pairs.values(), key=lambda pair: pair[0])]
        for i, edge in enumerate(op.edges):
            close(op.reduced(waves[i], i), equation_2(function, values, pairs[edge][0], g, h))

    @pytest.mark.parametrize("way", ["default", "rules"])
    @pytest.mark.parametrize(
        "function",
        [lambda x: x * x, lambda x: x @ x, lambda x: x / x, lambda x: torch.add(x, x, alpha=2)],
        ids=["mul", "mm", "div", "add"],
    )
    def test_one_tensor_that_enters_twice_is_one_variable(self, function, way):
        w = torch.rand(3, 3, requires_grad=True)
        x = w.exp()
        y = function(x)
        g, h = torch.randn_like(y), torch.randn_like(y)
        op = Graph([y.grad_fn]).operations({edge_of(w): 0}, Settings(enumerate_up_to=EXACT))[0]
        assert op.coincident
        waves = default(op, [g], [h]) if way == "default" else pass_diagonal(op, [g], [h])
        got = torch.zeros(3, 3) + sum(op.reduced(wave, i) for i, wave in enumerate(waves) if wave is not None)
        close(got, equation_2(function, [x.detach()], 0, g, h))

    def test_a_whole_graph_of_such_operations(self):
        """y = x tanh x, then a square: by hand, and by the block with and without rules."""
        w = torch.randn(4, requires_grad=True)

        def loss():
            x = w * 1.5
            return (x * torch.tanh(x)).pow(2).sum()

        x = w.detach() * 1.5
        t, y = torch.tanh(x), x * torch.tanh(x)
        h, g = torch.full_like(y, 2.0), 2 * y
        slope = 1 - t**2
        want = 1.5**2 * (h * t**2 + h * x**2 * slope**2 - g * x * 2 * t * slope)
        for rules in (True, False):
            with extend([w]):
                value = loss()
                if rules:
                    value.backward()
                else:
                    with without_rules():
                        value.backward()
            close(w.hesscale, want)


def draws(op, g, h, n, probes=1):
    settings = Settings(enumerate_up_to=0, probes=probes, generator=torch.Generator().manual_seed(0))
    settings.sampled.add(op.kind)
    op.settings = settings
    return torch.stack([flat(op, default(op, g, h)) for _ in range(n)])


def flat(op, waves):
    return torch.cat(
        [torch.zeros(op.inputs[i].shape).flatten() if w is None else w.flatten() for i, w in enumerate(waves)]
    )


class TestSampled:
    @pytest.mark.parametrize("name", ["softmax", "layer_norm", "mm", "conv2d", "batch_norm"])
    @pytest.mark.parametrize("term", ["g", "h"])
    def test_is_unbiased(self, name, term):
        function, inputs = OPERATIONS[name]
        inputs = [x.double().detach().requires_grad_() for x in inputs]
        op, g, h, _ = topmost(function, inputs)
        assert (h < 0).any() and (h > 0).any()
        rest = [None] * (len(op.outputs) - 1)
        arguments = ([g, *rest], None) if term == "g" else (None, [h, *rest])
        want = flat(op, default(op, *arguments))
        samples = draws(op, *arguments, 3000)
        error = samples.std(0) / 3000**0.5
        assert ((samples.mean(0) - want).abs() <= 4 * error + 1e-12).all()
        linear = name in ("mm", "conv2d") and term == "g"
        assert (samples.std(0).max() == 0) == linear == (not want.any())

    def test_more_probes_less_variance(self):
        op, g, h, _ = topmost(*OPERATIONS["softmax"])
        one, ten = (draws(op, [g], [h], 1000, probes).var(0).sum() for probes in (1, 10))
        assert 6 < one / ten < 15

    def sampled_block(self, seed=None, **options):
        x = torch.linspace(-1, 1, 40).view(4, 10)
        w = torch.full((10, 10), 0.1, requires_grad=True)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with without_rules(), extend([w], generator=generator, **options), warnings.catch_warnings():
            warnings.simplefilter("ignore", SampledOperationWarning)
            torch.softmax(x @ w, 1).square().sum().backward()
        return w.hesscale

    def test_a_generator_makes_it_reproducible_and_leaves_the_global_one_alone(self):
        state = torch.get_rng_state()
        first = self.sampled_block(1, enumerate_up_to=10)
        assert torch.equal(first, self.sampled_block(1, enumerate_up_to=10))
        assert not torch.equal(first, self.sampled_block(2, enumerate_up_to=10))
        assert torch.equal(torch.get_rng_state(), state)
        self.sampled_block(enumerate_up_to=10)
        assert not torch.equal(torch.get_rng_state(), state)

    def test_small_operations_are_enumerated(self):
        state = torch.get_rng_state()
        assert torch.equal(self.sampled_block(1, enumerate_up_to=100), self.sampled_block(2, enumerate_up_to=100))
        assert torch.equal(torch.get_rng_state(), state)

    def test_each_block_names_each_operation_once(self):
        w = leaf(20)
        for _ in range(2):
            with pytest.warns(SampledOperationWarning) as caught, extend([w], enumerate_up_to=10):
                loss = torch.logcumsumexp(torch.logcumsumexp(w, 0), 0).pow(2).sum()
                with without_rules():
                    loss.backward(retain_graph=True)
                    loss.backward()
            texts = [str(warning.message) for warning in caught]
            assert sum("LogcumsumexpBackward0 has no curvature rule" in text for text in texts) == 1
            assert all("curvext.rule" in text and "probes=" in text for text in texts)

    def test_warnings_as_errors_stay_warnings(self):
        w = leaf(20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(SampledOperationWarning), extend([w], enumerate_up_to=10), without_rules():
                torch.logcumsumexp(w, 0).pow(2).sum().backward()
        assert w.grad is not None


class Cube(torch.autograd.Function):
    """scale · x³ y, and an output that nothing may use; the backward writes into what it is given."""

    @staticmethod
    def forward(ctx, scale, x, constant, y):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return scale * x**3 * y, x + y

    @staticmethod
    def backward(ctx, g, unused):
        x, y = ctx.saved_tensors
        g *= ctx.scale
        return None, 3 * x**2 * y * g + unused, None, x**3 * g + unused


class Modern(torch.autograd.Function):
    """sin x, with setup_context."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Cut(torch.autograd.Function):
    """x³ with a backward that cuts the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return (3 * ctx.saved_tensors[0] ** 2 * g).detach()


class Once(Cut):
    """The same, and says so."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Step(torch.autograd.Function):
    """The sign of x, with gradient zero."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class TestPythonFunctions:
    def test_through_the_default(self):
        x, y = leaf(3), leaf(3)

        def loss(function):
            return (function(x * 1.5, y * 0.5) ** 2).sum()

        with extend([x, y]):
            loss(lambda x, y: Cube.apply(2, x, torch.ones(2), y)[0]).backward()
        for v, other, slope in ((x, y, 1.5), (y, x, 0.5)):
            a, b = x.detach() * 1.5, y.detach() * 0.5
            j, bend = (6 * a**2 * b, 12 * a * b) if v is x else (2 * a**3, 0 * a)
            close(v.hesscale, slope**2 * (2 * j**2 + 2 * (2 * a**3 * b) * bend))
            assert other.grad is not None
        grads = torch.autograd.grad(loss(lambda x, y: 2 * x**3 * y), [x, y])
        close([x.grad, y.grad], list(grads))

    def test_with_setup_context(self):
        x = leaf(5)
        with extend([x]):
            Modern.apply(x).pow(2).sum().backward()
        close([x.hesscale], hessian_diagonal(lambda: x.sin().pow(2).sum(), [x]))

    @pytest.mark.parametrize("function", [Cut, Once])
    def test_that_cannot_be_differentiated_twice(self, function):
        x = leaf(3)
        with extend({"x": x}), pytest.raises(CurvatureError, match=rf"{function.__name__}.*differentiable operations"):
            function.apply(x).sum().backward()
        close(x.grad, 3 * x.detach() ** 2)

    def test_that_is_constant(self):
        x = leaf(3)
        with extend([x]):
            (Step.apply(x) + x**2).sum().backward()
        close(x.hesscale, torch.full((3,), 2.0))


@pytest.fixture
def registered():
    """Registers rules for one test."""
    operations = []

    def register(operation, **options):
        operations.append(operation)
        return curvext.rule(operation, **options)

    yield register
    for operation in operations:
        curvext.unregister(operation)


class TestRegistration:
    def test_a_rule_for_a_class(self, registered):
        @registered(Once)
        def once(op, g, h):
            """y = x³."""
            (x,) = op.saved_tensors
            wave = None if h is None else 9 * x**4 * h
            bend = None if g is None else 6 * x * g
            return wave if bend is None else bend if wave is None else wave + bend

        x = leaf(3)
        with extend([x]):
            Once.apply(x).pow(2).sum().backward()
        close([x.hesscale], hessian_diagonal(lambda: x.pow(6).sum(), [x]))

    def test_a_rule_reads_what_ctx_held(self, registered):
        @registered(Cube, outputs="all")
        def cube(op, g, h):
            """y = scale · x³ y."""
            return None, torch.full_like(op.saved_tensors[0], op.scale)

        x, y = leaf(3), leaf(3)
        with extend([x, y]):
            Cube.apply(7, x, torch.ones(2), y)[0].pow(2).sum().backward()
        # edges exist for tensors only: x, the constant, y
        close([x.hesscale, y.hesscale], [torch.zeros(3)] * 2)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x, g, h: 9 * x**4 * h,
            lambda x, g, h: 9 * x**4 * h - 6 * x * g,
            lambda x, g, h: 3 * x**2 * h + 6 * x * g,
            lambda x, g, h: 9 * x**4 * h.abs() + 6 * x * g,
        ],
        ids=["no bend", "sign", "no square", "absolute"],
    )
    def test_check_rule_catches_a_wrong_one(self, registered, wrong):
        class Third(Cut):
            backward = staticmethod(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g)

        @registered(Third)
        def third(op, g, h):
            (x,) = op.saved_tensors
            zero = torch.zeros_like(x)
            return wrong(x, zero if g is None else g, zero if h is None else h)

        with pytest.raises(AssertionError, match=r"Third.*input 0, .*: rule != default"):
            check_rule(Third.apply, leaf(4))

    @pytest.mark.parametrize(
        ("name", "promise", "function"),
        [
            ("CumprodBackward0", "linear", lambda x: x.cumprod(0)),
            ("MulBackward0", "additive", lambda x: x * x.flip(0)),
            ("SoftmaxBackward0", "separable", lambda x: x.softmax(0)),
        ],
    )
    def test_check_rule_catches_a_broken_promise(self, name, promise, function):
        registry.RULES[name, "diagonal"] = replace(registry.RULES[name, "diagonal"], **{promise: True})
        with pytest.raises(AssertionError, match=f"{name} is said to be {promise}"):
            check_rule(function, leaf(4))

    def test_check_rule_accepts_a_right_one_and_says_what_it_checked(self, registered):
        @registered(Modern)
        def sine(op, g, h):
            (x,) = op.saved_tensors
            zero = torch.zeros_like(x)
            return x.cos() ** 2 * (zero if h is None else h) - x.sin() * (zero if g is None else g)

        assert check_rule(lambda x: Modern.apply(x).tanh(), leaf(4)) == {Modern, "TanhBackward0"}

    def test_an_own_rule_in_place_of_a_shipped_one(self):
        kept = curvext.unregister("TanhBackward0")
        try:
            assert find(topmost(torch.tanh, [leaf(3)])[0], "diagonal") is None
            curvext.rule("TanhBackward0")(lambda op, g, h: torch.full_like(op.result, 7))
            w = leaf(3)
            with extend([w]):
                torch.tanh(w).pow(2).sum().backward()
            close(w.hesscale, torch.full((3,), 7.0))
            with pytest.raises(AssertionError, match="TanhBackward0, input 0, g and h"):
                op, *_ = topmost(torch.tanh, [leaf(3)])
                check_operation(op, torch.Generator().manual_seed(0))
        finally:
            registry.RULES["TanhBackward0", "diagonal"] = kept

    def test_an_operation_without_second_derivative_and_rule(self):
        mha, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
        with extend(mha), pytest.raises(CurvatureError, match=r"Attention.*nearest parameter in_proj.*curvext.rule"):
            loss = mha(x, x, x, need_weights=False)[0].square().sum()
            with without_rules():
                loss.backward()
