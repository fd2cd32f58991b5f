"""Greedy and uniform soups: the mean of the models whose mean scores best (arXiv 2203.05482, recipe 1).

The greedy recipe scores every model; then, from the best one downwards, it adds each model if the score of the mean
does not get worse. Every mean is computed from the inputs and rounded once, never from another mean. Resumable:
soup.json is published after every score.
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
from pretrain.merge.execute import check_outside_inputs, execute
from pretrain.merge.figures import table
from pretrain.merge.merge_plan import Plan, letter
from pretrain.merge.output.writer import Progress
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.planner import Planner
from pretrain.merge.planning.request import Request
from pretrain.merge.sweeps.scoring import (
    Command,
    Metrics,
    choose_metric,
    format_metric,
    format_metrics,
    score_reporter,
)
from pretrain.merge.sweeps.workspace import LOGS, Workspace, discard

RESULTS = "soup.json"
MAX_TRIAL_NAME = 100  # characters; longer lists of models are named by their count and plan key


@dataclass
class Trial:
    """One mean that was scored.

    members: numbers of the inputs in the mean, ascending; a single one is that model itself.
    plan:    key of its merge plan.
    kept:    True if the recipe continued from this mean; None if it did not decide.
    """

    members: tuple[int, ...]
    plan: str
    metrics: Metrics
    kept: bool | None = None


@dataclass
class Soup:
    """The state and the result of a search.

    inputs:  addresses.
    command: words of the scoring command; empty for a soup without scores.
    metric:  the metric that decides; None before the first score.
    lower:   lower values of that metric are better.
    uniform: True for the mean of all inputs, False for the greedy recipe.
    chosen:  inputs in the soup, in the order in which they were added; empty during the search.
    trials:  every scored mean in order; first each input alone.
    record:  merge.json of the finished soup; not in soup.json.
    """

    inputs: tuple[str, ...]
    command: tuple[str, ...] = ()
    metric: str | None = None
    lower: bool = False
    uniform: bool = False
    chosen: tuple[int, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def trial(self, members: Sequence[int]) -> Trial | None:
        """The trial of a mean, None if it was not scored yet."""
        return next((trial for trial in self.trials if trial.members == tuple(sorted(members))), None)

    def signed_score(self, trial: Trial) -> float:
        """The metric that decides, with the sign that makes more better; -inf if it is not finite."""
        value = trial.metrics.get(self.metric or "")
        return float("-inf") if value is None else -value if self.lower else value

    def plain(self) -> dict[str, Any]:
        """The content of soup.json."""
        return {
            "inputs": {letter(number): address for number, address in enumerate(self.inputs)},
            "command": list(self.command),
            "metric": self.metric,
            "lower_is_better": self.lower,
            "recipe": "uniform" if self.uniform else "greedy",
            "chosen": [letter(number) for number in self.chosen],
            "trials": [
                {"of": list(t.members), "plan": t.plan, "figures": t.metrics, "kept": t.kept}
                for t in self.trials
            ],
        }

    def lines(self) -> list[str]:
        """The inputs, a table with one row per trial, and the chosen models, for the terminal."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.metrics))
        rows = []
        for trial in self.trials:
            cells = [format_metric(trial.metrics.get(name)) for name in names]
            decision = "" if trial.kept is None else "kept" if trial.kept else "dropped"
            rows.append((_letters(trial.members), *cells, decision))
        lines = [f"{letter(number)}  {address}" for number, address in enumerate(self.inputs)]
        if rows:
            lines += table(("mean of", *names, ""), rows)
        return [*lines, f"soup: the mean of {_letters(self.chosen)}"] if self.chosen else lines


def run_soup(
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
    print_line: Callable[[str], None] | None = None,
) -> Soup:
    """Find the soup of the inputs and write it to `out`; resumes where an earlier call stopped.

    request:    a linear merge of the inputs; its weights are ignored.
    uniform:    the mean of all inputs; scored if there is a command.
    out:        a folder on a disk or in a store.
    print_line: receives a line per score.

    During the search, trials and logs are in the folder `OUT.trials`; at the end soup.json and logs are in `out`. If
    `out` is in a store, the trials are in a folder below TMPDIR, because the command needs local files.
    Raises UserError if the command fails (earlier scores are kept), or if `out` holds anything else.
    """
    if command is None and not uniform:
        raise UserError(
            "a greedy soup needs scores: give the scoring command with --score-cmd, or mix all with --uniform"
        )
    if not is_remote(str(out)) and Path(out).name in ("", ".."):
        raise UserError(f"--out {str(out)!r}: give the name of a folder to create")
    check_outside_inputs(str(out), opened)
    if is_remote(str(out)) and "/" not in str(out).rstrip("/").partition("://")[2]:
        raise UserError(f"--out {out}: give a folder in the bucket")
    search = _Search(request, opened, str(out), command, threads, progress, print_line)
    search.check_out()
    with search.workspace:
        soup = search.resume(uniform, metric, lower)
        if search.workspace.remote:  # a store that refuses writes fails here, before hours of scoring
            search.save(soup)
        soup.chosen = tuple(range(opened.inputs)) if uniform else search.greedy(soup)
        if uniform and command is not None:
            search.score(soup, soup.chosen)
        # If this process is killed before `publish`, soup.json shows the next call that `out` belongs to this search.
        search.save(soup)
        records = execute([search.plan(soup.chosen)], opened, [out], threads=threads, progress=progress)
        soup.record = records[0]
        search.publish(soup)
        return soup


class _Search:
    """The plans, trials and results of one search.

    workspace: `OUT.trials`, where the search works.
    finished:  `OUT` itself, which gets soup.json and logs at the end.
    """

    def __init__(
        self,
        request: Request,
        opened: OpenedInputs,
        out: str,
        command: Command | None,
        threads: int | None,
        progress: Progress | None,
        print_line: Callable[[str], None] | None,
    ) -> None:
        self.opened, self.out, self.command = opened, out.rstrip("/"), command
        self._threads, self._progress, self._report = threads, progress, score_reporter(print_line)
        self._planner = Planner(opened.sources, request, opened.named)
        self._fingerprints = [source.hashes() for source in opened.sources]
        key = self.key(range(opened.inputs))
        self.workspace, self.finished = Workspace(f"{self.out}.trials", key), Workspace(self.out, key)

    def plan(self, members: Sequence[int]) -> Plan:
        """The mean of these inputs; the others have weight 0 and are not read."""
        weights = [1.0 / len(members) if i in members else 0.0 for i in range(self.opened.inputs)]
        return self._planner.plan(weights)

    def key(self, members: Sequence[int]) -> str:
        return self.plan(members).key(self._fingerprints)

    def check_out(self) -> None:
        """Raises UserError if `out` holds anything but a soup; checked before anything is written."""
        if any(self._saved()) or not exists(self.out):
            return
        if is_remote(self.out) or not Path(self.out).is_dir() or any(Path(self.out).iterdir()):
            raise UserError(
                f"{self.out} exists and is not the output of a soup; choose another --out, or remove it"
            )

    def _saved(self) -> Iterator[tuple[str, bytes]]:
        """URL and content of each existing soup.json: first of the unfinished search, then of the finished soup."""
        for workspace in (self.workspace, self.finished):
            if (content := workspace.read(RESULTS)) is not None:
                yield join(workspace.url, RESULTS), content

    def resume(self, uniform: bool, metric: str | None, lower: bool | None) -> Soup:
        """The search in soup.json; a new one if there is no file."""
        words = self.command.words if self.command is not None else ()
        inputs = tuple(source.address for source in self.opened.sources[: self.opened.inputs])
        soup = Soup(inputs, words, metric, bool(lower), uniform)
        for url, content in self._saved():
            self._load(soup, url, content, metric, lower)
            break
        return soup

    def _load(self, soup: Soup, url: str, raw: bytes, metric: str | None, lower: bool | None) -> None:
        """Take trials and metric from soup.json. Raises UserError if it belongs to another soup."""
        try:
            content = json.loads(raw)
            words, known, known_lower = (
                tuple(content["command"]),
                content["metric"],
                content["lower_is_better"],
            )
            trials = [Trial(tuple(t["of"]), t["plan"], t["figures"]) for t in content["trials"]]
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{url}: not written by dromos soup; choose another --out, or delete that file"
            ) from None
        if trials and words != soup.command:
            raise UserError(
                f"{url}: was scored by another command, {' '.join(words)}; choose another --out, or delete that "
                "file to score again"
            )
        for trial in trials:
            if max(trial.members) >= self.opened.inputs or trial.plan != self.key(trial.members):
                raise UserError(
                    f"{url}: is a soup of other models or options; choose another --out, or remove it"
                )
        soup.trials, soup.metric = trials, metric or known
        if lower is None and metric in (None, known):
            soup.lower = bool(known_lower)

    def greedy(self, soup: Soup) -> tuple[int, ...]:
        """The inputs that the greedy recipe chooses, in the order in which it adds them."""
        alone = [self.score(soup, (number,)) for number in range(self.opened.inputs)]
        if all(soup.signed_score(trial) == float("-inf") for trial in alone):
            raise UserError(
                f"--score-cmd: no model has a finite {soup.metric}, so none is the best; see "
                f"{self.workspace.folder / LOGS}, and delete {join(self.workspace.url, RESULTS)} to score again"
            )
        order = sorted(range(len(alone)), key=lambda number: (-soup.signed_score(alone[number]), number))
        chosen: tuple[int, ...] = (order[0],)
        best = alone[order[0]]
        best.kept = True
        for number in order[1:]:
            trial = self.score(soup, (*chosen, number))
            trial.kept = soup.signed_score(trial) >= soup.signed_score(best) > float("-inf")
            if trial.kept:
                chosen, best = (*chosen, number), trial
        return chosen

    def score(self, soup: Soup, members: Sequence[int]) -> Trial:
        """The trial of a mean; merges, scores and removes the mean unless an earlier call scored it."""
        trial = soup.trial(members)
        if trial is None:
            assert self.command is not None
            plan, members = self.plan(members), tuple(sorted(members))
            name = "".join(f"-{letter(number)}" for number in members).removeprefix("-")
            if len(name) > MAX_TRIAL_NAME:
                name = f"{len(members)}-models-{plan.key(self._fingerprints)}"
            folder = self.workspace.folder / name
            execute([plan], self.opened, [folder], threads=self._threads, progress=self._progress)
            metrics = self.workspace.score(self.command, folder, name)
            soup.metric = choose_metric(metrics, soup.metric)
            trial = Trial(members, plan.key(self._fingerprints), metrics)
            soup.trials.append(trial)
            self.save(soup)
            discard(folder)
            self._report(f"{_letters(members)}: {format_metrics(metrics)}", soup.metric, soup.lower)
        choose_metric(trial.metrics, soup.metric)
        return trial

    def save(self, soup: Soup) -> None:
        self.workspace.publish(RESULTS, _json(soup))

    def publish(self, soup: Soup) -> None:
        """Publish soup.json and the logs beside the soup, and remove the folder of the trials."""
        source, target = self.workspace, self.finished
        if source.remote:
            with_retries(
                source.url,
                lambda store: _copy_all(store, join(source.url, LOGS), join(target.url, LOGS)),
                to="write",
            )
        elif (source.folder / LOGS).is_dir():
            shutil.copytree(source.folder / LOGS, target.folder / LOGS, dirs_exist_ok=True)
        target.publish(RESULTS, _json(soup))
        source.remove()


def _copy_all(store: Any, source: str, target: str) -> None:
    for path in store.find(source):
        store.cp_file(path, join(target, path.rpartition("/")[2]))


def _json(soup: Soup) -> str:
    return json.dumps(soup.plain(), indent=1) + "\n"


def _letters(members: Sequence[int]) -> str:
    """The letters of inputs: "A C D"."""
    return " ".join(letter(number) for number in members)
