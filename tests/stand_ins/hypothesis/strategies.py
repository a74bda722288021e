"""What values are drawn from."""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple


class Strategy(NamedTuple):
    draw: Callable[[Random], Any]


def just(value: Any) -> Strategy:
    return Strategy(lambda random: value)


def booleans() -> Strategy:
    return sampled_from([False, True])


def integers(min_value: int, max_value: int) -> Strategy:
    return Strategy(lambda random: random.randint(min_value, max_value))


def sampled_from(values: Iterable[Any]) -> Strategy:
    values = list(values)
    return Strategy(lambda random: random.choice(values))


def one_of(*strategies: Strategy) -> Strategy:
    return Strategy(lambda random: random.choice(strategies).draw(random))


def tuples(*strategies: Strategy) -> Strategy:
    return Strategy(lambda random: tuple(strategy.draw(random) for strategy in strategies))


def lists(elements: Strategy, *, min_size: int, max_size: int) -> Strategy:
    return Strategy(
        lambda random: [elements.draw(random) for _ in range(random.randint(min_size, max_size))]
    )


def randoms(*, use_true_random: bool) -> Strategy:
    return Strategy(lambda random: Random(random.random()))


def composite(function: Callable[..., Any]) -> Callable[..., Strategy]:
    return lambda *args, **options: Strategy(
        lambda random: function(lambda strategy: strategy.draw(random), *args, **options)
    )
