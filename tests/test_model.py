"""The whole model: the slope of its loss, in parts, in processes, compiled, exported."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.parallel import DistributedDataParallel

from mdeq import (
    MDEQ,
    Anderson,
    Broyden,
    ClassificationHeadConfig,
    FixedPoint,
    Gmres,
    Implicit,
    MDEQConfig,
    Network,
    Phantom,
    Reversible,
    SegmentationHeadConfig,
)

TIGHT = Broyden(steps=80, tolerance=1e-13)
EXACT = Implicit(Gmres(steps=20, tolerance=1e-13))
RULES = [EXACT, Phantom(3, 0.5), Reversible(4, 0.5)]


def small_network(forward=Broyden(steps=6), backward=Implicit(Gmres(steps=5)), **settings):
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=settings.pop("channels", (8, 8)), expansion=2, groups=4, **settings
    )
    head = ClassificationHeadConfig(tuple(4 for _ in config.channels), 16)
    return Network(config, head, 5, forward, backward)


def contractive_network(forward=TIGHT, backward=EXACT, **settings):
    """In float64; f varies little around a bias: its Jacobian is small but far from zero."""
    network = small_network(forward, backward, post_fusion_affine=True, **settings).double()
    with torch.no_grad():
        for layer in network.backbone.f.post:
            layer.norm.weight.fill_(0.03)
            layer.norm.bias.normal_()
    return network


def gradients(network: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    return found


def images(batch=2, size=(8, 8)) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 8, 16)])
@pytest.mark.parametrize("size", [(33, 33), (24, 40)])
def test_any_size_any_number_of_scales(channels, size):
    network = small_network(channels=channels)
    prediction = network(torch.randn(2, 3, *size))
    prediction.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert prediction.equilibrium.scales[0].shape == (2, 8, *size)


@pytest.mark.parametrize("part", ["backbone.stem", "backbone.f", "head"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("channels", "size"), [((8,), (9, 9)), ((8, 8), (33, 33)), ((8, 8, 16), (12, 20))]
)
def test_the_gradient_is_the_slope_of_the_loss(channels, size, training, part):
    """Along a random direction, against central differences of the solved loss."""
    network = contractive_network(channels=channels).train(training)
    image, labels = images(2, size), torch.tensor([0, 3])
    parameters = list(network.get_submodule(part).parameters())
    directions = [torch.randn_like(p) * p.std() for p in parameters]

    def loss() -> Tensor:
        return F.cross_entropy(network(image).logits, labels)

    def derivative() -> Tensor:
        products = [
            (g * d).sum() for g, d in zip(grad(loss(), parameters), directions, strict=True)
        ]
        return torch.stack(products).sum()

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


def test_a_gradient_penalty_is_differentiated_through_the_equilibrium():
    """The slope of |dl/dimage|^2 along a direction of all weights, dropout and weight norm on."""
    network = contractive_network(dropout=0.3).train()
    image, parameters = images().requires_grad_(), list(network.parameters())
    directions = [torch.randn_like(p) * p.abs().mean() for p in parameters]

    def penalty(create_graph: bool) -> Tensor:
        torch.manual_seed(3)  # the same masks
        loss = network(image).logits.square().sum()
        return grad(loss, image, create_graph=create_graph)[0].square().sum()

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=by)
        value = penalty(create_graph=False)
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=-by)
        return value

    found = grad(penalty(create_graph=True), parameters, allow_unused=True)
    products = [(g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None]
    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(torch.stack(products).sum(), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_batch_solved_in_parts_is_the_batch(rule, monkeypatch):
    network = contractive_network(backward=rule, dropout=0.25)
    image, results, adjoints = images(5), [], []
    network.backbone.on_backward = adjoints.append
    for size in (5, 2):
        monkeypatch.setattr(network.backbone, "_part_size", lambda z0, size=size: size)
        torch.manual_seed(1)
        prediction = network(image)
        prediction.logits.square().sum().backward()
        solution = prediction.equilibrium.solution
        assert solution.trace.shape == (solution.nfe, 5)
        results.append([prediction.logits, solution.value, *gradients(network)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-8)
    assert len(adjoints) == (0 if isinstance(rule, Phantom) else 2)
    if adjoints:
        torch.testing.assert_close(adjoints[1].value, adjoints[0].value, rtol=1e-7, atol=1e-9)


def test_a_batch_is_solved_in_even_parts_that_fit_a_cache():
    backbone = small_network().backbone
    assert backbone._part_size(torch.empty(20, 10_000)) == 20
    assert backbone._part_size(torch.empty(20, 100_000)) == 10  # 13 would fit
    assert backbone._part_size(torch.empty(20, 100_000_000)) == 1


def replica(rank: int, folder: Path) -> None:
    """One of two processes that train the network on half of the batch each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = DistributedDataParallel(small_network().double().eval())
    image, labels = torch.load(folder / "batch.pt")
    for _ in range(2):
        network.zero_grad()
        logits = network(image.chunk(2)[rank]).logits
        F.cross_entropy(logits, labels.chunk(2)[rank]).backward()
    torch.save([p.grad for p in network.parameters()], folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    """Batch normalisation is in evaluation mode: its statistics would differ in any case."""
    network = small_network().double().eval()
    image, labels = images(4, (12, 12)), torch.tensor([0, 3, 1, 4])
    torch.save((image, labels), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(replica, (tmp_path,), nprocs=2)  # type: ignore[attr-defined]
    F.cross_entropy(network(image).logits, labels).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients{rank}.pt")
        for ours, whole in zip(found, network.parameters(), strict=True):
            torch.testing.assert_close(ours, whole.grad, rtol=1e-8, atol=1e-12)


def test_a_frozen_backbone_costs_no_adjoint_and_the_head_learns():
    network, solves = small_network(), []
    network.backbone.requires_grad_(False).eval()
    network.backbone.on_backward = solves.append
    network(torch.randn(2, 3, 8, 8)).logits.sum().backward()
    assert solves == []
    assert all(p.grad is not None for p in network.head.parameters())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("solver", [Broyden(6), Anderson(6), FixedPoint(6)], ids=lambda s: s.kind)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision_trains(dtype, solver, rule):
    network = small_network(solver, rule, dropout=0.1).to(dtype)
    prediction = network(torch.randn(2, 3, 8, 8, dtype=dtype))
    prediction.logits.float().square().mean().backward()
    assert prediction.logits.dtype == prediction.equilibrium.scales[0].dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("what", ["network", "f"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_compiled_model_has_the_gradients_of_the_eager_one(rule, what):
    network, image = contractive_network(backward=rule), images()
    network.eval()
    network(image).logits.square().sum().backward()
    expected = gradients(network)
    compiled = network
    if what == "f":
        network.backbone.f.compile(backend="aot_eager")
    else:
        compiled = torch.compile(network, backend="aot_eager")
    for _ in range(2):
        compiled(image).logits.square().sum().backward()
        for ours, eager in zip(gradients(network), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-10)


class Logits(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).logits


@pytest.mark.parametrize("head", [ClassificationHeadConfig((4, 4), 16), SegmentationHeadConfig()])
def test_a_trained_model_is_exported_with_its_weights(head):
    """In evaluation, where no solver looks at whether all samples have stopped."""
    torch.manual_seed(0)
    solver = Broyden(steps=6)
    network = Network(MDEQConfig((8, 8), expansion=2, groups=4), head, 5, solver).eval()
    network.backbone.forward_solver = replace(solver, check_every=solver.steps + 2)
    with torch.no_grad():
        exported = torch.export.export(Logits(network), (torch.randn(2, 3, 12, 12),), strict=False)
        image = torch.randn(2, 3, 12, 12)
        torch.testing.assert_close(exported.module()(image), network(image).logits)
    assert {f"network.{name}" for name, _ in network.named_parameters()} <= set(exported.state_dict)


def test_copies_made_after_a_step_train_on_their_own():
    network, image = small_network().double(), images()
    network.backbone.on_backward = [].append  # as the training loop leaves it
    before = network(image)
    before.logits.sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    twin = copy.deepcopy(network)
    torch.testing.assert_close(averaged(image).logits, before.logits)
    weight = network.head.classifier.weight
    first, g = weight.detach().clone(), weight.grad.clone()
    for _ in range(2):  # the first update copies the weights
        averaged.update_parameters(network)
        torch.optim.SGD(network.parameters(), 0.1).step()
    torch.testing.assert_close(averaged.module.head.classifier.weight, first - 0.05 * g)
    twin.zero_grad()
    twin(image).logits.sum().backward()
    torch.testing.assert_close(twin.head.classifier.weight.grad, g)


def test_two_forwards_and_one_backward_keep_their_masks():
    """The masks of a solve are its own, in the second derivative and the way back, too."""
    image, parts = images(), []
    for rule in (EXACT, Reversible(4, 0.5)):
        network = contractive_network(backward=rule, dropout=0.5)
        torch.manual_seed(5)
        network(image).logits.sum().backward()
        network(2 * image).logits.sum().backward()
        parts = gradients(network)
        torch.manual_seed(5)
        (network(image).logits.sum() + network(2 * image).logits.sum()).backward()
        for ours, expected in zip(gradients(network), parts, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_an_unrolled_model_is_the_warm_ups_network_always():
    image = torch.randn(2, 3, 16, 16)
    unrolled = small_network(unrolled=3).eval()(image)
    assert unrolled.equilibrium.solution is None
    expected = small_network().eval()(image, unroll_steps=3).logits
    torch.testing.assert_close(unrolled.logits, expected)
    with pytest.raises(ValueError, match="steps"):
        small_network()(image, unroll_steps=0)


def test_the_head_reads_z_in_evaluation_and_f_of_z_in_training():
    network, image = small_network(Broyden(steps=2)), torch.randn(2, 3, 8, 8)
    for training, output, reads_f in [
        (True, "f(z*)", True),
        (True, "z*", False),
        (False, "f(z*)", False),
    ]:
        network.backbone.config = replace(network.backbone.config, train_output=output)
        network.train(training)
        f, _, scales = network.backbone.fixed_point_problem(image)
        found = network(image).equilibrium
        expected = f(found.solution.value) if reads_f else found.solution.value
        torch.testing.assert_close(scales.flatten(found.scales), expected)


def test_a_start_is_used_and_a_wrong_one_refused():
    network, image = contractive_network().eval(), images()
    with torch.no_grad():
        solved = network(image).equilibrium.solution
        again = network(image, z0=solved.value).equilibrium.solution
    assert again.nfe == 1 < solved.nfe
    with pytest.raises(ValueError, match="z0: a state of these images has the shape"):
        network(image, z0=solved.value[:, 1:])


def published_broyden(f, z0: Tensor, steps: int, stop: str, tolerance: float = 1e-3) -> Tensor:
    """On the whole batch as one vector: -I + U V^T is the inverse Jacobian of f - id.

    Broyden's update with the Sherman-Morrison formula (Kelley 1995, Sec. 7.1); the iterate of
    smallest residual after the first is returned. The relative one is measured against the
    iterate's own f, in the adjoint solve too.
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
@pytest.mark.parametrize(
    ("stop", "network"), [("absolute", small_network), ("relative", contractive_network)]
)
def test_a_training_step_is_the_published_one(seed, stop, network):
    """With a batch of one, where the batch-wide and the per-sample best iterate agree (float64).

    Their relative residual of the adjoint has |J^T u + b| below, ours |b|: they may choose other
    iterates unless u converges.
    """
    forward, backward = Broyden(steps=18, stop=stop), Implicit(Broyden(steps=20, stop=stop))
    network = network(forward, backward, channels=(8, 8, 16), dropout=0.25).double()
    torch.manual_seed(seed)
    image, labels = images(1, (16, 16)), torch.tensor([2])
    torch.manual_seed(9)  # the same dropout masks
    F.cross_entropy(network(image).logits, labels).backward()
    ours = torch.cat([g.flatten() for g in gradients(network)])

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
    published = torch.cat([g.flatten() for g in gradients(network)])
    assert F.cosine_similarity(ours, published, dim=0) > 0.9999
    assert abs(ours.norm() / published.norm() - 1) < 0.01


def test_the_reversible_rule_refuses_a_mask_per_evaluation() -> None:
    config = MDEQConfig(channels=(8, 8), dropout=0.3, variational=False)
    with pytest.raises(ValueError, match="one mask per solve"):
        MDEQ(config, backward=Reversible())
