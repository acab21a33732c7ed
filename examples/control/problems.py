"""Three classic problems of optimal control, as functions that `ddpn_fx.control.solve` takes.

Each maker returns a :class:`Task`. The dynamics are discretised by one step of the integrator named, so that every
solver that is given a task minimises the same function. Units are SI; angles are in radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A problem and where to start.

    Attributes:
        name: for tables.
        f: dynamics, (n,), (m,), 0-d t to (n,).
        stage_cost: to a number.
        terminal_cost: to a number.
        x0: (n,), float64.
        us: (T, m), the first guess.
        goal: (n,), the state that a good solution ends near.
        near: how near, for each state.
        angles: the states that are angles, in which whole turns make no difference.
    """

    name: str
    f: Callable[[Tensor, Tensor, Tensor], Tensor]
    stage_cost: Callable[[Tensor, Tensor, Tensor], Tensor]
    terminal_cost: Callable[[Tensor], Tensor]
    x0: Tensor
    us: Tensor
    goal: Tensor
    near: Tensor
    angles: tuple[int, ...]

    def reached(self, x: Tensor) -> bool:
        """Whether a final state (n,) is as near to the goal as it should be."""
        off = x - self.goal
        for i in self.angles:
            off[i] = torch.remainder(off[i] + math.pi, 2.0 * math.pi) - math.pi
        return bool((off.abs() <= self.near).all())

    @property
    def functions(self) -> tuple[Callable, Callable, Callable]:
        """What `solve` takes first."""
        return self.f, self.stage_cost, self.terminal_cost


def vector(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def pendulum(T: int = 100, h: float = 0.05) -> Task:
    """Swing a damped pendulum up from hanging: x = (angle from upright, its rate), u = torque at the pivot, N m.

    Mass 1 kg, length 1 m, damping 0.1 N m s; semi-implicit Euler. Holding it level takes 9.81 N m.
    """
    g, damping = 9.81, 0.1

    def f(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        angle, rate = x
        rate = rate + h * (g * torch.sin(angle) - damping * rate + u[0])
        return torch.stack([angle + h * rate, rate])

    def stage_cost(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        return h * (1.0 - torch.cos(x[0]) + 0.05 * x[1] ** 2 + 0.05 * u[0] ** 2)

    def terminal_cost(x: Tensor) -> Tensor:
        return 100.0 * (1.0 - torch.cos(x[0])) + 10.0 * x[1] ** 2

    us = 0.1 * torch.ones(T, 1, dtype=torch.float64)  # hanging still without torque is a saddle
    return Task(
        "pendulum",
        f,
        stage_cost,
        terminal_cost,
        vector(math.pi, 0.0),
        us,
        vector(0.0, 0.0),
        vector(0.05, 0.05),
        angles=(0,),
    )


def cartpole(T: int = 150, h: float = 0.02) -> Task:
    """Swing a pole on a cart up: x = (position, angle from upright, their rates), u = force on the cart, N.

    Cart 1 kg, pole a point of 0.1 kg at 0.5 m; semi-implicit Euler.
    """
    g, cart, pole, length = 9.81, 1.0, 0.1, 0.5

    def f(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        position, angle, speed, rate = x
        sin, cos = torch.sin(angle), torch.cos(angle)
        push = (u[0] + pole * length * rate**2 * sin) / (cart + pole)
        swing = (g * sin - cos * push) / (length * (1.0 - pole * cos**2 / (cart + pole)))
        speed = speed + h * (push - pole * length * swing * cos / (cart + pole))
        rate = rate + h * swing
        return torch.stack([position + h * speed, angle + h * rate, speed, rate])

    def stage_cost(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        return h * (0.1 * x[0] ** 2 + 1.0 - torch.cos(x[1]) + 0.01 * x[2] ** 2 + 0.01 * x[3] ** 2 + 0.01 * u[0] ** 2)

    def terminal_cost(x: Tensor) -> Tensor:
        return 100.0 * x[0] ** 2 + 100.0 * (1.0 - torch.cos(x[1])) + 10.0 * x[2] ** 2 + 10.0 * x[3] ** 2

    return Task(
        "cart-pole",
        f,
        stage_cost,
        terminal_cost,
        vector(0.0, math.pi, 0.0, 0.0),
        torch.full((T, 1), 0.1, dtype=torch.float64),
        vector(0.0, 0.0, 0.0, 0.0),
        vector(0.1, 0.1, 0.1, 0.1),
        angles=(1,),
    )


def car(T: int = 500, h: float = 0.03) -> Task:
    """Park a car at the origin, facing along x, at rest: x = (x, y, heading, speed of the front wheels).

    u = (angle of the front wheels, acceleration). Dynamics, costs, start and horizon are those of the car-parking
    problem of Tassa, Mansard and Todorov (2014), section IV-B: wheels 2 m apart, smooth absolute values
    ``z(y, p) = sqrt(y^2 + p^2) - p`` for costs. Their limits on the controls are left out: this solver has none.
    """
    wheelbase = 2.0

    def z(y: Tensor, p: Tensor | float) -> Tensor:
        return torch.sqrt(y**2 + p**2) - p

    def f(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        _, _, heading, speed = x
        wheel, acceleration = u
        front = h * speed  # what the front wheels roll
        back = wheelbase + front * torch.cos(wheel) - torch.sqrt(wheelbase**2 - (front * torch.sin(wheel)) ** 2)
        turn = torch.asin(torch.sin(wheel) * front / wheelbase)
        return x + torch.stack([back * torch.cos(heading), back * torch.sin(heading), turn, h * acceleration])

    def stage_cost(x: Tensor, u: Tensor, t: Tensor) -> Tensor:
        return 0.01 * (z(x[0], 0.1) + z(x[1], 0.1)) + 0.01 * u[0] ** 2 + 0.0001 * u[1] ** 2

    def terminal_cost(x: Tensor) -> Tensor:
        return z(x[0], 0.01) + z(x[1], 0.01) + z(x[2], 0.01) + z(x[3], 1.0)

    generator = torch.Generator().manual_seed(0)
    us = 0.1 * torch.randn(T, 2, generator=generator, dtype=torch.float64)
    return Task(
        "car",
        f,
        stage_cost,
        terminal_cost,
        vector(1.0, 1.0, 1.5 * math.pi, 0.0),
        us,
        vector(0.0, 0.0, 0.0, 0.0),
        vector(0.05, 0.05, 0.05, 0.2),
        angles=(),
    )


TASKS = (pendulum, cartpole, car)
