"""The built-in arithmetic task: its problems, its small model and the flaws of the warm start."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from clipo_ds.schema.base import require


@dataclass(frozen=True)
class FlawRates:
    """How often a worked solution of the warm start is spoilt, as shares of all solutions; the rest is clean."""

    slip: float = 0.0
    """One step's value is off and the error flows on: wrong process, wrong answer (unless the modulus hides it)."""
    lucky_slip: float = 0.0
    """The same, off by a multiple of `task.answer_modulus`: wrong process, right answer by luck."""
    skip: float = 0.0
    """Two steps are told as one: fewer equations, each of them true."""
    false_equation: float = 0.0
    """A false equation is stated but the true value flows on: wrong process, right answer."""
    copied_answer: float = 0.0
    """No steps at all, the right answer only."""
    wrong_answer: float = 0.0
    """True steps, then an answer that is not their result."""

    def __post_init__(self) -> None:
        rates = {rate.name: getattr(self, rate.name) for rate in fields(self)}
        for name, rate in rates.items():
            require(0 <= rate <= 1, f"task.flaws.{name}", "in [0, 1]", rate)
        require(sum(rates.values()) <= 1 + 1e-9, "task.flaws", "rates that sum to at most 1", sum(rates.values()))


@dataclass(frozen=True)
class TaskConfig:
    """The built-in arithmetic task: chains like 7+5-3+8, solved step by step by a small model."""

    min_terms: int = 3
    """Fewest numbers in a chain."""
    max_terms: int = 5
    """Most numbers in a chain."""
    max_number: int = 20
    """Largest number in a chain; the smallest is 1."""
    harder_max_terms: int = 6
    """Most numbers in a chain of the harder test set (its fewest is `max_terms` + 1)."""
    harder_max_number: int = 30
    """Largest number in a chain of the harder test set."""
    answer_modulus: int | None = None
    """Ask for the chain's value modulo this number, so that wrong steps are often right by luck; null asks for the
    value itself."""
    flaws: FlawRates = field(default_factory=FlawRates)
    """Shares of spoilt solutions in the warm start."""
    num_train_prompts: int = 4096
    """Problems to train on."""
    num_test_prompts: int = 128
    """Problems in each of the two test sets; none of them is in the training set."""
    warm_start_steps: int = 1000
    """Optimiser steps of the supervised stage that makes the small model."""
    warm_start_batch_size: int = 32
    """Worked solutions in one supervised step."""
    warm_start_learning_rate: float = 3e-3
    """Peak learning rate of the supervised stage."""
    warm_start_harder_share: float = 0.1
    """Share of the warm start's problems that are of the harder test set's size. Without any, the small model cannot
    even copy such a problem, and the harder test set reads 0 whatever happens."""
    hidden_size: int = 128
    """Width of the small model."""
    num_layers: int = 3
    """Layers of the small model."""
    seed: int = 0
    """Seed of problems, solutions and the small model's weights; kept apart from the run's `seed`, so that runs with
    different seeds start from the same model."""

    def __post_init__(self) -> None:
        require(2 <= self.min_terms <= self.max_terms, "task.min_terms", "between 2 and task.max_terms", self.min_terms)
        require(self.max_number >= 2, "task.max_number", "at least 2", self.max_number)
        require(
            self.harder_max_terms > self.max_terms,
            "task.harder_max_terms",
            "above task.max_terms",
            self.harder_max_terms,
        )
        require(self.harder_max_number >= 2, "task.harder_max_number", "at least 2", self.harder_max_number)
        modulus = self.answer_modulus
        require(modulus is None or modulus >= 2, "task.answer_modulus", "null or at least 2", modulus)
        lucky = self.flaws.lucky_slip
        require(lucky == 0 or modulus is not None, "task.flaws.lucky_slip", "0 without task.answer_modulus", lucky)
        for name in (
            "num_train_prompts",
            "num_test_prompts",
            "warm_start_steps",
            "warm_start_batch_size",
            "num_layers",
        ):
            require(getattr(self, name) >= 1, f"task.{name}", "at least 1", getattr(self, name))
        share = self.warm_start_harder_share
        require(0 <= share <= 1, "task.warm_start_harder_share", "in [0, 1]", share)
        require(
            self.warm_start_learning_rate > 0,
            "task.warm_start_learning_rate",
            "positive",
            self.warm_start_learning_rate,
        )
        require(
            self.hidden_size >= 32 and self.hidden_size % 32 == 0,
            "task.hidden_size",
            "a multiple of 32",
            self.hidden_size,
        )
