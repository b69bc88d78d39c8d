"""When do hierarchical approximations of Hessians pay, and what do they cost?

  matrices  of six small problems (problems.py), at initialisation and after training: the Hessian H and the
            Gauss-Newton matrix G. For every format and memory: the relative error in Frobenius norm, products spent and
            seconds of the construction; for G, the iterations of conjugate gradients on (G + λI) x = b, b random, to
            1e-6, with the approximation's inverse as preconditioner
  growth    the field's G at initialisation to 1e-6, by peeling, for n = 1e4 ... 3e5 (--large: 1e6): seconds of building
            (products with the network's operator included), 8 products, factoring, 8 solves, the inverse's diagonal

Memory is in floats a row, n of them being a full matrix. Formats see the matrix by products alone; these come from a
stored copy, so that seconds are the construction's own. HODLR by blocks reads entries, as those of
``FactoredGaussNewton`` can be, and Kronecker sums come from its columns; adaptive blocks take all entries. Auto chooses
by the error, and again by the iterations. Seconds are of processor time on one thread. One seed a problem.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from problems import PROBLEMS, Problem, classifier, field
from torch import Tensor

from curvext import CurvatureError, GGNFactor, extend
from curvext.demo.report import cell, heading, progress, table
from curvext.operators import (
    Dense,
    FactoredGaussNewton,
    GaussNewton,
    Hessian,
    HierarchicalOperator,
    KroneckerSum,
    Operator,
)
from curvext.solvers import cg

FLOATS = (16, 32, 64, 128)  # a row
SOLVED = (32, 128)  # those of them that precondition
DAMPINGS = (1e-3, 1e-5)  # λ over the largest eigenvalue
EXACT = 1e-12  # an error that is rounding
STEPS = 1000  # of conjugate gradients, at most
MATRICES: dict[str, Callable[..., Operator]] = {"G": GaussNewton, "H": Hessian}
SMALL = {"classifier": partial(classifier, 2), "field": partial(field, 300)}
PAGE = Path(__file__).parent.parent / "docs" / "hierarchical.md"
MARKS = "<!-- measured by benchmarks/hierarchical.py -->\n", "<!-- end -->\n"


class Stored(Operator):
    """A matrix known by its products alone, as a network's is."""

    symmetric = True

    def __init__(self, operator: Operator):
        self.matrix = operator.to_dense(64)
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.domain = self.image = operator.domain

    def _apply(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@dataclass
class Case:
    """What is approximated."""

    problem: Problem
    kind: str
    stored: Stored


# Within bytes; a shift says that ``factor(shift)`` is to precondition. The result has ``@`` and ``bytes``.
Build = Callable[[Case, int, float | None], Any]


def hierarchical(format: str, readable: bool = False, **options: Any) -> Build:
    """One of :class:`HierarchicalOperator`'s formats, from products alone, or of a matrix whose entries can be read."""

    def build(case: Case, max_bytes: int, shift: float | None) -> HierarchicalOperator:
        limits = {"max_bytes": max_bytes, "max_products": 10 * case.stored.shape[0]}
        chosen = options | ({"shift": shift} if format == "auto" else {})
        generator = torch.Generator().manual_seed(0)
        a = Dense(case.stored.matrix, case.stored.domain, symmetric=True) if readable else case.stored
        return HierarchicalOperator.from_operator(a, format=format, generator=generator, **limits, **chosen)

    return build


def kronecker_sum(case: Case, max_bytes: int, shift: float | None) -> KroneckerSum:
    """Of the Gauss-Newton matrix, from its factor."""
    if case.kind != "G":
        raise CurvatureError("Kronecker sums are of Gauss-Newton matrices")
    with extend(case.problem.model, GGNFactor()) as curvature:
        case.problem.value().backward()
    g = FactoredGaussNewton(curvature.ggn_factor, case.stored.domain)
    return KroneckerSum.nearest(g, max_bytes, torch.Generator().manual_seed(0))


FORMATS: dict[str, Build] = {
    "low rank + diagonal": hierarchical("lowrank"),
    "HODLR": hierarchical("hodlr"),
    "HODLR, random order": hierarchical("hodlr", order="random"),
    "HODLR by blocks": hierarchical("hodlr", readable=True),
    "nested": hierarchical("nested"),
    "adaptive": hierarchical("adaptive"),
    "Kronecker sum": kronecker_sum,
    "auto": hierarchical("auto"),
}
FACTORED = [name for name in FORMATS if name not in ("adaptive", "Kronecker sum")]


@contextmanager
def seconds(found: dict[str, Any], name: str) -> Iterator[None]:
    """Puts the processor time of what happens within into ``found``."""
    start = time.process_time()
    yield
    found[name] = time.process_time() - start


def solve(a: Tensor, shift: float, approximation: Any = None) -> int:
    """Iterations; ``STEPS + 1`` where they are not enough."""
    b = torch.randn(len(a), dtype=a.dtype, generator=torch.Generator().manual_seed(1))
    inverse = None if approximation is None else approximation.factor(shift, compensate=True)
    solution = cg(a, b, damping=shift, preconditioner=inverse, tolerance=1e-6, steps=STEPS)
    return solution.steps if solution.converged else STEPS + 1


def approximate(case: Case, name: str, floats: int, top: float | None) -> dict[str, Any]:
    """One format in one memory; ``top``, the largest eigenvalue, if it is to precondition."""
    a = case.stored.matrix
    build = partial(FORMATS[name], case, floats * len(a) * a.element_size())
    found: dict[str, Any] = {}
    try:
        with seconds(found, "seconds"):
            near = build(None)
        found["products"] = getattr(near, "products", None)
        found["floats"] = near.bytes / a.element_size() / len(a)
        found["error"] = float((near.to_dense() - a).norm() / a.norm())
        if top is not None and name in FACTORED:
            shifts = {f"{damping:g}": damping * top for damping in DAMPINGS}
            found["iterations"] = {
                key: solve(a, shift, build(shift) if name == "auto" else near) for key, shift in shifts.items()
            }
    except CurvatureError as error:
        found["refused"] = str(error)
    return found


def measure(case: Case, args: Any, tick: Callable[[], object]) -> dict[str, Any]:
    """Formats in all memories."""
    found: dict[str, Any] = {"formats": {}}
    top = None
    if case.kind == "G":
        top = float(torch.linalg.eigvalsh(case.stored.matrix)[-1])
        found["unpreconditioned"] = {f"{damping:g}": solve(case.stored.matrix, damping * top) for damping in DAMPINGS}
    for name in args.formats:
        memories = {str(k): approximate(case, name, k, top if k in SOLVED else None) for k in args.floats}
        found["formats"][name] = memories
        tick()
    return found


def added(old: Any, new: Any) -> Any:
    """Nested results, with those of the same place replaced."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: added(old.get(key), value) for key, value in new.items()}


def stages(make: Callable[[], Problem], steps: int) -> Iterator[tuple[str, Problem, float]]:
    """The problem at initialisation and trained, with its loss."""
    torch.manual_seed(0)
    problem = make()
    yield "at initialisation", problem, float(problem.value().detach())
    yield "trained", problem, problem.train(steps)


def matrices(make: Callable[[], Problem], args: Any, tick: Callable[[], object]) -> dict[str, Any]:
    """Everything about one problem."""
    results: dict[str, Any] = {}
    for stage, problem, loss in stages(make, args.steps):
        results[stage] = {"loss": loss, "matrices": {}}
        for kind, operator in MATRICES.items():
            found: dict[str, Any] = {}
            with seconds(found, "product"):
                case = Case(problem, kind, Stored(operator(problem.model, problem.loss, problem.data)))
            n = results[stage]["parameters"] = case.stored.shape[0]
            results[stage]["matrices"][kind] = {"product": found["product"] / n, **measure(case, args, tick)}
    return results


def grown(n: int) -> dict[str, Any]:
    """One size of the field."""
    torch.manual_seed(0)
    problem = field(n)
    g = GaussNewton(problem.model, problem.loss, problem.data)
    v, found = torch.randn(n, 8, dtype=torch.float64), {"n": n}  # type: tuple[Tensor, dict[str, Any]]
    with seconds(found, "build"):
        h = HierarchicalOperator.from_operator(g, 1e-6)
    with seconds(found, "8 products"):
        h @ v
    shift = 1e-2 * float(h.diagonal().max())
    with seconds(found, "factor"):
        inverse = h.factor(shift)
    with seconds(found, "8 solves"):
        inverse.solve(v)
    with seconds(found, "diagonal"):
        inverse.diagonal()
    steps = cg(g, v[:, 0], damping=shift, preconditioner=inverse, tolerance=1e-6).steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found |= {"products": h.products, "error": h.error, "bytes": h.bytes, "iterations": steps, "peak": peak}
    return found


def exponent(growth: list[dict[str, Any]], of: str) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = (torch.tensor([math.log(entry[key]) for entry in growth]) for key in ("n", of))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


GROWING = ["bytes", "build", "8 products", "factor", "8 solves", "diagonal"]
GROWTH = ["n", "floats a row", "products", *GROWING[1:], "error", "iterations", "peak, GB"]


def growth_rows(growth: list[dict[str, Any]]) -> list[list[Any]]:
    """One row a size, then exponents."""
    rows: list[list[Any]] = []
    for e in growth:
        own = [f"{e['n']:,}", f"{e['bytes'] / 8 / e['n']:.0f}", e["products"], *(e[key] for key in GROWING[1:])]
        rows.append([*own, f"{e['error']:.0e}", e["iterations"], e["peak"] / 1e9])
    slopes = [f"{exponent(growth, key):.2f}" for key in GROWING]
    return [*rows, ["exponent", slopes[0], f"{exponent(growth, 'products'):.2f}", *slopes[1:], "", "", ""]]


def flattened(problems: dict[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The problems at both stages."""
    for name, entry in problems.items():
        for stage, found in entry.items():
            yield f"{name}, {stage}", found["matrices"][kind]


def entries(found: dict[str, Any], name: str, memories: Sequence[int]) -> list[dict[str, Any]]:
    """A format's; empty where it was not measured."""
    return [found["formats"].get(name, {}).get(str(k), {}) for k in memories]


def best(
    formats: list[list[float | None]], show: Callable[[float], str], exact: float = 0.0, most: float = math.inf
) -> list[str]:
    """For each format its values; those up to ``most`` within a tenth of the least, or of ``exact``, in bold."""
    least = [min((v for v in column if v is not None), default=0.0) for column in zip(*formats, strict=True)]

    def one(value: float | None, low: float) -> str:
        if value is None:
            return "-"
        return f"**{show(value)}**" if value <= min(most, 1.1 * max(low, exact)) else show(value)

    return [" / ".join(map(one, values, least)) for values in formats]


def errors(results: dict[str, Any], kind: str) -> Iterator[list[str]]:
    """A row a matrix."""
    for name, found in flattened(results["problems"], kind):
        values = [[entry.get("error") for entry in entries(found, each, results["floats"])] for each in FORMATS]
        yield [name, *best(values, lambda v: f"{v:.2g}" if v > EXACT else "exact", EXACT)]


def iterations(results: dict[str, Any], damping: str) -> Iterator[list[str]]:
    """A row a matrix: without, then with each format."""
    solved = [k for k in results["floats"] if k in SOLVED]
    for name, found in flattened(results["problems"], "G"):
        rows = [[e.get("iterations", {}).get(damping) for e in entries(found, each, solved)] for each in FACTORED]
        yield [name, _steps(found["unpreconditioned"][damping]), *best(rows, _steps, most=STEPS)]


def _steps(value: float) -> str:
    return f"> {STEPS}" if value > STEPS else str(value)


def spent(results: dict[str, Any]) -> Iterator[list[str]]:
    """Medians over all matrices of products and seconds, a row a format."""
    every = [found for kind in MATRICES for _, found in flattened(results["problems"], kind)]
    for name in FORMATS:
        row = [name]
        for k in results["floats"]:
            known = [e for found in every for e in entries(found, name, [k]) if "error" in e]
            row.append(", ".join(_median([e[key] for e in known]) for key in ("products", "seconds")))
        yield row


def _median(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return cell(median(known)) if known else "-"


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Titles, headers and rows of all that was measured."""
    if results["growth"]:
        yield "The field's G to 1e-6 as n grows, seconds of processor time", GROWTH, growth_rows(results["growth"])
    if not results["problems"]:
        return
    memories = " / ".join(map(str, results["floats"]))
    for kind in MATRICES:
        title = f"‖{kind} - Â‖ / ‖{kind}‖ at {memories} floats a row (bold: within a tenth of the least)"
        yield title, [kind, *FORMATS], list(errors(results, kind))
    solved = " / ".join(str(k) for k in results["floats"] if k in SOLVED)
    for damping in DAMPINGS:
        title = f"Iterations of conjugate gradients at λ = {damping:g} λ_max, {solved} floats a row"
        yield title, ["G", "none", *FACTORED], list(iterations(results, f"{damping:g}"))
    once = median(found["product"] for kind in MATRICES for _, found in flattened(results["problems"], kind))
    title = f"Products spent and seconds beside them, by floats a row; a product takes {1e3 * once:.2g} ms; medians"
    yield title, ["format", *map(str, results["floats"])], list(spent(results))


def measured(results: dict[str, Any]) -> str:
    """The part of docs/hierarchical.md that says what was measured."""
    where = "{cpu}, one thread, torch {torch}, {date:.10}".format(**results["environment"])
    parts = [f"Measured on {where}; float64, one seed.\n"]
    for title, header, rows in tables(results):
        parts += [f"{title}:\n", common.markdown(header, rows)]
    return "\n".join(parts)


def options(argv: list[str] | None) -> Any:
    """Of the command line."""
    parser = common.parser("hierarchical", __doc__)
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="(all)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="(all)")
    parser.add_argument("--sizes", nargs="*", type=int, default=[10**4, 3 * 10**4, 10**5, 3 * 10**5], help="of growth")
    parser.add_argument("--large", action="store_true", help="a million parameters as well: 2 minutes, 5 GB")
    parser.add_argument("--docs", action="store_true", help="only write the tables in docs/hierarchical.md")
    args = parser.parse_args(argv)
    args.floats, args.steps, args.sizes = FLOATS, 300, args.sizes + [10**6] * args.large
    if args.quick:
        args.floats, args.steps, args.sizes = SOLVED[:1], 10, [300, 600]
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what is asked for, and add it to what has been measured; or write the tables."""
    args = options(argv)
    results: dict[str, Any] = common.kept(args.output) or {"problems": {}, "growth": []}
    if args.docs:
        PAGE.write_text(common.rewritten(PAGE, MARKS, measured(results)), encoding="utf-8")
        return results
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    growth = [grown(n) for n in args.sizes]
    results |= {"environment": common.environment(), "floats": args.floats, "growth": growth or results["growth"]}
    common.write(args.output, results)
    makes = SMALL if args.quick else {name: PROBLEMS[name] for name in args.problems}
    with progress(4 * len(makes) * len(args.formats), "matrices") as bar:
        for name, make in makes.items():
            results["problems"][name] = added(results["problems"].get(name), matrices(make, args, bar.update))
            common.write(args.output, results)
    torch.set_num_threads(before)
    for title, header, rows in tables(results):
        print(heading(title))
        print(table(header, rows))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
