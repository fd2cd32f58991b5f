"""`dromos diff`: compare.py measures the distances of two models, heatmap.py draws them."""
