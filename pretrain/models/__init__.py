"""The models: clip.py has two towers, vision_language.py a language model that sees; masking.py chooses patches."""
