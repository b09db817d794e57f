"""Where the passes over the examples run: in this process, or on Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.scoring.coverage import Coverage
    from im_lightning.scoring.engine import Plan

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Where:
    """The engine of a scoring; checks its arguments, so that a wrong one is refused before any work.

    Args:
        engine: "local" or "ray".
        ray_address: Of a running Ray cluster.
        ray_workers: Copies of each model on Ray.
        device: What was asked for, of the workers where there are some.

    Raises:
        RequestError: there is no such engine, Ray is not installed, or its arguments do not fit.
    """

    engine: str = "local"
    ray_address: str | None = None
    ray_workers: int | None = None
    device: Any = "auto"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            remedy = f"give one of {', '.join(ENGINES)}"
            raise RequestError(message(f"engine {self.engine!r}", "is not known", remedy))
        if self.engine == "local":
            for name, value in (("ray_address", self.ray_address), ("ray_workers", self.ray_workers)):
                if value is not None:
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise RequestError(message(flag, "the engine is local", "add --engine ray (engine='ray')"))
            return
        if self.ray_workers is not None and self.ray_workers < 1:
            cause = "is less than one worker"
            raise RequestError(message(f"--ray-workers {self.ray_workers}", cause, "give 1 or more"))
        if str(self.device).split(":")[0] not in ("auto", "cpu", "cuda") or ":" in str(self.device):
            cause = "Ray's workers take whichever GPU Ray gives them"
            raise RequestError(message(f"--device {self.device}", cause, "name auto, cpu or cuda"))
        from im_lightning.scoring.ray_engine import check_ray

        check_ray()

    @property
    def device_here(self) -> Any:
        """For what this process computes itself (neighbours): the device asked for, unless only the workers have it."""
        if self.engine == "local" or str(self.device) != "cuda":
            return self.device
        import torch

        return self.device if torch.cuda.is_available() else "auto"

    def execute(self, plan: Plan) -> tuple[ScoreTable, Coverage]:
        """As `engine.execute`; Ray is not started where everything is in the store."""
        from im_lightning.scoring.engine import execute

        if self.engine == "local" or not plan.passes:
            return execute(plan)
        from im_lightning.scoring.ray_engine import ray_engine

        with ray_engine(self.ray_address, self.device, self.ray_workers) as ray:
            return execute(plan, ray.run)

    def estimate(self, plan: Plan) -> list[str]:
        """What the work would take, for a person."""
        from im_lightning.scoring.estimate import describe, estimate

        if self.engine == "local" or not plan.passes:
            return describe(plan, *estimate(plan))
        from im_lightning.scoring.ray_engine import ray_engine

        with ray_engine(self.ray_address, self.device, self.ray_workers) as ray:
            return describe(plan, *ray.estimate(plan))
