"""Merges at many weights: sweep.py writes them in one pass, scored_sweep.py scores them, soup.py finds soups."""
