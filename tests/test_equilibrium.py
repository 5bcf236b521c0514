"""Gradients through an equilibrium against the dense (I - J)^-1, long unrolling, and each other, in float64."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.parallel import DistributedDataParallel

from mdeq import (
    Anderson,
    Broyden,
    ClassificationHeadConfig,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
    Phantom,
    Reversible,
    transformation,
)
from mdeq.equilibrium import equilibrium, unroll

TIGHT = Broyden(steps=80, tolerance=1e-13)
RULES = [
    Implicit(Broyden(steps=80, tolerance=1e-13)),
    Implicit(Anderson(steps=80, tolerance=1e-13, ridge=1e-14)),
    Implicit(Gmres(steps=20, tolerance=1e-13)),
]


class Contraction(nn.Module):
    """z -> tanh(W z + U x) with |W| = 0.6 in the spectral norm, so that |J| <= 0.6 everywhere."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        weight = torch.randn(dim, dim, dtype=torch.float64)
        self.w = nn.Parameter(0.6 * weight / torch.linalg.matrix_norm(weight, 2))
        self.u = nn.Parameter(torch.randn(dim, dim, dtype=torch.float64))

    def bind(self, x):
        return lambda z: torch.tanh(z @ self.w.T + x @ self.u.T)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model, x = Contraction(), torch.randn(3, 8, dtype=torch.float64)
    return model, x, torch.zeros_like(x), torch.randn(3, 8, dtype=torch.float64)


def gradients(model, x, z0, direction, rule, forward=TIGHT):
    model.zero_grad()
    x = x.clone().requires_grad_()
    z, _ = equilibrium(model.bind(x), z0, forward, rule)
    (z * direction).sum().backward()
    return [x.grad, model.w.grad.clone(), model.u.grad.clone()]


def dense(model, x, z0, direction):
    """dl/d. = u^T df/d. with (I - J)^T u = dl/dz, J formed sample by sample."""
    x = x.clone().requires_grad_()
    f = model.bind(x)
    with torch.no_grad():
        z = TIGHT(f, z0).value
    adjoint = []
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda zi, i=i: model.bind(x[i : i + 1])(zi), z[i : i + 1])
        matrix = jacobian[0, :, 0]
        assert torch.linalg.matrix_norm(matrix, 2) < 0.61
        adjoint.append(torch.linalg.solve(torch.eye(len(matrix), dtype=torch.float64) - matrix.T, direction[i]))
    return grad(f(z), [x, model.w, model.u], torch.stack(adjoint))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.solver.kind)
def test_implicit_gradient_is_the_dense_one(problem, rule):
    for ours, expected in zip(gradients(*problem, rule), dense(*problem), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_long_unrolling_and_many_phantom_steps_agree(problem):
    model, x, z0, direction = problem
    expected = dense(*problem)
    for ours, e in zip(gradients(*problem, Phantom(steps=120, damping=0.5)), expected, strict=True):
        torch.testing.assert_close(ours, e, rtol=1e-8, atol=1e-10)
    model.zero_grad()
    (unroll(model.bind(x), z0, 80) * direction).sum().backward()
    torch.testing.assert_close(model.w.grad, expected[1], rtol=1e-9, atol=1e-11)


def test_one_phantom_step_is_jacobian_free(problem):
    model, x, z0, direction = problem
    with torch.no_grad():
        z = TIGHT(model.bind(x), z0).value
    expected = grad(model.bind(x)(z), model.w, direction)[0]
    torch.testing.assert_close(gradients(*problem, Phantom(1, 1.0))[1], expected, rtol=1e-10, atol=1e-12)


def test_gradcheck(problem):
    model, x, z0, _ = problem

    def solve(x, w):
        return equilibrium(lambda z: torch.tanh(z @ w.T + x), z0, TIGHT, RULES[2])[0]

    assert torch.autograd.gradcheck(solve, (x.requires_grad_(), model.w))


def test_two_forwards_one_backward_and_a_second_backward(problem):
    model, x, z0, direction = problem
    rule = RULES[0]
    first = gradients(*problem, rule)[1]
    other = gradients(model, 2 * x, z0, direction, rule)[1]
    model.zero_grad()
    a, _ = equilibrium(model.bind(x), z0, TIGHT, rule)
    b, _ = equilibrium(model.bind(2 * x), z0, TIGHT, rule)
    ((a + b) * direction).sum().backward(retain_graph=True)
    torch.testing.assert_close(model.w.grad, first + other)
    ((a + b) * direction).sum().backward()
    torch.testing.assert_close(model.w.grad, 2 * (first + other))


def test_statistics_of_the_adjoint_and_no_graph_without_grad(problem):
    model, x, z0, direction = problem
    seen = []
    z, _ = equilibrium(model.bind(x), z0, TIGHT, Implicit(Broyden(steps=6, tolerance=0)), seen.append)
    (z * direction).sum().backward()
    assert len(seen) == 1 and seen[0].nfe == len(seen[0].trace) == 6
    with torch.no_grad():
        z, solution = equilibrium(model.bind(x), z0, TIGHT, RULES[0])
    assert not z.requires_grad and z is solution.value


def small_network(forward=None, backward=None, **settings):
    torch.manual_seed(0)
    config = MDEQConfig(channels=settings.pop("channels", (8, 8)), expansion=2, groups=4, **settings)
    head = ClassificationHeadConfig(tuple(4 for _ in config.channels), 16)
    return Network(config, head, 5, forward or Broyden(steps=6), backward or Implicit(Gmres(steps=5)))


@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 8, 16)])
@pytest.mark.parametrize("size", [(33, 33), (24, 40)])
def test_any_size_any_number_of_scales(channels, size):
    network = small_network(channels=channels)
    prediction = network(torch.randn(2, 3, *size))
    prediction.logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.backbone.parameters())
    assert prediction.equilibrium.scales[0].shape == (2, 8, *size)


def contractive_network(**settings):
    """In float64; f's outputs vary little around a bias, so that its Jacobian is small but far from zero."""
    network = small_network(TIGHT, RULES[2], post_fusion_affine=True, **settings).double()
    with torch.no_grad():
        for layer in network.backbone.f.post:
            layer.norm.weight.fill_(0.03)
            layer.norm.bias.normal_()
    return network


@pytest.mark.parametrize("part", ["backbone.stem", "backbone.f", "head"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "size"), [((8,), (9, 9)), ((8, 8), (33, 33)), ((8, 8, 16), (12, 20))])
def test_the_models_gradient_is_the_slope_of_its_loss(channels, size, training, part):
    """Along a random direction, against central differences of the solved loss."""
    network = contractive_network(channels=channels).train(training)
    image, labels = torch.randn(2, 3, *size, dtype=torch.float64), torch.tensor([0, 3])
    parameters = list(network.get_submodule(part).parameters())
    directions = [torch.randn_like(p) * p.std() for p in parameters]

    def loss() -> Tensor:
        return F.cross_entropy(network(image).logits, labels)

    def derivative() -> Tensor:
        return torch.stack([(g * d).sum() for g, d in zip(grad(loss(), parameters), directions, strict=True)]).sum()

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=by)
            value = loss()
            torch._foreach_add_(parameters, directions, alpha=-by)
        return value

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(derivative(), slope, rtol=1e-5, atol=1e-9)
    if part == "backbone.f":  # the test would see a gradient that ignores J
        network.backbone.backward = Phantom(1, 1.0)
        assert abs(derivative() - slope) > 1e-3 * abs(slope)


def replica(rank: int, folder: Path) -> None:
    """One of two processes that train the network on half of the batch each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = DistributedDataParallel(small_network().double().eval())
    image, labels = torch.load(folder / "batch.pt")
    for _ in range(2):
        network.zero_grad()
        F.cross_entropy(network(image.chunk(2)[rank]).logits, labels.chunk(2)[rank]).backward()
    torch.save([p.grad for p in network.parameters()], folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    """Batch normalisation is in evaluation mode: its statistics would differ, whatever the library does."""
    network = small_network().double().eval()
    image, labels = torch.randn(4, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    torch.save((image, labels), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(replica, (tmp_path,), nprocs=2)  # type: ignore[attr-defined]
    F.cross_entropy(network(image).logits, labels).backward()
    for rank in range(2):
        for ours, whole in zip(torch.load(tmp_path / f"gradients{rank}.pt"), network.parameters(), strict=True):
            torch.testing.assert_close(ours, whole.grad, rtol=1e-8, atol=1e-12)


def test_autocast_costs_the_gradient_no_more_than_its_digits(problem):
    model, x, z0, direction = (v.float() for v in problem)
    rule = Implicit(Gmres(steps=8, tolerance=1e-6))
    full = gradients(model, x, z0, direction, rule, Broyden(steps=30, tolerance=1e-6))
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        z, solution = equilibrium(model.bind(x), z0, Broyden(steps=30, tolerance=1e-2), rule, seen.append)
    (z * direction).sum().backward()
    assert solution.converged.all() and solution.value.dtype == seen[0].value.dtype == torch.float32
    error = (model.w.grad - full[1]).norm() / full[1].norm()
    assert 1e-5 < error < 8 * 2**-8 / (1 - 0.6)  # a few roundings to 8 bits, amplified by |(I - J)^-1|


@pytest.mark.parametrize("rule", [RULES[2], Phantom(3, 0.5)], ids=["implicit", "phantom"])
def test_a_compiled_f_gives_the_same_gradient_batch_after_batch(rule, monkeypatch):
    """Warm-up, then solves, in parts of unequal size; and no compiled tape carries the parameters."""
    compiled = torch.compile(lambda f, state: f(state), backend="aot_eager")
    tapes: list[bool] = []

    def run(f, state: Tensor) -> Tensor:
        fz = compiled(f, state)
        tapes.append(fz.requires_grad)
        assert fz.requires_grad == state.requires_grad
        return fz

    monkeypatch.setattr(transformation, "_run", lambda: run)
    eager = contractive_network()
    fast = copy.deepcopy(eager)
    fast.backbone.compile_f()
    for network in (eager, fast):
        network.backbone.forward_solver, network.backbone.backward = TIGHT, rule
        monkeypatch.setattr(network.backbone, "at_once", lambda z0: 2)
    for steps in (3, None, None):
        image = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        gradients = []
        for network in (eager, fast):
            network.zero_grad()
            network(image, unroll_steps=steps).logits.square().sum().backward()
            gradients.append([p.grad.clone() for p in network.parameters()])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert any(tapes) == isinstance(rule, Implicit)


def test_copies_made_after_a_step_train_on_their_own():
    network = small_network().double()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    network.backbone.on_backward = [].append  # as the training loop leaves it
    before = network(image)
    before.logits.sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    twin = copy.deepcopy(network)
    torch.testing.assert_close(averaged(image).logits, before.logits)
    first, g = network.head.classifier.weight.detach().clone(), network.head.classifier.weight.grad.clone()
    for _ in range(2):  # the first update copies the weights
        averaged.update_parameters(network)
        torch.optim.SGD(network.parameters(), 0.1).step()
    torch.testing.assert_close(averaged.module.head.classifier.weight, first - 0.05 * g)
    twin(image).logits.sum().backward()
    torch.testing.assert_close(twin.head.classifier.weight.grad, g)


def published_broyden(f, z0: Tensor, steps: int, stop: str, tolerance: float = 1e-3) -> Tensor:
    """The (U, V) form on the whole batch as one vector, as published: -I + U V^T is the inverse Jacobian of f - id.

    Broyden's update with the Sherman-Morrison formula (Kelley 1995, Sec. 7.1); the iterate of smallest residual after
    the first is returned. The relative one is measured against the iterate's own f, in the adjoint solve too.
    """
    z, g, u, v, best, smallest = z0, f(z0) - z0, [], [], z0, torch.inf

    def inverse(x: Tensor) -> Tensor:
        return sum(((b * x).sum() * a for a, b in zip(u, v, strict=True)), -x)

    def transposed(x: Tensor) -> Tensor:
        return sum(((a * x).sum() * b for a, b in zip(u, v, strict=True)), -x)

    for _ in range(steps):
        step = -inverse(g)
        z = z + step
        new = f(z) - z
        residual = float(new.norm() / ((new + z).norm() if stop == "relative" else 1))
        if residual < smallest:
            best, smallest = z, residual
        if smallest < tolerance:
            break
        change, g = new - g, new
        row = transposed(step)
        u.append((step - inverse(change)) / (row * change).sum())
        v.append(row)
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("stop", "network"), [("absolute", small_network), ("relative", contractive_network)])
def test_a_training_step_is_the_published_one(seed, stop, network):
    """With a batch of one, where the batch-wide and the per-sample selection of the best iterate agree (float64).

    Their relative residual of the adjoint has |J^T u + b| below, ours |b|: they may choose other iterates unless u
    converges.
    """
    network = network(channels=(8, 8, 16), dropout=0.25).double()
    network.backbone.forward_solver = Broyden(steps=18, stop=stop)
    network.backbone.backward = Implicit(Broyden(steps=20, stop=stop))
    torch.manual_seed(seed)
    image, labels = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.tensor([2])

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    torch.manual_seed(9)  # the same dropout masks
    F.cross_entropy(network(image).logits, labels).backward()
    ours = gradient()

    network.zero_grad()
    torch.manual_seed(9)
    f, z0, scales = network.backbone.fixed_point_problem(image)
    with torch.no_grad():
        z = published_broyden(f, z0, 18, stop)
    fz = f(z.requires_grad_())
    read = fz.detach().requires_grad_()
    F.cross_entropy(network.head(scales.split(read)), labels).backward()
    b = read.grad
    adjoint = lambda u: grad(fz, z, u, retain_graph=True)[0] + b  # noqa: E731
    fz.backward(published_broyden(adjoint, 0 * b, 20, stop))
    published = gradient()
    assert F.cosine_similarity(ours, published, dim=0) > 0.9999
    assert abs(ours.norm() / published.norm() - 1) < 0.01


def test_dropout_mask_is_fixed_during_a_solve_and_drawn_anew_each_time():
    network = small_network(dropout=0.5).train()
    image = torch.randn(2, 3, 16, 16)
    f, z0, _ = network.backbone.fixed_point_problem(image)
    z = torch.randn_like(z0)
    torch.testing.assert_close(f(z), f(z), rtol=0, atol=0)
    other, _, _ = network.backbone.fixed_point_problem(image)
    assert (other(z) - f(z)).norm() > 1e-3
    network.eval()
    torch.testing.assert_close(network(image).logits, network(image).logits, rtol=0, atol=0)


def test_conventional_dropout_draws_a_mask_at_every_evaluation():
    image = torch.randn(2, 3, 16, 16)
    f, z0, _ = small_network(dropout=0.5, variational=False).train().backbone.fixed_point_problem(image)
    z = torch.randn_like(z0)
    assert (f(z) - f(z)).norm() > 1e-3


def test_an_unrolled_model_is_the_warm_ups_network_always():
    image = torch.randn(2, 3, 16, 16)
    unrolled = small_network(unrolled=3).eval()(image)
    assert unrolled.equilibrium.solution is None
    torch.testing.assert_close(unrolled.logits, small_network().eval()(image, unroll_steps=3).logits)


def test_softplus_of_great_curvature_is_the_relu():
    network = small_network().double().eval()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    relu = network(image, unroll_steps=3).logits
    torch.testing.assert_close(network(image, unroll_steps=3, softplus=1e7).logits, relu, rtol=1e-4, atol=1e-5)
    assert (network(image, unroll_steps=3, softplus=1.0).logits - relu).abs().max() > 1e-5


class Rows:
    """The f of a `Contraction` that can be had for some samples alone."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __call__(self, z):
        return self.model.bind(self.x)(z)

    def rows(self, rows):
        return self.model.bind(self.x[rows])


@pytest.mark.parametrize("rule", [*RULES, Phantom(5, 0.5), Reversible(6, 0.4)])
def test_a_batch_solved_in_parts_is_the_batch(problem, rule):
    model, x, z0, direction = problem
    results, adjoints = [], []
    for at_once in (None, 2):
        model.zero_grad()
        z, solution = equilibrium(Rows(model, x), z0, TIGHT, rule, adjoints.append, at_once)
        (z * direction).sum().backward()
        results.append(
            [z, solution.value, solution.relative, solution.steps, model.w.grad.clone(), model.u.grad.clone()]
        )
        assert solution.trace.shape == (solution.nfe, len(x))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    if adjoints:
        torch.testing.assert_close(adjoints[1].value, adjoints[0].value, rtol=1e-9, atol=1e-9)


def test_parts_need_an_f_that_has_rows(problem):
    model, x, z0, _ = problem
    with pytest.raises(TypeError, match="at_once"):
        equilibrium(model.bind(x), z0, TIGHT, RULES[0], at_once=1)
