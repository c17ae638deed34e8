"""A block's pass that goes from one layer's input to the next, for all windows.

Between two inputs the layers may have changed. Either each call waits where a layer's input comes by, with all that it
holds, and what comes before is computed once; or each begins anew, and holds nothing. Both give the same numbers.

Legend of shapes: T time (of inputs: tokens), K inputs of a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from .runs import Run


class Pass:
    """One pass of a block.

    Args:
        run: the windows that it is for.
        within: what the block's calls run inside.
        waits: whether calls wait.
    """

    def __init__(
        self, run: Run, *, waits: bool, within: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.run, self._within = run, within
        self.halves = tuple(run.halves())
        self._waiting: dict[int, list[_Waiting]] | None = {} if waits else None

    def inputs(self, half: int, layer: nn.Linear) -> Iterator[Tensor]:
        """What comes to a layer, [T, K], for some windows of one of the halves after the others. Layers are asked for
        in the order of their calls."""
        for call in self._calls(half):
            with self._within():
                x = call.input_of(layer) if isinstance(call, _Waiting) else input_of(layer, call)
            del call
            yield x.reshape(-1, layer.in_features)
            del x

    def whole(self, before: Any = None) -> Any:
        """What the block gives for all windows, into what another pass gave `before`, if it is given."""
        for number, half in enumerate(self.halves):
            calls = None if self._waiting is None else [call.end for call in self._waiting.pop(number, ())]
            with self._within():
                before = half.whole(before, calls or None)
        return before

    def close(self) -> None:
        """Calls that wait end where they are; what is asked for next begins anew."""
        for calls in (self._waiting or {}).values():
            for call in calls:
                call.close()
        if self._waiting is not None:
            self._waiting = {}

    def _calls(self, half: int) -> Iterator[Any]:
        if self._waiting is None:
            return self.halves[half].parts()
        if half not in self._waiting:
            self._waiting[half] = [_Waiting(part) for part in self.halves[half].parts(every=True)]
        return iter(self._waiting[half])


class _Waiting:
    """A call that has a stack of its own, on which it waits."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._course = greenlet(call)
        self._course.gr_context = copy_context()

    def input_of(self, layer: nn.Linear) -> Tensor:
        """Go on until a layer's input comes by."""
        asking = getcurrent()

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            asking.switch(inputs[0])

        handle = layer.register_forward_pre_hook(hook)
        try:
            x: Tensor = self._course.switch()
        finally:
            handle.remove()
        if self._course.dead:
            raise RuntimeError("a block's call has ended before it came to a layer that others came to")
        return x

    def end(self) -> Any:
        """Go on to the end: what the call gives."""
        return self._course.switch()

    def close(self) -> None:
        """End where it is."""
        self._course.throw()


def input_of(layer: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What comes to a layer in a call, which goes no further."""
    heard: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])
        raise _Heard

    handle = layer.register_forward_pre_hook(hook)
    try:
        call()
    except _Heard:
        pass
    finally:
        handle.remove()
    return heard.pop()


class _Heard(Exception):  # no error: what follows in the block is of no use
    """A layer's input has come by."""
