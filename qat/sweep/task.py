"""A sweep about to run: what every point has in common, its folder, and the record of what the sweep is.

Run again, the same command finds its folder and goes on. Whether it is the same is decided by what determines the
points: the common overrides, what varies, the objectives, and what the config files behind them say; not by how many
points, where, or how many at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from qat.errors import UserError
from qat.files import claimed, make_folder, read_object, write_object
from qat.sweep.point import Outcome, Point
from qat.sweep.results import DEFINITION, POINTS, read_point
from qat.sweep.space import Interval, Space

LOCK = ".lock"


@dataclass(frozen=True)
class Task:
    """A sweep as the command line and the config describe it.

    Attributes:
        command: Overrides and options that all points share.
        space: The keys that vary, and their values.
        objectives: Name -> direction, checked.
        metric: Name of the metric, for people; `mode`: whether more (`max`) or less of it is better.
        seed: Seed of the search.
        folder: The sweep's.
        console: Console that progress goes to.
        config: Part of the composed config (`quant`) -> a hash of what it says, in all points.
    """

    command: tuple[str, ...]
    space: Space
    objectives: dict[str, str]
    metric: str
    mode: str
    seed: int
    folder: Path
    console: Console
    config: dict[str, str] = field(default_factory=dict)

    def definition(self, kind: str) -> dict[str, Any]:
        """Definition of the sweep, as plain containers; points are numbered by the order of what varies."""
        space = [[k, vars(v) if isinstance(v, Interval) else v] for k, v in self.space.items()]
        return {
            "kind": kind, "command": list(self.command), "params": space, "objectives": self.objectives,
            "metric": self.metric, "seed": self.seed, "config": self.config,
        }  # fmt: skip

    def point(self, number: int, params: dict[str, str]) -> Point:
        return Point(number, params, self.command, self.folder / POINTS / str(number))

    @contextmanager
    def claimed(self, kind: str) -> Iterator[None]:
        """Holds the folder for this sweep.

        Raises:
            UserError: if another sweep was run there, or with other config files, or this one is running.
        """
        make_folder(self.folder, "sweep.dir")
        with claimed(self.folder / LOCK, f"{self.folder}: a sweep is running in this folder"):
            self._check_same(self.definition(kind))
            yield

    def _check_same(self, mine: dict[str, Any]) -> None:
        path = self.folder / DEFINITION
        if path.is_file():
            theirs = read_object(path)
            changed = [key for key in mine if mine[key] != theirs.get(key)]
            if changed == ["config"]:
                now, then = mine["config"], theirs.get("config") or {}
                parts = [key for key in now | then if now.get(key) != then.get(key)]
                raise UserError(
                    f"{self.folder}: the config files say something else of {', '.join(parts)} than when this sweep "
                    "began; name a folder of its own with sweep.dir=..., or change them back to resume it"
                )
            if changed:
                raise UserError(
                    f"{self.folder} holds another sweep ({', '.join(changed)} differ); "
                    "name a folder of its own with sweep.dir=..., or repeat that sweep's command to resume it"
                )
        write_object(path, mine)

    def announce(self, points: int, more: str) -> None:
        """One line before the first point."""
        self.console.print(f"{points} point{'' if points == 1 else 's'}{more}: {self.folder}")

    def tell(self, point: Point, outcome: Outcome, left: int) -> None:
        """One line for each point that ended."""
        values = read_point(point.folder).values
        said = "  ".join(f"{name} {values[name]:.4g}" for name in self.objectives if name in values)
        if outcome.state != "done":
            said = "pruned" if outcome.state == "pruned" else f"[red]failed: {escape(str(outcome.error))}[/]"
        head = f"[bold]{point.number}[/]  {escape(point.label)}"
        self.console.print(f"{head}  {said}  [dim]({left} to go)[/]", soft_wrap=True)
