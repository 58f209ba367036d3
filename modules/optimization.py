"""BertAdam, learning-rate schedules, and parameter groups. See docs/reference.md, Optimization."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Those of a parameter group.
NUMERIC_SETTINGS = ("lr", "warmup", "t_total", "eps", "weight_decay", "max_grad_norm")


def warmup_cosine(x: float, warmup: float) -> float:
    """x/warmup, then ½(1 + cos πx); x is the share of all steps already taken."""
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


def warmup_linear(x: float, warmup: float) -> float:
    """x/warmup, then along a line to 0 at x = 1.

    With warmup −1 the line is (1 − x)/2: it starts at ½, as published.
    """
    return x / warmup if x < warmup else max((1 - x) / (1 - warmup), 0.0)


def warmup_constant(x: float, warmup: float) -> float:
    """x/warmup, then 1."""
    return x / warmup if x < warmup else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": warmup_cosine,
    "linear": warmup_linear,
    "constant": warmup_constant,
}


class BertAdam(torch.optim.Optimizer):
    """BERT's Adam: no bias correction, decay added to the update, each gradient's norm clipped.

    `lr` is the peak rate (groups may have their own), `warmup` a share of `t_total` steps (−1:
    none, but "linear" then starts at lr/2), `betas` and `eps` as in Adam. `max_global_norm` first
    scales all gradients down to that common norm; if it is set and the common norm is not finite,
    no parameter is updated and `skipped_steps` grows by one. Both clips change the gradients in
    place. Parameters without a gradient are left alone, weight decay included. With
    `bias_correction`, and `max_grad_norm` 0, this is AdamW. Raises ValueError for settings out of
    range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        warmup: float = -1,
        t_total: int = -1,
        schedule: str = "linear",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        max_global_norm: float | None = None,
        bias_correction: bool = False,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}, expected at least 0")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if warmup != -1 and not 0 <= warmup < 1:
            raise ValueError(f"warmup is {warmup}, expected a share in [0, 1), or -1 for none")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers in [0, 1)")
        defaults = {
            "lr": lr,
            "warmup": warmup,
            "t_total": t_total,
            "schedule": schedule,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)
        self.max_global_norm = max_global_norm
        self.bias_correction = bias_correction
        self.skipped_steps = 0

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's.

        Raises ValueError for anything that this optimizer's `state_dict` could not have returned.
        """
        names = self.param_groups[0].keys()
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if not (group.keys() == names and _are_settings(group)):
                raise ValueError("the saved optimizer settings are invalid")
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state and not _is_own_state(state, parameter):
                    raise ValueError("the saved optimizer state does not fit the parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        gradients = [parameter.grad for _, parameter in moving]
        max_norms = [group["max_grad_norm"] for group, _ in moving]
        if not self._clip(gradients, max_norms):
            self.skipped_steps += 1
            return loss
        for group in self.param_groups:
            for step, parameters in self._by_step(group).items():
                self._update(group, parameters, self._scheduled_lr(group, step))
        return loss

    def _clip(self, gradients: list[Tensor], max_norms: list[float]) -> bool:
        """Clip all gradients to the common norm, then each to its own limit (0: none), in one pass.

        Returns False, and changes nothing, if the common norm is limited and not finite. One call
        for all gradients is faster than `clip_grad_norm_` for each of them
        (benchmarks/hand_written.py).
        """
        if not gradients or not (self.max_global_norm or any(max_norms)):
            return True
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = torch.ones_like(norms)
        if self.max_global_norm:
            total = norms.norm()
            if not total.isfinite():
                return False
            factors = factors * (self.max_global_norm / (total + 1e-6)).clamp(max=1.0)
        limits = norms.new_tensor([limit or math.inf for limit in max_norms])
        factors = factors * (limits / (norms * factors + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
        return True

    def _by_step(self, group: dict) -> dict[int, list[Tensor]]:
        """The group's parameters with a gradient, by the number of their steps so far."""
        by_step: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                step = self._parameter_state(parameter)["step"]
                by_step.setdefault(step, []).append(parameter)
        return by_step

    def _update(self, group: dict, parameters: list[Tensor], rate: float) -> None:
        """Update parameters that have taken the same number of steps."""
        states = [self.state[parameter] for parameter in parameters]
        # torch's fused AdamW is BertAdam without the bias correction, which is gone at step ∞,
        # because 1 − β^∞ is 1.
        count = float(states[0]["step"]) if self.bias_correction else math.inf
        steps = torch.full((len(parameters),), count, device=parameters[0].device)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["moment"] for state in states],
            [state["square"] for state in states],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        for state in states:
            state["step"] += 1

    def _parameter_state(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state, zeros before its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["moment"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        return state

    @staticmethod
    def _scheduled_lr(group: dict, step: int) -> float:
        if group["t_total"] <= 0:
            return group["lr"]
        return group["lr"] * SCHEDULES[group["schedule"]](step / group["t_total"], group["warmup"])

    def first_learning_rate(self) -> float:
        """The first group's rate at its next step, for the log."""
        group = self.param_groups[0]
        steps = [self.state[p]["step"] for p in group["params"] if p in self.state]
        return self._scheduled_lr(group, max(steps, default=0))


def _are_settings(group: dict) -> bool:
    """Whether a group's numbers are finite, and its schedule is one of ours."""
    numbers = [group.get(name) for name in NUMERIC_SETTINGS]
    numbers += group.get("betas", (None,))
    are_finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return are_finite and group["schedule"] in SCHEDULES


def _is_own_state(state: dict, parameter: Tensor) -> bool:
    """Whether a parameter's state is one that BertAdam makes."""
    if state.keys() != {"step", "moment", "square"}:
        return False
    for moment in (state["moment"], state["square"]):
        if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
            return False
    return type(state["step"]) is int and state["step"] >= 0


class GroupedModel(Protocol):
    """What parameter groups depend on; `CLIP4IDC` has it."""

    task: str

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def part_of(self, name: str) -> str | int | None: ...


def parameter_groups(
    model: GroupedModel, lr: float, coef_lr: float, weight_decay: float
) -> list[dict]:
    """The parameters that learn, in up to four groups by learning rate and weight decay.

    The backbone learns at lr·coef_lr and the rest at lr; in adaptation the backbone's parts for
    pairs learn at lr too. Biases, and the weights of BERT's LayerNorms, do not decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = model.part_of(name)
        is_new = part is None or (part == "pair" and model.task == "retrieval")
        has_decay = "bias" not in name and "LayerNorm.weight" not in name
        rate = lr if is_new else lr * coef_lr
        decay = weight_decay if has_decay else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
