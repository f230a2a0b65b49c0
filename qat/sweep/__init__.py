"""Sweeps: many runs, each a full one in its own process and folder, and what they say together.

A *point* is a list of overrides and a folder. A sweep (`GridSweep`, `OptunaSweep`, `RaySweep`) says which points there
are, a launcher (`Local`, `Slurm`) says where they run, `run_point` runs one, and `results` reads what they left.
Nothing here knows what is in a config: a point is started as `qat train <overrides>`.

    SWEEP_DIR/sweep.json          what the sweep is; another one is refused
    SWEEP_DIR/points/<n>/         the run of each point, and point.json: its parameters and how it ended
    SWEEP_DIR/cache/              the float models that the points share
    SWEEP_DIR/study.db            Optuna's trials
    SWEEP_DIR/report.{html,png}   the Pareto front, to look at
"""

from qat.sweep.grid import GridSweep
from qat.sweep.launchers import Local, Slurm
from qat.sweep.optuna_sweep import OptunaSweep
from qat.sweep.prune import Dominated
from qat.sweep.ray_sweep import RaySweep

__all__ = ["Dominated", "GridSweep", "Local", "OptunaSweep", "RaySweep", "Slurm"]
