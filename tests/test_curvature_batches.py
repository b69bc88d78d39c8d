"""Curvature from some of the samples, others at every step."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvext.optim import GradientDescent, NewtonCG, Subsample

from .optimizers import CASES, Net, equal, make, problem, values

pytestmark = pytest.mark.usefixtures("float64")
curved = pytest.mark.parametrize("name", [name for name, (kind, _) in CASES.items() if kind.second_order])


@given(samples=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_turn_has_every_sample(samples, size, seed):
    size = min(size, samples)
    batches, turns = Subsample(samples, size, seed=seed), -(-samples // size)
    for start in (0, turns):
        rows = [batches.rows(step) for step in range(start, start + turns)]
        assert all(len(r) == len(r.unique()) == size for r in rows)
        assert torch.cat(rows)[:samples].sort().values.tolist() == [*range(samples)]
        assert all(torch.equal(r, Subsample(samples, size, seed=seed).rows(start + i)) for i, r in enumerate(rows))


@pytest.mark.parametrize("order", ["cycle", "draw"])
def test_other_samples_at_every_step_and_with_every_seed(order):
    batches, others = (Subsample(1000, 0.0501, order, seed) for seed in (0, 1))
    seen = [tuple(batch.rows(step).tolist()) for batch in (batches, others) for step in range(40)]
    assert len({*seen}) == 80 and all(len({*rows}) == len(rows) == 51 for rows in seen)
    if order == "draw":
        assert len({*seen[0]} & {*seen[1]}) > 0 or len({*seen[0]} & {*seen[2]}) > 0


def rows_of(model):
    return lambda rows=slice(None): problem(model, rows)()


@curved
def test_is_a_curvature_closure(name):
    model, twin, batches = Net(), Net(), Subsample(12, 5)
    optimizer = make(name, model.parameters(), curvature_batch=batches)
    other = make(name, twin.parameters())
    for step in range(4):
        optimizer.step(rows_of(model))
        other.step(problem(twin), lambda: problem(twin, batches.rows(step))())  # noqa: B023
        assert equal(values(model), values(twin)) and optimizer.report == other.report


@curved
def test_resumes_bit_by_bit(name):
    models = Net(), Net()
    optimizers = [make(name, model.parameters(), curvature_batch=Subsample(12, 5)) for model in models]
    for _ in range(2):
        optimizers[0].step(rows_of(models[0]))
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    file.seek(0)
    optimizers[1].load_state_dict(torch.load(file))
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(rows_of(model))
        assert equal(*map(values, models))


def test_refused():
    for wrong in ({"size": 0}, {"size": 13}, {"size": 0.0}, {"size": 1.5}, {"order": "random"}):
        with pytest.raises(ValueError, match=r"Subsample\(samples=12.*size a fraction"):
            Subsample(12, **wrong)
    with pytest.raises(ValueError, match="samples >= 1"):
        Subsample(0)
    model = Net()
    optimizer = NewtonCG(model.parameters(), curvature_batch=Subsample(12, 0.5))
    with pytest.raises(TypeError, match=r"closure\(rows=slice\(None\)\)"):
        optimizer.step(problem(model))
    with pytest.raises(TypeError, match="no curvature_closure"):
        optimizer.step(rows_of(model), problem(model))
    with pytest.raises(TypeError, match="curvature_batch"):
        GradientDescent(model.parameters(), curvature_batch=Subsample(12, 0.5))
