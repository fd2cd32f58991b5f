"""The modules of the models: clip.py for FLIP, multimodal.py for SPHINX; masking.py chooses the patches to keep."""
