"""`dromos export`: write_folder.py writes trained weights as a folder that open_clip or transformers loads."""
