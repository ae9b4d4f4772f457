"""What counts only once the optimizer has stepped on a window."""

from collections.abc import Callable

__all__ = ["StepEffects"]


class StepEffects:
    """
    The effects of a window. They are applied after its outer step, when the number of the step has increased.

    So a checkpoint that is saved before the step repeats the window after a resume. The Trainer has no earlier event:
    a callback may save a checkpoint as soon as the number has increased.

    Example:
        >>> effects, counts = StepEffects(), []
        >>> effects.begin(0)
        >>> effects.add(lambda: counts.append("window 0"))
        >>> effects.apply(0)  # the optimizer has not stepped yet
        >>> counts
        []
        >>> effects.apply(1)
        >>> counts
        ['window 0']
    """

    def __init__(self) -> None:
        self.step = -1  # of the window
        self._effects: list[Callable[[], None]] = []

    def begin(self, step: int) -> None:
        """Begin the window of an outer step. An interrupted window of the same step is discarded."""
        self.apply(step)
        self._effects.clear()
        self.step = step

    def add(self, effect: Callable[[], None]) -> None:
        """Add an effect of the window."""
        self._effects.append(effect)

    def apply(self, step: int) -> None:
        """Apply the effects of the window, once, if it belongs to a step before `step`."""
        if self.step < step:
            for effect in self._effects:
                effect()
            self._effects.clear()
