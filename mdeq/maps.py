"""f and its state at the boundary: any state flattened to (B, D), what f returns checked, its tape.

The solvers know maps of a flat state alone. `FlatMap` makes one of a function or module f on a
tensor, a tuple, a list or a dict of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.func import functional_call

State = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The kind of a state and the shapes of its tensors, by which it is flattened and restored.

    Attributes:
        keys: The names of a dict's tensors; empty for other kinds.
        shapes: The shape of each tensor, without the batch.
    """

    kind: type
    keys: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    batch: int
    dtype: torch.dtype

    @classmethod
    def of(cls, state: State) -> Layout:
        """The layout of a state.

        Raises:
            TypeError: It is not a tensor, tuple, list or dict of floating tensors.
            ValueError: Its tensors differ in batch, dtype or device.
        """
        kind = next((k for k in (Tensor, tuple, list, dict) if isinstance(state, k)), None)
        if kind is None or (kind is not Tensor and not state):
            raise TypeError(
                f"z0: must be a tensor, or a tuple, list or dict of some, not {state!r}"
            )
        tensors = _tensors(state)
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.dim():
                raise TypeError("z0: each tensor of a state must be floating, of shape (B, ...)")
        if len({(len(t), t.dtype, t.device) for t in tensors}) > 1:
            raise ValueError("z0: the tensors of a state must have one batch, dtype and device")
        keys = tuple(state) if isinstance(state, dict) else ()
        shapes = tuple(tensor.shape[1:] for tensor in tensors)
        return cls(kind, keys, shapes, len(tensors[0]), tensors[0].dtype)

    def flatten(self, state: State, *, convert: bool = False) -> Tensor:
        """A state of this layout to (B, D); another precision is an error unless `convert`.

        Raises:
            TypeError: The state is of another kind or dtype.
            ValueError: Its tensors have other shapes or names.
        """
        kinds = (tuple, list) if self.kind in (tuple, list) else self.kind
        if not isinstance(state, kinds):
            raise TypeError(
                f"f must return a {self.kind.__name__} like z, not {type(state).__name__}"
            )
        if isinstance(state, dict):
            if set(state) != set(self.keys):
                raise ValueError(f"f must return the keys of z, {self.keys}, not {tuple(state)}")
            state = [state[key] for key in self.keys]
        flat = []
        for tensor, shape in zip(_tensors(state), self.shapes, strict=True):
            if tensor.shape != (self.batch, *shape):
                expected = (self.batch, *shape)
                raise ValueError(
                    f"f must return the shape of z, {expected}, not {(*tensor.shape,)}"
                )
            if tensor.dtype != self.dtype and not convert:
                raise TypeError(f"f must return the dtype of z, {self.dtype}, not {tensor.dtype}")
            if len(shape) != 1:
                tensor = tensor.reshape(self.batch, shape.numel())
            flat.append(tensor.to(self.dtype))
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def restore(self, flat: Tensor) -> State:
        """(B, D) to a state of this layout."""
        if self.kind is Tensor:
            shape = self.shapes[0]
            return flat if len(shape) == 1 else flat.view(flat.shape[0], *shape)
        tensors, start = [], 0
        for shape in self.shapes:
            end = start + shape.numel()
            tensors.append(flat[:, start:end].view(flat.shape[0], *shape))
            start = end
        return dict(zip(self.keys, tensors, strict=True)) if self.keys else self.kind(tensors)


def _tensors(state: State) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return list(state.values() if isinstance(state, dict) else state)


class FlatMap:
    """f(z, *inputs) on the flat state, under the autocast that was on when this was made.

    Args:
        f: A function or a module.
        layout: The layout of the state.
        arguments: What f takes after z.
        device: The type of the state's device.

    Attributes:
        inputs: All named tensors that f depends on: the arguments, then the parameters of a module
            that require grad.
    """

    def __init__(
        self, f: Callable[..., State], layout: Layout, arguments: Sequence[Tensor], device: str
    ) -> None:
        for argument in arguments:
            if not isinstance(argument, Tensor):
                raise TypeError(f"inputs: must be tensors, not {argument!r}")
        self.f, self.layout, self.device = f, layout, device
        self.arguments = tuple(arguments)
        named = f.named_parameters() if isinstance(f, nn.Module) else ()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.inputs = (*self.arguments, *self.parameters.values())
        self.autocast = torch.is_autocast_enabled(device)
        self.low_precision = torch.get_autocast_dtype(device)
        self.writes: bool | None = None  # into its input; known after the first call

    def __call__(self, z: Tensor, *arguments: Tensor) -> Tensor:
        """f(z) (B, D); with other arguments if any are given."""
        return self._value(self.f, z, arguments or self.arguments)

    def at(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """f(z) (B, D) with other tensors in the place of `self.inputs`."""
        count = len(self.arguments)
        if not self.parameters:
            return self._value(self.f, z, inputs)
        parameters = dict(zip(self.parameters, inputs[count:], strict=True))
        f = partial(_call_with, self.f, parameters)  # type: ignore[arg-type]
        return self._value(f, z, inputs[:count])

    def _value(self, f: Callable[..., State], z: Tensor, arguments: Sequence[Tensor]) -> Tensor:
        copied = self.writes is not False or z.is_inference()
        given = z.clone() if copied else z
        version = None if given.is_inference() else given._version
        if torch.is_autocast_enabled(self.device) == self.autocast:
            value = f(self.layout.restore(given), *arguments)
        else:
            with torch.autocast(self.device, self.low_precision, enabled=self.autocast):
                value = f(self.layout.restore(given), *arguments)
        wrote = version is not None and given._version != version
        if wrote and not copied:
            raise RuntimeError("f writes into its input, but did not at its first call")
        self.writes = self.writes or wrote
        return self.layout.flatten(value, convert=self.autocast)


def _call_with(module: nn.Module, parameters: dict[str, Tensor], *arguments: Any) -> Any:
    return functional_call(module, parameters, arguments)


def flat_problem(
    f: Callable[..., State], z0: State, inputs: Sequence[Tensor]
) -> tuple[FlatMap, Tensor]:
    """f on the flat state and the flat start (B, D)."""
    layout = Layout.of(z0)
    start = layout.flatten(z0)
    return FlatMap(f, layout, inputs, start.device.type), start


def vjp(fz: Tensor, z: Tensor, v: Tensor, **options: Any) -> Tensor:
    """v^T J, J = df/dz, from f(z) on a tape; 0 where f does not depend on z."""
    if not fz.requires_grad:
        return torch.zeros_like(z)
    product = torch.autograd.grad(fz, z, v, allow_unused=True, **options)[0]
    return torch.zeros_like(z) if product is None else product


def depends_beyond(value: Tensor, known: Sequence[Tensor]) -> bool:
    """Whether a gradient of `value` would reach a tensor other than through `known`."""
    if not value.requires_grad:
        return False
    seen: set[Node] = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    todo = [get_gradient_edge(value).node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            return True
        todo += [after for after, _ in node.next_functions if after is not None]
    return False


def refused(message: str, value: Tensor, *upstream: Tensor) -> Tensor:
    """`value`, whose derivative with respect to what `upstream` comes from is a RuntimeError."""
    return _Refused.apply(message, value, *upstream)  # type: ignore[return-value]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor, *upstream: Tensor) -> Tensor:
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(ctx.message)
