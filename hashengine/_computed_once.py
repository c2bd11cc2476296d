"""A property whose value is computed at its first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from typing_extensions import Self

T = TypeVar("T")


class computed_once(Generic[T]):  # noqa: N801, a decorator like `property`
    """Decorates a method whose value is stored in the object at its first use.

    Threads that come at the same time may each compute it. `functools.cached_property` of Python 3.10 and 3.11 lets
    them wait for a lock, for which a process that was forked in the meantime would wait without end.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        """The value; the decorator itself if it is accessed in the class."""
        if instance is None:
            return self
        return vars(instance).setdefault(self._name, self._compute(instance))
