"""A run as one HTML file: what changed, how it went, and what the model wrote.

    write_report("runs/demo")                                    # runs/demo/report.html
    write_comparison(["runs/a", "runs/b"], "comparison.html")

The file needs no network and no other file. `run_files.py` reads a run, `samples.py` chooses completions, `charts.py`
draws, `page.py` fills the template.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"page": ["write_comparison", "write_report"]}
)
