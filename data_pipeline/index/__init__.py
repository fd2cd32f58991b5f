"""`dromos data index` and `dromos data view`: build.py and build_view.py write the `_index/` folder of a source."""
