"""The model card (README.md) of a merge: front matter for the Hugging Face hub, formula, inputs, notes and spec."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan, letter
from pretrain.merge.planning.describe import formula
from pretrain.merge.planning.output_layout import SHARD_SIZE
from pretrain.weights.origins import CARD_LIMIT, FRONT_MATTER
from pretrain.weights.source import WeightSource

NAME = "README.md"
HUB = "hf://"
LISTED_FILES = 30  # merge.json has all files

LOAD_CODE = {
    "transformers": """import transformers

model = transformers.CLASS.from_pretrained("PATH")
tokenizer = transformers.AutoTokenizer.from_pretrained("PATH")""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH")
tokenizer = open_clip.get_tokenizer("local-dir:PATH")""",
    "open_clip weights": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("ARCHITECTURE", pretrained="PATH/FILE")""",
    "safetensors": """from safetensors.torch import load_file

weights = load_file("PATH/FILE")""",
}


def card(plan: Plan, sources: Sequence[WeightSource], record: Mapping[str, Any]) -> bytes:
    """README.md of the output that `record` (merge.json) describes; the same merge has the same card."""
    mixed = sum(job.treatment == "mixed" for job in plan.jobs)
    parts = [
        f"---\n{yaml.safe_dump(front_matter(plan, sources), sort_keys=False, allow_unicode=True)}---",
        f"# {_title(plan, sources)}",
        f"Merged with Dromos {record.get('dromos', '')}: {mixed} tensors mixed, {len(plan.jobs) - mixed} copied.",
        "    theta = " + formula(plan),
        _inputs(plan, sources, record),
        _notes(plan),
        _how_computed(plan),
        f"## Load\n\n```python\n{_load(plan)}\n```",
        "`merge.json` has the digests of every tensor and the whole plan; `dromos verify PATH` checks them, and "
        "recomputes parts of the weights if the inputs are available.",
        _spec(plan),
        _files(record),
    ]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def front_matter(plan: Plan, sources: Sequence[WeightSource]) -> dict[str, Any]:
    """base_model, library, licence (only if all inputs state the same one) and tags, under the hub's keys."""
    matter: dict[str, Any] = {}
    names = sorted({name.removeprefix(HUB) for s in sources for name in _hub_names(s)})
    if names:
        matter |= {"base_model": names, "base_model_relation": "merge"}
    if (library := _library(plan)) != "safetensors":
        matter["library_name"] = library
    licences = {_licence(source) for source in sources}
    if len(licences) == 1 and (licence := licences.pop()):
        matter["license"] = licence
    return matter | {"tags": ["merge", "dromos"]}


def _hub_names(source: WeightSource) -> set[str]:
    """The input's own hub name, or those of its ancestors."""
    if source.address.startswith(HUB):
        return {source.address.partition("@")[0]}
    return {name for name in source.lineage if name.startswith(HUB)}


def _licence(source: WeightSource) -> str | None:
    folder = source.folder
    if folder is None or NAME not in folder:
        return None
    try:
        match = FRONT_MATTER.match(folder.bytes(NAME, CARD_LIMIT))
        matter: Any = yaml.safe_load(match[1].decode("utf-8", "replace")) if match else None
    except (UserError, yaml.YAMLError, RecursionError, ValueError):
        return None
    licence = matter.get("license") if isinstance(matter, dict) else None
    return licence if isinstance(licence, str) else None


def _library(plan: Plan) -> str:
    if "open_clip_config.json" in plan.companions:
        return "open_clip"
    return "transformers" if "model_type" in _config(plan) else "safetensors"


def _config(plan: Plan) -> dict[str, Any]:
    config = plan.companions.get("config.json", b"{}")
    content = json.loads(config if isinstance(config, bytes) else config.read_bytes())
    return content if isinstance(content, dict) else {}


def _load(plan: Plan) -> str:
    """Python code that loads the output."""
    library, config = _library(plan), _config(plan)
    names = [job.name for job in plan.jobs]
    if library == "safetensors" and "logit_scale" in names and any(n.startswith("visual.") for n in names):
        library = "open_clip weights"
    classes = config.get("architectures") or ["AutoModel"]
    known = isinstance(classes, list) and isinstance(classes[0], str) and classes[0].isidentifier()
    code = LOAD_CODE[library].replace("FILE", plan.files[0].name)
    code = code.replace("CLASS", classes[0] if known and "auto_map" not in config else "AutoModel")
    if library == "transformers" and not any(name.startswith("tokenizer") for name in plan.companions):
        code = code.rpartition("\n")[0]
    return code


def _spec(plan: Plan) -> str:
    """The spec that reproduces the merge with `dromos merge --spec`; the mergekit file if the merge came from one."""
    spec, command = plan.request, ""
    if "mergekit" in spec:
        flags = f" --seed {spec['seed']}" if spec.get("seed") else ""
        if spec["max_shard_size"] != SHARD_SIZE:
            flags += f" --max-shard-size {spec['max_shard_size']}"
        command = f"A mergekit file; `dromos merge --spec FILE{flags} --out DIR` reproduces this merge.\n\n"
        spec = spec["mergekit"]
    text = yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"## Spec\n\n{command}{fence}yaml\n{text}{fence}"


def _title(plan: Plan, sources: Sequence[WeightSource]) -> str:
    names = [Path(source.address.removeprefix(HUB)).name for source in sources[: plan.inputs]]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"Merge of {shown}"


def _inputs(plan: Plan, sources: Sequence[WeightSource], record: Mapping[str, Any]) -> str:
    """A table with one row per source: address, step, weight and digests."""
    rows = ["| | from | weight | files |", "|---|---|---|---|"]
    used = {term.source for job in plan.jobs for term in job.reads}
    for number, (source, entry) in enumerate(zip(sources, record.get("inputs", []), strict=False)):
        weight = _weight(plan, number)
        step = f", step {source.located.step}" if source.located.step is not None else ""
        files = list((entry.get("files") or {}).items())
        listed = "<br>".join(f"{_cell(name)} {digest}" for name, digest in files[:4])
        more = f"<br>and {len(files) - 4} more" if len(files) > 4 else ""
        if number not in used:
            weight = f"{weight} (not read)" if number < plan.inputs else "config only"
        rows.append(f"| {letter(number)} | `{_cell(source.address)}`{step} | {weight} | {listed}{more} |")
    return "\n".join(rows)


def _weight(plan: Plan, number: int) -> str:
    """The weight of a source, and its range over the tensors if rules change it."""
    mixing = [job for job in plan.jobs if job.treatment == "mixed"]
    if any(job.base is not None and job.base.source == number for job in mixing):
        return "base"
    per_job = [[term.weight for term in job.terms if term.source == number] for job in mixing]
    seen = {weight for weights in per_job for weight in weights or [0.0]}
    if number < len(plan.weights):
        weight = plan.weights[number]
        others = f", {min(seen):.4g} to {max(seen):.4g} by rule" if seen - {weight} else ""
        return f"{weight:.10g}{others}"
    if not any(per_job):
        return "copied from"
    return f"{min(seen):.10g}" + (f" to {max(seen):.10g} by tensor" if len(seen) > 1 else "")


def _notes(plan: Plan) -> str:
    return "\n".join(f"- {note}" for note in plan.notes)


def _how_computed(plan: Plan) -> str:
    if plan.method != "linear":
        return f"Method: {plan.method}. Weights are computed in fp64; the result is rounded once, to nearest even."
    text = "Weights are fp64, rounded once to the accumulation type (fp32 for 16-bit inputs, fp64 for wider ones); "
    text += (
        "each product is rounded, then added in the order above, without FMA; one rounding to nearest even."
    )
    if plan.inputs == 2:
        text += (
            " Dromos' beta is the weight of the first input; t of other tools is the weight of the second."
        )
    return text


def _files(record: Mapping[str, Any]) -> str:
    written = list(record.get("output", {}).items())
    rows = [f"| `{name}` | {entry['size']:,} | {entry['digest']} |" for name, entry in written[:LISTED_FILES]]
    more = [f"| and {len(written) - LISTED_FILES} more | | |"] if len(written) > LISTED_FILES else []
    return "\n".join(["## Files", "", "| file | bytes | digest |", "|---|---|---|", *rows, *more])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
