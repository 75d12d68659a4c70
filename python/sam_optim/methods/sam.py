"""SAM and ASAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON, Normalized

from ..core.checks import is_zero
from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.errors import InvalidSettingError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Choice, Maybe, Number, Radius, Setting, handed_on

# The eta of the authors of ASAM (arXiv 2102.11600, section 5).
AUTHORS_ETA = 0.01


class SAM(SharpnessAwareOptimizer):
    """Sharpness-Aware Minimization (Foret et al. 2021, arXiv 2010.01412), and ASAM with ``adaptive``.

    ::

        g  = gradient at w                      e = rho g / |g|                (eq. 2)
        g+ = gradient at w + e                  w <- base_optimizer(w, g+)

    The norm is taken over all parameters together. Weight decay is the base optimizer's and does not enter e. With the
    base optimizer's ``maximize``, in all groups or in some, the steps are those that minimise -f.

    Args:
        params: parameters, (name, parameter) pairs or group dicts. A group may set ``rho``, ``adaptive``, ``eta``, and
            ``perturb=False``, which keeps it out of the perturbation and of the norm (normalisation layers, biases).
            rho may be a tensor of one element on the GPU; captured steps then read it at each replay.
        base_optimizer: class or instance of a torch optimizer.
        rho: radius of the perturbation; at least 0. At 0 in all groups the step is the base optimizer's, bit for bit,
            and takes one pass by ``each_pass()``, ``TrainStep`` and closures for every pass.
        adaptive: False for SAM. True or ``"elementwise"`` for ASAM with T = abs(w) + eta on every parameter, as in the
            SAM packages in use (rho about 2). ``"weights"`` for ASAM as its authors run it: T = abs(w) + eta for
            parameters whose name contains "weight", T = 1 for the others (rho about 0.5); ``params`` must be named
            then, ``model.named_parameters()``.
        eta: added to abs(w) in T; by default 0 for ``"elementwise"`` and 0.01 for ``"weights"``.
        perturb_eps: guards the division by the norm.
        all others: see :class:`SharpnessAwareOptimizer`.

    ASAM: e = rho T^2 g / |T g| (Kwon et al. 2021, arXiv 2102.11600, eq. 6), norm and product elementwise in T.

    Example::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    rho = Radius()
    adaptive: Setting[Adaptive] = Choice(False, True, "elementwise", "weights", per_group=True)
    eta = Maybe(Number(at_least=0, per_group=True))
    perturb = Choice(False, True, per_group=True, default=True, of_groups_only=True)
    perturb_eps = Number(at_least=0, default=NORM_EPSILON)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        adaptive: Adaptive = False,
        *,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "second_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(**handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass()
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    @property
    def _rule(self) -> Normalized:
        return _normalized(self.perturb_eps)

    def _is_plain_step(self) -> bool:
        return all(is_zero(group["rho"]) for group in self._base.param_groups)

    def validate_group(self, group: dict[str, Any]) -> None:
        super().validate_group(group)
        _refuse_unnamed(group)

    def geometry_of(self, group: dict[str, Any]) -> Sequence[float | None]:
        # Needed if one of these has changed; a radius is checked where it is used.
        for name in ("adaptive", "eta", "perturb"):
            self._declared[name].checked(group[name])
        _refuse_unnamed(group)
        count = len(group["params"])
        if not group["adaptive"]:
            return [None] * count
        if group["adaptive"] == "weights":
            eta = AUTHORS_ETA if group["eta"] is None else group["eta"]
            return [eta if "weight" in name else None for name in group["param_names"]]
        return [group["eta"] or 0.0] * count


@lru_cache(maxsize=16)
def _normalized(epsilon: float) -> Normalized:
    """Made only once, since every step asks for it."""
    return Normalized(epsilon=epsilon)


def _refuse_unnamed(group: dict[str, Any]) -> None:
    """Raises :class:`InvalidSettingError` if a group's parameters have no names to choose them by."""
    if group["adaptive"] == "weights":
        names = group.get("param_names") or [entry[0] for entry in group["params"] if isinstance(entry, tuple)]
        if len(names) != len(group["params"]):
            raise InvalidSettingError(
                "adaptive='weights' chooses parameters by their names: pass model.named_parameters() as params"
            )
