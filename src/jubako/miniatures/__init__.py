"""Small, really trained models on a captioned world of coloured shapes, and the tools that made them.

`world` and `reader` need no torch: the first draws captioned pictures, the second reads pictures back.
"""
