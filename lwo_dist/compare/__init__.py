"""`lwo-dist compare`: methods side by side, on the same start, data and batches.

design      which runs a comparison consists of, and their configs
rates       the search for a method's learning rate
child       one run in a process of its own, on Ray or without it
comparison  does the runs in order, and goes on after a stop
readings    what is read from the runs: rows, differences, the time to reach a loss
page        the page for people; the pictures are in `lwo_dist.report.comparison`, the
            parent run in MLflow is in `lwo_dist.tracking.parent`
"""

from .comparison import Comparison, compare
from .design import Design, Variant, read_variants

__all__ = ["Comparison", "Design", "Variant", "compare", "read_variants"]
