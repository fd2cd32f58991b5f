"""`chat_template` of a mergekit file: the one that most models have, a known one by its name, or the text itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.vocabulary.remapped_source import RemappedSource
from pretrain.weights.companions import as_json, read_companion
from pretrain.weights.folder import parse_json
from pretrain.weights.source import WeightSource

NAME = "chat_template.jinja"
ELSEWHERE = ("tokenizer_config.json", "chat_template.json")
KNOWN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ bos_token if loop.first else '' }}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}


def chosen_template(sources: Sequence[WeightSource], wanted: str | None) -> tuple[str | None, list[str]]:
    """The output's template, None where the file says nothing of it; and notes. UserError for a name not in KNOWN."""
    if wanted is None:
        return None, []
    if wanted == "auto":
        found = [text.strip() for source in sources if (text := template_of(source))]
        if not found:
            return None, ["chat_template: auto, and no model has one"]
        return Counter(found).most_common(1)[0][0], []
    if "{" in wanted:
        return wanted, []
    if wanted not in KNOWN:
        raise UserError(
            f"chat_template: {wanted!r} is not known here; known: auto, {', '.join(KNOWN)}; or write the template "
            "itself, in Jinja"
        )
    return KNOWN[wanted], []


def template_of(source: WeightSource) -> str | None:
    """The chat template beside weights, wherever it stands; of several the default."""
    beside = source.companions
    if NAME in beside:
        return read_companion(beside[NAME]).decode("utf-8", "replace")
    for name in ELSEWHERE:
        content = (
            parse_json(read_companion(beside[name]), f"{source.address}: {name}") if name in beside else None
        )
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):
            found = next(
                (
                    one.get("template")
                    for one in found
                    if isinstance(one, dict) and one.get("name") == "default"
                ),
                None,
            )
        if isinstance(found, str) and found:
            return found
    return None


def with_template(source: WeightSource, text: str) -> WeightSource:
    """`source` with this template and no other beside it."""
    beside: dict[str, Path | bytes] = {
        name: c for name, c in source.companions.items() if not name.startswith("chat_template")
    }
    config = beside.get("tokenizer_config.json")
    if config is not None:
        content = parse_json(read_companion(config), f"{source.address}: tokenizer_config.json")
        if isinstance(content, dict) and content.pop("chat_template", None) is not None:
            beside["tokenizer_config.json"] = as_json(content)
    beside[NAME] = text.encode("utf-8")
    return RemappedSource.beside(source, beside)
