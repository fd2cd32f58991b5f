"""Model soups: the mean of those models whose mean scores best, found greedily (arXiv 2203.05482, recipe 1).

Every model is scored by itself; from the best one downwards each is added if the score of the mean does not drop.
Every mean is computed from the inputs and rounded once, never from a mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.files import exists, is_remote, join
from data_pipeline.storage.object_store import with_retries
from pretrain.merge.execute import check_apart, execute
from pretrain.merge.figures import table
from pretrain.merge.merge_plan import Plan, letter
from pretrain.merge.output.writer import Progress
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.planner import Planner
from pretrain.merge.planning.request import Request
from pretrain.merge.sweeps.scoring import Command, Figures, metric_of, telling
from pretrain.merge.sweeps.workspace import LOGS, Workplace, discard

RESULTS = "soup.json"


@dataclass
class Trial:
    """One mean that was scored.

    of:      inputs in it, by number, ascending; a single one is that model itself.
    plan:    key of its merge.
    kept:    whether the soup went on from it; None while that is open.
    """

    of: tuple[int, ...]
    plan: str
    figures: Figures
    kept: bool | None = None


@dataclass
class Soup:
    """The search as far as it went.

    inputs:  addresses.
    chosen:  inputs in the soup, in the order in which they were added; empty while it is not known.
    trials:  every mean scored, in order; first each input by itself.
    record:  of the soup when it is merged; not in soup.json.
    """

    inputs: tuple[str, ...]
    command: tuple[str, ...] = ()
    metric: str | None = None
    lower: bool = False
    uniform: bool = False
    chosen: tuple[int, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def trial(self, of: Sequence[int]) -> Trial | None:
        return next((trial for trial in self.trials if trial.of == tuple(sorted(of))), None)

    def worth(self, trial: Trial) -> float:
        """Of the figure that decides, more is better; what is not finite is worst."""
        value = trial.figures.get(self.metric or "")
        return float("-inf") if value is None else -value if self.lower else value

    def plain(self) -> dict[str, Any]:
        """As soup.json has it."""
        return {
            "inputs": {letter(number): address for number, address in enumerate(self.inputs)},
            "command": list(self.command),
            "metric": self.metric,
            "lower_is_better": self.lower,
            "recipe": "uniform" if self.uniform else "greedy",
            "chosen": [letter(number) for number in self.chosen],
            "trials": [
                {"of": list(t.of), "plan": t.plan, "figures": t.figures, "kept": t.kept} for t in self.trials
            ],
        }

    def lines(self) -> list[str]:
        """Every trial in a row, and what came out."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.figures))
        rows = []
        for trial in self.trials:
            cells = [_shown(trial.figures.get(name)) for name in names]
            mark = "" if trial.kept is None else "kept" if trial.kept else "dropped"
            rows.append((_marks(trial.of), *cells, mark))
        shown = table(("mean of", *names, ""), rows) if rows else []
        shown = [f"{letter(number)}  {address}" for number, address in enumerate(self.inputs)] + shown
        return [*shown, f"soup: the mean of {_marks(self.chosen)}"] if self.chosen else shown


def find_soup(
    request: Request,
    opened: OpenedInputs,
    out: Path | str,
    command: Command | None = None,
    *,
    uniform: bool = False,
    metric: str | None = None,
    lower: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Soup:
    """Find the soup of the inputs and write it to `out`; goes on where an earlier call stopped.

    request: a linear merge of the inputs; its weights are not looked at.
    uniform: the mean of all; scored if there is a command.
    out:     a folder on a disk, or in a store.
    While it searches, trials and logs are in the folder `OUT.trials`; at the end soup.json and logs are in `out`. Of an
    `out` in a store the trials, which the command needs on a disk, are in a folder below TMPDIR.
    Raises UserError when the command fails on one (what was scored stays), and for an `out` with something else.
    """
    if command is None and not uniform:
        raise UserError("a greedy soup needs scores: say how with --score-cmd, or take all with --uniform")
    if not is_remote(str(out)) and Path(out).name in ("", ".."):
        raise UserError(f"--out {str(out)!r}: name the folder that is to be made")
    check_apart(str(out), opened)
    if is_remote(str(out)) and "/" not in str(out).rstrip("/").partition("://")[2]:
        raise UserError(f"--out {out}: name a folder in the bucket")
    search = _Search(request, opened, str(out), command, threads, progress, told)
    search.check_place()
    with search.place:
        soup = search.resume(uniform, metric, lower)
        if search.place.remote:  # one that may not be written is found before hours of scoring
            search.save(soup)
        soup.chosen = tuple(range(opened.inputs)) if uniform else search.greedy(soup)
        if uniform and command is not None:
            search.score(soup, soup.chosen)
        search.save(soup)  # else a kill before `publish` leaves an `out` that nobody knows
        made = execute([search.plan(soup.chosen)], opened, [out], threads=threads, progress=progress)
        soup.record = made[0]
        search.publish(soup)
        return soup


class _Search:
    """What a search works with: plans of means, and the folder of its trials."""

    def __init__(
        self,
        request: Request,
        opened: OpenedInputs,
        out: str,
        command: Command | None,
        threads: int | None,
        progress: Progress | None,
        told: Callable[[str], None] | None,
    ) -> None:
        self.opened, self.out, self.command = opened, out.rstrip("/"), command
        self._threads, self._progress, self._tell = threads, progress, telling(told)
        self._planner = Planner(opened.sources, request, opened.named)
        self._prints = [source.hashes() for source in opened.sources]
        key = self.key(range(opened.inputs))
        self.place, self._done = Workplace(f"{self.out}.trials", key), Workplace(self.out, key)

    def plan(self, of: Sequence[int]) -> Plan:
        """The mean of these inputs alone; the others are not read."""
        weights = [1.0 / len(of) if i in of else 0.0 for i in range(self.opened.inputs)]
        return self._planner.plan(weights)

    def key(self, of: Sequence[int]) -> str:
        return self.plan(of).key(self._prints)

    def check_place(self) -> None:
        """Before anything is written: UserError where `out` cannot be had."""
        if any(self._known()) or not exists(self.out):
            return
        if is_remote(self.out) or not Path(self.out).is_dir() or any(Path(self.out).iterdir()):
            raise UserError(
                f"{self.out} exists and is not the output of a soup; choose another --out, or remove it"
            )

    def _known(self) -> Iterator[tuple[str, bytes]]:
        """soup.json of the trials, or of what is done: its address and content."""
        for place in (self.place, self._done):
            if (content := place.read(RESULTS)) is not None:
                yield join(place.url, RESULTS), content

    def resume(self, uniform: bool, metric: str | None, lower: bool | None) -> Soup:
        """The search as soup.json knows it."""
        words = self.command.words if self.command is not None else ()
        inputs = tuple(source.address for source in self.opened.sources[: self.opened.inputs])
        soup = Soup(inputs, words, metric, bool(lower), uniform)
        for url, content in self._known():
            self._take(soup, url, content, metric, lower)
            break
        return soup

    def _take(self, soup: Soup, url: str, raw: bytes, metric: str | None, lower: bool | None) -> None:
        try:
            content = json.loads(raw)
            words, known, less = tuple(content["command"]), content["metric"], content["lower_is_better"]
            trials = [Trial(tuple(t["of"]), t["plan"], t["figures"]) for t in content["trials"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{url}: not what a soup writes; choose another --out, or delete that file"
            ) from None
        if trials and words != soup.command:
            raise UserError(
                f"{url}: scored by another command, {' '.join(words)}; choose another --out, or delete it"
            )
        for trial in trials:
            if max(trial.of) >= self.opened.inputs or trial.plan != self.key(trial.of):
                raise UserError(f"{url}: of other models or options; choose another --out, or remove it")
        soup.trials, soup.metric = trials, metric or known
        if lower is None and metric in (None, known):
            soup.lower = bool(less)

    def greedy(self, soup: Soup) -> tuple[int, ...]:
        """The greedy recipe."""
        alone = [self.score(soup, (number,)) for number in range(self.opened.inputs)]
        if all(soup.worth(trial) == float("-inf") for trial in alone):
            raise UserError(
                f"--score-cmd: of no model is {soup.metric} a finite number, so none is the best; see "
                f"{self.place.folder / LOGS}, and delete {join(self.place.url, RESULTS)} to score again"
            )
        order = sorted(range(len(alone)), key=lambda number: (-soup.worth(alone[number]), number))
        chosen: tuple[int, ...] = (order[0],)
        best = alone[order[0]]
        best.kept = True
        for number in order[1:]:
            trial = self.score(soup, (*chosen, number))
            trial.kept = soup.worth(trial) >= soup.worth(best) > float("-inf")
            if trial.kept:
                chosen, best = (*chosen, number), trial
        return chosen

    def score(self, soup: Soup, of: Sequence[int]) -> Trial:
        """The trial of a mean, scored now if it was not before."""
        found = soup.trial(of)
        if found is None:
            assert self.command is not None
            plan, of = self.plan(of), tuple(sorted(of))
            name = "".join(f"-{letter(number)}" for number in of).removeprefix("-")
            if len(name) > 100:
                name = f"{len(of)}-models-{plan.key(self._prints)}"
            trial = self.place.folder / name
            execute([plan], self.opened, [trial], threads=self._threads, progress=self._progress)
            figures = self.place.score(self.command, trial, name)
            soup.metric = metric_of(figures, soup.metric)
            found = Trial(of, plan.key(self._prints), figures)
            soup.trials.append(found)
            self.save(soup)
            discard(trial)
            listed = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
            self._tell(f"{_marks(of)}: {listed}", soup.metric, soup.lower)
        metric_of(found.figures, soup.metric)
        return found

    def save(self, soup: Soup) -> None:
        self.place.publish(RESULTS, _json(soup))

    def publish(self, soup: Soup) -> None:
        """The results beside the soup; the trials' folder goes."""
        trials, done = self.place, self._done
        if trials.remote:
            with_retries(
                trials.url,
                lambda store: _copy_all(store, join(trials.url, LOGS), join(done.url, LOGS)),
                to="write",
            )
        elif (trials.folder / LOGS).is_dir():
            shutil.copytree(trials.folder / LOGS, done.folder / LOGS, dirs_exist_ok=True)
        done.publish(RESULTS, _json(soup))
        trials.remove()


def _copy_all(store: Any, source: str, target: str) -> None:
    for path in store.find(source):
        store.cp_file(path, join(target, path.rpartition("/")[2]))


def _json(soup: Soup) -> str:
    return json.dumps(soup.plain(), indent=1) + "\n"


def _marks(of: Sequence[int]) -> str:
    return " ".join(letter(number) for number in of)


def _shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.6g}"
