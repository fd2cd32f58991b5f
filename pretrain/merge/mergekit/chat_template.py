"""`chat_template` of a mergekit file: `auto` (the most frequent one), a known name, or the template itself."""

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


def chosen_template(sources: Sequence[WeightSource], setting: str | None) -> tuple[str | None, list[str]]:
    """Return the output's template (None if the file sets none), and notes. Raises UserError for an unknown name."""
    if setting is None:
        return None, []
    if setting == "auto":
        found = [text.strip() for source in sources if (text := template_of(source))]
        if not found:
            return None, ["chat_template: auto, but no model has a chat template"]
        return Counter(found).most_common(1)[0][0], []
    if "{" in setting:
        return setting, []
    if setting not in KNOWN:
        raise UserError(
            f"chat_template: unknown name {setting!r}; write auto, {', '.join(KNOWN)}, or the Jinja template itself"
        )
    return KNOWN[setting], []


def template_of(source: WeightSource) -> str | None:
    """The chat template of a source, from any of its companions; the default one if there are several."""
    companions = source.companions
    if NAME in companions:
        return read_companion(companions[NAME]).decode("utf-8", "replace")
    for name in ELSEWHERE:
        content = (
            parse_json(read_companion(companions[name]), f"{source.address}: {name}")
            if name in companions
            else None
        )
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):
            found = next(
                (
                    entry.get("template")
                    for entry in found
                    if isinstance(entry, dict) and entry.get("name") == "default"
                ),
                None,
            )
        if isinstance(found, str) and found:
            return found
    return None


def with_template(source: WeightSource, text: str) -> WeightSource:
    """`source` with `text` as its only chat template."""
    companions: dict[str, Path | bytes] = {
        name: c for name, c in source.companions.items() if not name.startswith("chat_template")
    }
    config = companions.get("tokenizer_config.json")
    if config is not None:
        content = parse_json(read_companion(config), f"{source.address}: tokenizer_config.json")
        if isinstance(content, dict) and content.pop("chat_template", None) is not None:
            companions["tokenizer_config.json"] = as_json(content)
    companions[NAME] = text.encode("utf-8")
    return RemappedSource.with_companions(source, companions)
