"""The module for one's own f, and the examples of the documentation."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdeq import DEQ, Anderson, Broyden, FixedPoint, Gmres, Implicit, Normal, Phantom, Zeros
from mdeq.equilibrium import equilibrium


class Layer(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.orthogonal_(self.w.weight, 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) + self.u(x))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_it_is_the_equilibrium_with_its_statistics():
    f, x = Layer(), torch.randn(4, 6)
    deq = DEQ(f, Broyden(20, 1e-5), Implicit(Gmres(9)))
    assert deq.solution is None and deq.adjoint is None
    z = deq(x)
    expected, solution = equilibrium(f, torch.zeros(4, 6), deq.solver, deq.backward, inputs=(x,))
    assert torch.equal(z, expected) and deq.solution.nfe == solution.nfe
    z.sum().backward()
    assert deq.adjoint.converged.all() and deq.adjoint.nfe <= 9
    assert set(deq.state_dict()) == {f"f.{name}" for name in f.state_dict()}


def test_training_and_evaluation_have_their_solvers_and_jitter_is_even():
    solver = FixedPoint(5, tolerance=0)
    deq = DEQ(Layer(), solver, evaluation=FixedPoint(12, tolerance=0), jitter=2)
    x, limits = torch.randn(2, 6), []
    for _ in range(300):
        with torch.no_grad():
            deq(x)
        limits.append(deq.solution.nfe - 1)
    counts = [limits.count(steps) for steps in range(3, 8)]
    assert sum(counts) == 300 and min(counts) > 30  # of 60 each; 30 is four deviations below
    deq.eval()
    deq(x)
    assert deq.solution.nfe == 13


class Guess(nn.Module):
    """Proposes z0 from x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def first(deq, *inputs, **options):
    """The point where the solver evaluates f first."""
    seen = []
    hook = deq.f.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    deq(*inputs, **options)
    hook.remove()
    return seen[0]


def test_starts():
    f, x = Layer(), torch.randn(500, 6)
    assert not first(DEQ(f, start=Zeros()), x).any()
    normal = first(DEQ(f, start=Normal(0.3)), x)
    assert abs(normal.std() - 0.3) < 0.02 and abs(normal.mean()) < 0.02  # 3,000 numbers
    guess = Guess()
    deq = DEQ(f, start=guess)
    torch.testing.assert_close(first(deq, x), guess(x))
    assert torch.equal(first(deq, x, z0=x), x)
    deq(x).sum().backward()
    assert guess.layer.weight.grad is None
    (deq.start(x) - deq(x).detach()).square().mean().backward()
    assert guess.layer.weight.grad.norm() > 0


def test_a_state_like_an_example():
    deq = DEQ(lambda z: {"a": z["a"] / 2 + 1, "b": z["b"] / 2 + z["a"].mean(1)})
    z = deq(like={"a": torch.empty(2, 3), "b": torch.empty(2)})
    torch.testing.assert_close(z["b"], torch.full((2,), 4.0), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="^like"):
        deq()


def test_states_on_the_way_are_differentiable():
    deq, x = DEQ(Layer(), Anderson(8, 0), Phantom(1, 1.0)), torch.randn(2, 6)
    states = deq.states(x, keep=(1, 3))
    assert len(states) == 3 and torch.equal(states[-1], deq(x))
    sum(s.square().mean() for s in states).backward()
    assert deq.f.w.weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"solver": Gmres()}, "solver"),
        ({"backward": "phantom"}, "backward"),
        ({"start": 0.0}, "start"),
        ({"jitter": 18}, "jitter"),
    ],
)
def test_wrong_settings(settings, key):
    with pytest.raises(ValueError, match=f"^{key}: must be"):
        DEQ(Layer(), **settings)


def test_copies_made_after_a_step_train_on_their_own():
    deq, x = DEQ(Layer()), torch.randn(2, 6)
    deq(x).sum().backward()
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        twin.zero_grad()
        twin(x).sum().backward()
        torch.testing.assert_close(twin.f.w.weight.grad, deq.f.w.weight.grad)


def test_a_compiled_one_trains():
    deq, x = DEQ(Layer()), torch.randn(2, 6)
    deq(x).sum().backward()
    expected = deq.f.w.weight.grad.clone()
    deq.zero_grad()
    torch.compile(deq, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(deq.f.w.weight.grad, expected)


def test_an_exported_one_predicts():
    """In evaluation, where no solver looks at whether all samples have stopped."""
    deq, x = DEQ(Layer(), Anderson(12, check_every=13)).eval(), torch.randn(2, 6)
    with torch.no_grad():
        exported = torch.export.export(deq, (x,), strict=False).module()
        torch.testing.assert_close(exported(2 * x), deq(2 * x))


def test_distributed_training_sees_every_parameter_once_a_step(tmp_path):
    """A parameter whose gradient it missed or met twice would be an error of the next step."""
    deq, x = DEQ(Layer()), torch.randn(4, 6)
    deq(x).square().mean().backward()
    expected = [p.grad.clone() for p in deq.parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(deq)
        for _ in range(3):
            model.zero_grad()
            model(x).square().mean().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([p.grad for p in deq.parameters()], expected)


EXAMPLES = (Path(__file__).parents[1] / "docs" / "examples.md").read_text()
SNIPPETS = re.findall(r"## (.*?)\n.*?```python\n(.*?)```", EXAMPLES, re.DOTALL)


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_the_examples_of_the_documentation_run(title, code, capsys):
    """Each ends with assertions about what it claims."""
    exec(compile(code, f"docs/examples.md, {title}", "exec"), {})
    assert "assert" in code and len(code.splitlines()) <= 30
