"""BertAdam, learning-rate schedules, parameter groups and freezing (SPEC §5)."""

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from modules.clip4idc import CLIP4IDC

if TYPE_CHECKING:
    from modules.clip4idc import CLIP4IDC


TEXT_BLOCK = re.compile(r"clip\.(?:visual\.)?transformer\.resblocks\.(\d+)\.")


NEW_IN_CLIP = (
    "clip.visual.ln_mid.",
    "clip.visual.joint_positional_embedding",
    "clip.visual.bef_embedding",
    "clip.visual.aft_embedding",
)


ALWAYS_TRAINED = NEW_IN_CLIP + (
    "clip.ln_final.",
    "clip.text_projection",
    "clip.logit_scale",
    "clip.visual.ln_post.",
    "clip.visual.proj",
    "clip.visual.conv2.",
)


def warmup_cosine(x: float, warmup: float) -> float:
    """x/warmup, then ½(1 + cos πx); x is the share of all steps already taken."""
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


def warmup_linear(x: float, warmup: float) -> float:
    """x/warmup, then down a line to 0 at x = 1."""
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
    """Adam as BERT trained with it: no bias correction, decay added to the update, each parameter's gradient norm clipped.

    `lr` is the peak rate (groups may bring their own), `warmup` a share of `t_total` steps (−1: none), `betas` and `eps` as in
    Adam. `max_total_norm` first scales all gradients down to that common norm; both clips change the gradients in place. Where that
    norm is not finite nothing moves, and `skipped` counts one more.
    With `bias_correction`, and `max_grad_norm` 0, it is AdamW.
    Parameters without a gradient are left alone, decay included. Raises ValueError for settings out of range.
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
        max_total_norm: float | None = None,
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
        super().__init__(
            params,
            {
                "lr": lr,
                "warmup": warmup,
                "t_total": t_total,
                "schedule": schedule,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            },
        )
        self.max_total_norm, self.bias_correction = max_total_norm, bias_correction
        self.skipped = 0

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's. ValueError where it is not what `state_dict` gave of such an optimizer."""
        names = self.param_groups[0].keys()
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            numbers = (
                group.get("lr"),
                group.get("warmup"),
                group.get("t_total"),
                group.get("eps"),
                group.get("weight_decay"),
                group.get("max_grad_norm"),
                *group.get("betas", (None,)),
            )
            are_finite = all(
                type(number) in (int, float) and math.isfinite(number) for number in numbers
            )
            if group.keys() != names or group["schedule"] not in SCHEDULES or not are_finite:
                raise ValueError("the optimizer's settings in it make no sense")
            for parameter in group["params"]:
                if self.state.get(parameter) and not _is_own_state(
                    self.state[parameter], parameter
                ):
                    raise ValueError("the optimizer's state in it does not fit its parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        limits = [
            group["max_grad_norm"]
            for group, params in zip(self.param_groups, moving, strict=True)
            for _ in params
        ]
        if not self._clip([p.grad for params in moving for p in params], limits):
            self.skipped += 1
            return loss
        for group, params in zip(self.param_groups, moving, strict=True):
            by_step: dict[int, list[Tensor]] = {}
            for p in params:
                by_step.setdefault(self._parameter_state(p)["step"], []).append(p)
            for step, alike in by_step.items():
                self._update(group, alike, self._scheduled_lr(group, step))
        return loss

    def _clip(self, gradients: list[Tensor], limits: list[float]) -> bool:
        """To the common norm, then each to its own limit (0: none), in one pass over the gradients. False, and nothing changed,
        where the common norm is not finite."""
        if not gradients or not (self.max_total_norm or any(limits)):
            return True
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = torch.ones_like(norms)
        if self.max_total_norm:
            total = norms.norm()
            if not total.isfinite():
                return False
            factors = factors * (self.max_total_norm / (total + 1e-6)).clamp(max=1.0)
        limits = norms.new_tensor([limit or math.inf for limit in limits])
        factors = factors * (limits / (norms * factors + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
        return True

    def _update(self, group: dict, params: list[Tensor], rate: float) -> None:
        states = [self.state[p] for p in params]
        # torch's fused AdamW is BertAdam once the bias correction is gone, and at step ∞ it is: 1 − β^∞ = 1.
        steps = [
            torch.full((), float(s["step"]) if self.bias_correction else math.inf, device=p.device)
            for s, p in zip(states, params, strict=True)
        ]
        adamw(
            params,
            [p.grad for p in params],
            [s["moment"] for s in states],
            [s["square"] for s in states],
            [],
            steps,
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

    def _parameter_state(self, parameter: Tensor) -> dict:
        state = self.state[parameter]
        if not state:
            state.update(
                step=0, moment=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
            )
        return state

    @staticmethod
    def _scheduled_lr(group: dict, step: int) -> float:
        if group["t_total"] <= 0:
            return group["lr"]
        return group["lr"] * SCHEDULES[group["schedule"]](step / group["t_total"], group["warmup"])

    def learning_rate(self) -> float:
        """The rate of the first group's next step, for the log."""
        group = self.param_groups[0]
        steps = [self.state[p]["step"] for p in group["params"] if p in self.state]
        return self._scheduled_lr(group, max(steps, default=0))


def _is_own_state(state: dict, parameter: Tensor) -> bool:
    """Whether a parameter's state is one that BertAdam makes."""
    moments = [state.get("moment"), state.get("square")]
    are_tensors = all(
        isinstance(moment, Tensor) and moment.shape == parameter.shape for moment in moments
    )
    return (
        state.keys() == {"step", "moment", "square"}
        and are_tensors
        and type(state["step"]) is int
        and state["step"] >= 0
    )


def parameter_groups(
    model: "CLIP4IDC", lr: float, coef_lr: float, weight_decay: float
) -> list[dict]:
    """The trainable parameters in up to four groups by rate and decay, as the model's stage wants them (SPEC §5, Groups).

    CLIP learns at lr·coef_lr and the rest at lr; in adaptation so do the parts of CLIP that pairs brought. Names that contain
    `bias` or end a BERT `LayerNorm.weight` do not decay. Groups that come out empty are left out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new = not name.startswith("clip.") or (
            model.task == "retrieval" and name.startswith(NEW_IN_CLIP)
        )
        no_decay = "bias" in name or "LayerNorm.weight" in name
        key = (lr if new else lr * coef_lr, 0.0 if no_decay else weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
