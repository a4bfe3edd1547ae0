"""The tape: tensors remember the op that made them, and `backward` walks the ops in reverse.

There is no global tape. A :class:`Tensor` made by an op points to its :class:`Node`; a node
knows the nodes (and leaves) that its inputs came from, and a closure that maps gradients of the
outputs to gradients of the inputs. Of the arrays in between only those live on that a closure
needs. A graph that nobody refers to is garbage, and a graph is consumed by its `backward`, node by
node, so that activations are freed on the way.

Gradients of weights do not travel through the tape: a backward adds them into
:meth:`Tensor.grad_buffer` in place, so a tied table receives all its adds in one buffer.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from loopos.backends import get_backend
from loopos.backends.lasting import lasting
from loopos.errors import LooposError

Array = np.ndarray[Any, Any]
#: Maps the gradients of a node's outputs (None where none arrived) to those of its inputs.
Backward = Callable[[Sequence[Array | None]], Sequence[Array | None]]

_grad_enabled: ContextVar[bool] = ContextVar("loopos_grad_enabled", default=True)
_creation_order = itertools.count()


def is_grad_enabled() -> bool:
    """Return whether ops called now are recorded for a backward."""
    return _grad_enabled.get()


@contextmanager
def _set_grad(enabled: bool) -> Iterator[None]:
    token = _grad_enabled.set(enabled)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


def no_grad() -> AbstractContextManager[None]:
    """Record nothing inside the block: evaluation and frozen models keep no tape."""
    return _set_grad(False)


def enable_grad() -> AbstractContextManager[None]:
    """Record inside the block, whatever holds around it."""
    return _set_grad(True)


class Edge(NamedTuple):
    """An output of a node, where gradients of what it became go."""

    node: Node
    output: int


class Node:
    """One recorded op: where its inputs came from, its backward, how many outputs it has."""

    __slots__ = ("__weakref__", "again", "backward", "inputs", "num_outputs", "order")

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        backward: Backward,
        num_outputs: int,
        again: Callable[[], Array] | None = None,
    ):
        self.inputs: Sequence[Tensor | Edge | None] = [_source(tensor) for tensor in inputs]
        self.backward: Backward | None = backward
        self.again = again
        self.num_outputs = num_outputs
        self.order = next(_creation_order)


def _source(tensor: Tensor | None) -> Tensor | Edge | None:
    """Return where the gradient of `tensor` goes: a leaf, the node that made it, or nowhere."""
    if tensor is None or not tensor.requires_grad:
        return None
    return tensor if tensor._node is None else Edge(tensor._node, tensor._output)


class Tensor:
    """An array that knows how it was made.

    Parameters
    ----------
    data : ndarray
        The values; kept, not copied.
    requires_grad : bool
        Whether gradients with respect to this leaf are wanted.

    Attributes
    ----------
    data : ndarray
        The values.
    grad : ndarray or None
        Gradient accumulated by `backward` since the last `zero_grad`; leaves only.
    """

    __slots__ = (
        "_buffer", "_has_grad", "_lent", "_node", "_output", "_rows", "data", "requires_grad",
    )  # fmt: skip

    def __init__(self, data: Any, requires_grad: bool = False):
        self.data: Array = np.asarray(data)
        self.requires_grad = requires_grad
        self._node: Node | None = None
        self._output = 0
        self._buffer: Array | None = None
        self._has_grad = False
        self._lent = False
        #: Where the rows of the buffer are that may differ from 0; None: anywhere.
        self._rows: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def again(self) -> Callable[[], Array] | None:
        """What computes `data` once more from what its own backward keeps, where that is cheap.

        An op that needs `data` in its backward may keep this instead.
        """
        return None if self._node is None else self._node.again

    @property
    def grad(self) -> Array | None:
        """The accumulated gradient, or None when there is none since `zero_grad`."""
        self._rows = None  # who has the array may write to any of its rows
        return self._buffer if self._has_grad else None

    @property
    def grad_and_rows(self) -> tuple[Array | None, Array | None]:
        """The gradient, to be read only, and which of its rows may differ from 0 (None: any)."""
        return (self._buffer, self._rows) if self._has_grad else (None, None)

    def zero_grad(self) -> None:
        """Forget the gradient; its buffer is kept for the next one, unless it was given to us."""
        self._has_grad = False
        if self._lent:
            self._buffer, self._lent, self._rows = None, False, None

    def grad_buffer(self) -> Array:
        """Return the gradient's buffer for adding into, zero-filled when there is no gradient."""
        buffer, holds_gradient = self.grad_target()
        if not holds_gradient:
            buffer.fill(0)
        return buffer

    def grad_target(self) -> tuple[Array, bool]:
        """Return the gradient's buffer, and whether to add to what it holds or to overwrite it.

        The caller must fill all of it: from now on it counts as the gradient.
        """
        held, self._has_grad = self._has_grad, True
        self._rows = None
        if self._buffer is None:
            self._buffer = self._new_buffer()
        return self._buffer, held

    def _new_buffer(self) -> Array:
        """Return an array for the gradient, whatever it holds."""
        return np.empty_like(self.data, order="C")

    def grad_rows_target(self, rows: Array) -> Array:
        """Return the gradient's buffer for adding into these rows, and no others.

        A table of which a batch uses few rows is then neither cleared nor, by an optimizer that
        asks for :attr:`grad_and_rows`, walked through as a whole.
        """
        held, self._has_grad = self._has_grad, True
        if self._buffer is None:
            self._buffer = np.zeros(self.shape, self.dtype)
            self._rows = np.zeros(len(self.data), bool)
        elif not held:
            if self._rows is None:
                self._buffer.fill(0)
                self._rows = np.zeros(len(self.data), bool)
            else:
                self._buffer[self._rows] = 0
                self._rows[:] = False
        if self._rows is not None:
            self._rows[rows] = True
        return self._buffer

    def add_grad(self, gradient: Array, scale: float = 1.0) -> None:
        """Add ``scale * gradient`` to the gradient; one pass over memory when it is the first."""
        buffer, holds_gradient = self.grad_target()
        if holds_gradient:
            buffer += gradient if scale == 1.0 else gradient * self.dtype.type(scale)
        else:
            np.multiply(gradient, self.dtype.type(scale), out=buffer)

    def give_grad(self, gradient: Array) -> None:
        """Add `gradient`, an array that nobody else holds: the first one is kept, not copied."""
        if self._has_grad or gradient.shape != self.shape or gradient.dtype != self.dtype:
            self.add_grad(gradient)
            return
        self._buffer, self._has_grad, self._lent, self._rows = gradient, True, True, None

    def item(self) -> float:
        """Return the value of a tensor with one element as a Python float."""
        return float(self.data.item())

    def backward(self, grad: Any = None) -> None:
        """Add the gradient of this tensor, times `grad`, to every leaf it depends on.

        Parameters
        ----------
        grad : array_like, optional
            Upstream gradient of the shape of this tensor. May be absent for a single element,
            where it is 1.

        Raises
        ------
        LooposError
            If nothing was recorded, the graph was used before, or `grad` has another shape.
        """
        if grad is None:
            if self.data.size != 1:
                raise LooposError(
                    f"backward() of a tensor of shape {self.shape} needs a gradient of that shape"
                )
            grad = np.ones_like(self.data)
        backward([(self, grad)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


class Parameter(Tensor):
    """A named leaf that is trained.

    Parameters
    ----------
    data : ndarray
        Initial values; kept, not copied.
    name : str
        Where it stands in its model.
    requires_grad : bool
        False freezes it: no gradient is computed for it and nothing is recorded for it.
    """

    __slots__ = ("name",)

    def __init__(self, data: Any, name: str = "", requires_grad: bool = True):
        super().__init__(data, requires_grad)
        self.name = name

    def _new_buffer(self) -> Array:
        """Return an array that stays, beside those of other parameters."""
        return lasting(self.shape, self.dtype)

    def update(self, learning_rate: float) -> None:
        """Take one step of plain gradient descent in place: ``data -= learning_rate * grad``.

        Raises
        ------
        LooposError
            If there is no gradient.
        """
        if self.grad is None:
            raise LooposError(f"parameter '{self.name}' has no gradient; call backward() first")
        self.data -= self.dtype.type(learning_rate) * self.grad

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.shape}, dtype={self.dtype})"


def record(
    outputs: Sequence[Array],
    inputs: Sequence[Tensor | None],
    backward: Backward,
    again: Callable[[], Array] | None = None,
) -> Any:
    """Wrap the arrays of an op's outputs, recording its backward if any input wants a gradient.

    Parameters
    ----------
    outputs : sequence of ndarray
    inputs : sequence of Tensor or None
    backward : callable
    again : callable, optional
        Makes an only output once more from what `backward` keeps; see :attr:`Tensor.again`.

    Returns
    -------
    Tensor or tuple of Tensor
        One tensor for one output, else a tuple.
    """
    tensors = [Tensor(array) for array in outputs]
    if _grad_enabled.get() and recording(*inputs):  # first what is cheap: decoding is short of time
        node = Node(inputs, backward, len(tensors), again)
        for index, tensor in enumerate(tensors):
            tensor.requires_grad, tensor._node, tensor._output = True, node, index
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def recording(*inputs: Tensor | None) -> bool:
    """Return whether an op on `inputs` is to be recorded."""
    return _grad_enabled.get() and any(t is not None and t.requires_grad for t in inputs)


def backward(terms: Iterable[tuple[Tensor, Any]]) -> None:
    """Walk the graph of several tensors at once, in reverse order of creation.

    Parameters
    ----------
    terms : iterable of (Tensor, array_like)
        Each tensor with its upstream gradient (a number for a scalar tensor). The gradient of
        ``sum(grad * tensor)`` is added to every leaf.

    Raises
    ------
    LooposError
        If a tensor was not recorded, its graph was used before, or a gradient has another shape.
    """
    pending: dict[Node, list[Array | None]] = {}
    heap: list[tuple[int, Node]] = []

    def send(source: Tensor | Edge | None, gradient: Array) -> None:
        if isinstance(source, Tensor):
            source.add_grad(gradient)
            return
        if source is None:
            return
        node, index = source
        if node not in pending:
            pending[node] = [None] * node.num_outputs
            heapq.heappush(heap, (-node.order, node))
        slots = pending[node]
        held = slots[index]
        # Never in place: an op may hand the same array to several inputs.
        slots[index] = gradient if held is None else get_backend().add(held, gradient)

    for tensor, gradient in terms:
        if not tensor.requires_grad:
            raise LooposError("backward() of a tensor that depends on nothing that is trained")
        array = np.asarray(gradient, dtype=tensor.dtype)
        if array.shape != tensor.shape:
            raise LooposError(f"gradient of shape {array.shape} for a tensor of {tensor.shape}")
        send(_source(tensor), array)
    while heap:
        node = heapq.heappop(heap)[1]
        if node.backward is None:
            raise LooposError("this graph was used by backward() before; run the forward again")
        gradients = node.backward(pending.pop(node))
        for source, grad in zip(node.inputs, gradients, strict=True):
            if grad is not None:
                send(source, grad)
        node.inputs, node.backward, node.again = (), None, None
